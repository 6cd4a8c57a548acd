"""Semantic segmentation, as `training.task.Task` asks for it."""
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from timm.layers import convert_sync_batchnorm, to_2tuple

import datasets
from models import NetworkRecipe
from models.segmentation import (
    HEADS,
    EvalSize,
    NoMapsError,
    Segmenter,
    has_same_heads,
    is_segmenter,
    load_backbone,
    load_segmenter,
)
from storage.remote import public
from storage.weights import MismatchError, check_finite, class_difference, class_names, default_weights, unwrap
from training.data.loader import EpochLoader, build_loader
from training.distributed import Distributed
from training.options import LoaderOptions
from training.precision import Precision
from training.run import Clock
from training.task import Task, reading_weights
from utils import UsageError, UserError

from .. import networks, pictures
from . import report
from .data import SegmentationDataset, collate_samples
from .errors import ADVICE, NoSegmenterError, NothingFitsError
from .folder import open_folder
from .inference import Inference
from .losses import pixel_loss
from .metrics import Sample, SegmentationScores
from .options import SegmentationSettings
from .transforms import Augmentation, TrainTransform, Views

Batch = tuple[torch.Tensor, torch.Tensor]


class SegmentationTask(Task):
    """Trains and evaluates Semantic FPN and UPerNet on any backbone of timm's."""

    settings_class = SegmentationSettings
    metrics: ClassVar[dict[str, bool]] = dict(mIoU=True, mAcc=True, aAcc=True)
    advice = ADVICE
    settings: SegmentationSettings

    def __init__(self, settings: SegmentationSettings, distributed: Distributed, precision: Precision):
        super().__init__(settings, distributed, precision)
        self.config = networks.model_data_config(settings.model.model)
        test, folder = settings.test, settings.report.report
        self.size = EvalSize(test.short_side, test.long_side, test.test_rounding)
        self.inference = Inference.of(test, self.config, precision)
        self.report_folder = None if folder is None else Path(folder)
        self.val_set: SegmentationDataset | None = None

    @classmethod
    def check_names(cls, settings: SegmentationSettings):
        networks.check_model(settings.model.model)

    # --- data ---------------------------------------------------------------------------------------------------------

    def dataset(self, split: str) -> SegmentationDataset:
        """In training uint8 (3, h, w) images and (h, w) labels, else views of whole images and their labels."""
        data, train = self.settings.data, split == "train" and not self.settings.evaluation.eval
        source = open_folder(data.data_path, split, data.data_set, data.exif_transpose)
        self.tell(source.notes)
        self.classes, self.num_classes = source.classes, len(source.classes)
        on_error = "raise" if not data.skip_bad_images else "next" if train else "mask"
        transform = self._augmented() if train else Views(self.size, self.settings.test.test_scales)
        return SegmentationDataset(source, source.classes, transform, on_error)

    def _augmented(self) -> TrainTransform:
        asked = self.settings.augmentation
        augmentation = Augmentation(
            to_2tuple(asked.input_size), self.size, tuple(asked.scale_ratio), asked.hflip, asked.photometric
        )
        return TrainTransform(augmentation, self.config["mean"])

    def loader(self, dataset: SegmentationDataset, train: bool) -> EpochLoader:
        if train:
            return self._train_loader(dataset, self.settings.loader)
        if self.distributed.is_main:
            print(f"evaluated at {self._description()}")
            if self.report_folder is not None:
                pictures.prepare_folder(self.report_folder)
        self.val_set = dataset
        return build_loader(
            dataset, self.settings.loader, self.eval_processes, train=False, collate_fn=collate_samples
        )

    def _train_loader(self, dataset: SegmentationDataset, loader_options: LoaderOptions) -> EpochLoader:
        on_device = partial(
            datasets.NormalizedImages, mean=self.config["mean"], std=self.config["std"], device=self.distributed.device
        )
        return build_loader(
            dataset, loader_options, self.distributed, train=True, seed=self.settings.machine.seed, transfer=on_device
        )

    def _description(self) -> str:
        test = self.settings.test
        rounding = dict(none="", stretch=", stretched to multiples of 32", pad=", padded to multiples of 32")
        seen = f", in windows of {_shape(test.window)}, every {_shape(test.step)}" if test.window else ""
        scales = f", scales {' '.join(f'{ratio:g}' for ratio in test.test_scales)}" if test.test_scales != [1] else ""
        mirrored = ", and mirrored" if test.test_flip else ""
        sides = f"a shorter side of {test.short_side} and a longer one of at most {test.long_side}"
        return f"{sides}{rounding[test.test_rounding]}{seen}{scales}{mirrored}"

    # --- network ------------------------------------------------------------------------------------------------------

    def network(self) -> Segmenter:
        settings = self.settings
        network, training = self._build(), not settings.evaluation.eval
        if settings.model.grad_checkpointing:
            networks.checkpoint_gradients(network, settings.model.model)
        if training and settings.checkpoint.finetune and not settings.checkpoint.resumes_here():
            self._fine_tune(network, settings.checkpoint.finetune)
        if training and settings.model.sync_bn and self.distributed.is_distributed:
            if self.distributed.device.type == "cuda":
                network = convert_sync_batchnorm(network)
            else:
                self.tell(["batch norms are of each process alone: SyncBN needs GPUs"])
        return network

    def _build(self) -> Segmenter:
        """The network; without stochastic depth if the backbone has none."""
        if self.settings.model.model_kwargs:
            networks.check_asserts(self.settings.model.model)
        try:
            return self._create(drop_path_rate=self.settings.model.drop_path)
        except UsageError as error:
            try:
                network = self._create()
            except UserError:
                raise error from None
        self.tell([f"{self.settings.model.model} has no stochastic depth: drop path is left out"])
        return network

    def _create(self, **kwargs: Any) -> Segmenter:
        asked, checkpoint = self.settings.model, self.settings.checkpoint
        # A run that resumes has its weights in its checkpoint.
        pretrained = asked.load_release and not checkpoint.resumes_here()
        kwargs = {**kwargs, **asked.model_kwargs}
        with networks.building(asked.model, pretrained):
            try:
                return HEADS[asked.head](
                    asked.model, self.num_classes, pretrained, head_channels=asked.head_channels,
                    extra_norms=asked.extra_norms, img_size=self.settings.augmentation.input_size, **kwargs,
                )
            except NoMapsError as error:  # which names the model
                raise UsageError(str(error)) from error

    def _read(self, source: str) -> tuple[dict[str, Any], dict[str, torch.Tensor], list[str]]:
        """A checkpoint, the weights to take from it, and lines about these."""
        checkpoint, key = networks.read(source), self.settings.checkpoint.model_key
        key, notes = (key, []) if key else default_weights(checkpoint, source)
        with reading_weights():
            return checkpoint, unwrap(checkpoint, key), notes

    def _fine_tune(self, network: Segmenter, source: str):
        """Start from the weights of a segmenter, or for the backbone alone from those of a classifier or of a segmenter
        with another head; tells which.
        """
        (checkpoint, weights, notes), source = self._read(source), public(source)
        with reading_weights():
            try:
                if is_segmenter(weights) and has_same_heads(network, weights):
                    notes += self._load_segmenter(network, weights, class_difference(checkpoint, self.classes), source)
                else:
                    notes += [f"{source}: {note}" for note in load_backbone(network, weights)]
            except MismatchError as error:
                raise NothingFitsError(f"{source}: {error}{NetworkRecipe.of(checkpoint).owner}") from error
            check_finite(network, source)
        self.tell(notes)

    @staticmethod
    def _load_segmenter(
        network: Segmenter, weights: dict[str, torch.Tensor], difference: str | None, source: str
    ) -> list[str]:
        is_new = load_segmenter(network, weights, new_classes=True, other_classes=difference is not None)
        reason = difference or "has another number of classes"
        return [f"{source} {reason}: the classifiers are re-initialised" if is_new else f"{source}: all is loaded"]

    def load(self, network: Segmenter, source: str):
        (checkpoint, weights, notes), source = self._read(source), public(source)
        if not is_segmenter(weights):
            raise NoSegmenterError(f"{source} holds no segmenter, but the weights of a classifier")
        difference = class_difference(checkpoint, self.classes)
        names = class_names(checkpoint) or []
        if difference and (len(names) != len(self.classes) or sorted(names) == sorted(self.classes)):
            raise UserError(f"{source} {difference}")
        with reading_weights():
            load_segmenter(network, weights)
            check_finite(network, source)
        self.tell([*notes, *([f"warning: {source} {difference}"] if difference else [])])

    # --- loss ---------------------------------------------------------------------------------------------------------

    def loss(self, network: torch.nn.Module, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        images, labels = batch
        logits = network(self.precision.arrange(images))
        losses = {name: pixel_loss(values, labels) for name, values in logits.items()}
        loss = losses["decode"]
        if "aux" in losses:
            loss = loss + self.settings.model.aux_weight * losses["aux"]
        return loss, {name: value.detach() for name, value in losses.items()}

    # --- evaluation ---------------------------------------------------------------------------------------------------

    def evaluator(self) -> SegmentationScores:
        is_shown = self.distributed.is_main and self.val_set is not None and not self.settings.evaluation.eval
        images = len(self.val_set) if is_shown else 0
        places = pictures.places_to_show(report.SHOWN, images, self.eval_processes.world_size)
        return SegmentationScores(self.inference, self.classes, self.distributed.device, places)

    def pictures(self, evaluator: SegmentationScores) -> dict[str, np.ndarray]:
        return dict(overlays=report.draw_overlays(evaluator.shown, self.classes)) if evaluator.shown else {}

    def report(self, results: dict[str, float], evaluator: SegmentationScores, what: str):
        if self.settings.evaluation.eval:
            report.print_classes(evaluator)
        super().report(results, evaluator, what)
        if self.report_folder is not None:
            report.write_report(self.report_folder, evaluator)

    # --- before training ----------------------------------------------------------------------------------------------

    def preview(self, dataset: SegmentationDataset, clock: Clock):
        """`--show_batch`: the training images of the next steps, and their labels."""
        if self.settings.report.show_batch is None or not self.distributed.is_main:
            return
        loader = self._train_loader(dataset, replace(self.settings.loader, num_workers=0))
        epoch, step = clock.next_step
        loader.set_epoch(epoch, first_batch=step * self.settings.optimizer.update_freq)
        mean, std = self.config["mean"], self.config["std"]
        shown = [
            pair for images, targets in islice(loader, report.SHOWN)
            for pair in zip(pictures.as_pixels(images, mean, std), targets.cpu().numpy(), strict=True)
        ][:report.SHOWN]
        file = Path(self.settings.report.show_batch)
        pictures.write_picture(file, report.draw_batch(*zip(*shown, strict=True), self.classes))
        print(f"training images: {file}")

    def dummy_batch(self, size: int, train: bool) -> Batch | list[Sample]:
        device = self.distributed.device
        if train:
            height, width = to_2tuple(self.settings.augmentation.input_size)
            images = torch.zeros(size, 3, height, width, device=device)
            return images, torch.zeros(size, height, width, dtype=torch.uint8, device=device)
        # Of the size of evaluation, for a photograph of 3 : 4.
        sizes = [self.size.of(3, 4, ratio) for ratio in self.settings.test.test_scales]
        views = [torch.zeros(3, *view, dtype=torch.uint8, device=device) for view in sizes]
        return [Sample(views, views[0][0]) for _ in range(size)]

    @property
    def input_description(self) -> str:
        return f"images of 3 x {_shape(to_2tuple(self.settings.augmentation.input_size))}"


def _shape(size: tuple[int, int]) -> str:
    return f"{size[0]} x {size[1]}"
