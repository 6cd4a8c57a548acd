"""Image classification, as `training.task.Task` asks for it."""
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from timm.data.loader import fast_collate
from timm.data.mixup import Mixup
from timm.layers import to_2tuple
from torch.utils.data import Dataset

import datasets
from storage.weights import held_out_changes, held_out_difference
from training.data.loader import EpochLoader, build_loader, seeded
from training.distributed import Distributed
from training.options import LoaderOptions
from training.precision import Precision
from training.run import Clock
from training.task import Task
from utils import UsageError, derive_seed

from .. import networks
from . import confusion, losses, pictures, report, tables, token_labels
from .errors import (
    ADVICE,
    NoTokenHeadError,
    OneClassError,
    TeacherClassesError,
    TooFewClassesError,
)
from .images import ImagePipeline
from .losses import Criterion
from .metrics import Accuracy, RecordedAccuracy
from .options import IMAGE_FOLDERS, TOKEN_STRIDE, ClassificationSettings
from .policies import check_policy

# How many images are shown, and of at most how many classes an evaluation in training draws the confusion matrix.
SHOWN, DRAWN = 16, 50
Batch = tuple[torch.Tensor, torch.Tensor | token_labels.TokenTargets]


def check_several_classes(dataset: datasets.ImageDataset):
    """Raises OneClassError where a training set is known to hold one class."""
    # a network may have classes of which a folder has no images
    held = getattr(dataset.source, "folders", dataset.classes)
    if dataset.num_classes == 1 or (held is not None and len(held) == 1):
        name = f", {held[0]}" if held else ""
        raise OneClassError(f"the training set has one class{name}: there is nothing to learn")


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
        if augmentation.use_test_size:
            self.images = ImagePipeline.of_validation(model.model, augmentation.crop_pct)
        self.criterion: Criterion | None = None
        self._told: set[str] = set()
        # Training images of each class, where the loss weighs classes by them.
        self.class_counts: list[int] | None = None
        folder = settings.report.report
        self.val_set: Dataset | None = None
        self.report_folder = None if folder is None else Path(folder)

    @classmethod
    def check_names(cls, settings: ClassificationSettings):
        networks.check_model(settings.model.model)
        if settings.distillation.teacher_model:
            networks.check_model(settings.distillation.teacher_model)

    # --- data ---------------------------------------------------------------------------------------------------------

    def dataset(self, split: str) -> Dataset:
        """(uint8 image, class index), or with token labels what `token_labels.add_label_maps` makes of it."""
        data, train = self.settings.data, split == "train" and not self.settings.evaluation.eval
        reading = datasets.Reading(
            download=data.download,
            shard_cache=datasets.ShardCache(data.shard_cache, data.shard_cache_gb),
            val_split=data.val_split and datasets.ValSplit(data.val_split, self.settings.machine.seed),
            exif_transpose=data.exif_transpose,
        )
        dataset = datasets.build_dataset(
            data.data_set,
            data.data_path,
            split,
            self._train_transform() if train else self.images.transform(),
            on_error="raise" if not data.skip_bad_images else "next" if train else "mask",
            most_classes=self._most_classes(),
            reading=reading,
        )
        self.held_out = dataset.held_out
        self._tell(dataset.notes)
        if train:
            check_several_classes(dataset)
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

    def _most_classes(self) -> int | None:
        """Classes of the network, where they are known before the data; None for as many as image folders there are."""
        evaluation, model = self.settings.evaluation, self.settings.model
        published = (evaluation.eval and model.load_release) or self.settings.data.data_set not in IMAGE_FOLDERS
        return model.nb_classes or (networks.pretrained_num_classes(self.name) if published else None)

    def _tell(self, notes: Iterable[str]):
        """Print, in the main process, lines that were not printed yet: two splits may have some in common."""
        for note in notes:
            if self.distributed.is_main and note not in self._told:
                print(note)
            self._told.add(note)

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
            if self.distributed.is_main:
                print(f"evaluated at {self.images.description}")
                if self.report_folder is not None:
                    report.prepare(self.report_folder)
            self.val_set = dataset
            return self.images.loader(dataset, self.settings.loader, self.eval_processes)
        return self._train_loader(dataset, self.settings.loader)

    def _train_loader(self, dataset: Dataset, loader_options: LoaderOptions) -> EpochLoader:
        options = self.settings.augmentation
        return build_loader(
            dataset,
            loader_options,
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
        if model.model_kwargs:
            networks.check_asserts(self.name)
        kwargs = networks.size_kwargs(self.name, self.images.input_size)
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
        checkpoint = networks.read(source)
        networks.load_checkpoint(
            network, checkpoint, source, self.settings.checkpoint.model_key, trained_on=self.classes
        )
        if self.held_out is None:
            return
        # a val split that was not held out of these images has nothing to do with them
        difference = held_out_difference(checkpoint, self.held_out.rule)
        changes = None if difference else held_out_changes(checkpoint, self.held_out.images)
        if difference:
            self.distributed.print(f"warning: {source} {difference}; it may have been trained on these images")
        if changes:
            self.distributed.print(f"warning: {source}: {changes}; it may have been trained on some")

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
            teacher = networks.create_teacher(
                options.teacher_model, num_classes, size, options.teacher_path, trained_on=self.classes
            )
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
        device, training = self.distributed.device, not self.settings.evaluation.eval
        if training:
            self.evaluated = RecordedAccuracy(device, self.precision, self._shown())
        elif self.report_folder is not None:
            self.evaluated = RecordedAccuracy(device, self.precision)
        else:
            self.evaluated = Accuracy(device, self.precision)
        return self.evaluated

    def _shown(self) -> list[int]:
        """The places among its own, in order, of the val images that this process shows; the main process does."""
        if not self.distributed.is_main or self.val_set is None:
            return []
        own = len(range(0, len(self.val_set), self.eval_processes.world_size))
        return sorted({place * own // SHOWN for place in range(SHOWN)})

    def pictures(self) -> dict[str, np.ndarray]:
        """Images of the last evaluation, and of at most `DRAWN` classes the confusion matrix, where it can be drawn."""
        recorded, names = self.evaluated, tables.complete(self.classes or [], self.num_classes)
        indices = [place * self.eval_processes.world_size for place in recorded.shown]
        titles = [
            f"{names[recorded.targets[i]] if recorded.targets[i] >= 0 else 'cannot be read'}\n"
            f"pred. {names[recorded.classes[i, 0]]} {100 * recorded.probabilities[i, 0]:.0f} %" for i in indices
        ]
        config = self.images.config
        images = torch.stack(recorded.images)
        shown = dict(predictions=pictures.draw_grid(images, titles, config["mean"], config["std"]))
        if len(names) <= DRAWN and confusion.can_draw():
            targets, predicted = recorded.targets.numpy(), recorded.classes[:, 0].numpy()
            matrix = confusion.confusion_matrix(targets, predicted, len(names))
            shown["confusion"] = confusion.as_pixels(confusion.confusion_figure(matrix, names))
        return shown

    # --- before training ----------------------------------------------------------------------------------------------

    def preview(self, dataset: Dataset, clock: Clock):
        """`--show_batch`: the training images of the next steps, at least `SHOWN` where there are so many."""
        if self.settings.report.show_batch is None:
            return
        file, config = Path(self.settings.report.show_batch), self.images.config
        images, titles = [], []
        for batch in self._next_batches(dataset, clock):
            images += batch[0]
            titles += pictures.target_titles(batch[1], tables.complete(self.classes or [], self.num_classes),
                                             self.criterion.mixup)
            if len(images) >= SHOWN:
                break
        pixels = pictures.draw_grid(torch.stack(images[:2 * SHOWN]), titles[:2 * SHOWN], config["mean"], config["std"])
        pictures.write_picture(file, pixels)
        print(f"training images: {file}")

    def _next_batches(self, dataset: Dataset, clock: Clock) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """The images, mixed, and targets of the first batch of each step from `clock` on, as this process trains on
        them; read in this process, by a loader of its own, and without a change to what is drawn later.
        """
        seed, update_freq = self.settings.machine.seed, self.settings.optimizer.update_freq
        epoch, step = (clock.epoch + 1, 0) if clock.epoch_is_over else (clock.epoch, clock.step)
        loader = self._train_loader(dataset, replace(self.settings.loader, num_workers=0))
        loader.set_epoch(epoch, first_batch=step * update_freq)
        for number, (images, targets) in enumerate(loader):
            if number % update_freq == 0:
                key = derive_seed(seed, epoch, step + number // update_freq, self.distributed.rank)
                with seeded(key % 2**32, self.distributed.device):
                    if self.criterion.mixup is not None:
                        images, targets = self.criterion.mixup(images, targets)
                # of token labels, those of the images
                yield images, targets[0] if isinstance(targets, tuple) else targets

    def report(self, results: dict[str, float], what: str):
        # In the words of the published repositories, up to the loss.
        values = f"Acc@1 {results['acc1']:.3f} Acc@5 {results['acc5']:.3f} loss {results['loss']:.3f}"
        print(f"* {values} {self.measured_on(results, what)}")
        if self.report_folder is not None:
            report.write_report(self.report_folder, self.evaluated, self.val_set.names(), self.classes)

    def dummy_batch(self, size: int, train: bool) -> Batch:
        height, width = to_2tuple(self.images.input_size)
        device = self.distributed.device
        images = torch.zeros(size, 3, height, width, device=device)
        if train and self.settings.token_label.token_label:
            return images, token_labels.TokenTargets.zeros(size, height // TOKEN_STRIDE, width // TOKEN_STRIDE, device)
        return images, torch.zeros(size, dtype=torch.int64, device=device)

    @property
    def input_description(self) -> str:
        height, width = to_2tuple(self.images.input_size)
        return f"images of 3 x {height} x {width}"
