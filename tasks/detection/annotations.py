"""COCO-format annotations as published training takes them, checked, in arrays that data loading processes share.

Left out, as in mmdetection: crowd regions, and boxes that are not a pixel wide and high, or have no area.
"""
import pickle
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from utils import UserError, count, some

from .errors import BadAnnotationError, NoMasksError
from .files import problem_of_annotation, read_annotations
from .masks import problem_of_mask, problem_of_size, size_of, tidy

# Pixels of a box that must be in its image, in width and height: float32 must still tell its corners apart.
_LEAST = 0.01
# Names of what is left out, for a line about it.
_CROWD, _TINY, _BAD, _NO_MASK = "crowd region", "box without area", "bad annotation", "object without a mask"


class ImageEntry(NamedTuple):
    """An image of the annotations."""

    id: int
    file_name: str
    height: int
    width: int


@dataclass(frozen=True)
class Objects:
    """What there is to learn in an image.

    Args:
        boxes: (N, 4) float32 corners in pixels, within the image.
        labels: (N,) int64, from 1 in the order of the categories' ids.
        segmentations: Of each, as `masks.tidy` returns it; empty where masks are not asked for.
    """

    boxes: np.ndarray
    labels: np.ndarray
    segmentations: list[Any]

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Annotations:
    """The images, categories and objects of a file.

    Objects lie in arrays, image after image, and their segmentations as bytes: of as many Python objects, every data
    loading process would in time hold a copy.

    Args:
        path: The file.
        images: All of them, in the file's order.
        categories: Names by id, in ascending order of the ids.
        boxes, labels: Of all objects.
        starts: (images + 1,) index of the first object of each image.
        segmentations: Pickled lists, of each image that has objects.
        left_out: What was left out -> how often.
        content: The file's content without bad annotations, for scoring; None where it is not asked for.
    """

    path: Path
    images: list[ImageEntry]
    categories: dict[int, str]
    boxes: np.ndarray
    labels: np.ndarray
    starts: np.ndarray
    segmentations: "Pickles"
    left_out: Counter[str] = field(default_factory=Counter)
    content: dict[str, Any] | None = None

    def objects(self, index: int) -> Objects:
        """Those of the image at `index`."""
        of_image = slice(self.starts[index], self.starts[index + 1])
        return Objects(self.boxes[of_image], self.labels[of_image], self.segmentations[index])

    @property
    def bad(self) -> Counter[str]:
        """What of `left_out` could not be right."""
        return Counter({_BAD: self.left_out[_BAD]})

    @property
    def counts(self) -> np.ndarray:
        """(images,) objects of each."""
        return np.diff(self.starts)


class Pickles:
    """A list of values by index, each pickled, in one array of bytes."""

    def __init__(self, values: list[Any]):
        pickled = [pickle.dumps(value, pickle.HIGHEST_PROTOCOL) for value in values]
        self.ends = np.cumsum([0, *map(len, pickled)])
        self.content = np.frombuffer(b"".join(pickled), np.uint8)

    def __getitem__(self, index: int) -> Any:
        return pickle.loads(self.content[self.ends[index]:self.ends[index + 1]].tobytes())


def read(path: Path, with_masks: bool, skip_bad: bool = False, for_scoring: bool = False) -> Annotations:
    """The annotations of a COCO-format JSON.

    Args:
        path: The file.
        with_masks: Whether objects have masks.
        skip_bad: Leave bad annotations out, and count them, instead of raising an error.
        for_scoring: Keep the content of the file. All masks must then be there; in training, objects without are left
            out.

    Raises:
        BadAnnotationError: An annotation is of no image or category, or has a box or a segmentation that cannot be.
        NoMasksError: Masks are asked for, and none is there, or in scoring one is missing.
        UserError: It cannot be read, holds no annotations, or images or categories in it cannot be right.
    """
    content = read_annotations(path, check_each=False)
    categories, images = _categories(content, path), _images(content, path)
    places = {image.id: place for place, image in enumerate(images)}
    sort = _Sorting(images, places, {id: label for label, id in enumerate(categories, start=1)}, with_masks)
    kept, left_out, sound = [], Counter(), []
    for entry in content["annotations"]:
        try:
            found = sort(entry)
        except ValueError as error:
            if not skip_bad:
                raise BadAnnotationError(f"{path}: annotation {entry.get('id')} {error}") from None
            found = _BAD
        if for_scoring and found == _NO_MASK:
            if not skip_bad:
                raise NoMasksError(f"{path}: annotation {entry.get('id')} has no mask")
            found = _BAD
        if found != _BAD:
            sound.append(entry)
        if isinstance(found, str):
            left_out[found] += 1
        else:
            kept.append(found)
    if with_masks and not kept and left_out[_NO_MASK]:
        raise NoMasksError(f"{path} has boxes and no masks")
    kept.sort(key=lambda found: found[0])
    of_image = np.array([found[0] for found in kept], np.int64)
    return Annotations(
        path, images, categories,
        boxes=np.array([found[1] for found in kept], np.float32).reshape(-1, 4),
        labels=np.array([found[2] for found in kept], np.int64),
        starts=np.searchsorted(of_image, np.arange(len(images) + 1)),
        segmentations=_pickled([found[3] for found in kept] if with_masks else [], of_image, len(images)),
        left_out=left_out, content=dict(content, annotations=sound) if for_scoring else None,
    )


