"""Image data sets and transforms by name, for the most part timm's and torchvision's.

Every random choice about an image follows from the seed that comes with its index (`training/data/loader.py`).
"""
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data import create_transform
from timm.data.auto_augment import NAME_TO_OP
from timm.data.loader import PrefetchLoader
from timm.data.random_erasing import RandomErasing
from torch.utils.data import DataLoader, Dataset
from torchvision.datasets import CIFAR10, CIFAR100

from training.data.folders import open_folders
from training.data.held_out import HeldOut, ValSplit
from training.data.images import UnreadableImageError, load_image
from training.data.loader import seeded, seeded_sample
from training.data.robustness import CROPPED, RobustnessImages, find, find_all, incomplete, left_out, synsets
from training.data.robustness import SETS as ROBUSTNESS_SETS
from training.data.shards import TarShards, open_shards
from utils import LostDataError, UserError, derive_seed, is_url, one_line, some, user_path

Transform = Callable[[Image.Image], Any]


class MissingDataError(UserError):
    """A data set that can be downloaded is not there."""


# --- transforms -------------------------------------------------------------------------------------------------------


def _posterize(image: Image.Image, bits_to_keep: int, **_) -> Image.Image:
    # At its strongest timm keeps 0 bits, which is black; Pillow refuses that from version 13 on.
    return image.point(lambda value: value & ~(2 ** (8 - bits_to_keep) - 1))


# timm looks its operations up here.
_POSTERIZE = {"Posterize", "PosterizeIncreasing", "PosterizeOriginal"}
assert NAME_TO_OP.keys() >= _POSTERIZE
NAME_TO_OP.update(dict.fromkeys(_POSTERIZE, _posterize))


def build_transform(
    *,
    train: bool,
    input_size: int | tuple[int, int],
    mean: tuple[float, ...],
    std: tuple[float, ...],
    interpolation: str = "bicubic",
    crop_pct: float | None = None,
    crop_mode: str | None = None,
    **augmentation: Any,
) -> Callable[[Image.Image], torch.Tensor]:
    """PIL RGB image -> uint8 tensor (3, H, W), by timm.

    Args:
        train: Random crop and augmentation if true, else resize and centre crop.
        input_size: H and W in pixels, as one int or as (H, W).
        mean, std: What the loader normalises with; here the mean only fills what geometric augmentation uncovers.
        interpolation: Name of PIL's filter for resizing, or "random".
        crop_pct: Share of the resized image that evaluation's crop keeps; None is timm's 0.875.
        crop_mode: How evaluation resizes an image that is no square: "center" by its shorter side, "border" by its
            longer one, with a margin, "squash" by both; None is "center".
        augmentation: `scale`, `ratio`, `hflip`, `color_jitter`, `auto_augment`... of timm's `create_transform`.
    """
    return create_transform(
        input_size,
        is_training=train,
        mean=mean,
        std=std,
        interpolation=interpolation,
        crop_pct=crop_pct,
        crop_mode=crop_mode,
        use_prefetcher=True,
        **augmentation,
    )


# --- data sets --------------------------------------------------------------------------------------------------------


