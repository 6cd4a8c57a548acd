"""Losses of a classifier: cross-entropy, token labels, and distillation from a teacher."""
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.loss import SoftTargetCrossEntropy
from torch import nn


class Criterion:
    """The training loss of a classifier: mixes the batch, calls the network, and compares in float32.

    Args:
        loss: (logits, targets) -> scalar; a tuple of logits where the network returns one in training.
        mixup: timm's mixup and cutmix, or one for targets that are not class indices; None for none.
        sees_images: Give the loss the images too.
    """

    def __init__(self, loss: nn.Module, mixup: Callable | None = None, sees_images: bool = False):
        self.loss, self.mixup, self.sees_images = loss, mixup, sees_images

    def __call__(self, network: nn.Module, images: torch.Tensor, targets: Any) -> torch.Tensor:
        """(B, 3, H, W) images and their targets -> scalar."""
        if self.mixup is not None:
            images, targets = self.mixup(images, targets)
        outputs = network(images)
        logits = tuple(x.float() for x in outputs) if isinstance(outputs, tuple) else outputs.float()
        return self.loss(logits, targets, images) if self.sees_images else self.loss(logits, targets)


def balanced_weights(counts: Sequence[int]) -> torch.Tensor:
    """(classes,) a weight for each class, inverse to its number of images; 0 where there is none.

    The mean over all images is 1, as in scikit-learn's "balanced": the learning rate keeps its meaning.
    """
    images = torch.tensor(counts, dtype=torch.float64)
    held = (images > 0).sum()
    return torch.where(images > 0, images.sum() / (held * images.clamp(min=1)), 0).float()


class ClassWeightedCrossEntropy(nn.Module):
    """Mean over the images of their cross-entropy, in which each class has a weight, whether targets are mixed or not.

    torch's own divides by the weights of a batch, where targets are indices: a batch of one class would have none.
    """

    def __init__(self, weight: torch.Tensor, label_smoothing: float = 0.0):
        """`weight`: (classes,). `label_smoothing`: for targets that are class indices."""
        super().__init__()
        self.register_buffer("weight", weight)
        self.label_smoothing = label_smoothing

    def forward(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """(B, classes) logits, (B,) class indices or (B, classes) probabilities -> scalar."""
        smoothing = 0.0 if targets.is_floating_point() else self.label_smoothing
        losses = F.cross_entropy(logits, targets, self.weight, reduction="none", label_smoothing=smoothing)
        return losses.mean()


class TokenLabelLoss(nn.Module):
    """Cross-entropy of the image, plus `weight` times the mean cross-entropy of its tokens.

    Jiang et al., "All Tokens Matter", https://arxiv.org/abs/2104.10858, where the weight is 0.5.
    """

    def __init__(self, weight: float = 0.5):
        super().__init__()
        self.loss = SoftTargetCrossEntropy()
        self.weight = weight

    def forward(
        self, logits: tuple[torch.Tensor, torch.Tensor], targets: tuple[torch.Tensor, torch.Tensor]
    ) -> torch.Tensor:
        """Logits and targets of images, (B, classes), and of their tokens, (B, h, w, classes) -> scalar."""
        of_image, of_tokens = (self.loss(x, target) for x, target in zip(logits, targets, strict=True))
        return of_image + self.weight * of_tokens


class Renormalize(nn.Module):
    """Images that were normalised with one mean and standard deviation, as if normalised with others."""

    def __init__(
        self, mean: Sequence[float], std: Sequence[float], other_mean: Sequence[float], other_std: Sequence[float]
    ):
        super().__init__()
        mean, std, other_mean, other_std = (
            torch.tensor(x).view(1, -1, 1, 1) for x in (mean, std, other_mean, other_std)
        )
        self.register_buffer("scale", std / other_std)
        self.register_buffer("shift", (mean - other_mean) / other_std)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W) -> (B, 3, H, W)."""
        return images * self.scale + self.shift


class DistillationLoss(nn.Module):
    """(1 - alpha) * the loss on the labels + alpha * the distance to a teacher's prediction.

    "soft": KL divergence at a temperature (Hinton et al., https://arxiv.org/abs/1503.02531), times temperature ** 2.
    "hard": cross-entropy to the teacher's class (DeiT, Touvron et al., https://arxiv.org/abs/2012.12877).

    Args:
        loss: The loss on the labels.
        teacher: Classifier with the student's classes; put into eval mode, never trained.
        kind: "soft" or "hard".
        alpha: Weight of the teacher, 0 to 1.
        temperature: Divides the logits of both, for "soft".
        images: The student's images -> the teacher's; by default they are the same.
    """

    def __init__(
        self,
        loss: nn.Module,
        teacher: nn.Module,
        kind: str,
        alpha: float = 0.5,
        temperature: float = 1.0,
        images: nn.Module | None = None,
    ):
        super().__init__()
        if kind not in ("soft", "hard"):
            raise ValueError(f"kind must be 'soft' or 'hard', got {kind!r}")
        self.loss = loss
        self.teacher = teacher.eval().requires_grad_(False)
        self.kind = kind
        self.alpha = alpha
        self.temperature = temperature
        self.images = images or nn.Identity()

    def forward(self, logits: torch.Tensor, targets: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
        """(B, classes) logits, targets as the label loss takes them, (B, 3, H, W) images -> scalar."""
        with torch.no_grad():
            teacher_logits = self.teacher(self.images(images))
        if self.kind == "hard":
            distance = F.cross_entropy(logits, teacher_logits.argmax(dim=1))
        else:
            log_student = F.log_softmax(logits.float() / self.temperature, dim=1)
            log_teacher = F.log_softmax(teacher_logits.float() / self.temperature, dim=1)
            distance = F.kl_div(log_student, log_teacher, reduction="batchmean", log_target=True)
            distance = distance * self.temperature**2
        return (1 - self.alpha) * self.loss(logits, targets) + self.alpha * distance
