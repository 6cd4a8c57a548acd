"""The labels of whole images: at one size or several, at once or in windows, and mirrored."""
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from models.segmentation import round_up
from training.precision import Precision
from training.task import refusal

from ..errors import UnfitImageError
from .options import ViewOptions

# Values of a tensor of logits at the size of an image: 0.25 GB in float32.
_MOST_VALUES = 2**26
# Windows of one forward pass.
_WINDOWS = 8


@dataclass(frozen=True)
class Inference:
    """How a segmenter's labels of an image are found.

    Args:
        mean, std: What is subtracted from pixels, 0 to 1, and what they are divided by.
        precision: Of the network.
        pads: Pad what the network sees with zeros, to sides that are multiples of 32.
        crop: (height, width) of the windows in which an image is seen; None for the whole of it.
        stride: From one window to the next, (vertical, horizontal).
        flip: See each view mirrored too.
    """

    mean: Sequence[float]
    std: Sequence[float]
    precision: Precision
    pads: bool = False
    crop: tuple[int, int] | None = None
    stride: tuple[int, int] | None = None
    flip: bool = False

    @classmethod
    def of(cls, options: ViewOptions, config: dict[str, Any], precision: Precision) -> "Inference":
        """What the options of a run say; `config` has the mean and std of its model."""
        pads = options.test_rounding == "pad"
        return cls(config["mean"], config["std"], precision, pads, options.window, options.step, options.test_flip)

    def labels(self, network: nn.Module, views: Sequence[torch.Tensor], size: tuple[int, int]) -> torch.Tensor:
        """The class of each pixel of an image.

        Of several views, or mirrored ones, the probabilities at the size of the image are averaged.

        Args:
            network: (B, 3, H, W) -> (B, classes, H / 4, W / 4) logits, in evaluation mode.
            views: The image at each size that it is to be seen at: uint8 (3, h, w), on the network's device.
            size: (height, width) of what is returned.

        Returns:
            int64 (height, width) class indices; all -1 where an output is NaN or infinite.

        Raises:
            UnfitImageError: The network does not take an image of this size.
        """
        with refusal(UnfitImageError, f"the network cannot take an image of {size[0]} x {size[1]} pixels"):
            return self._labels(network, views, size)

    def _labels(self, network: nn.Module, views: Sequence[torch.Tensor], size: tuple[int, int]) -> torch.Tensor:
        images = [self._normalize(view) for view in views]
        if len(images) == 1 and not self.flip:
            logits = self._logits(network, images[0])
            return _largest(logits, size) if logits.isfinite().all() else logits.new_full(size, -1, dtype=torch.int64)
        total, is_finite = None, True
        for image in images:
            for flips in ([False, True] if self.flip else [False]):
                logits = self._logits(network, image.flip(3) if flips else image)
                is_finite = is_finite & logits.isfinite().all()
                total = _add(total, _softmax(_resize(logits.flip(3) if flips else logits, size)))
        return total[0].argmax(dim=0) if is_finite else total.new_full(size, -1, dtype=torch.int64)

    def _normalize(self, view: torch.Tensor) -> torch.Tensor:
        """uint8 (3, h, w) -> (1, 3, h, w)."""
        mean, std = (torch.tensor(x, device=view.device).view(3, 1, 1) for x in (self.mean, self.std))
        return ((view / 255 - mean) / std)[None]

    def _logits(self, network: nn.Module, image: torch.Tensor) -> torch.Tensor:
        """(1, 3, h, w) -> float32 (1, classes, h, w)."""
        if self.crop is None:
            return self._of_window(network, image)
        total, seen = 0, image.new_zeros(1, 1, *image.shape[2:])
        boxes = list(windows(image.shape[2:], self.crop, self.stride or self.crop))
        for start in range(0, len(boxes), _WINDOWS):
            some = boxes[start:start + _WINDOWS]
            logits = self._of_window(network, torch.cat([image[..., rows, columns] for rows, columns in some]))
            if not start:
                total = logits.new_zeros(1, logits.shape[1], *image.shape[2:])
            for of_window, (rows, columns) in zip(logits, some, strict=True):
                total[..., rows, columns] += of_window
                seen[..., rows, columns] += 1
        return total / seen

    def _of_window(self, network: nn.Module, images: torch.Tensor) -> torch.Tensor:
        """(B, 3, h, w) -> float32 (B, classes, h, w), of which it may be padded."""
        height, width = images.shape[2:]
        if self.pads:
            padded = round_up(height, width)
            images = F.pad(images, (0, padded[1] - width, 0, padded[0] - height))
        logits = network(self.precision.arrange(images)).float()
        return _resize(logits, images.shape[2:])[..., :height, :width]


def windows(size: Sequence[int], crop: tuple[int, int], stride: tuple[int, int]) -> Iterator[tuple[slice, slice]]:
    """Windows that cover an image of `size`, (height, width): each of the crop's size, or the image's where it is less.

    The last ones of a row and of a column end with the image.
    """
    starts = []
    for side, window, step in zip(size, crop, stride, strict=True):
        number = -(-max(side - window, 0) // step) + 1
        starts.append([max(0, min(i * step, side - window)) for i in range(number)])
    for top in starts[0]:
        for left in starts[1]:
            yield slice(top, min(top + crop[0], size[0])), slice(left, min(left + crop[1], size[1]))


def _resize(logits: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
    return F.interpolate(logits, tuple(size), mode="bilinear", align_corners=False)


def _softmax(logits: torch.Tensor) -> torch.Tensor:
    """Probabilities in the place of (1, classes, h, w) logits, which of many classes fill gigabytes."""
    for rows in logits.split(max(1, _MOST_VALUES // logits[:, :, 0].numel()), dim=2):
        rows.copy_(rows.softmax(dim=1))
    return logits


def _add(total: torch.Tensor | None, values: torch.Tensor) -> torch.Tensor:
    return values if total is None else total.add_(values)


def _largest(logits: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """The class of the largest of (1, classes, h, w) logits at another size, some classes at a time."""
    at_once = max(1, _MOST_VALUES // (size[0] * size[1]))
    values = classes = None
    for start in range(0, logits.shape[1], at_once):
        found = _resize(logits[:, start:start + at_once], size)[0].max(dim=0)
        if values is None:
            values, classes = found
            continue
        is_larger = found.values > values
        classes = torch.where(is_larger, found.indices + start, classes)
        values = torch.where(is_larger, found.values, values)
    return classes