@dataclass(eq=False, repr=False)
class ImageDataset(Dataset):
    """(image, target) by index, or by (index, seed) for augmentation that is a function of the seed.

    Args:
        source: (PIL RGB image, class index) by index; raises UnreadableImageError for an image that it cannot read. One
            that should not be read in any order has a method `sampler`, as `TarShards`.
        classes: Names of the classes; None where they are not known.
        transform: Takes a PIL RGB image; None returns it as it is.
        on_error: What to do about an image that cannot be read: "raise" its error; or mark it in `bad_images`, and give
            the "next" good image, or "mask" it: a black one with target -1.
        num_classes: How many classes there are where `classes` is None; None where that is not known either.
        notes: What a user should know about the data set, a line each.

    Attributes:
        bad_images: bool (N,), which images could not be read, in whatever process; None where that raises an error.
    """

    source: Sequence[tuple[Image.Image, int]]
    classes: list[str] | None = None
    transform: Transform | None = None
    on_error: str = "raise"
    num_classes: int | None = None
    notes: tuple[str, ...] = ()

    def __post_init__(self):
        if self.classes is not None:
            self.num_classes = len(self.classes)
        assert self.on_error in ("raise", "next", "mask"), self.on_error
        # of a source that should not be read in any order; see `training.data.loader.training_sampler`
        self.sampler = getattr(self.source, "sampler", None)
        bad = None if self.on_error == "raise" else torch.zeros(len(self.source), dtype=torch.bool)
        self.bad_images = bad if bad is None else bad.share_memory_()  # with forked and spawned workers

    @property
    def held_out(self) -> HeldOut | None:
        """What is held out of the training images for validation, where these are some of them."""
        return getattr(self.source, "held_out", None)

    def names(self) -> list[str]:
        """What each image is called: its path; in shards on this machine, its shard and its name there; else its index.
        """
        if hasattr(self.source, "samples"):  # of (path, class index)
            return [path for path, _ in self.source.samples]
        names = self.source.names() if isinstance(self.source, TarShards) else None
        return names or [str(index) for index in range(len(self))]

    def name(self, index: int) -> str:
        """What one image is called: as in `names`; in shards from a URL, where it lies in its shard."""
        if hasattr(self.source, "samples"):
            return self.source.samples[index][0]
        return self.source.name(index) if isinstance(self.source, TarShards) else str(index)

    def fingerprint(self) -> str:
        """Which images these are: a hash of their names and classes where they lie in folders, of their list where they
        lie in shards; else, as of CIFAR, their number.
        """
        own = getattr(self.source, "fingerprint", None)
        return f"{len(self)} images" if own is None else own()

    def arriving(self) -> Any:
        """What changes while samples are copied from a server; see `training.waits.wait_for`."""
        own = getattr(self.source, "arriving", None)
        return None if own is None else own()

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, item: int | tuple[int, int]) -> tuple[Any, int]:
        index, seed = item if isinstance(item, tuple) else (item, None)
        image, target = self._read(index)
        if self.transform is None:
            return image, target
        with nullcontext() if seed is None else seeded_sample(seed):
            return self._transformed(image, target)

    def _transformed(self, image: Image.Image, target: Any) -> Any:
        return self.transform(image), target

    @staticmethod
    def _masked() -> tuple[Image.Image, Any]:
        """What stands for an image that cannot be read, and that no metric counts."""
        return Image.new("RGB", (256, 256)), -1

    def class_counts(self) -> list[int]:
        """The number of images of each class; of shards it is not known without reading all of them."""
        if hasattr(self.source, "targets"):
            targets = self.source.targets
        else:
            targets = [target for _, target in getattr(self.source, "samples", self.source)]
        return np.bincount(targets, minlength=self.num_classes).tolist()

    def _read(self, index: int) -> tuple[Image.Image, int]:
        for offset in range(len(self)):
            place = (index + offset) % len(self)
            try:
                return self.source[place]
            except LostDataError:
                raise
            except UnreadableImageError:
                if self.on_error == "raise":
                    raise
                self.bad_images[place] = True
                if self.on_error == "mask":
                    return self._masked()
        raise UserError(f"none of the {len(self)} images can be read")


@dataclass(eq=False, repr=False)
class RobustnessDataset(ImageDataset):
    """Images of one or more of the sets in `training.data.robustness`; a target is an image's part and its classes.

    The arguments are those of `ImageDataset`, the source a `RobustnessImages`; `cropped` is as in `Reading`.
    """

    source: RobustnessImages
    cropped: Transform | None = None

    @property
    def has_cropped(self) -> bool:
        """Whether there are images that are cropped already."""
        return any(part.set in CROPPED for part in self.source.parts)

    def _transformed(self, image: Image.Image, target: tuple[int, ...]) -> Any:
        is_cropped = target[0] >= 0 and self.source.parts[target[0]].set in CROPPED
        return (self.cropped if is_cropped and self.cropped else self.transform)(image), target

    def name(self, index: int) -> str:
        return self.source.name(index)

    def names(self) -> list[str]:
        return [self.name(index) for index in range(len(self))]

    def _masked(self) -> tuple[Image.Image, tuple[int, ...]]:
        return super()._masked()[0], (-1,) * self.source.width


