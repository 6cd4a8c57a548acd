"""Folders of images, SPLIT/CLASS/IMAGE, as a sequence: which folder is which class, and which images are held out.

Where a network is evaluated whose classes have names, the folders are numbered by these. Elsewhere, where all class
folders are named by integers, they are numbered in the order of these; where all of them are synsets
of ImageNet and the network has ImageNet's classes, as ImageNet numbers them; else in the order of their names.

The name of a class is its folder's in Unicode NFC: a copy from macOS may have it decomposed (NFD), with the same looks.
"""
import hashlib
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from timm.data import ImageNetInfo, infer_imagenet_subset

from utils import UserError, nearest, some

from .files import IMAGE_EXTENSIONS, describe_left_out, find_images, is_image, list_folder
from .held_out import HeldOut, ValSplit
from .splits import SPLIT_NAMES, are_classes


class NoValFolderError(UserError):
    """There is no folder val, and no part of the training images was to be held out in its place."""


class ValFolderError(UserError):
    """There is a folder val, and a part of the training images was to be held out in its place."""


# --- classes ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Numbering:
    """Which class each class folder is.

    Args:
        indices: Class index by name of the folder, in the order of the indices.
        classes: Names of the classes from index 0 on: ImageNet's synsets where the folders have ImageNet's numbers,
            else the names of the folders. A network may have more classes.
        note: One line for the user, about the numbers or the classes without a folder, where the network has more
            classes than there are folders.
    """

    indices: dict[str, int]
    classes: list[str]
    note: str | None = None


def number_classes(names: Sequence[str], num_classes: int | None = None) -> Numbering:
    """Which class each of these class folders is; the rules are at the top of this file.

    Args:
        names: Names of the folders.
        num_classes: Classes of the network; None for as many as there are folders.
    """
    if all(name.isascii() and name.isdigit() for name in names):
        order = sorted(names, key=lambda name: (int(name), name))
    else:
        order = sorted(names)
    plain = Numbering({name: index for index, name in enumerate(order)}, order)
    if num_classes is None:
        return plain
    synsets = _imagenet_synsets(names, num_classes)
    if synsets is not None and synsets != order:
        numbers = {synset: index for index, synset in enumerate(synsets)}
        indices = {name: numbers[name] for name in sorted(names, key=numbers.__getitem__)}
        note = f"{len(names)} class folders are synsets of ImageNet: numbered as its {num_classes} classes, " \
               f"{_first_and_last(indices)}"
        return Numbering(indices, synsets, note)
    if num_classes > len(order):
        note = f"{len(order)} class folders, for a network of {num_classes} classes: numbered in order, " \
               f"{_first_and_last(plain.indices)}"
        return Numbering(plain.indices, order, note)
    return plain


def number_by_names(
    names: Sequence[str], classes: list[str], place: str | Path, kind: str = "folders"
) -> Numbering:
    """The numbers of classes in `place` as a network has them, whose classes are called `classes`.

    Args:
        names: Names of the classes in `place`.
        classes: Names of the network's.
        place: Folder or URL, for messages.
        kind: What has these names there.

    Raises:
        UserError: The network has no class of a name.
    """
    unknown = [name for name in names if name not in classes]
    if unknown:
        similar = nearest(unknown[0], classes) if len(unknown) == 1 else ""
        raise UserError(
            f"{place} has {kind} that the network has no class for: {some(unknown)}"
            f"{similar or f'; its classes are {some(classes)}'}"
        )
    missing = [name for name in classes if name not in names]
    note = f"no images in {place} of {len(missing)} of the network's {len(classes)} classes: {some(missing)}"
    indices = {name: index for index, name in enumerate(classes) if name in names}
    return Numbering(indices, classes, note if missing else None)


def _imagenet_synsets(names: Sequence[str], num_classes: int) -> list[str] | None:
    """The synsets of the subset of ImageNet that has `num_classes` classes; None unless all `names` are among them."""
    subset = infer_imagenet_subset(dict(num_classes=num_classes))
    if subset is None or not all(re.fullmatch(r"n\d{8}", name) for name in names):
        return None
    synsets = ImageNetInfo(subset).label_names()
    return synsets if set(names) <= set(synsets) else None


def _first_and_last(indices: dict[str, int]) -> str:
    items = [f"{index} is {name}" for name, index in indices.items()]
    return items[0] if len(items) == 1 else f"{items[0]} and {items[-1]}"


# --- a split ----------------------------------------------------------------------------------------------------------


class ImageFolders(Sequence):
    """(decoded image, class index) by index over class folders.

    Args:
        root: The folder of the class folders.
        numbering: The class of each class folder.
        samples: (path, class index) of each image.
        notes: What a user should know about them, a line each.
        decode: Takes a path; raises UserError if it cannot be read.
        held_out: What is held out of the training images, where these are some of them.
    """

    def __init__(
        self,
        root: Path,
        numbering: Numbering,
        samples: list[tuple[str, int]],
        notes: list[str],
        decode: Callable[[str], Image.Image],
        held_out: HeldOut | None = None,
    ):
        self.root, self.samples, self.notes, self.decode = root, samples, notes, decode
        self.folders, self.classes, self.held_out = list(numbering.indices), numbering.classes, held_out

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        path, target = self.samples[index]
        return self.decode(path), target

    def fingerprint(self) -> str:
        """A hash of the images' names below the folder, in Unicode NFC and in order, and of their classes."""
        digest = hashlib.sha256()
        for path, target in self.samples:
            name = os.fsencode(unicodedata.normalize("NFC", path.removeprefix(f"{self.root}/")))
            digest.update(b"%b\0%d\0" % (name, target))
        return digest.hexdigest()


