"""The command-line options that only detection has."""
from collections.abc import Mapping
from dataclasses import dataclass, fields
from types import MappingProxyType
from typing import ClassVar

from training.flags import Group, Needs, at_least, boolean, flag, fraction, path
from training.options import Settings
from utils import UsageError

from ..options import NetworkOptions, OnBackboneSettings, check_picture

DETECTORS = ("mask_rcnn", "cascade_mask_rcnn", "retinanet")


@dataclass(frozen=True)
class DetectorOptions(NetworkOptions):
    """Network"""

    detector: str = flag("mask_rcnn", "the detector on the backbone, which --model names; retinanet learns boxes alone",
                         choices=DETECTORS)
    fpn_channels: int = flag(256, "width of the feature pyramid and of the convolutions on it", type=int,
                             check=at_least(8))
    head_channels: int = flag(1024, "width of the linear layers that look at boxes", type=int, check=at_least(2))
    extra_norms: bool | None = flag(None, "norm each map of the backbone (default: with BiFormer and DeBiFormer)",
                                    type=boolean, metavar="BOOL")
    freeze_batch_norm: bool = flag(True, "keep the running statistics of the backbone's batch norms")
    sync_bn: bool = flag(True, "batch norms over all processes, on GPUs")

    def needs(self) -> Needs:
        return {"head_channels": (self.detector != "retinanet", "with --detector retinanet")}

    @property
    def has_masks(self) -> bool:
        return self.detector != "retinanet"


@dataclass(frozen=True)
class DetectionDataOptions(Group):
    """Data"""

    data_path: str | None = flag(None, "the folder of images and annotations: COCO's, or one of your own", type=path,
                                 metavar="FOLDER")
    train_json: str | None = flag(None, "annotations in COCO's format (default: the usual names in --data_path)",
                                  type=path, metavar="FILE")
    val_json: str | None = flag(None, "those of the evaluation, also of --split test", type=path, metavar="FILE")
    skip_bad_images: bool = flag(False, "skip images that cannot be read, and annotations that cannot be right, and "
                                        "count them")
    parts_of: ClassVar[Mapping[str, str]] = MappingProxyType({"train_json": "data_path", "val_json": "data_path"})

    def annotations(self, split: str) -> str | None:
        """The file of a split's annotations, where it was given."""
        return self.train_json if split == "train" else self.val_json


@dataclass(frozen=True)
class DetectionAugmentation(Group):
    """Augmentation"""

    multi_scale: bool = flag(False, "draw the size of an image, down to 0.6 of --short_side, and crop every second one")
    hflip: float = flag(0.5, "probability of a horizontal flip", type=float, check=fraction)


@dataclass(frozen=True)
class SizeOptions(Group):
    """Size of images"""

    short_side: int = flag(800, "images are scaled to fit with this shorter side", type=int, check=at_least(32))
    long_side: int = flag(1333, "and with this longer side", type=int, check=at_least(32))

    def check(self):
        if self.short_side > self.long_side:
            raise UsageError(f"--short_side {self.short_side} is above --long_side {self.long_side}")


@dataclass(frozen=True)
class DetectionReport(Group):
    """Reports and pictures"""

    report: str | None = flag(None, "with --eval, write tables there: AP by class", type=path, metavar="FOLDER")
    detections: str | None = flag(None, "with --eval, write the detections there, in COCO's format of results",
                                  type=path, metavar="FILE")
    show_batch: str | None = flag(None, "write the first training images and their objects there, and train",
                                  type=path, metavar="FILE", check=check_picture)


@dataclass(frozen=True)
class DetectionSettings(OnBackboneSettings):
    """All options of a run that trains or evaluates a detector."""

    data_is = "the folder of images and annotations"
    of_evaluation = ("report", "detections")
    evaluated = Settings.evaluated | {
        "model", "model_kwargs", "detector", "fpn_channels", "head_channels", "extra_norms",
    } | {field.name for group in (DetectionDataOptions, SizeOptions) for field in fields(group)}
    decides_epoch = Settings.decides_epoch | {"detector"} | {
        field.name for group in (DetectionAugmentation, SizeOptions) for field in fields(group)
    }
    model: DetectorOptions
    data: DetectionDataOptions
    augmentation: DetectionAugmentation
    size: SizeOptions
    report: DetectionReport

    most_used: ClassVar[tuple[str, ...]] = (
        "data_path", "model", "detector", "load_release", "short_side", "finetune", *Settings.most_used,
    )

    @property
    def name(self) -> str:
        return f"{self.model.detector}_{self.model.model}"

    def check(self):
        super().check()
        best = self.checkpoint.best_metric
        if best is not None and "mask" in best and not self.model.has_masks:
            raise UsageError(f"--best_metric {best}: --detector {self.model.detector} finds no masks")
        if self.machine.compile:
            raise UsageError("--compile is not for detectors, whose tensors have another size at each step")
