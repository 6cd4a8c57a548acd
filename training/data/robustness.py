"""Sets of images that measure how robust the classifiers of ImageNet are, found as they are downloaded.

| set | what it holds | classes |
|---|---|---|
| imagenet_v2 | new photographs (Recht et al., https://arxiv.org/abs/1902.10811) | 1,000, folders 0 to 999 |
| imagenet_c | its validation images, corrupted (Hendrycks and Dietterich, https://arxiv.org/abs/1903.12261) | 1,000 |
| imagenet_a | photographs that ResNet-50 mistakes (Hendrycks et al., https://arxiv.org/abs/1907.07174) | 200 of them |
| imagenet_r | paintings, toys, cartoons (Hendrycks et al., https://arxiv.org/abs/2006.16241) | another 200 |
| imagenet_sketch | drawings (Wang et al., https://arxiv.org/abs/1905.13549) | 1,000 |
| imagenet_real | its validation images, labelled again (Beyer et al., https://arxiv.org/abs/2006.07159) | 1,000 |
| imagenet_val | ImageNet's validation images | 1,000 |
"""
import json
import os
import pkgutil
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image
from timm.data import ImageNetInfo

from utils import UserError, some

from .files import find_images, list_folder

CORRUPTIONS = (
    "gaussian_noise", "shot_noise", "impulse_noise", "defocus_blur", "glass_blur", "motion_blur", "zoom_blur", "snow",
    "frost", "fog", "brightness", "contrast", "elastic_transform", "pixelate", "jpeg_compression",
)
SEVERITIES = (1, 2, 3, 4, 5)
NUM_CLASSES = 1000
# Of each part of a set, when it is whole.
WHOLE = dict(imagenet_val=50_000, imagenet_v2=10_000, imagenet_c=50_000, imagenet_a=7_500, imagenet_r=30_000,
             imagenet_sketch=50_889, imagenet_real=50_000)
# The order in which they are evaluated.
SETS = tuple(WHOLE)
# Its images are the 224 x 224 pixels of the usual crop; the authors evaluate them as they are.
CROPPED = frozenset({"imagenet_c"})
# Folders of the archives and of common copies, in lower case and without what is no letter or digit.
_FOLDERS = dict(
    imagenet_a=("imageneta",), imagenet_r=("imagenetr",), imagenet_c=("imagenetc",),
    imagenet_sketch=("sketch", "imagenetsketch"),
)
_IMAGENET = ("imagenet", "imagenet1k", "in1k", "ilsvrc2012", "ilsvrc")


@dataclass(frozen=True)
class Part:
    """Images of a set that are counted together.

    Args:
        set: One of `SETS`.
        name: What this part of it is; empty where it is the whole.
        folder: Where its images are.
        files: Their paths below it, as an array of bytes: there may be millions.
        labels: (N, K) int32, the classes that are right for each image, -1 behind the last.
        severity: Of a corruption, 1 to 5.
    """

    set: str
    name: str
    folder: Path
    files: np.ndarray
    labels: np.ndarray
    severity: int | None = None

    @property
    def description(self) -> str:
        return " ".join(filter(None, (self.set, self.name, self.severity and f"severity {self.severity}")))


@cache
def set_classes(name: str) -> tuple[int, ...] | None:
    """The classes of ImageNet among which a network chooses in a set, by timm's lists; None for all."""
    if name not in ("imagenet_a", "imagenet_r"):
        return None
    text = pkgutil.get_data("timm.data", f"_info/{name}_indices.txt")
    return tuple(map(int, text.decode().split()))


@cache
def synsets() -> tuple[str, ...]:
    """ImageNet's 1,000 classes, in order."""
    return tuple(ImageNetInfo().label_names())


@cache
def real_labels() -> tuple[tuple[int, ...], ...]:
    """The classes that are right for each of ImageNet's 50,000 validation images, by timm's copy; none for some."""
    return tuple(map(tuple, json.loads(pkgutil.get_data("timm.data", "_info/imagenet_real_labels.json"))))


# --- finding ----------------------------------------------------------------------------------------------------------


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def _folders(root: Path) -> list[Path]:
    return [root, *(root / name for name in list_folder(root)[0])]


def _named(root: Path, set_name: str) -> list[Path]:
    """Folders of a set, by their names: `root`, or in it."""
    return [folder for folder in _folders(root) if _plain(folder.name) in _FOLDERS[set_name]][:1]


def _class_of(name: str) -> int | None:
    """The class of a class folder: a number, as in ImageNet-V2, or a synset; None where it is neither."""
    if name.isascii() and name.isdigit():
        return int(name) if int(name) < NUM_CLASSES else None
    return _numbers().get(name)


