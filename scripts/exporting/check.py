"""Whether an exported file computes what PyTorch does on photographs, and how fast it is."""
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.utils.data import Dataset

from tasks.classification.images import ImagePipeline
from training.data.images import load_image

from .opened import Run

# Of the largest logit: far above float32's rounding, and what a route gives that rounding decides otherwise.
TOLERANCE = 1e-3
# Of the images, those whose first class has to stay the same in int8.
LEAST_ALIKE = 0.9
UNLABELLED = -1
_ROUNDS, _WARM_UP = 5, 2
Batch = tuple[torch.Tensor, torch.Tensor]


@dataclass
class Agreement:
    """A file beside the network that it was written from, on a number of images.

    Args:
        difference: The largest difference between logits.
        largest: The largest logit of the network.
        alike: Images that have the same class first.
        total: Images.
        labelled: Images whose class is known.
        correct: Those of them that the file classifies correctly.
        correct_before: Those of them that the network does.
        size: (height, width) of the images.
    """

    difference: float = 0.0
    largest: float = 0.0
    alike: int = 0
    total: int = 0
    labelled: int = 0
    correct: int = 0
    correct_before: int = 0
    size: tuple[int, int] = (0, 0)

    def add(self, found: torch.Tensor, expected: torch.Tensor, labels: torch.Tensor):
        """Count a batch: logits (B, classes) of the file and of the network, and labels (B,), UNLABELLED or a class."""
        first, first_before = found.argmax(1), expected.argmax(1)
        # A logit that is no number differs without limit.
        difference = (found - expected).abs().nan_to_num(nan=torch.inf, posinf=torch.inf)
        self.difference = max(self.difference, difference.max().item())
        self.largest = max(self.largest, expected.abs().max().item())
        self.alike += int((first == first_before).sum())
        self.total += len(found)
        self.labelled += int((labels != UNLABELLED).sum())
        self.correct += int((first == labels).sum())
        self.correct_before += int((first_before == labels).sum())

    @property
    def accuracy(self) -> float:
        """Of the file, in percent."""
        return 100 * self.correct / self.labelled

    @property
    def accuracy_before(self) -> float:
        """Of the network, in percent."""
        return 100 * self.correct_before / self.labelled

    def holds(self, precision: str) -> bool:
        """Whether a file of this precision differs no more than it may."""
        if precision == "int8":
            return self.alike >= LEAST_ALIKE * self.total
        return self.difference <= TOLERANCE * self.largest


def sample_photographs() -> Iterator[Image.Image]:
    """Two photographs that come with scikit-learn, of a temple and a flower, and a grid of crops of each."""
    from sklearn.datasets import load_sample_images  # slow to import, and scripts/benchmark.py runs without it

    for pixels in load_sample_images().images:
        photo = Image.fromarray(pixels)
        yield photo
        side = photo.height // 2
        for left in range(0, photo.width - side, side // 2):
            for top in (0, side // 2, side):
                yield photo.crop((left, top, left + side, top + side))


class Photographs(Dataset):
    """(uint8 (3, H, W), label) of image files or, without any, of `sample_photographs`.

    The label is the index among `label_names` of the folder that an image lies in, or UNLABELLED.
    """

    def __init__(self, paths: list[Path], images: ImagePipeline, exif_transpose: bool, label_names: list[str] = ()):
        self.photos = paths or list(sample_photographs())
        self.transform, self.exif_transpose = images.transform(), exif_transpose
        self.labels = {name: label for label, name in enumerate(label_names)}

    def __len__(self) -> int:
        return len(self.photos)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        photo = self.photos[index]
        if not isinstance(photo, Path):
            return self.transform(photo), UNLABELLED
        return self.transform(load_image(photo, self.exif_transpose)), self.labels.get(photo.parent.name, UNLABELLED)


def at_another_size(found: Iterable[Batch]) -> Iterator[Batch]:
    """The images at a size that differs in both sides, of which 32 divides neither."""
    for x, labels in found:
        height, width = x.shape[2:]
        yield F.interpolate(x, size=(height + 37, width + 75), mode="bilinear"), labels


@torch.inference_mode()
def compare(network: nn.Module, run: Run, found: Iterable[Batch]) -> Agreement:
    """The file beside the network, batch by batch; the first image alone, which some programs do not take."""
    agreement = Agreement()
    for number, batch in enumerate(found):
        sizes = [1, len(batch[0]) - 1] if number == 0 and len(batch[0]) > 1 else [len(batch[0])]
        for x, labels in zip(*(values.split(sizes) for values in batch), strict=True):
            agreement.size = tuple(x.shape[2:])
            agreement.add(run(x), network(x), labels)
    return agreement


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
