"""The command-line options that only segmentation has."""
from collections.abc import Mapping
from dataclasses import dataclass, fields
from types import MappingProxyType
from typing import ClassVar

from training.flags import Group, Needs, at_least, boolean, flag, fraction, not_negative, path, positive
from training.options import Settings
from utils import UsageError

from ..options import NetworkOptions, OnBackboneSettings, check_picture, check_range, image_size

HEADS = ("upernet", "semantic_fpn")
ROUNDINGS = ("none", "stretch", "pad")
DATA_SETS = ("segmentation_folder", "ade20k")


@dataclass(frozen=True)
class SegmenterOptions(NetworkOptions):
    """Network"""

    head: str = flag("upernet", "the head on the backbone, which --model names", choices=HEADS)
    head_channels: int | None = flag(None, "width of the head (default: as published, 512 of upernet, 128 of "
                                           "semantic_fpn)", type=int, check=at_least(2))
    extra_norms: bool | None = flag(None, "norm each map of the backbone (default: with BiFormer and DeBiFormer)",
                                    type=boolean, metavar="BOOL")
    aux_weight: float = flag(0.4, "weight of the loss of UPerNet's auxiliary head", type=float, check=not_negative)
    sync_bn: bool = flag(True, "batch norms over all processes, on GPUs")

    def needs(self) -> Needs:
        return {"aux_weight": (self.head == "upernet", "without --head upernet")}


@dataclass(frozen=True)
class SegmentationDataOptions(Group):
    """Data"""

    data_set: str = flag("segmentation_folder", "ade20k, or a folder laid out like it with a classes.txt",
                         choices=DATA_SETS)
    data_path: str | None = flag(None, "the folder of images/ and annotations/", type=path, metavar="FOLDER")
    skip_bad_images: bool = flag(False, "skip images that cannot be read, and count them")
    exif_transpose: bool = flag(True, "turn images upright by their EXIF orientation; label files have none")
    parts_of: ClassVar[Mapping[str, str]] = MappingProxyType({"data_path": "data_set"})


@dataclass(frozen=True)
class SegmentationAugmentation(Group):
    """Augmentation"""

    input_size: int | tuple[int, int] = flag(512, "side of the training crop, or HEIGHTxWIDTH", type=image_size,
                                             metavar="PIXELS")
    scale_ratio: list[float] = flag([0.5, 2.0], "range of the random scale, of --short_side and --long_side",
                                    type=float, nargs=2, metavar=("MIN", "MAX"), check=check_range)
    hflip: float = flag(0.5, "probability of a horizontal flip", type=float, check=fraction)
    photometric: bool = flag(True, "distort brightness, contrast, saturation and hue")


@dataclass(frozen=True)
class ViewOptions(Group):
    """Size and views of evaluation"""

    short_side: int = flag(512, "images are scaled to fit with this shorter side", type=int, check=at_least(32))
    long_side: int = flag(2048, "and with this longer side", type=int, check=at_least(32))
    test_rounding: str = flag("none", "of sides that are no multiples of 32: stretch the image to the next ones, or "
                                      "pad it", choices=ROUNDINGS)
    crop: int | tuple[int, int] | None = flag(None, "see images in windows of this side, or HEIGHTxWIDTH (default: "
                                                    "whole)", type=image_size, metavar="PIXELS",
                                              check=lambda side: at_least(32)(min(_both(side))))
    stride: int | tuple[int, int] | None = flag(None, "from one window to the next (default: two thirds of --crop)",
                                                type=image_size, metavar="PIXELS")
    test_scales: list[float] = flag([1.0], "see images at several scales, and average the probabilities", type=float,
                                    nargs="+", metavar="RATIO",
                                    check=lambda ratios: next(filter(None, map(positive, ratios)), None))
    test_flip: bool = flag(False, "see images mirrored too")

    def check(self):
        if self.short_side > self.long_side:
            raise UsageError(f"--short_side {self.short_side} is above --long_side {self.long_side}")
        if self.stride is not None and self.crop is None:
            raise UsageError("--stride needs --crop, the side of the windows")
        if self.crop is not None and any(s > c for s, c in zip(self.step, self.window, strict=True)):
            raise UsageError("--stride is above --crop: the windows would leave out a part of the image")
        if not all(self.short_side * ratio >= 1 for ratio in self.test_scales):
            raise UsageError(f"--test_scales {min(self.test_scales):g} leaves no pixel of --short_side")

    @property
    def window(self) -> tuple[int, int] | None:
        """(height, width) of the windows."""
        return _both(self.crop)

    @property
    def step(self) -> tuple[int, int] | None:
        """From one window to the next, (vertical, horizontal)."""
        if self.crop is None or self.stride is not None:
            return _both(self.stride)
        height, width = self.window
        return max(1, height * 2 // 3), max(1, width * 2 // 3)


def _both(side: int | tuple[int, int] | None) -> tuple[int, int] | None:
    return (side, side) if isinstance(side, int) else side


@dataclass(frozen=True)
class SegmentationReport(Group):
    """Reports and pictures"""

    report: str | None = flag(None, "with --eval, write tables there: IoU and accuracy by class, the confusion matrix",
                              type=path, metavar="FOLDER")
    show_batch: str | None = flag(None, "write the first training images and their labels there, and train", type=path,
                                  metavar="FILE", check=check_picture)


@dataclass(frozen=True)
class SegmentationSettings(OnBackboneSettings):
    """All options of a run that trains or evaluates a segmenter."""

    data_is = "the folder of images/ and annotations/"
    evaluated = Settings.evaluated | {"model", "model_kwargs", "head", "head_channels", "extra_norms", "input_size"} | {
        field.name for group in (SegmentationDataOptions, ViewOptions) for field in fields(group)
    }
    decides_epoch = Settings.decides_epoch | {"data_set", "exif_transpose", "short_side", "long_side"} | {
        field.name for field in fields(SegmentationAugmentation)
    }
    model: SegmenterOptions
    data: SegmentationDataOptions
    augmentation: SegmentationAugmentation
    test: ViewOptions
    report: SegmentationReport

    most_used: ClassVar[tuple[str, ...]] = (
        "data_path", "data_set", "model", "head", "load_release", "input_size", "finetune", *Settings.most_used,
    )

    @property
    def name(self) -> str:
        return f"{self.model.head}_{self.model.model}"