@cache
def _numbers() -> dict[str, int]:
    return {synset: number for number, synset in enumerate(synsets())}


def _is_of_classes(folder: Path) -> bool:
    return any(_class_of(name) is not None for name in list_folder(folder)[0])


def _of_classes(set_name: str, folder: Path, name: str = "", severity: int | None = None) -> Part:
    """The images in class folders.

    Raises:
        UserError: There is no class folder, or one that is of no class of the set, or no image.
    """
    folders, allowed = list_folder(folder)[0], set_classes(set_name)
    numbers = {name: _class_of(name) for name in folders}
    foreign = [name for name, number in numbers.items() if number is None or (allowed and number not in allowed)]
    if foreign or not folders:
        raise UserError(f"{folder} needs folders of {set_name}'s classes; it has {some(foreign) or 'none'}")
    files, labels = [], []
    for name_of_class, number in numbers.items():
        found = [os.path.relpath(path, folder) for path in find_images(folder / name_of_class).images]
        files += found
        labels += [number] * len(found)
    if not files:
        raise UserError(f"{folder} has class folders, and no image in them")
    return Part(set_name, name, folder, _as_array(files), np.array(labels, np.int32)[:, None], severity)


def _as_array(files: list[str]) -> np.ndarray:
    return np.array([os.fsencode(file) for file in files])


def _validation(root: Path) -> Path | None:
    """ImageNet's validation images: root/val, root/imagenet/val and the like; None where there are none."""
    places = [root, *(folder for folder in _folders(root)[1:] if _plain(folder.name) in _IMAGENET)]
    return next((place / "val" for place in places if (place / "val").is_dir()), None)


def _find_clean(root: Path) -> Iterator[Part]:
    folder = _validation(root)
    if folder is not None and _is_of_classes(folder):
        yield _of_classes("imagenet_val", folder)


def _find_real(root: Path) -> Iterator[Part]:
    """The validation images that have labels; also where they lie in no class folders, as in their archive."""
    folder = _validation(root) or root
    numbered = {}
    for path in find_images(folder).images if folder != root or _has_numbered(root) else ():
        if match := re.search(r"ILSVRC2012_val_(\d{8})\.", os.path.basename(path)):
            numbered[int(match[1])] = os.path.relpath(path, folder)
    found = [(file, real_labels()[number - 1]) for number, file in sorted(numbered.items()) if 0 < number <= 50_000]
    found = [(file, labels) for file, labels in found if labels]
    if found:
        most = max(len(labels) for _, labels in found)
        table = np.array([(*labels, *[-1] * (most - len(labels))) for _, labels in found], np.int32)
        yield Part("imagenet_real", "", folder, _as_array([file for file, _ in found]), table)


def _has_numbered(folder: Path) -> bool:
    """Whether a folder holds validation images: right in it, or in class folders."""
    return _is_of_classes(folder) or any(name.startswith("ILSVRC2012_val_") for name in list_folder(folder)[1])


def _find_v2(root: Path) -> Iterator[Part]:
    """Each of its three selections that is there."""
    named = [folder for folder in _folders(root) if _plain(folder.name).startswith("imagenetv2")]
    named = [inner for folder in named for inner in ([folder] if _is_of_classes(folder) else _folders(folder)[1:])]
    for folder in named:
        selection = re.sub(r"^imagenet-?v2-?|-?format-?val$", "", folder.name.lower())
        yield _of_classes("imagenet_v2", folder, selection)
    if not named and _is_of_classes(root):
        yield _of_classes("imagenet_v2", root)


def _find_c(root: Path) -> Iterator[Part]:
    """CORRUPTION/SEVERITY in the folder of the set, or one deeper, by kind: noise, blur, weather, digital."""
    places = [inner for folder in (_named(root, "imagenet_c") or [root]) for inner in _folders(folder)]
    for corruption in CORRUPTIONS:
        folder = next((place / corruption for place in places if (place / corruption).is_dir()), None)
        for severity in SEVERITIES if folder is not None else ():
            if not (folder / str(severity)).is_dir():
                raise UserError(f"{folder} has no folder {severity}: there are five severities of each corruption")
            yield _of_classes("imagenet_c", folder / str(severity), corruption, severity)


def _find_by_name(set_name: str, root: Path) -> Iterator[Part]:
    """The folder of the set; or `root` itself, whatever it is called, where it has class folders."""
    for folder in _named(root, set_name) or [root] * _is_of_classes(root):
        yield _of_classes(set_name, folder)


