"""The images of a segmenter: whole, their shorter side at a size, and normalised."""
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from PIL import Image
from torchvision.transforms.v2 import functional as F

from .._images import fit, resize
from .._load import to_rgb

STRIDE = 32  # of the coarsest map


def round_up(height: int, width: int) -> tuple[int, int]:
    """The sides as the next multiples of `STRIDE`."""
    return -(-height // STRIDE) * STRIDE, -(-width // STRIDE) * STRIDE


@dataclass(frozen=True)
class EvalSize:
    """At which size an image is segmented.

    Args:
        short, long: The sides that it is fitted with.
        rounding: What is done about sides that are no multiples of 32: "none", "stretch" the image to the next ones, or
            "pad" it with zeros once it is normalised.
    """

    short: int = 512
    long: int = 2048
    rounding: str = "none"

    def of(self, height: int, width: int, ratio: float = 1.0) -> tuple[int, int]:
        """The height and width that an image of this shape is resized to; `ratio` scales both sides of the fit."""
        size = fit(height, width, int(self.short * ratio), int(self.long * ratio))
        return round_up(*size) if self.rounding == "stretch" else size

    def resized(self, image: torch.Tensor, ratio: float = 1.0) -> torch.Tensor:
        """(3, H, W) pixels at that size; as published, they are first resized in proportion, and then stretched."""
        image = resize(image, replace(self, rounding="none").of(*image.shape[-2:], ratio))
        return resize(image, round_up(*image.shape[-2:])) if self.rounding == "stretch" else image


@dataclass(frozen=True)
class SegmentationTransform:
    """PIL image of any mode with 8 bits -> normalised float tensor (3, h, w) at the size of evaluation.

    Args:
        size: That size.
        mean, std: What is subtracted from the values, 0 to 1, and what they are divided by.
        exif_transpose: Turn the image upright as its EXIF orientation says.
    """

    size: EvalSize
    mean: Sequence[float]
    std: Sequence[float]
    exif_transpose: bool = True

    def __call__(self, image: Image.Image) -> torch.Tensor:
        pixels = F.pil_to_tensor(to_rgb(image, self.exif_transpose))
        pixels = F.to_dtype(self.size.resized(pixels), torch.float32, scale=True)
        return F.normalize(pixels, list(self.mean), list(self.std))
