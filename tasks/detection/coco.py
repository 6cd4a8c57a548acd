"""COCO as downloaded, and any other data set with COCO-format annotations.

    ROOT/{train,val}2017/NAME.jpg
    ROOT/annotations/instances_{train,val}2017.json

Other files of annotations may have any place. Where they are not given, the usual names of them are looked for.
"""
import hashlib
import os
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from training.data.images import load_image
from utils import UserError, count, some, user_path

from . import annotations, masks
from .annotations import Annotations, ImageEntry
from .errors import BadAnnotationError, NoAnnotationsError, OtherSizeError

# Where the annotations of a split may lie; the last is Roboflow's.
PLACES = (
    "annotations/instances_{}2017.json", "annotations/instances_{}.json", "annotations/{}.json", "{}.json",
    "{}/_annotations.coco.json",
)  # fmt: skip
# Other names of splits.
_ALSO = dict(train=("training",), val=("valid", "validation"), test=("testing",))
# Shortest side of an image to train on, as in mmdetection.
SHORTEST = 32


class Target(NamedTuple):
    """What there is in an image, as transforms take it.

    Args:
        boxes: (N, 4) float32 corners.
        labels: (N,) int64 from 1.
        masks: (N, H, W) bool; None where they are not asked for.
    """

    boxes: np.ndarray
    labels: np.ndarray
    masks: np.ndarray | None


class CocoImages(Sequence):
    """(PIL RGB image, Target) by index: the images of a split to train on; or all of them, and their ids.

    An image is read upright, as its EXIF orientation says, unless its annotations are of its size as it is stored.

    Args:
        found: The annotations.
        folder: What the names of the files start from.
        indices: Which of the images.
        train: Whether their objects are given, or their ids.
        with_masks: Whether objects have masks.
        notes: What a user should know about them, a line each.

    Attributes:
        samples: (path, id) of each image.
    """

    def __init__(
        self, found: Annotations, folder: Path, indices: Sequence[int], train: bool, with_masks: bool,
        notes: Sequence[str] = (),
    ):
        self.found, self.folder, self.indices = found, folder, np.asarray(indices, np.int64)
        self.train, self.with_masks, self.notes = train, with_masks, list(notes)
        images = [found.images[index] for index in self.indices]
        self.samples = [(os.path.join(folder, image.file_name), image.id) for image in images]
        self.is_wide = np.array([image.width >= image.height for image in images], bool)

    @property
    def classes(self) -> list[str]:
        return list(self.found.categories.values())

    @cached_property
    def has_objects(self) -> bool:
        """Of all images and their ids: whether there is anything to find in them but crowds."""
        ids = {id for _, id in self.samples}
        return any(not entry.get("iscrowd") and entry["image_id"] in ids for entry in self.found.content["annotations"])

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> tuple[Image.Image, Target | int]:
        """Raises UnreadableFileError where a file is no intact image, or of another size than its annotations say."""
        place = self.indices[index]
        entry, path = self.found.images[place], self.samples[index][0]
        image = _load(path, entry)
        return image, self._target(place, entry) if self.train else entry.id

    def _target(self, place: int, entry: ImageEntry) -> Target:
        objects = self.found.objects(place)
        if not self.with_masks:
            return Target(objects.boxes, objects.labels, None)
        pixels = [masks.rasterize(x, entry.height, entry.width) for x in objects.segmentations]
        shape = (len(pixels), entry.height, entry.width)
        return Target(objects.boxes, objects.labels, np.stack(pixels) if pixels else np.zeros(shape, bool))

    def fingerprint(self) -> str:
        """A hash of the images' names, ids and sizes, of their objects, and of the classes."""
        found = self.found
        text = repr([[found.images[index] for index in self.indices], found.categories])
        arrays = (found.boxes, found.labels, found.starts, found.segmentations.content)
        parts = (text.encode("utf-8", "backslashreplace"), *(array.tobytes() for array in arrays))
        return hashlib.sha256(b"\0".join(parts)).hexdigest()


def _load(path: str, entry: ImageEntry) -> Image.Image:
    size = (entry.width, entry.height)
    image = load_image(path)
    if image.size != size and image.size == size[::-1]:
        image = load_image(path, exif_transpose=False)
    if image.size != size:
        raise OtherSizeError(f"{path}: is {image.width} x {image.height}, and its annotations (image {entry.id}) are "
                             f"of {entry.width} x {entry.height}")
    return image


