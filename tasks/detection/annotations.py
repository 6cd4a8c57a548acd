"""COCO-format annotations as published training takes them, checked, in arrays that data loading processes share.

Left out, as in mmdetection: crowd regions, and boxes that are not a pixel wide and high, or have no area.
"""
import json
from array import array
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from utils import UserError, count, some

from .errors import BadAnnotationError, MissingMaskError, NoMasksError
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
        segmentations: Of each, as `masks.tidy` returns it; None where masks are not asked for.
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
        segmentations: As `masks.tidy` returns them, of all objects; None where masks are not asked for.
        left_out: What was left out -> how often.
        content: The file's content without bad annotations, for scoring; None where it is not asked for.
    """

    path: Path
    images: list[ImageEntry]
    categories: dict[int, str]
    boxes: np.ndarray
    labels: np.ndarray
    starts: np.ndarray
    segmentations: "Packed"
    left_out: Counter[str] = field(default_factory=Counter)
    content: dict[str, Any] | None = None

    def objects(self, index: int) -> Objects:
        """Those of the image at `index`."""
        start, end = self.starts[index], self.starts[index + 1]
        segmentations = [self.segmentations[i] for i in range(start, end)]
        return Objects(self.boxes[start:end], self.labels[start:end], segmentations)

    @property
    def bad(self) -> Counter[str]:
        """What of `left_out` could not be right."""
        return Counter({_BAD: self.left_out[_BAD]})

    @property
    def counts(self) -> np.ndarray:
        """(images,) objects of each."""
        return np.diff(self.starts)


class Packed:
    """Values of JSON by index, as texts in one array of bytes."""

    def __init__(self, texts: Sequence[bytes]):
        self.ends = np.cumsum([0, *map(len, texts)])
        self.content = np.frombuffer(b"".join(texts), np.uint8)

    def __getitem__(self, index: int) -> Any:
        return json.loads(self.content[self.ends[index]:self.ends[index + 1]].tobytes())


class _Found(NamedTuple):
    """An object: place of its image, corners of its box, label, segmentation or None."""

    place: int
    corners: tuple[float, ...]
    label: int
    segmentation: Any


class _Kept:
    """Objects as they are found, in little memory."""

    def __init__(self):
        self.places, self.corners, self.labels, self.segmentations = array("q"), array("f"), array("q"), []

    def add(self, found: _Found):
        self.places.append(found.place)
        self.corners.extend(found.corners)
        self.labels.append(found.label)
        self.segmentations.append(json.dumps(found.segmentation).encode())

    def by_image(self, images: int) -> dict[str, Any]:
        """Arrays and segmentations, image after image, as `Annotations` has them."""
        places = np.array(self.places, np.int64)
        order = np.argsort(places, kind="stable")
        return dict(
            boxes=np.array(self.corners, np.float32).reshape(-1, 4)[order],
            labels=np.array(self.labels, np.int64)[order],
            starts=np.searchsorted(places[order], np.arange(images + 1)),
            segmentations=Packed([self.segmentations[index] for index in order]),
        )


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
        NoMasksError: Masks are asked for, and none is there; in scoring MissingMaskError, where one is missing.
        UserError: It cannot be read, is no file of annotations, or images or categories in it cannot be right.
    """
    content = read_annotations(path, check_each=False)
    categories, images = _categories(content, path), _images(content, path)
    sort = _Sorting(
        images, {image.id: place for place, image in enumerate(images)},
        {id: label for label, id in enumerate(categories, start=1)}, with_masks, for_scoring,
    )
    kept, left_out, sound, entries = _Kept(), Counter(), [], content["annotations"]
    for index, entry in enumerate(entries):
        entries[index] = None  # of a million of them, memory is freed as they are read
        try:
            found = sort(entry)
        except BadAnnotationError as error:
            if not skip_bad:
                raise type(error)(f"{path}: annotation {entry.get('id')} {error}") from None
            left_out[_BAD] += 1
            continue
        if for_scoring:
            sound.append(entry)
        if isinstance(found, str):
            left_out[found] += 1
        else:
            kept.add(found)
    if with_masks and not kept.labels and left_out[_NO_MASK]:
        raise NoMasksError(f"{path} has boxes and no masks")
    names = [dict(id=id, name=name) for id, name in categories.items()]
    content = dict(images=content["images"], annotations=sound, categories=names) if for_scoring else None
    return Annotations(path, images, categories, **kept.by_image(len(images)), left_out=left_out, content=content)


