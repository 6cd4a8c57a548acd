"""Folders of images and label files: ADE20K (SceneParse150) as downloaded, and any other laid out like it.

    ROOT/images/{training,validation,test}/NAME.jpg
    ROOT/annotations/{training,validation,test}/NAME.png
    ROOT/classes.txt                                     a class a line, the first has the value 1; 0 is not labelled

Images may lie in folders of any depth; the label file of an image has its path and name. ADE20K has objectInfo150.txt
in the place of classes.txt.
"""
import hashlib
import os
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image

from training.data.files import describe_left_out, find_images, list_folder
from training.data.images import UnreadableFileError, load_image, reading
from utils import UserError, count, some, user_path

from .classes import about_names, read_classes
from .errors import TurnedImageError
from .labels import IGNORE, LabelError, read_label

# ADE20K's name of each split, and another that is taken too.
FOLDERS = dict(train=("training", "train"), val=("validation", "val"), test=("test", "testing"))
# Label files that are read when a data set is opened: two seconds of ADE20K's.
_LOOKED_AT = 500


class SegmentationFolder(Sequence):
    """(PIL RGB image, (H, W) uint8 labels) by index.

    Args:
        root: The folder of the data set.
        split: "train", "val" or "test".
        classes: Names of the classes.
        exif_transpose: Turn images upright as their EXIF orientation says; label files have none.

    Attributes:
        root, labels: The folders of the split's images and of its label files.
        samples: (path of the image, path of its label file) of each image.
        notes: What a user should know about them, a line each.

    Raises:
        UserError: There is no such folder, an image has no label file, or there is no image.
    """

    def __init__(self, root: Path, split: str, classes: list[str], exif_transpose: bool = True):
        self.classes, self.exif_transpose = classes, exif_transpose
        self.root, self.labels = (_split_folder(root, kind, split) for kind in ("images", "annotations"))
        found = find_images(self.root)
        self.samples = [(image, str(_label_of(image, self.root, self.labels))) for image in found.images]
        missing = [image for image, label in self.samples if not os.path.isfile(label)]
        if missing:
            expected = _label_of(missing[0], self.root, self.labels)
            jpeg = " (it is there as JPEG, which changes the values)" if expected.with_suffix(".jpg").is_file() else ""
            raise UserError(f"{count(len(missing), 'image')} of {self.root} without a label file: {expected}{jpeg} for "
                            f"{missing[0]}, for example")
        if not self.samples:
            raise UserError(f"{self.root} holds no image")
        if doubled := [label for label, number in Counter(label for _, label in self.samples).items() if number > 1]:
            pair = [image for image, label in self.samples if label == doubled[0]]
            raise UserError(f"{some(pair, 2)} have one label file, {doubled[0]}")
        self.notes = [note for note in (describe_left_out(found.left_out, self.root), self._about_palettes()) if note]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Image.Image, np.ndarray]:
        """Raises UnreadableFileError where a file is no intact image, LabelError where a label file does not fit."""
        path, label_path = self.samples[index]
        image = load_image(path, self.exif_transpose)
        size = image.size[::-1]
        try:
            return image, read_label(Path(label_path), len(self.classes), size)
        except LabelError as error:
            if self.exif_transpose and _size_of(label_path) == load_image(path, False).size != image.size:
                raise TurnedImageError(f"{error}, turned upright by its EXIF orientation") from None
            raise

    def fingerprint(self) -> str:
        """A hash of the images' names below the folder, in Unicode NFC and in order, and of the classes."""
        names = [unicodedata.normalize("NFC", path.removeprefix(f"{self.root}/")) for path, _ in self.samples]
        return hashlib.sha256(b"\0".join(os.fsencode(name) for name in [*names, "", *self.classes])).hexdigest()

    def _about_palettes(self) -> str | None:
        try:
            with reading(self.samples[0][1]), Image.open(self.samples[0][1]) as label:
                is_palette = label.mode == "P"
        except UnreadableFileError:  # it is named when it is read
            return None
        return "label files have palettes: their indices are taken for the classes" if is_palette else None

    def look_at_labels(self) -> Iterator[str]:
        """Lines about what is odd in the labels of at most `_LOOKED_AT` images.

        Raises:
            LabelError: A label file does not fit the classes or its image, or no pixel of them has a label.
        """
        indices = range(0, len(self), -(-len(self) // _LOOKED_AT))
        paths = [self.samples[index][1] for index in indices]
        pixels = np.zeros(IGNORE + 1, np.int64)
        for index, path in zip(indices, paths, strict=True):
            with suppress(UnreadableFileError):  # it is named when its image is read
                labels = read_label(Path(path), len(self.classes))
                if labels.shape != _size_of(self.samples[index][0], self.exif_transpose)[::-1]:
                    self[index]  # which says what does not fit, if the header is right
                pixels += np.bincount(labels.ravel(), minlength=IGNORE + 1)
        if not pixels[:IGNORE].any() and pixels.any():
            raise LabelError(f"no pixel of {count(len(paths), 'label file')} such as {paths[0]} has a label: they hold "
                             "0 and 255 alone, which both stand for what is not labelled; the first class is 1")
        absent = [name for name, number in zip(self.classes, pixels, strict=False) if not number]
        is_all = len(paths) == len(self)  # else rare classes may well be absent
        if absent and (is_all or absent[-1] == self.classes[-1]):
            place = str(self.labels) if is_all else f"{count(len(paths), 'label file')} of {self.labels}"
            yield (f"warning: no pixel of {place} is labelled {some(absent) if is_all else absent[-1]}; the value 1 is "
                   f"the first class, {self.classes[0]}: labels from 0 have to be raised by one")


def _size_of(path: str, upright: bool = False) -> tuple[int, int]:
    """(width, height) as a file's header says, or of the image turned upright by its EXIF orientation."""
    with reading(path), Image.open(path) as image:
        is_turned = upright and image.getexif().get(ExifTags.Base.Orientation, 1) > 4
        return image.size[::-1] if is_turned else image.size


def _label_of(image: str, images: Path, labels: Path) -> Path:
    label = (labels / Path(image).relative_to(images)).with_suffix(".png")
    upper = label.with_suffix(".PNG")
    return upper if upper.is_file() and not label.is_file() else label


def _split_folder(root: Path, kind: str, split: str) -> Path:
    """The folder of a split's "images" or "annotations". Raises UserError where there is none."""
    folders = [root / kind / name for name in FOLDERS[split]]
    if found := [folder for folder in folders if folder.is_dir()]:
        return found[0]
    place = root / kind if (root / kind).is_dir() else root
    names, files = list_folder(place)
    inside = some(sorted([*names, *files])) or "nothing"
    expected = f"images/{{{','.join(names[0] for names in FOLDERS.values())}}} and annotations/ with the same folders"
    missing = folders[0].relative_to(root)
    raise UserError(f"{root} has no folder {missing}: expected {expected}, found {inside} in {place}")


def open_folder(root: str, split: str, data_set: str, exif_transpose: bool) -> SegmentationFolder:
    """A split of a data set, "ade20k" or "segmentation_folder", of which some labels were looked at.

    Raises:
        UserError: As `read_classes`, `SegmentationFolder` and `look_at_labels`.
    """
    folder = user_path(root)
    if not folder.is_dir():
        raise UserError(f"data folder {folder} {'is not a folder' if folder.exists() else 'does not exist'}")
    _split_folder(folder, "images", split)
    found = SegmentationFolder(folder, split, read_classes(folder, data_set), exif_transpose)
    found.notes += [*about_names(folder, data_set), *found.look_at_labels()]  # before a run trains for hours
    return found