def find_annotations(root: Path, split: str, given: str | None) -> Path:
    """The file of annotations of a split, "train", "val" or "test", in a folder; or the file that was given.

    Raises:
        NoAnnotationsError: There are none.
    """
    if given is not None:
        path = user_path(given)
        return path if path.is_file() or not (root / path).is_file() else root / path
    places = [root / place.format(name) for name in (split, *_ALSO[split]) for place in PLACES]
    if found := [place for place in places if place.is_file()]:
        return found[0]
    expected = some([place.format(split) for place in PLACES])
    raise NoAnnotationsError(f"{root} has no annotations of the split {split}: expected one of {expected}")


def find_folder(root: Path, split: str, found: Annotations) -> Path:
    """The folder that the file names of annotations start from: the one that most of some have a file below.

    Folders named as the annotations or as the split come before others.

    Raises:
        UserError: No folder has any.
    """
    names = dict.fromkeys([found.path.stem.removeprefix("instances_"), f"{split}2017", split, *_ALSO[split]])
    places = [folder / name for name in names for folder in (root, root / "images")]
    places += [root / "images", root, found.path.parent]
    step = -(-len(found.images) // 20)
    looked_at = [image.file_name for image in found.images[::step]]
    hits = [sum((place / name).is_file() for name in looked_at) for place in places]
    if not any(hits):
        raise UserError(f"no image of {found.path} is there: {looked_at[0]}, for example, is in none of "
                        f"{some(list(map(str, dict.fromkeys(places))), len(places))}")
    return places[hits.index(max(hits))]


def _missing(folder: Path, images: Sequence[ImageEntry]) -> list[int]:
    """Indices of the images without a file. Lists each folder once: an answer for each file may take a while."""
    parents = {os.path.dirname(image.file_name) for image in images}
    there = {parent: set(_names(folder / parent)) for parent in parents}
    return [
        index for index, image in enumerate(images)
        if os.path.basename(image.file_name) not in there[os.path.dirname(image.file_name)]
    ]


def _names(folder: Path) -> list[str]:
    try:
        return os.listdir(folder)
    except OSError:
        return []


def open_coco(
    root: str, split: str, given: str | None, train: bool, with_masks: bool, skip_bad: bool
) -> CocoImages:
    """The images of a split.

    Args:
        root: The folder of the data set.
        split: "train", "val" or "test".
        given: The file of its annotations; None for the usual names.
        train: Whether to give what is trained on: images with objects, and these; else all images, and their ids.
        with_masks: Whether objects have masks.
        skip_bad: Leave bad annotations and images without a file out, instead of raising an error.

    Raises:
        BadAnnotationError: An annotation cannot be right, or images have no file.
        UserError: As `annotations.read`; or there is no image, or none with objects to train on.
    """
    folder = user_path(root)
    if not folder.is_dir():
        raise UserError(f"data folder {folder} {'is not a folder' if folder.exists() else 'does not exist'}")
    path = find_annotations(folder, split, given)
    found = annotations.read(path, with_masks, skip_bad, for_scoring=not train)
    place = find_folder(folder, split, found)
    missing = _missing(place, found.images)
    if missing and not skip_bad:
        first = found.images[missing[0]]
        raise BadAnnotationError(f"{count(len(missing), 'image')} of {path} not in {place}: {first.file_name} (image "
                                 f"{first.id}), for example")
    is_used = np.ones(len(found.images), bool)
    is_used[missing] = False
    left_out = {"image without a file": len(missing)}
    if train:
        is_small = np.array([min(image.height, image.width) < SHORTEST for image in found.images])
        is_empty = found.counts == 0
        left_out["image without objects"] = int((is_used & is_empty).sum())
        left_out[f"image of less than {SHORTEST} pixels"] = int((is_used & ~is_empty & is_small).sum())
        is_used &= ~is_empty & ~is_small
    if not is_used.any():
        raise UserError(f"{path} has no image {'with an object to learn' if train else 'with a file'}")
    return CocoImages(found, place, is_used.nonzero()[0], train, with_masks, [_note(found, is_used, left_out, train)])


def _note(found: Annotations, is_used: np.ndarray, left_out: dict[str, int], train: bool) -> str:
    number, objects = int(is_used.sum()), int(found.counts[is_used].sum())
    line = f"{found.path}: {count(number, 'image')}, {count(objects, 'object')}"
    # An evaluation knows what crowd regions are.
    reasons = annotations.describe((found.left_out if train else found.bad) | left_out)
    return f"{line}; left out: {reasons}" if reasons else line
