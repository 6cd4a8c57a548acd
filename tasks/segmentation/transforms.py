"""The published augmentation of ADE20K, and images as they are evaluated, on torchvision's transforms v2.

The steps and their numbers are those of mmsegmentation's pipeline: a random scale, a crop that no class fills, a flip,
photometric distortion, and padding. Pixels stay uint8; they are normalised on the device.
"""
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from PIL import Image
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from models.segmentation import EvalSize, resize

from .labels import IGNORE

# How often a crop is drawn again, and which share of its labelled pixels one class may have.
CROP_TRIES, MOST_OF_ONE = 10, 0.75
# Photometric distortion: brightness is shifted by at most so much of 255; contrast and saturation are multiplied; hue
# is turned by at most so much of the colour circle, 18 of OpenCV's 180 degrees. Each in half of the images.
BRIGHTNESS, CONTRAST, SATURATION, HUE = 32, (0.5, 1.5), (0.5, 1.5), 18 / 180


def _uniform(low: float, high: float) -> float:
    return torch.empty(()).uniform_(low, high).item()


def _integer(most: int) -> int:
    """0 to `most`, both included."""
    return int(torch.randint(most + 1, ()))


def _is_chosen() -> bool:
    return bool(torch.rand(()) < 0.5)


class RandomScale(v2.Transform):
    """Resize by a random ratio, so that the image fits with two sides, both multiplied by the ratio.

    Args:
        size: The sides.
        ratio: Smallest and largest ratio.
    """

    def __init__(self, size: EvalSize, ratio: Sequence[float]):
        super().__init__()
        self.size, self.ratio = replace(size, rounding="none"), tuple(ratio)

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        return dict(size=self.size.of(*v2.query_size(flat_inputs), _uniform(*self.ratio)))

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        if isinstance(inpt, tv_tensors.Mask):
            return F.resize(inpt, list(params["size"]))  # by nearest neighbours
        return tv_tensors.wrap(resize(inpt, params["size"]), like=inpt)


class CropOfSeveralClasses(v2.Transform):
    """A random crop, drawn again while one class covers too much of what is labelled in it.

    Args:
        size: (height, width) in pixels; of a smaller image all is kept.
    """

    def __init__(self, size: tuple[int, int]):
        super().__init__()
        self.size = size

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        (labels,) = (x for x in flat_inputs if isinstance(x, tv_tensors.Mask))
        box = self._draw(labels)
        for _ in range(CROP_TRIES):
            if not self._is_of_one(labels[..., box[0]:box[0] + box[2], box[1]:box[1] + box[3]]):
                break
            box = self._draw(labels)
        return dict(zip(("top", "left", "height", "width"), box, strict=True))

    def _draw(self, labels: torch.Tensor) -> tuple[int, int, int, int]:
        height, width = (min(side, crop) for side, crop in zip(labels.shape[-2:], self.size, strict=True))
        return _integer(labels.shape[-2] - height), _integer(labels.shape[-1] - width), height, width

    @staticmethod
    def _is_of_one(labels: torch.Tensor) -> bool:
        """Whether there are less than two classes, or one has most of what is labelled."""
        counts = np.bincount(labels.as_subclass(torch.Tensor).numpy().ravel(), minlength=IGNORE + 1)[:IGNORE]
        return counts.max() >= MOST_OF_ONE * counts.sum()

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        return F.crop(inpt, **params)


class PhotometricDistortion(v2.Transform):
    """Brightness, contrast, saturation and hue, each changed in half of the images; contrast comes first or last.

    torchvision's RandomPhotometricDistort multiplies the brightness, blends contrast with the mean of the image, and
    turns the hue half as far.
    """

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        contrast_first = _is_chosen()
        return dict(
            brightness=_uniform(-BRIGHTNESS, BRIGHTNESS) if _is_chosen() else 0.0,
            contrast=_uniform(*CONTRAST) if _is_chosen() else 1.0,
            contrast_first=contrast_first,
            saturation=_uniform(*SATURATION) if _is_chosen() else 1.0,
            hue=_uniform(-HUE, HUE) if _is_chosen() else 0.0,
        )

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        if not isinstance(inpt, tv_tensors.Image):
            return inpt
        pixels = distort(inpt.as_subclass(torch.Tensor), **params)
        return tv_tensors.wrap(pixels, like=inpt)