def _pickled(segmentations: list[Any], of_image: np.ndarray, images: int) -> Pickles:
    ends = np.searchsorted(of_image, np.arange(images + 1))
    return Pickles([segmentations[start:end] for start, end in pairwise(ends)])


def _categories(content: Mapping[str, Any], path: Path) -> dict[int, str]:
    found = content["categories"]
    if doubled := [x for x, number in Counter(category["name"] for category in found).items() if number > 1]:
        raise UserError(f"{path}: two categories have the name {some(doubled)}")
    return {category["id"]: category["name"] for category in sorted(found, key=lambda category: category["id"])}


def _images(content: Mapping[str, Any], path: Path) -> list[ImageEntry]:
    images = []
    for entry in content["images"]:
        image = ImageEntry(entry.get("id"), entry.get("file_name"), entry.get("height"), entry.get("width"))
        if not isinstance(image.file_name, str):
            raise UserError(f"{path}: image {image.id} has no file_name")
        if size_of(entry) is None:
            raise UserError(f"{path}: image {image.id} ({image.file_name}) has no width and height in pixels")
        images.append(image)
    if doubled := [x for x, number in Counter(image.file_name for image in images).items() if number > 1]:
        raise UserError(f"{path}: two images have the file_name {some(doubled)}")
    return images


@dataclass(frozen=True)
class _Sorting:
    """Annotation -> (place of its image, corners of its box, label, segmentation), or why it is left out.

    Raises ValueError, "has ...", where the annotation cannot be right.
    """

    images: list[ImageEntry]
    places: Mapping[int, int]
    labels: Mapping[int, int]
    with_masks: bool

    def __call__(self, entry: Mapping[str, Any]) -> tuple[int, tuple[float, ...], int, Any] | str:
        if problem := problem_of_annotation(entry, self.places, self.labels):
            raise ValueError(problem)
        place, label = self.places[entry["image_id"]], self.labels[entry["category_id"]]
        corners = _corners(entry["bbox"], self.images[place])
        segmentation = self._segmentation(entry, self.images[place]) if self.with_masks else None
        if entry.get("iscrowd"):
            return _CROWD
        if corners is None or entry.get("area", 1) <= 0:
            return _TINY
        if self.with_masks and segmentation is None:
            return _NO_MASK
        return place, corners, label, segmentation

    @staticmethod
    def _segmentation(entry: Mapping[str, Any], image: ImageEntry) -> Any:
        found = entry.get("segmentation")
        if not found:
            return None
        if problem := problem_of_mask(found) or problem_of_size(found, (image.height, image.width)):
            raise ValueError(problem)
        return tidy(found)


def _corners(box: list[float], image: ImageEntry) -> tuple[float, ...] | None:
    """The corners of the part of a box that is in its image; None where the box is not a pixel wide and high."""
    x, y, width, height = box
    left, top, right, bottom = max(x, 0), max(y, 0), min(x + width, image.width), min(y + height, image.height)
    if width >= 1 and height >= 1 and not (right - left > _LEAST and bottom - top > _LEAST):
        raise ValueError(f"has the box {box}, outside of its image {image.file_name} of {image.width} x {image.height}")
    return (left, top, right, bottom) if width >= 1 and height >= 1 else None


def describe(left_out: Counter[str]) -> str:
    """What was left out, for a line: "3 crowd regions, 1 box without area"; empty where nothing was."""
    plural = {_TINY: "boxes without area", _NO_MASK: "objects without a mask"}
    return ", ".join(
        f"{number} {plural[what]}" if number > 1 and what in plural else count(number, what)
        for what, number in left_out.items() if number
    )
