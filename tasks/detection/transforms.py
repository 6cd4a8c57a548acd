"""The published augmentation of COCO, on torchvision's transforms v2; pixels stay uint8, the network normalises them.

The sizes and crops of `MultiScale` are those of DETR (https://arxiv.org/abs/2005.12872), with which Swin and ViTAEv2
were published.
"""
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from models.detection import fit, resize

from .coco import Target

# Shorter sides, the sides of crops, and shorter sides before a crop; all for a shorter side of 800.
SCALES = tuple(range(480, 801, 32))
CROP = (384, 600)
BEFORE_CROP = (400, 500, 600)
_FOR = 800


def _integer(low: int, high: int) -> int:
    """`low` to `high`, both included."""
    return int(torch.randint(low, high + 1, ()))


def _one_of(values: Sequence[int]) -> int:
    return values[_integer(0, len(values) - 1)]


class FitSides(v2.Transform):
    """Resize so that an image fits with its sides: its shorter one drawn, its longer one at most `long`.

    Args:
        shorts: What the shorter side is drawn from.
        long: Limit of the longer side.
    """

    def __init__(self, shorts: Sequence[int], long: int):
        super().__init__()
        self.shorts, self.long = tuple(shorts), long

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        return dict(size=fit(*v2.query_size(flat_inputs), _one_of(self.shorts), self.long))

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        if isinstance(inpt, tv_tensors.Image):
            return tv_tensors.wrap(resize(inpt, params["size"]), like=inpt)
        return F.resize(inpt, list(params["size"]))  # masks by the nearest pixel up and left, as OpenCV and published


class RandomSizeCrop(v2.Transform):
    """Crop a window whose sides are drawn, each by itself; of a smaller image all of that side is kept.

    Args:
        sides: Least and greatest.
    """

    def __init__(self, sides: tuple[int, int]):
        super().__init__()
        self.sides = sides

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        size = v2.query_size(flat_inputs)
        height, width = (_integer(min(side, self.sides[0]), min(side, self.sides[1])) for side in size)
        return dict(top=_integer(0, size[0] - height), left=_integer(0, size[1] - width), height=height, width=width)

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        return F.crop(inpt, **params)


class MultiScale(v2.Transform):
    """One of two, with equal chances: a drawn shorter side; or one of three shorter sides, a crop, and the former.

    Args:
        short, long: The sides of an evaluation; of the former, all sizes are as large as with 800.
    """

    def __init__(self, short: int, long: int):
        super().__init__()
        sizes = [max(1, round(scale * short / _FOR)) for scale in (*SCALES, *BEFORE_CROP, *CROP)]
        scales, before, crop = sizes[:len(SCALES)], sizes[len(SCALES):-2], sizes[-2:]
        self.plain = FitSides(scales, long)
        self.cropped = v2.Compose([FitSides(before, long), RandomSizeCrop(tuple(crop)), self.plain])

    def forward(self, *inputs: Any) -> Any:
        return (self.plain if torch.rand(()) < 0.5 else self.cropped)(*inputs)


class TrainTransform:
    """(PIL RGB image, Target) -> (uint8 (3, h, w), dict of boxes, labels and, where there are any, masks).

    Objects of which a crop has left nothing are gone.

    Args:
        short, long: The sides that an image is fitted with.
        multi_scale: Draw sizes and crops, see `MultiScale`.
        flip: Probability of a horizontal flip.
    """

    def __init__(self, short: int, long: int, multi_scale: bool = False, flip: float = 0.5):
        sizes = MultiScale(short, long) if multi_scale else FitSides([short], long)
        self.steps = v2.Compose([v2.RandomHorizontalFlip(flip), sizes])

    def __call__(self, image: Image.Image, target: Target) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        pixels = tv_tensors.Image(F.pil_to_tensor(image))
        boxes = tv_tensors.BoundingBoxes(torch.from_numpy(target.boxes), format="XYXY", canvas_size=image.size[::-1])
        parts = dict(boxes=boxes)
        if target.masks is not None:
            parts["masks"] = tv_tensors.Mask(torch.from_numpy(target.masks))
        pixels, parts = self.steps(pixels, parts)
        parts = {name: part.as_subclass(torch.Tensor) for name, part in parts.items()}
        parts["labels"] = torch.from_numpy(target.labels)
        is_left = (parts["boxes"][:, 2:] > parts["boxes"][:, :2]).all(dim=1)
        return pixels.as_subclass(torch.Tensor), {name: part[is_left] for name, part in parts.items()}


def to_sample(image: Image.Image, id: int | None) -> tuple[torch.Tensor, int | None]:
    """(PIL RGB image, its id) as it is evaluated: uint8 (3, H, W), which the network resizes."""
    return F.pil_to_tensor(image), id
