"""Semantic segmentation, as `training.task.Task` asks for it."""
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from timm.layers import to_2tuple

import datasets
from models.segmentation import HEADS, EvalSize, Segmenter, has_same_heads, is_segmenter, load_segmenter
from training.data.loader import EpochLoader, build_loader
from training.distributed import Distributed
from training.options import LoaderOptions
from training.precision import Precision
from training.run import Clock

from .. import networks, pictures
from ..on_backbone import TaskOnBackbone
from . import report
from .data import SegmentationDataset, collate_samples
from .errors import ADVICE
from .folder import open_folder
from .inference import Inference
from .losses import pixel_loss
from .metrics import Sample, SegmentationScores
from .options import SegmentationSettings
from .transforms import Augmentation, TrainTransform, Views

Batch = tuple[torch.Tensor, torch.Tensor]


class SegmentationTask(TaskOnBackbone):
    """Trains and evaluates Semantic FPN and UPerNet on any backbone of timm's."""

    kind = "segmenter"
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

    def create(self, pretrained: bool, **kwargs: Any) -> Segmenter:
        asked = self.settings.model
        return HEADS[asked.head](
            asked.model, self.num_classes, pretrained, head_channels=asked.head_channels, extra_norms=asked.extra_norms,
            img_size=self.settings.augmentation.input_size, **kwargs,
        )

    is_own = staticmethod(is_segmenter)
    has_same_parts = staticmethod(has_same_heads)
    load_own = staticmethod(load_segmenter)

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