def _categories(content: Mapping[str, Any], path: Path) -> dict[int, str]:
    """Names by id; of two of one name, that which annotations have: Roboflow's files begin with one for all of them."""
    found = sorted(content["categories"], key=lambda category: category["id"])
    doubled = {name for name, number in Counter(category["name"] for category in found).items() if number > 1}
    if doubled:
        used = {entry.get("category_id") for entry in content["annotations"]}
        found = [category for category in found if category["name"] not in doubled or category["id"] in used]
        if len({category["name"] for category in found}) < len(found):
            raise UserError(f"{path}: two categories have the name {some(sorted(doubled))}")
    return {category["id"]: category["name"] for category in found}


def _images(content: Mapping[str, Any], path: Path) -> list[ImageEntry]:
    images = []
    for entry in content["images"]:
        name, size = entry.get("file_name"), size_of(entry)
        if not isinstance(name, str):
            raise UserError(f"{path}: image {entry['id']} has no file_name")
        if size is None:
            raise UserError(f"{path}: image {entry['id']} ({name}) has no width and height in pixels")
        images.append(ImageEntry(entry["id"], name.replace("\\", "/"), *size))  # of tools on Windows
    if doubled := [x for x, number in Counter(image.file_name for image in images).items() if number > 1]:
        raise UserError(f"{path}: two images have the file_name {some(doubled)}")
    return images


@dataclass(frozen=True)
class _Sorting:
    """Annotation -> an object, or why it is left out.

    Raises BadAnnotationError, "has ...", where the annotation cannot be right; in scoring, MissingMaskError where it
    has no mask.
    """

    images: list[ImageEntry]
    places: Mapping[int, int]
    labels: Mapping[int, int]
    with_masks: bool
    for_scoring: bool

    def __call__(self, entry: Mapping[str, Any]) -> _Found | str:
        if problem := problem_of_annotation(entry, self.places, self.labels):
            raise BadAnnotationError(problem)
        place, label = self.places[entry["image_id"]], self.labels[entry["category_id"]]
        corners = _corners(entry["bbox"], self.images[place])
        segmentation = self._segmentation(entry, self.images[place]) if self.with_masks else None
        has_no_mask = self.with_masks and segmentation is None
        if entry.get("iscrowd"):
            return _CROWD
        if has_no_mask and self.for_scoring:
            raise MissingMaskError("has no mask")
        if corners is None or entry.get("area") == 0:
            return _TINY
        return _NO_MASK if has_no_mask else _Found(place, corners, label, segmentation)

    @staticmethod
    def _segmentation(entry: Mapping[str, Any], image: ImageEntry) -> Any:
        found = entry.get("segmentation")
        if not found:
            return None
        if problem := problem_of_mask(found) or problem_of_size(found, (image.height, image.width)):
            raise BadAnnotationError(problem)
        return tidy(found)


def _corners(box: list[float], image: ImageEntry) -> tuple[float, ...] | None:
    """The corners of the part of a box that is in its image; None where the box is not a pixel wide and high."""
    x, y, width, height = box
    left, top, right, bottom = max(x, 0), max(y, 0), min(x + width, image.width), min(y + height, image.height)
    if width >= 1 and height >= 1 and not (right - left > _LEAST and bottom - top > _LEAST):
        raise BadAnnotationError(f"has the box {box}, outside of its image {image.file_name} of {image.width} x "
                                 f"{image.height}")
    return (left, top, right, bottom) if width >= 1 and height >= 1 else None


def describe(left_out: Mapping[str, int]) -> str:
    """What was left out, for a line: "3 crowd regions, 1 box without area"; empty where nothing was."""
    plural = {_TINY: "boxes without area", _NO_MASK: "objects without a mask"}
    return ", ".join(
        f"{number} {plural[what]}" if number > 1 and what in plural else count(number, what)
        for what, number in left_out.items() if number
    )