@dataclass(frozen=True)
class ShardCache:
    """Where copies of shards from a URL are kept.

    Args:
        folder: By default `shards` in torch.hub's folder.
        gigabytes: At most how many GB (1e9 bytes) of them; None for any number.
    """

    folder: str | Path | None = None
    gigabytes: float | None = None

    @property
    def path(self) -> Path:
        return user_path(self.folder or Path(torch.hub.get_dir()) / "shards")


@dataclass(frozen=True)
class Reading:
    """How a data set is found and read.

    Args:
        download: Fetch CIFAR if it is not there.
        shard_cache: Where, and how many, copies of shards from a URL are kept.
        val_split: What is held out of the training images of a folder that has no folder val.
        exif_transpose: See `load_image`; for folders and shards.
        cropped: The transform of images that are cropped already, as ImageNet-C's; None for that of all others.
    """

    download: bool = False
    shard_cache: ShardCache = ShardCache()
    val_split: ValSplit | None = None
    exif_transpose: bool = True
    cropped: Transform | None = None


def build_dataset(
    name: str,
    root: str | Path | None,
    split: str,
    transform: Transform | None = None,
    *,
    on_error: str = "raise",
    most_classes: int | None = None,
    classes: list[str] | None = None,
    reading: Reading = Reading(),
) -> ImageDataset:
    """A split of a data set, of (transformed image, class index).

    Its `classes` is the list of class names and its `num_classes` is their number, each None for shards whose list does
    not give it; its `bad_images` are the unreadable ones that were skipped; its `notes` are lines about it that a user
    should read.

    Args:
        name: "IMNET" or "image_folder" (root/SPLIT/CLASS/IMAGE), "CIFAR10", "CIFAR100", "digits" (scikit-learn's),
            "wds/NAME" (WebDataset shards), one of `ROBUSTNESS_SETS`, or "robustness" for all of these below the root.
        root: Folder of the data, for shards also a URL; the digits need none.
        split: "train", "val" or "test"; CIFAR's test images and the digits held out are "val".
        transform: Takes a PIL RGB image; None returns it as it is.
        on_error: What to do about an image that cannot be read: "raise", "next" or "mask", see `ImageDataset`.
        most_classes: How many classes the network has: for folders, see `training.data.folders.number_classes`; shards
            whose list does not say how many there are may hold no others. None for any.
        classes: Names of the network's classes, by which folders, and shards whose list names its classes, are
            numbered; None for the rules of that function, and for the numbers in the shards.
        reading: How it is found and read.

    Raises:
        UserError: There is no such data set or split, or its files are not there or not as they should be.
    """
    assert split in ("train", "val", "test"), split
    decode = partial(load_image, exif_transpose=reading.exif_transpose)
    if name.startswith("wds/"):
        root = root if root is not None and is_url(root) else _folder(root)
        splits, cache = ("val", "validation") if split == "val" else (split,), reading.shard_cache
        shards = open_shards(root, splits, decode, cache.path, cache.gigabytes, most_classes, classes)
        number = shards.split.num_classes
        return ImageDataset(shards, shards.classes, transform, on_error, number, tuple(shards.notes))
    if name in ("IMNET", "image_folder"):
        source = open_folders(_folder(root), split, decode, most_classes, reading.val_split, classes)
        return ImageDataset(source, source.classes, transform, on_error, notes=tuple(source.notes))
    if name not in ("CIFAR10", "CIFAR100", "digits", "robustness", *ROBUSTNESS_SETS):
        raise UserError(f"no data set {name!r}; there are IMNET, image_folder, CIFAR10, CIFAR100, digits, wds/NAME, "
                        f"robustness, {', '.join(ROBUSTNESS_SETS)}")
    if name == "robustness" or name in ROBUSTNESS_SETS:
        if split != "val":
            raise UserError(f"{name} has no split {split}: it is there to be evaluated")
        return _robustness(name, _folder(root), decode, transform, on_error, reading.cropped)
    if split == "test":
        raise UserError(f"{name} has no split test; its splits are train and val")
    train = split == "train"
    source, names = _digits(train) if name == "digits" else _cifar(name, root, train, reading.download)
    return ImageDataset(source, names, transform, on_error)


