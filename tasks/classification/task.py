"""Image classification, as `training.task.Task` asks for it."""
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from timm.data.loader import fast_collate
from timm.layers import to_2tuple
from torch.utils.data import Dataset

import datasets
from storage.remote import public
from training.data.folders import NoValFolderError
from training.data.held_out import knows_images, rule_difference
from training.data.loader import EpochLoader, build_loader
from training.distributed import Distributed
from training.options import LoaderOptions
from training.precision import Precision
from training.run import Clock
from training.task import Task
from utils import UsageError

from .. import networks, pictures, tables
from . import report, robustness, shown, token_labels
from .criterion import create_criterion
from .errors import (
    ADVICE,
    NothingToEvaluateError,
    NoTokenHeadError,
    OneClassError,
    TeacherClassesError,
    TeacherModelError,
    TeacherWeightsError,
    TooFewClassesError,
)
from .images import ImagePipeline
from .losses import Criterion
from .metrics import Accuracy, RecordedAccuracy
from .options import IMAGE_FOLDERS, ROBUSTNESS, TOKEN_STRIDE, ClassificationSettings

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
            cropped=self._whole_images.transform() if data.data_set in ROBUSTNESS else None,
        )
        try:
            dataset = datasets.build_dataset(
                data.data_set,
                data.data_path,
                split,
                self.images.augmented(self.settings.augmentation) if train else self.images.transform(),
                on_error="raise" if not data.skip_bad_images else "next" if train else "mask",
                most_classes=self._most_classes(),
                classes=self._trained_classes(),
                reading=reading,
            )
        except NoValFolderError as error:
            raise NothingToEvaluateError(str(error)) if self.settings.evaluation.eval else error from None
        self.held_out = dataset.held_out
        self.tell(dataset.notes)
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

    def _trained_classes(self) -> list[str] | None:
        """Names of the classes of the weights that are evaluated, by which folders and shards are numbered; or None."""
        asked, data_set = self.settings.checkpoint, self.settings.data.data_set
        is_numbered = data_set in IMAGE_FOLDERS or data_set.startswith("wds/")
        if not self.settings.evaluation.eval or not is_numbered:
            return None
        if source := asked.resume or asked.finetune:
            return networks.trained_classes(source)
        return networks.published_classes(self.name) if self.settings.model.load_release else None

    def _count_classes(self, dataset: datasets.ImageDataset) -> int | None:
        """Classes of the model; None, for the model's own number, where neither the settings nor the data set know."""
        asked, held = self.settings.model.nb_classes, dataset.num_classes
        if asked is not None and held is not None and asked < held:
            raise TooFewClassesError(f"{asked} classes were asked for, fewer than the {held} that the data holds")
        return asked or held

    def loader(self, dataset: Dataset, train: bool) -> EpochLoader:
        if not train:
            if self.distributed.is_main:
                print(f"evaluated at {self.images.description}{self._about_cropped(dataset)}")
                if self.report_folder is not None:
                    pictures.prepare_folder(self.report_folder)
            self.val_set = dataset
            collate = robustness.collate if isinstance(dataset, datasets.RobustnessDataset) else fast_collate
            return self.images.loader(dataset, self.settings.loader, self.eval_processes, collate)
        return self._train_loader(dataset, self.settings.loader)

    @property
    def _whole_images(self) -> ImagePipeline:
        """How images that are cropped already are prepared: whole, unless the crop was asked for."""
        return replace(self.images, crop_pct=self.settings.augmentation.crop_pct or 1.0)

    def _about_cropped(self, dataset: Dataset) -> str:
        """How images that are cropped already are evaluated, where there are such, and others are not so."""
        has_cropped = isinstance(dataset, datasets.RobustnessDataset) and dataset.has_cropped
        whole = self._whole_images
        if not has_cropped or whole == self.images:
            return ""
        return f"; ImageNet-C, which is cropped already, at {whole.description}"

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
            networks.checkpoint_gradients(network, self.name)
        if training:
            if settings.checkpoint.finetune and not settings.checkpoint.resumes_here():
                self._fine_tune(network, settings.checkpoint.finetune)
            if settings.model.load_release and not settings.checkpoint.resumes_here():
                self.tell(networks.renew_classifier(network, self.name, self.classes))
            if settings.model.freeze_backbone:
                networks.freeze_backbone(network)
            self.num_classes = network.num_classes
            counts, teacher = self.class_counts, self._teacher(network.num_classes)
            self.criterion = create_criterion(settings, network.num_classes, counts, teacher, self.distributed.device)
        return network

    def _fine_tune(self, network: torch.nn.Module, source: str):
        """Start from the weights in `source`; tells where these have seen what is held out now."""
        checkpoint, source = networks.read(source), public(source)
        key = self.settings.checkpoint.model_key
        notes = networks.load_checkpoint(
            network, checkpoint, source, key, new_classifier=True, trained_on=self.classes
        )
        self.tell(notes)
        # without an image in common, that run was on others
        unseen = self.held_out and self.held_out.unseen(checkpoint)
        if unseen is not None and len(unseen.images) > 0:
            leak = self.held_out.leak(checkpoint)
            self.tell([f"warning: {source} {leak}"] if leak else [])
            self.held_out = unseen

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
        # A run that resumes has its weights in its checkpoint.
        resumes = not self.settings.evaluation.eval and self.settings.checkpoint.resumes_here()
        pretrained = self.settings.model.load_release and not resumes
        try:
            return networks.build_model(self.name, pretrained, kwargs)
        except UsageError:
            if not networks.takes(self.name, kwargs, without={"drop_path_rate"}):
                if networks.takes(self.name, kwargs, without={"drop_path_rate", "token_head"}):
                    raise NoTokenHeadError(f"{self.name} has no token head, as BiFormer has") from None
                raise
        self.tell([f"{self.name} has no stochastic depth: drop path is left out"])
        kwargs = {key: value for key, value in kwargs.items() if key != "drop_path_rate"}
        return networks.build_model(self.name, pretrained, kwargs)

    def load(self, network: torch.nn.Module, source: str):
        checkpoint, source = networks.read(source), public(source)
        key = self.settings.checkpoint.model_key
        self.tell(networks.load_checkpoint(network, checkpoint, source, key, trained_on=self.classes))
        if self.held_out is None:
            # a folder val is a set of its own; shards may be of the images that the run was trained on
            if knows_images(checkpoint) and self.settings.data.data_set.startswith("wds/"):
                told = "was trained on a part of a folder: shards do not tell whether on these images"
                self.tell([f"warning: {source} {told}"])
            return
        if leak := self.held_out.leak(checkpoint):
            self.tell([f"warning: {source} {leak}"])
        elif not knows_images(checkpoint) and (difference := rule_difference(checkpoint, self.held_out)):
            said = difference if checkpoint["held_out"] else "does not say that images of this folder were held out"
            self.tell([f"warning: {source} {said}; it may have been trained on these images"])

    def _teacher(self, num_classes: int) -> torch.nn.Module | None:
        options, size = self.settings.distillation, self.settings.model.input_size
        if options.distillation_type == "none":
            return None
        try:
            teacher, notes = networks.create_teacher(
                options.teacher_model, num_classes, size, options.teacher_path, trained_on=self.classes
            )
        except networks.PretrainedClassesError as error:
            raise TeacherClassesError(str(error)) from error
        except networks.PretrainedWeightsError as error:
            raise TeacherWeightsError(str(error)) from error
        except networks.OtherModelError as error:
            raise TeacherModelError(str(error)) from error
        self.tell(notes)
        return teacher

    # --- loss ---------------------------------------------------------------------------------------------------------

    def loss(self, network: torch.nn.Module, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        images, targets = batch
        return self.criterion(network, self.precision.arrange(images), targets), {}

    def train_mode(self, network: torch.nn.Module):
        super().train_mode(network)
        if self.settings.model.freeze_backbone:
            networks.hold_frozen(network)

    # --- evaluation ---------------------------------------------------------------------------------------------------

    def evaluator(self) -> Accuracy | robustness.RobustnessAccuracy:
        device = self.distributed.device
        if isinstance(self.val_set, datasets.RobustnessDataset):
            return robustness.RobustnessAccuracy(device, self.precision, self.val_set.source.parts)
        if not self.settings.evaluation.eval:
            images = len(self.val_set) if self.distributed.is_main and self.val_set is not None else 0
            places = pictures.places_to_show(shown.SHOWN, images, self.eval_processes.world_size)
            return RecordedAccuracy(device, self.precision, places)
        kind = Accuracy if self.report_folder is None else RecordedAccuracy
        return kind(device, self.precision)

    def pictures(self, evaluator: RecordedAccuracy) -> dict[str, np.ndarray]:
        config, processes = self.images.config, self.eval_processes.world_size
        return shown.evaluation_pictures(evaluator, self._class_names(), config, processes)

    def report(self, results: dict[str, float], evaluator: Accuracy | robustness.RobustnessAccuracy, what: str):
        if isinstance(evaluator, robustness.RobustnessAccuracy):
            robustness.report(evaluator, self.report_folder)
            return
        # In the words of the published repositories, up to the loss.
        values = f"Acc@1 {results['acc1']:.3f} Acc@5 {results['acc5']:.3f} loss {results['loss']:.3f}"
        print(f"* {values} {self.measured_on(results, what)}")
        if self.report_folder is not None:
            report.write_report(self.report_folder, evaluator, self.val_set.names(), self.classes)

    def _class_names(self) -> list[str]:
        return tables.complete(self.classes or [], self.num_classes)

    # --- before training ----------------------------------------------------------------------------------------------

    def preview(self, dataset: Dataset, clock: Clock):
        """`--show_batch`: the training images of the next steps."""
        if self.settings.report.show_batch is None or not self.distributed.is_main:
            return
        seed, update_freq = self.settings.machine.seed, self.settings.optimizer.update_freq
        loader = self._train_loader(dataset, replace(self.settings.loader, num_workers=0))
        mixup, file = self.criterion.mixup, Path(self.settings.report.show_batch)
        batches = shown.next_batches(loader, clock, seed, update_freq, mixup, self.distributed)
        shown.write_preview(file, batches, self._class_names(), mixup, self.images.config)

    def dummy_batch(self, size: int, train: bool) -> Batch:
        height, width = to_2tuple(self.images.input_size)
        device = self.distributed.device
        images = torch.zeros(size, 3, height, width, device=device)
        if train and self.settings.token_label.token_label:
            return images, token_labels.TokenTargets.zeros(size, height // TOKEN_STRIDE, width // TOKEN_STRIDE, device)
        if isinstance(self.val_set, datasets.RobustnessDataset):
            return images, torch.tensor([self.val_set.source.target(0)] * size, device=device)
        return images, torch.zeros(size, dtype=torch.int64, device=device)

    @property
    def input_description(self) -> str:
        height, width = to_2tuple(self.images.input_size)
        return f"images of 3 x {height} x {width}"