def open_folders(
    root: Path,
    split: str,
    decode: Callable[[str], Image.Image],
    num_classes: int | None = None,
    val_split: ValSplit | None = None,
    classes: list[str] | None = None,
) -> ImageFolders:
    """Find the images of root/SPLIT/CLASS; where there is no root/train, those of root/CLASS are the training images.

    Args:
        root: The folder of the data.
        split: "train", "val" or "test".
        decode: See `ImageFolders`.
        num_classes: Classes of the network, where that is known; see `number_classes`.
        val_split: What is held out of the training images as "val".
        classes: Names of the network's classes, by which the folders are numbered; None for `number_classes`.

    Raises:
        NoValFolderError: The split is "val", there is no folder root/val, and no `val_split`.
        ValFolderError: There is a folder root/val, and a `val_split`.
        UserError: There is no folder of another split, or root is itself the folder of one; it has no class folders,
            one that is none of `classes`, or one without images; or nothing can be held out, as each class has one
            image.
    """
    folder = _folder_of(root, split, val_split is not None)
    if val_split and (root / "val").is_dir():
        raise ValFolderError(f"{root} has a folder val, and a part of the training images was to be held out")
    images, notes = _find(folder)
    names = list(images)
    numbering = number_classes(names, num_classes) if classes is None else number_by_names(names, classes, folder)
    notes += [] if numbering.note is None else [numbering.note]
    held_out = None
    if val_split and split != "test":
        images, held_out, about_parts = _part(images, folder, val_split, split)
        notes += about_parts
    samples = [(path, index) for name, index in numbering.indices.items() for path in images[name]]
    return ImageFolders(folder, numbering, samples, notes, decode, held_out)


def _folder_of(root: Path, split: str, has_val_split: bool) -> Path:
    """The folder that holds a split's class folders; with `has_val_split`, val is a part of train.

    Raises:
        UserError: There is none; NoValFolderError where it is the folder val that is missing.
    """
    split = "train" if has_val_split and split == "val" else split
    if (root / split).is_dir():
        return root / split
    folders, files = list_folder(root)
    if split == "train" and are_classes(folders):
        return root
    above = Path(os.path.abspath(root)).parent
    if os.path.basename(os.path.abspath(root)).lower() in SPLIT_NAMES and (above / split).is_dir():
        raise UserError(
            f"{root} is the folder of one split, with no folder {split} in it: give the folder above it, {above}"
        )
    found = some(sorted(folders + files)) or "nothing"
    if not folders and split == ("train" if has_val_split else "val"):
        expected = "train/CLASS/IMAGE or CLASS/IMAGE" if split == "train" else f"{split}/CLASS/IMAGE"
        raise UserError(f"{root} has no folder {split} and no class folders: expected {expected}, found {found}")
    kind = NoValFolderError if split == "val" else UserError
    raise kind(f"{root} has no folder {split}: expected {split}/CLASS/IMAGE, found {found}")


def _find(folder: Path) -> tuple[dict[str, list[str]], list[str]]:
    """Paths of the images by name of the class, and lines about what else was found.

    Raises:
        UserError: There is no class folder, one has no images, or two are of the same class.
    """
    names, files = list_folder(folder)
    if not names:
        raise UserError(f"{folder} needs class folders, with images in each: there is no folder in it")
    classes = Counter(unicodedata.normalize("NFC", name) for name in names)
    if double := [name for name, number in classes.items() if number > 1]:
        raise UserError(f"{folder} has several folders of one class: {some(double)}, composed in other ways "
                        "(Unicode NFC and NFD); merge them")
    found = {unicodedata.normalize("NFC", name): find_images(folder / name) for name in names}
    left_out = describe_left_out(sum((files.left_out for files in found.values()), Counter()), folder)
    empty = [name for name, files in found.items() if not files.images]
    if empty:
        raise UserError(
            f"{folder} needs class folders, with images in each: there is none for the classes {some(empty)}; "
            f"endings of images are {', '.join(IMAGE_EXTENSIONS)}{f'; {left_out}' if left_out else ''}"
        )
    loose = sum(map(is_image, files))
    images = "1 image" if loose == 1 else f"{loose} images"
    notes = [f"left out {images} in {folder} itself, in no class folder"] if loose else []
    return {name: files.images for name, files in found.items()}, [*notes, *([left_out] if left_out else [])]


def _part(
    images: dict[str, list[str]], folder: Path, val_split: ValSplit, split: str
) -> tuple[dict[str, list[str]], HeldOut, list[str]]:
    """The images of each class that belong to the split "train" or "val", what is held out, and lines about it.

    Raises:
        UserError: Each class has one image.
    """
    single = [name for name, paths in images.items() if len(paths) == 1]
    if len(single) == len(images):
        raise UserError(f"{folder} has one image in each class: nothing can be held out for validation")
    notes = [f"nothing can be held out of the classes of one image: {some(single)}"] if single else []
    of_class = {name: val_split.held_out(paths, below=folder) for name, paths in images.items()}
    numbers = sorted(number for held_out in of_class.values() for number in held_out.values())
    total = sum(map(len, images.values()))
    notes.append(f"held out for validation: {len(numbers)} of the {total} images in {folder}, {val_split}")
    is_val = split == "val"
    part = {name: [path for path in paths if (path in of_class[name]) == is_val] for name, paths in images.items()}
    return part, HeldOut(str(val_split), torch.tensor(numbers, dtype=torch.int64)), notes
