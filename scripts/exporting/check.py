"""Whether an exported file computes what PyTorch does on photographs, and how fast it is."""
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.datasets import load_sample_images
from torch import nn

from tasks.classification.images import ImagePipeline
from training.data.images import load_image

from .opened import Run

# Of the largest logit: far above float32's rounding, and what a route gives that rounding decides otherwise.
TOLERANCE = 1e-3
_ROUNDS, _WARM_UP = 5, 2


class Agreement(NamedTuple):
    """How far logits differ from PyTorch's, at most, beside the largest; and of how many images the first class is one.
    """

    difference: float
    largest: float
    alike: int
    total: int

    @property
    def holds(self) -> bool:
        return self.difference <= TOLERANCE * self.largest


def sample_photographs() -> Iterator[Image.Image]:
    """Two photographs that come with scikit-learn, of a temple and a flower, and a grid of crops of each."""
    for pixels in load_sample_images().images:
        photo = Image.fromarray(pixels)
        yield photo
        side = photo.height // 2
        for left in range(0, photo.width - side, side // 2):
            for top in (0, side // 2, side):
                yield photo.crop((left, top, left + side, top + side))


def prepare(paths: list[Path], images: ImagePipeline, exif_transpose: bool) -> torch.Tensor:
    """(B, 3, H, W) normalised: these photographs, or without any `sample_photographs`."""
    photos = (load_image(path, exif_transpose) for path in paths) if paths else sample_photographs()
    transform = images.transform()
    mean, std = (torch.tensor(images.config[name]).view(3, 1, 1) * 255 for name in ("mean", "std"))
    return torch.stack([(transform(photo).float() - mean) / std for photo in photos])


@torch.inference_mode()
def compare(network: nn.Module, run: Run, x: torch.Tensor, batch_size: int) -> Agreement:
    """The file beside the network, in batches of which the last may be smaller."""
    found, expected = (torch.cat([f(part) for part in x.split(batch_size)]) for f in (run, network))
    alike = int((found.argmax(1) == expected.argmax(1)).sum())
    return Agreement((found - expected).abs().max().item(), expected.abs().max().item(), alike, len(found))


def of_another_size(x: torch.Tensor) -> torch.Tensor:
    """The images at a size that differs in both sides, of which 32 divides neither."""
    height, width = x.shape[2:]
    return F.interpolate(x, size=(height + 37, width + 75), mode="bilinear")


@torch.inference_mode()
def images_per_second(runs: dict[str, Callable], x: torch.Tensor) -> dict[str, tuple[float, float, float]]:
    """Of each, the median, the slowest and the fastest of several rounds, taken in turns."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(_WARM_UP + _ROUNDS):
        for name, run in runs.items():
            start = time.perf_counter()
            run(x)
            if turn >= _WARM_UP:
                seconds[name].append(time.perf_counter() - start)
    speeds = {name: sorted(len(x) / taken for taken in times) for name, times in seconds.items()}
    return {name: (statistics.median(each), each[0], each[-1]) for name, each in speeds.items()}