def distort(
    pixels: torch.Tensor, brightness: float, contrast: float, contrast_first: bool, saturation: float, hue: float
) -> torch.Tensor:
    """Pixels, (3, H, W) uint8, with `brightness` added, `contrast` and `saturation` multiplied and `hue` turned.

    Values are cut off at 0 and 255 after each step, and rounded at the end.
    """
    x = pixels.float()
    if brightness:
        x = (x + brightness).clamp_(0, 255)
    if contrast != 1 and contrast_first:
        x = (x * contrast).clamp_(0, 255)
    if saturation != 1:
        x = _saturate(x, saturation)
    if hue:
        x = F.adjust_hue(x / 255, hue) * 255
    if contrast != 1 and not contrast_first:
        x = (x * contrast).clamp_(0, 255)
    return x.round_().clamp_(0, 255).to(torch.uint8)


def _saturate(x: torch.Tensor, factor: float) -> torch.Tensor:
    """Multiply the saturation in HSV, at most to 1: the largest channel stays, the others move away from it."""
    value, least = x.amax(dim=0), x.amin(dim=0)
    most = value / (value - least).clamp_(min=1e-6)  # 1 / saturation
    return value - (value - x) * most.clamp(max=factor)


class PadTo(v2.Transform):
    """Pad at the right and the bottom: the image with a colour, its labels with `IGNORE`.

    Args:
        size: (height, width) in pixels.
        fill: The colour, 0 to 255. Of the mean of the images: normalised, it is 0 but for its rounding.
    """

    def __init__(self, size: tuple[int, int], fill: Sequence[int]):
        super().__init__()
        self.size, self.fill = size, list(fill)

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        height, width = inpt.shape[-2:]
        padding = [0, 0, max(0, self.size[1] - width), max(0, self.size[0] - height)]
        return F.pad(inpt, padding, fill=IGNORE if isinstance(inpt, tv_tensors.Mask) else self.fill)


@dataclass(frozen=True)
class Augmentation:
    """Which images a segmenter is trained on.

    Args:
        crop: (height, width) in pixels.
        size: The sides that an image is scaled to fit with.
        ratio: Range of the scale.
        flip: Probability of a horizontal flip.
        distortion: Distort brightness, contrast, saturation and hue.
    """

    crop: tuple[int, int]
    size: EvalSize
    ratio: Sequence[float] = (0.5, 2.0)
    flip: float = 0.5
    distortion: bool = True


class TrainTransform:
    """(PIL RGB image, (H, W) uint8 labels) -> uint8 (3, h, w) and (h, w) tensors: augmented, of the crop's size."""

    def __init__(self, augmentation: Augmentation, mean: Sequence[float]):
        self.steps = v2.Compose([
            RandomScale(augmentation.size, augmentation.ratio),
            CropOfSeveralClasses(augmentation.crop),
            v2.RandomHorizontalFlip(augmentation.flip),
            *([PhotometricDistortion()] if augmentation.distortion else []),
            PadTo(augmentation.crop, [round(255 * value) for value in mean]),
        ])

    def __call__(self, image: Image.Image, labels: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        image, mask = self.steps(tv_tensors.Image(F.pil_to_tensor(image)), tv_tensors.Mask(torch.from_numpy(labels)))
        return image.as_subclass(torch.Tensor), mask.as_subclass(torch.Tensor)


class Views:
    """(PIL RGB image, (H, W) uint8 labels or None) -> the image at each size of an evaluation, and its labels.

    Args:
        size: The size of evaluation.
        ratios: Of its sides, for a view each.
    """

    def __init__(self, size: EvalSize, ratios: Sequence[float] = (1.0,)):
        self.size, self.ratios = size, tuple(ratios)

    def __call__(
        self, image: Image.Image, labels: np.ndarray | None
    ) -> tuple[list[torch.Tensor], torch.Tensor | None]:
        """Returns [uint8 (3, h_i, w_i), ...], and the labels (H, W) as they are."""
        pixels = F.pil_to_tensor(image)
        views = [self.size.resized(pixels, ratio) for ratio in self.ratios]
        return views, None if labels is None else torch.from_numpy(labels)