def find(set_name: str, root: Path) -> list[Part]:
    """The parts of a set in or below a folder.

    Raises:
        UserError: There are none, or they are not as the set is downloaded.
    """
    own = dict(imagenet_val=_find_clean, imagenet_real=_find_real, imagenet_v2=_find_v2, imagenet_c=_find_c)
    find_parts: Callable = own.get(set_name) or (lambda root: _find_by_name(set_name, root))
    parts = list(find_parts(root))
    if not parts:
        expected = dict(
            imagenet_val="val/SYNSET", imagenet_real="val/ with files ILSVRC2012_val_NUMBER.JPEG",
            imagenet_v2="imagenetv2-matched-frequency-format-val/0 to 999", imagenet_c="CORRUPTION/1 to 5/SYNSET",
            imagenet_sketch="sketch/SYNSET",
        ).get(set_name, f"{set_name.replace('_', '-')}/SYNSET")
        raise UserError(f"{root} has no {set_name}: expected {expected} in it")
    return parts


def find_all(root: Path) -> list[Part]:
    """The parts of all sets whose folders are in `root`, by their names.

    Raises:
        UserError: There are none, or they are not as they are downloaded.
    """
    there = {name: bool(_named(root, name)) for name in _FOLDERS}
    folders = [folder.name for folder in _folders(root)]
    there["imagenet_c"] |= any(corruption in folders for corruption in CORRUPTIONS)
    there["imagenet_v2"] = any(_plain(name).startswith("imagenetv2") for name in folders)
    there["imagenet_val"] = there["imagenet_real"] = _validation(root) is not None
    parts = [part for name in SETS if there[name] for part in _find_if_there(name, root)]
    if not parts:
        raise UserError(f"{root} has none of the sets {', '.join(SETS)}: it has {some(folders[1:]) or 'no folder'}")
    return parts


def _find_if_there(set_name: str, root: Path) -> list[Part]:
    """`find`; of validation images without class folders, or with other names, what can be evaluated."""
    if set_name == "imagenet_val":
        return list(_find_clean(root))
    return list(_find_real(root)) if set_name == "imagenet_real" else find(set_name, root)


def incomplete(parts: Sequence[Part]) -> list[str]:
    """Lines about the sets of which images are missing."""
    notes = []
    for name in dict.fromkeys(part.set for part in parts):
        own = [part for part in parts if part.set == name]
        whole = WHOLE[name] - (sum(not labels for labels in real_labels()) if name == "imagenet_real" else 0)
        short = [part for part in own if len(part.files) != whole]
        if short:
            counts = some([f"{len(part.files):,}" for part in short])
            notes.append(f"{name} has {counts} images where the whole set has {whole:,}")
    return notes


def left_out(parts: Sequence[Part]) -> list[str]:
    """Lines about what `find_all` has found of the validation images without being able to evaluate it."""
    sets = {part.set for part in parts}
    lines = []
    if "imagenet_val" in sets and "imagenet_real" not in sets:
        lines.append("imagenet_real is left out: its labels are found by names as ILSVRC2012_val_00000001.JPEG, "
                     "which the validation images do not have")
    if "imagenet_real" in sets and "imagenet_val" not in sets:
        lines.append("imagenet_val is left out: the validation images are in no class folders")
    return lines


# --- reading ----------------------------------------------------------------------------------------------------------


class RobustnessImages(Sequence):
    """(decoded image, (part, classes...)) by index, over all parts; as many classes as an image has at most, -1 behind.

    Args:
        parts: What is evaluated, one after the other.
        decode: Takes a path; raises UserError if it cannot be read.
    """

    def __init__(self, parts: list[Part], decode: Callable[[str], Image.Image]):
        self.parts, self.decode = parts, decode
        self.ends = np.cumsum([len(part.files) for part in parts])
        self.width = 1 + max(part.labels.shape[1] for part in parts)

    def __len__(self) -> int:
        return int(self.ends[-1])

    def _locate(self, index: int) -> tuple[int, int]:
        """The part of an image, and its place there."""
        number = int(np.searchsorted(self.ends, index, side="right"))
        return number, index - int(self.ends[number] - len(self.parts[number].files))

    def name(self, index: int) -> str:
        number, place = self._locate(index)
        part = self.parts[number]
        return os.path.join(part.folder, os.fsdecode(part.files[place]))

    def target(self, index: int) -> tuple[int, ...]:
        number, place = self._locate(index)
        labels = self.parts[number].labels[place].tolist()
        return number, *labels, *[-1] * (self.width - 1 - len(labels))

    def __getitem__(self, index: int) -> tuple[Image.Image, tuple[int, ...]]:
        index = range(len(self))[index]
        return self.decode(self.name(index)), self.target(index)
