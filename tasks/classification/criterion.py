"""The loss that the settings of a run ask for."""
from typing import Any

import torch
from timm.data.mixup import Mixup
from torch import nn

from ..networks import model_data_config
from . import losses, token_labels
from .losses import Criterion
from .options import TOKEN_STRIDE, ClassificationSettings


def create_criterion(
    settings: ClassificationSettings,
    num_classes: int,
    class_counts: list[int] | None,
    teacher: nn.Module | None,
    device: torch.device,
) -> Criterion:
    """The training loss: of token labels, or cross-entropy with mixup, class weights and a teacher as asked for.

    Args:
        settings: The run's.
        num_classes: Of the network.
        class_counts: Training images of each class, by which classes are weighed; None where they are not.
        teacher: A network to learn from; None for none.
        device: Where it is computed.
    """
    options = settings.augmentation
    mixing = dict(prob=options.mixup_prob, switch_prob=options.mixup_switch_prob)
    if settings.token_label.token_label:
        return _of_token_labels(settings, num_classes, mixing)
    mixup = None
    if options.mixup or options.cutmix:
        mixup = Mixup(
            options.mixup, options.cutmix, label_smoothing=options.smoothing, num_classes=num_classes, **mixing
        )
    # Mixup has smoothed its targets already.
    smoothing = 0.0 if mixup else options.smoothing
    loss = nn.CrossEntropyLoss(label_smoothing=smoothing)
    if class_counts is not None:
        weights = losses.balanced_weights(class_counts + [0] * (num_classes - len(class_counts)))
        loss = losses.ClassWeightedCrossEntropy(weights.to(device), smoothing)
    if teacher is not None:
        return Criterion(_distillation(settings, loss, teacher).to(device), mixup, sees_images=True)
    return Criterion(loss, mixup)


def _of_token_labels(settings: ClassificationSettings, num_classes: int, mixing: dict[str, Any]) -> Criterion:
    options, weight = settings.augmentation, settings.token_label.token_label_weight
    loss = losses.TokenLabelLoss(**({} if weight is None else dict(weight=weight)))
    mixup = token_labels.TokenLabelMixup(
        num_classes, options.smoothing, TOKEN_STRIDE, options.mixup, options.cutmix, **mixing
    )
    return Criterion(loss, mixup)


def _distillation(settings: ClassificationSettings, loss: nn.Module, teacher: nn.Module) -> losses.DistillationLoss:
    options = settings.distillation
    own, teachers = model_data_config(settings.model.model), model_data_config(options.teacher_model)
    return losses.DistillationLoss(
        loss,
        teacher,
        options.distillation_type,
        options.distillation_alpha,
        options.distillation_tau,
        images=losses.Renormalize(own["mean"], own["std"], teachers["mean"], teachers["std"]),
    )
