"""What is converted: images with their label files, the objects in these, and the data set that images make up."""
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from utils import UserError


class BadSampleError(UserError):
    """An image or its labels cannot be converted; names the file."""


@dataclass(frozen=True)
class Sample:
    """An image, its label file where it has one, and what is already known to be wrong with them."""

    image: Path
    label: Path | None = None
    problem: str | None = None


@dataclass(frozen=True)
class Picture:
    """The sides of an image in pixels, upright, and its (width, height) as stored."""

    width: int
    height: int
    stored: tuple[int, int]


@dataclass(frozen=True)
class Thing:
    """An object: its class, corners (x1, y1, x2, y2) in pixels, and polygon (x1, y1, x2, y2, x3, y3, ...)."""

    name: str
    corners: tuple[float, ...]
    polygon: tuple[float, ...] = ()
    is_crowd: bool = False

    def area(self) -> float:
        """The area of the polygon, by the shoelace formula, or else of the box."""
        if not self.polygon:
            x1, y1, x2, y2 = self.corners
            return (x2 - x1) * (y2 - y1)
        xs, ys = self.polygon[::2], self.polygon[1::2]
        return abs(sum(xs[i - 1] * ys[i] - xs[i] * ys[i - 1] for i in range(len(xs)))) / 2


# The objects in a label file of an image, and how many of them each of make_coco.py's `WARNINGS` is about.
Read = Callable[[Path, Picture], tuple[list[Thing], Counter[str]]]


@dataclass
class Source:
    """A data set to convert.

    Args:
        root: The folder that file names are relative to.
        splits: Split -> its images.
        names: Its classes in their order; None where they are those of its objects.
        read: Reads a label file.
    """

    root: Path
    splits: dict[str, list[Sample]]
    names: list[str] | None
    read: Read


@dataclass
class Converted:
    """An image with its objects."""

    sample: Sample
    picture: Picture
    things: list[Thing] = field(default_factory=list)
    warnings: Counter[str] = field(default_factory=Counter)
