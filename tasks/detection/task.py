"""Object detection and instance segmentation, as `training.task.Task` asks for it."""
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

import datasets
from models.detection import DETECTORS, fit, has_same_parts, is_detector, load_detector
from training.data.loader import EpochLoader, build_loader
from training.distributed import Distributed
from training.options import LoaderOptions
from training.precision import Precision
from training.run import Clock

from .. import pictures
from ..on_backbone import TaskOnBackbone
from . import report
from .coco import CocoImages, open_coco
from .data import DetectionDataset, OrientationSampler, Sample, collate_samples, collate_training
from .errors import ADVICE, NothingToFindError
from .metrics import DetectionScores, Truth
from .options import DetectionSettings
from .transforms import TrainTransform, to_sample

Batch = tuple[list[torch.Tensor], list[dict[str, torch.Tensor]]]
# (height, width) of the images by which a network is tried out: small, and of a photograph's shape.
_TRIED = (96, 128)


class DetectionTask(TaskOnBackbone):
    """Trains and evaluates Mask R-CNN, Cascade Mask R-CNN and RetinaNet on any backbone of timm's."""

    kind = "detector"
    settings_class = DetectionSettings
    metrics: ClassVar[dict[str, bool]] = dict(mask_AP=True, box_AP=True)
    advice = ADVICE
    settings: DetectionSettings

    def __init__(self, settings: DetectionSettings, distributed: Distributed, precision: Precision):
        super().__init__(settings, distributed, precision)
        self.has_masks = settings.model.has_masks
        if not self.has_masks:
            self.metrics = dict(box_AP=True)
        folder, file = settings.report.report, settings.report.detections
        self.report_folder, self.detections_file = (None if x is None else Path(x) for x in (folder, file))
        self.val_set: DetectionDataset | None = None

    # --- data ---------------------------------------------------------------------------------------------------------

    def dataset(self, split: str) -> DetectionDataset:
        """In training uint8 (3, h, w) images and their objects, else images as they are and their ids."""
        data, train = self.settings.data, split == "train" and not self.settings.evaluation.eval
        source = open_coco(
            data.data_path, split, data.annotations(split), train, self.has_masks, data.skip_bad_images
        )
        self.tell(source.notes)
        if not train and not source.has_objects and self.detections_file is None:
            raise NothingToFindError(f"{source.found.path} has no object to find in its images")
        if self.classes is not None:
            datasets.check_same_classes(self.classes, source.classes)
        self.classes, self.num_classes = source.classes, len(source.classes)
        on_error = "raise" if not data.skip_bad_images else "next" if train else "mask"
        size, augmentation = self.settings.size, self.settings.augmentation
        transform = to_sample if not train else TrainTransform(
            size.short_side, size.long_side, augmentation.multi_scale, augmentation.hflip
        )
        return DetectionDataset(source, source.classes, transform, on_error)

    def loader(self, dataset: DetectionDataset, train: bool) -> EpochLoader:
        if train:
            return self._train_loader(dataset, self.settings.loader)
        if self.distributed.is_main:
            size = self.settings.size
            print(f"evaluated at a shorter side of {size.short_side} and a longer one of at most {size.long_side}")
            report.prepare(self.report_folder, self.detections_file)
        self.val_set = dataset
        return build_loader(dataset, self.settings.loader, self.eval_processes, train=False, collate_fn=collate_samples)

    def _train_loader(self, dataset: DetectionDataset, loader_options: LoaderOptions) -> EpochLoader:
        dataset.sampler = partial(_sampler, dataset.source, loader_options.batch_size)
        return build_loader(
            dataset, loader_options, self.distributed, train=True, seed=self.settings.machine.seed,
            collate_fn=collate_training,
        )

    # --- network ------------------------------------------------------------------------------------------------------

    def create(self, pretrained: bool, **kwargs: Any) -> torch.nn.Module:
        asked, size = self.settings.model, self.settings.size
        if self.has_masks:
            kwargs = dict(head_channels=asked.head_channels) | kwargs
        network = DETECTORS[asked.detector](
            asked.model, self.num_classes, pretrained, channels=asked.fpn_channels, short=size.short_side,
            long=size.long_side, extra_norms=asked.extra_norms, freeze_batch_norm=asked.freeze_batch_norm, **kwargs,
        )
        network.transform.resize_in_training = False  # where the sizes are drawn, in the data loading processes
        return network

    is_own = staticmethod(is_detector)
    has_same_parts = staticmethod(has_same_parts)
    load_own = staticmethod(load_detector)

    # --- loss ---------------------------------------------------------------------------------------------------------

    def loss(self, network: torch.nn.Module, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The sum of the losses, which have torchvision's names."""
        images, targets = batch
        losses = network([image.float() / 255 for image in images], targets)
        return sum(losses.values()), {name: value.detach() for name, value in losses.items()}

    # --- evaluation ---------------------------------------------------------------------------------------------------

    def evaluator(self) -> DetectionScores:
        truth, places = None, []
        if self.val_set is not None:
            source = self.val_set.source
            truth = Truth(source.found.content, list(source.found.categories), source.has_objects)
            is_shown = self.distributed.is_main and not self.settings.evaluation.eval
            images = len(self.val_set) if is_shown else 0
            places = pictures.places_to_show(report.SHOWN, images, self.eval_processes.world_size)
        return DetectionScores(truth, self.has_masks, self.distributed.device, places)

    def pictures(self, evaluator: DetectionScores) -> dict[str, np.ndarray]:
        return dict(detections=report.draw_shown(evaluator, self.classes)) if evaluator.shown else {}

    def problem_of(self, results: dict[str, float], what: str) -> str | None:
        return super().problem_of(results, what) if self.val_set.source.has_objects else None

    def report(self, results: dict[str, float], evaluator: DetectionScores, what: str):
        if not evaluator.truth.has_objects:
            print(f"no object to find: nothing is scored, {self.measured_on(results, what)}")
        else:
            if self.settings.evaluation.eval:
                report.print_scores(evaluator.scores)
            super().report(results, evaluator, what)
        report.write(evaluator, self.report_folder, self.detections_file)

    # --- before training ----------------------------------------------------------------------------------------------

    def preview(self, dataset: DetectionDataset, clock: Clock):
        """`--show_batch`: the training images of the next steps, and their objects."""
        if self.settings.report.show_batch is None or not self.distributed.is_main:
            return
        loader = self._train_loader(dataset, replace(self.settings.loader, num_workers=0))
        epoch, step = clock.next_step
        loader.set_epoch(epoch, first_batch=step * self.settings.optimizer.update_freq)
        shown = [pair for batch in islice(loader, report.SHOWN) for pair in zip(*batch, strict=True)][:report.SHOWN]
        file = Path(self.settings.report.show_batch)
        pictures.write_picture(file, report.draw_batch(shown, self.classes))
        print(f"training images: {file}")

    def dummy_batch(self, size: int, train: bool) -> Batch | list[Sample]:
        device, (height, width) = self.distributed.device, _TRIED
        image = torch.zeros(3, height, width, dtype=torch.uint8, device=device)
        if not train:
            return [Sample(image, 0)] * size
        box = torch.tensor([[width / 4, height / 4, width * 3 / 4, height * 3 / 4]], device=device)
        target = dict(boxes=box, labels=torch.ones(1, dtype=torch.int64, device=device))
        if self.has_masks:
            target["masks"] = torch.ones(1, height, width, dtype=torch.bool, device=device)
        return [image] * size, [target] * size

    def count(self, batch: Batch) -> int:
        return len(batch[0])

    @property
    def input_description(self) -> str:
        size = self.settings.size
        height, width = fit(*_TRIED, size.short_side, size.long_side)
        return f"images of 3 x {height} x {width}"


def _sampler(source: CocoImages, batch_size: int, world_size: int, rank: int, repeats: int) -> OrientationSampler:
    assert repeats == 1, repeats
    return OrientationSampler(source.is_wide, batch_size, world_size, rank)