def check_same_classes(train_classes: list[str] | None, val_classes: list[str] | None):
    """Compare the class names of two splits; None, for unknown, goes with any.

    Raises:
        UserError: They are not the same, or not in the same order.
    """
    if train_classes is None or val_classes is None or train_classes == val_classes:
        return
    missing = [name for name in train_classes if name not in val_classes]
    extra = [name for name in val_classes if name not in train_classes]
    differences = [f"{what} {some(names)}" for what, names in (("lacks", missing), ("adds", extra)) if names]
    difference = " and ".join(differences) or "has them in another order"
    raise UserError(f"the validation set must have the training set's classes, but {difference}")


def _robustness(
    name: str, root: Path, decode: Callable[[str], Image.Image], transform: Transform | None, on_error: str,
    cropped: Transform | None,
) -> RobustnessDataset:
    parts = find_all(root) if name == "robustness" else find(name, root)
    notes = (*incomplete(parts), *(left_out(parts) if name == "robustness" else ()))
    return RobustnessDataset(
        RobustnessImages(parts, decode), list(synsets()), transform, on_error, notes=notes, cropped=cropped,
    )


def _folder(root: str | Path | None) -> Path:
    if root is None:
        raise UserError("this data set needs a data folder, and none was given")
    folder = user_path(root)
    if not folder.is_dir():
        raise UserError(f"data folder {folder} {'is not a folder' if folder.exists() else 'does not exist'}")
    return folder


def _cifar(name: str, root: str | Path | None, train: bool, download: bool) -> tuple[CIFAR10, list[str]]:
    if root is None:
        raise UserError(f"{name} needs a data folder, and none was given")
    kind = {"CIFAR10": CIFAR10, "CIFAR100": CIFAR100}[name]
    try:
        source = kind(user_path(root), train=train, download=download)
    except (OSError, RuntimeError) as error:
        if download:
            raise UserError(f"{name} is not in {root}, or incomplete: {one_line(error)}") from None
        raise MissingDataError(f"{name} is not in {root}, or incomplete; unpack {kind.url} there") from None
    return source, source.classes


def _digits(train: bool) -> tuple[list[tuple[Image.Image, int]], list[str]]:
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ImportError:
        raise UserError("the digits come with scikit-learn: pip install scikit-learn") from None
    digits = load_digits()
    images = np.rint(digits.images * (255 / 16)).astype(np.uint8)
    parts = train_test_split(range(len(images)), test_size=0.2, stratify=digits.target, random_state=0)
    source = [(Image.fromarray(images[i]).convert("RGB"), int(digits.target[i])) for i in parts[0 if train else 1]]
    return source, [str(name) for name in digits.target_names]


# --- batches on the device --------------------------------------------------------------------------------------------


class SeededErasing:
    """timm's random erasing, as a function of the epoch's key and the number of the batch in it."""

    def __init__(self, erasing: RandomErasing, device: torch.device):
        self.erasing, self.device = erasing, device

    def start(self, key: tuple[int, ...], first_batch: int):
        """Begin the epoch of `key` (seed, epoch, rank) at its batch `first_batch`."""
        self.key, self.batch = key, first_batch

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        # the 1 keeps this apart from the seed of the sample at the same position
        with seeded(derive_seed(*self.key, self.batch, 1), self.device):
            images = self.erasing(images)
        self.batch += 1
        return images


class NormalizedImages(PrefetchLoader):
    """(images, targets) on the device, by timm's PrefetchLoader: images float32 (B, 3, H, W), normalised and erased.

    Args:
        loader: Yields (uint8 images, targets with a method `to`), as timm's `fast_collate` makes them.
        settings: `mean`, `std`, `device`, `re_prob` and `re_mode` of PrefetchLoader.
    """

    def __init__(self, loader: DataLoader, **settings: Any):
        super().__init__(loader, channels=len(settings["mean"]), **settings)
        if self.random_erasing is not None:
            self.random_erasing = SeededErasing(self.random_erasing, self.device)

    def start(self, key: tuple[int, ...], first_batch: int):
        """Begin the epoch of `key` (seed, epoch, rank) at its batch `first_batch`."""
        if self.random_erasing is not None:
            self.random_erasing.start(key, first_batch)
