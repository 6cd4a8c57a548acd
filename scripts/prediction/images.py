"""The images that are to be predicted, in batches; one that cannot be read says why."""
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from timm.data.loader import fast_collate
from torch.utils.data import Dataset

import datasets
from training.data import files
from training.data.images import load_image
from utils import UserError, printable


@dataclass(frozen=True)
class Places:
    """Of the images of a batch, their indices, and why they could not be read; goes where targets go in training."""

    indices: list[int]
    errors: list[str]

    def to(self, *args: Any, **kwargs: Any) -> "Places":
        return self


class Images(Dataset):
    """(transformed image, its index, "") of files; where one cannot be read, a black image, its index, and the reason.
    """

    def __init__(self, paths: list[Path], transform: datasets.Transform, exif_transpose: bool = True):
        self.paths, self.transform, self.exif_transpose = paths, transform, exif_transpose

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Any, int, str]:
        try:
            return self.transform(load_image(self.paths[index], self.exif_transpose)), index, ""
        except UserError as error:
            return self.transform(Image.new("RGB", (256, 256))), index, str(error)


def collate(samples: list[tuple[Any, int, str]]) -> tuple[torch.Tensor, Places]:
    """Samples of `Images` -> uint8 (B, 3, H, W), and whose they are."""
    images, indices, errors = zip(*samples, strict=True)
    return fast_collate([(image, 0) for image in images])[0], Places(list(indices), list(errors))


def find_images(places: list[Path]) -> list[Path]:
    """The files that were named, and the images in the folders that were, at any depth, in order.

    Raises:
        UserError: There is none.
    """
    found, empty = [], []
    for place in places:
        if not place.exists():
            raise UserError(f"{place}: no such file or folder")
        if not place.is_dir():
            found.append(place)
            continue
        inside = files.find_images(place)
        found += map(Path, inside.images)
        empty += [] if inside.images else [place]
        if left_out := files.describe_left_out(inside.left_out, place):
            print(left_out, file=sys.stderr)
    no_image = f"no image in {', '.join(map(str, empty))}; endings are {', '.join(files.IMAGE_EXTENSIONS)}"
    if not found:
        raise UserError(no_image)
    if empty:
        print(printable(no_image), file=sys.stderr)
    return found


class Prediction(NamedTuple):
    """An image, and its (class, share) pairs, the largest first; or why it could not be read.

    The share of a class is its probability, of a segmenter the part of the image that it covers, and of a detector the
    score of an object of it; `more` objects have lower ones.
    """

    path: Path
    guesses: list[tuple[str, float | None]]
    error: str = ""
    more: int = 0

    @property
    def text(self) -> str:
        """What is printed of the image: "cat 98.7 %, dog 91.2 % and 3 more"."""
        listed = ", ".join(f"{name} {100 * share:.1f} %" for name, share in self.guesses)
        return f"{listed} and {self.more} more" if self.more else listed or "nothing found"
