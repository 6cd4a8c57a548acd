"""Image classification, as `training.task.Task` asks for it."""
from typing import Any, ClassVar

import torch
from timm.data import create_transform
from timm.data.loader import fast_collate
from timm.data.mixup import Mixup
from timm.layers import to_2tuple
from torch.utils.data import Dataset

import datasets
from training.data.loader import EpochLoader, build_loader
from training.distributed import Distributed
from training.precision import Precision
from training.task import Task
from utils import UsageError

from .. import networks
from . import losses, token_labels
from .errors import ADVICE, NoTokenHeadError, TeacherClassesError, TooFewClassesError, UnknownPolicyError
from .images import ImagePipeline
from .losses import Criterion
from .metrics import Accuracy
from .options import TOKEN_STRIDE, ClassificationSettings

Batch = tuple[torch.Tensor, torch.Tensor | token_labels.TokenTargets]


def check_policy(policy: str):
    """Raises UnknownPolicyError where timm knows no such augmentation policy."""
    try:
        # With timm's defaults for all else, nothing but the policy can be at fault.
        create_transform(is_training=True, auto_augment=policy)
    except (AssertionError, KeyError, ValueError) as error:
        raise UnknownPolicyError(f"{policy}: timm does not know this augmentation policy ({error})") from error


class ClassificationTask(Task):
    """Trains and evaluates any classifier of timm's, on folders of images, CIFAR, digits or shards."""

    settings_class = ClassificationSettings
    metrics: ClassVar[dict[str, bool]] = dict(acc1=True, acc5=True, loss=False)
    advice = ADVICE
    settings: ClassificationSettings

    def __init__(self, settings: ClassificationSettings, distributed: Distributed, precision: Precision):
        super().__init__(settings, distributed, precision)
        model, augmentation = self.settings.model, self.settings.augmentation
        self.images = ImagePipeline(model.model, model.input_size, augmentation.crop_pct)
        self.criterion: Criterion | None = None
        # Training images of each class, where the loss weighs classes by them.
        self.class_counts: list[int] | None = None

    @classmethod
    def check_names(cls, settings: ClassificationSettings):
        networks.check_model(settings.model.model)
        if settings.distillation.teacher_model:
            networks.check_model(settings.distillation.teacher_model)

    # --- data ---------------------------------------------------------------------------------------------------------

    def dataset(self, split: str) -> Dataset:
        """(uint8 image, class index), or with token labels what `token_labels.add_label_maps` makes of it."""
        data, train = self.settings.data, split == "train"
        dataset = datasets.build_dataset(
            data.data_set,
            data.data_path,
            split,
            self._train_transform() if train else self.images.transform(),
            on_error="raise" if not data.skip_bad_images else "next" if train else "mask",
            download=data.download,
            shard_cache=datasets.ShardCache(data.shard_cache, data.shard_cache_gb),
            most_classes=self.settings.model.nb_classes or networks.pretrained_num_classes(self.name),
        )
        if self.classes is not None:
            datasets.check_same_classes(self.classes, dataset.classes)
        self.classes = self.classes or dataset.classes
        self.num_classes = self.num_classes or self._count_classes(dataset)
        if train and self.settings.augmentation.class_weights == "balanced":
            self.class_counts = dataset.class_counts()
        if train and self.settings.token_label.token_label:
            root = self.settings.token_label.token_label
            return token_labels.add_label_maps(dataset, root, self.num_classes, TOKEN_STRIDE)
        return dataset

    def _train_transform(self) -> datasets.Transform:
        options = self.settings.augmentation
        policy = None if options.aa == "none" else options.aa
        if policy is not None:
            check_policy(policy)
        return self.images.transform(
            train=True,
            interpolation=options.train_interpolation,
            scale=tuple(options.scale),
            ratio=tuple(options.ratio),
            hflip=options.hflip,
            color_jitter=options.color_jitter,
            auto_augment=policy,
        )

    def _count_classes(self, dataset: datasets.ImageDataset) -> int | None:
        """Classes of the model; None, for the model's own number, where neither the settings nor the data set know."""
        asked, held = self.settings.model.nb_classes, dataset.num_classes
        if asked is not None and held is not None and asked < held:
            raise TooFewClassesError(f"{asked} classes were asked for, fewer than the {held} that the data holds")
        return asked or held

    def loader(self, dataset: Dataset, train: bool) -> EpochLoader:
        if not train:
            return self.images.loader(dataset, self.settings.loader, self.eval_processes)
        options = self.settings.augmentation
        return build_loader(
            dataset,
            self.settings.loader,
            self.distributed,
            train=True,
            seed=self.settings.machine.seed,
            repeats=3 if options.repeated_aug else 1,
            collate_fn=token_labels.collate if self.settings.token_label.token_label else fast_collate,
            transfer=self.images.on_device(self.distributed, re_prob=options.reprob, re_mode=options.remode),
        )

    # --- network ------------------------------------------------------------------------------------------------------

    def network(self) -> torch.nn.Module:
        settings = self.settings
        training = not settings.evaluation.eval
        if not training and settings.model.load_release and self.num_classes is not None:
            networks.check_pretrained_classes(self.name, self.num_classes)
        network = self._build(self._model_kwargs(training))
        if settings.model.grad_checkpointing:
            network.set_grad_checkpointing()
        if training:
            if settings.checkpoint.finetune:
                source, key = settings.checkpoint.finetune, settings.checkpoint.model_key
                networks.load_from(network, source, key, new_classifier=True)
            if settings.model.freeze_backbone:
                networks.freeze_backbone(network)
            self.num_classes = network.num_classes
            self.criterion = self._criterion(network.num_classes)
        return network

    def _model_kwargs(self, training: bool) -> dict[str, Any]:
        model = self.settings.model
        kwargs = networks.size_kwargs(self.name, model.input_size)
        if self.num_classes is not None:
            kwargs["num_classes"] = self.num_classes
        if training:
            kwargs.update(drop_rate=model.drop, drop_path_rate=model.drop_path)
            if self.settings.token_label.token_label:
                kwargs["token_head"] = True
        return kwargs | model.model_kwargs

    def _build(self, kwargs: dict[str, Any]) -> torch.nn.Module:
        """The model; without stochastic depth if it has none."""
        pretrained = self.settings.model.load_release
        try:
            return networks.build_model(self.name, pretrained, kwargs)
        except UsageError:
            if not networks.takes(self.name, kwargs, without={"drop_path_rate"}):
                if networks.takes(self.name, kwargs, without={"drop_path_rate", "token_head"}):
                    raise NoTokenHeadError(f"{self.name} has no token head, as BiFormer has") from None
                raise
        if self.distributed.is_main:
            print(f"{self.name} has no stochastic depth: drop path is left out")
        kwargs = {key: value for key, value in kwargs.items() if key != "drop_path_rate"}
        return networks.build_model(self.name, pretrained, kwargs)

    def load(self, network: torch.nn.Module, source: str):
        networks.load_from(network, source, self.settings.checkpoint.model_key, trained_on=self.classes)

    # --- loss ---------------------------------------------------------------------------------------------------------

    def _criterion(self, num_classes: int) -> Criterion:
        options, token_label = self.settings.augmentation, self.settings.token_label
        mixing = dict(prob=options.mixup_prob, switch_prob=options.mixup_switch_prob)
        if token_label.token_label:
            weight = token_label.token_label_weight
            loss = losses.TokenLabelLoss(**({} if weight is None else dict(weight=weight)))
            mixup = token_labels.TokenLabelMixup(
                num_classes, options.smoothing, TOKEN_STRIDE, options.mixup, options.cutmix, **mixing
            )
            return Criterion(loss, mixup)
        mixup = None
        if options.mixup or options.cutmix:
            mixup = Mixup(
                options.mixup, options.cutmix, label_smoothing=options.smoothing, num_classes=num_classes, **mixing
            )
        # Mixup has smoothed its targets already.
        smoothing = 0.0 if mixup else options.smoothing
        loss = torch.nn.CrossEntropyLoss(label_smoothing=smoothing)
        if self.class_counts is not None:
            counts = self.class_counts + [0] * (num_classes - len(self.class_counts))
            weights = losses.balanced_weights(counts).to(self.distributed.device)
            loss = losses.ClassWeightedCrossEntropy(weights, smoothing)
        if self.settings.distillation.distillation_type != "none":
            return Criterion(self._distillation(loss, num_classes), mixup, sees_images=True)
        return Criterion(loss, mixup)

    def _distillation(self, loss: torch.nn.Module, num_classes: int) -> torch.nn.Module:
        options, size = self.settings.distillation, self.settings.model.input_size
        try:
            teacher = networks.create_teacher(options.teacher_model, num_classes, size, options.teacher_path)
        except networks.PretrainedClassesError as error:
            raise TeacherClassesError(str(error)) from error
        own, teachers = self.images.config, networks.model_data_config(options.teacher_model)
        return losses.DistillationLoss(
            loss,
            teacher,
            options.distillation_type,
            options.distillation_alpha,
            options.distillation_tau,
            images=losses.Renormalize(own["mean"], own["std"], teachers["mean"], teachers["std"]),
        ).to(self.distributed.device)

    def loss(self, network: torch.nn.Module, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        images, targets = batch
        return self.criterion(network, self.precision.arrange(images), targets), {}

    def train_mode(self, network: torch.nn.Module):
        super().train_mode(network)
        if self.settings.model.freeze_backbone:
            networks.hold_frozen(network)

    # --- evaluation ---------------------------------------------------------------------------------------------------

    def evaluator(self) -> Accuracy:
        return Accuracy(self.distributed.device, self.precision)

    def report(self, results: dict[str, float], what: str):
        print(f"* Acc@1 {results['acc1']:.3f} Acc@5 {results['acc5']:.3f} loss {results['loss']:.3f}")
        print(f"Accuracy of the {what} on the {results['images']} test images: {results['acc1']:.1f}%")

    def dummy_batch(self, size: int, train: bool) -> Batch:
        height, width = to_2tuple(self.settings.model.input_size)
        device = self.distributed.device
        images = torch.zeros(size, 3, height, width, device=device)
        if train and self.settings.token_label.token_label:
            return images, token_labels.TokenTargets.zeros(size, height // TOKEN_STRIDE, width // TOKEN_STRIDE, device)
        return images, torch.zeros(size, dtype=torch.int64, device=device)

    @property
    def input_description(self) -> str:
        height, width = to_2tuple(self.settings.model.input_size)
        return f"images of 3 x {height} x {width}"
