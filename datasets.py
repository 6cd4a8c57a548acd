"""Data sets, transforms and loaders, for the most part timm's.

Every random choice about an image follows from (seed, epoch, position in the epoch), never from what was read before
or by which process: a run that is resumed, at any step, sees the very images that it would have seen.
"""
import ctypes
import errno
import os
import random
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from timm.data import create_transform
from timm.data.auto_augment import NAME_TO_OP
from timm.data.distributed_sampler import RepeatAugSampler
from timm.data.loader import PrefetchLoader, fast_collate
from timm.data.random_erasing import RandomErasing
from torch.utils.data import DataLoader, Dataset, DistributedSampler, Sampler, get_worker_info
from torchvision.datasets import CIFAR10, CIFAR100, ImageFolder

from training.data.shards import open_shards
from utils import LostDataError, UserError, derive_seed, is_url, seed_generators

# What the system answers of one file: it is not there, or its damaged bytes made a decoder seek to no place in it.
# PIL's own errors have no number. All others are faults of the machine or its storage, which other images share.
_OF_ONE_FILE = (None, errno.ENOENT, errno.EINVAL)
_PR_SET_PDEATHSIG = 1  # of Linux's sys/prctl.h
Transform = Callable[[Image.Image], Any]


# --- randomness -------------------------------------------------------------------------------------------------------


@contextmanager
def seeded(seed: int, device: torch.device | None = None) -> Iterator[None]:
    """Start the generators of Python, NumPy and torch (CPU, and `device` if it is CUDA) from `seed`; restores them."""
    # torch.manual_seed would also reseed every CUDA device, for good
    generators = [torch.default_generator]
    if device is not None and device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
        generators.append(torch.cuda.default_generators[index])
    before = random.getstate(), np.random.get_state(), [generator.get_state() for generator in generators]
    seed_generators(seed, *(generator.manual_seed for generator in generators))
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        for generator, state in zip(generators, before[2], strict=True):
            generator.set_state(state)


def seeded_image(seed: int) -> AbstractContextManager[None]:
    """`seeded`, but without restoring in a worker: nothing else draws there, and NumPy's state takes 60 us a time."""
    if get_worker_info() is None:
        return seeded(seed)
    seed_generators(seed, torch.default_generator.manual_seed)
    return nullcontext()


class SeededSampler(Sampler):
    """Yields (index, seed) for each index of `sampler`, which is one with `set_epoch`.

    The seed is that of the index's place among those of all processes: augmentation is the same on any number of them.
    """

    def __init__(self, sampler: Sampler, seed: int, rank: int, world_size: int):
        self.sampler, self.seed, self.rank, self.world_size = sampler, seed, rank, world_size
        self.set_epoch(0)

    def set_epoch(self, epoch: int, start: int = 0):
        """Make the next pass that of `epoch`, without its first `start` indices."""
        self.epoch, self.start = epoch, start
        self.sampler.set_epoch(self.seed + epoch)  # RepeatAugSampler takes no seed of its own

    def __iter__(self) -> Iterator[tuple[int, int]]:
        for position, index in enumerate(self.sampler):
            if position >= self.start:
                yield index, derive_seed(self.seed, self.epoch, position * self.world_size + self.rank)

    def __len__(self) -> int:
        """Indices of a whole epoch."""
        return len(self.sampler)

    @property
    def ranges(self) -> int:
        """Into how many ranges an epoch is cut, one for each process; 1 where its indices are dealt out in turn."""
        return getattr(self.sampler, "ranges", 1)


# --- images -----------------------------------------------------------------------------------------------------------


def load_image(file: str | Path | BinaryIO) -> Image.Image:
    """Read the image in `file`, whatever its mode, as PIL RGB.

    Alpha is dropped, as in timm and torchvision; 16-bit grey is scaled to 8 bits.

    Raises:
        LostDataError: The folder in which it should lie is gone, or the system cannot read the file.
        UserError: It is not a whole image; names the file.
    """
    try:
        with Image.open(file) as image:
            image.load()
            return _to_rgb(image)
    except Exception as error:  # on damaged bytes PIL's decoders raise nearly anything
        name = getattr(file, "name", file)
        if isinstance(error, OSError) and error.errno not in _OF_ONE_FILE:
            raise LostDataError(f"cannot read {name}: {error.strerror}; see to the machine and its storage") from None
        if isinstance(file, (str, Path)) and not Path(file).parent.is_dir():
            raise LostDataError(f"cannot read {file}: its folder is gone; was the data moved, or unmounted?") from None
        reason = "not an image" if isinstance(error, UnidentifiedImageError) else _one_line(error)
        raise UserError(f"cannot read {name}: {reason}; remove it, or pass --skip_bad_images") from None


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # I, I;16 and its byte orders
        # convert("RGB") clips at 255, which turns all but the darkest pixels white
        values = np.asarray(image).clip(0, 65535).astype(np.uint32)
        image = Image.fromarray(((values + 128) // 257).astype(np.uint8))
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # straight to RGB, PIL warns
    return image.convert("RGB")


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
        source: (PIL RGB image, class index) by index; raises UserError for an image that it cannot read. One that is
            not to be read in any order has a method `sampler`, as `shards.TarShards`.
        classes: Names of the classes; None where they are not known.
        transform: Takes a PIL RGB image; None returns it as it is.
        on_bad: What is done of an image that cannot be read: "raise" its error; or count it in `bad_images`, each time
            that it is tried, and give the "next" good image, or "mask" it: a black one with target -1.
        num_classes: How many classes there are where `classes` is None; None where that is not known either.
    """

    source: Sequence[tuple[Image.Image, int]]
    classes: list[str] | None = None
    transform: Transform | None = None
    on_bad: str = "raise"
    num_classes: int | None = None

    def __post_init__(self):
        if self.classes is not None:
            self.num_classes = len(self.classes)
        assert self.on_bad in ("raise", "next", "mask"), self.on_bad
        # a Value of the fork context cannot be passed to spawned workers; this one reaches forked ones too
        self._bad = None if self.on_bad == "raise" else get_context("spawn").Value("q", 0)

    @property
    def bad_images(self) -> int:
        """How many images could not be read so far, in all worker processes."""
        return self._bad.value if self._bad else 0

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, item: int | tuple[int, int]) -> tuple[Any, int]:
        index, seed = item if isinstance(item, tuple) else (item, None)
        image, target = self._read(index)
        if self.transform is None:
            return image, target
        with nullcontext() if seed is None else seeded_image(seed):
            return self.transform(image), target

    def _read(self, index: int) -> tuple[Image.Image, int]:
        for offset in range(len(self)):
            try:
                return self.source[(index + offset) % len(self)]
            except LostDataError:
                raise
            except UserError:
                if self.on_bad == "raise":
                    raise
                with self._bad.get_lock():
                    self._bad.value += 1
                if self.on_bad == "mask":
                    return Image.new("RGB", (256, 256)), -1
        raise UserError(f"none of the {len(self)} images can be read")

    def sampler(self, world_size: int, rank: int, repeats: int) -> Sampler:
        """The order in which process `rank` of `world_size` trains on the images, `repeats` (1 or 3) times each."""
        if hasattr(self.source, "sampler"):
            return self.source.sampler(world_size, rank, repeats)
        if repeats > 1:
            # By default the sampler rounds down to a multiple of 256 images, most of a small data set
            return RepeatAugSampler(self, world_size, rank, num_repeats=repeats, selected_round=0)
        # drop_last here: rather leave out a few images than see some of them twice
        return DistributedSampler(self, world_size, rank, drop_last=True)


def build_dataset(
    name: str,
    root: str | Path | None,
    split: str,
    transform: Transform | None = None,
    *,
    on_bad: str = "raise",
    download: bool = False,
    shard_cache: str | Path | None = None,
    shard_cache_gb: float | None = None,
    most_classes: int | None = None,
) -> ImageDataset:
    """A split of a data set, of (transformed image, class index).

    Its `classes` is the list of class names, None for shards; its `num_classes` is their number, None for shards whose
    list does not give it; its `bad_images` is how many unreadable images have been skipped so far.

    Args:
        name: "IMNET" or "image_folder" (root/SPLIT/CLASS/IMAGE), "CIFAR10", "CIFAR100", "digits" (scikit-learn's) or
            "wds/NAME" (WebDataset shards).
        root: Folder of the data, for shards also a URL; the digits need none.
        split: "train" or "val".
        transform: Takes a PIL RGB image; None returns it as it is.
        on_bad: What is done of an image that cannot be read: "raise", "next" or "mask", see `ImageDataset`.
        download: Fetch CIFAR if it is not there.
        shard_cache: Where shards of a URL are kept; by default `shards` in torch.hub's folder.
        shard_cache_gb: At most how many GB (1e9 bytes) of them.
        most_classes: How many classes shards may hold whose list does not say how many there are; None for any.

    Raises:
        UserError: There is no such data set, or its files are not there or not as they should be.
    """
    assert split in ("train", "val"), split
    train = split == "train"
    if name.startswith("wds/"):
        cache = Path(shard_cache or Path(torch.hub.get_dir()) / "shards").expanduser()
        root = root if root is not None and is_url(root) else _folder(root)
        splits = ("train",) if train else ("val", "validation")
        shards = open_shards(root, splits, load_image, cache, shard_cache_gb, most_classes)
        return ImageDataset(shards, None, transform, on_bad, shards.split.num_classes)
    if name in ("IMNET", "image_folder"):
        source, classes = _image_folder(root, split)
    elif name in ("CIFAR10", "CIFAR100"):
        source, classes = _cifar(name, root, train, download)
    elif name == "digits":
        source, classes = _digits(train)
    else:
        raise UserError(f"no data set {name!r}; there are IMNET, image_folder, CIFAR10, CIFAR100, digits, wds/NAME")
    return ImageDataset(source, classes, transform, on_bad)


def check_same_classes(train_classes: list[str] | None, val_classes: list[str] | None):
    """Compare the class names of two splits; None, for unknown, goes with any.

    Raises:
        UserError: They are not the same, or not in the same order.
    """
    if train_classes is None or val_classes is None or train_classes == val_classes:
        return
    missing = [name for name in train_classes if name not in val_classes]
    extra = [name for name in val_classes if name not in train_classes]
    differences = [f"{what} {_some(names)}" for what, names in (("lacks", missing), ("adds", extra)) if names]
    difference = " and ".join(differences) or "has them in another order"
    raise UserError(f"the validation set must have the training set's classes, but {difference}")


def _some(names: Sequence[str], most: int = 5) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _folder(root: str | Path | None) -> Path:
    if root is None:
        raise UserError("this data set needs a data folder, and none was given")
    folder = Path(root).expanduser()
    if not folder.is_dir():
        raise UserError(f"data folder {folder} {'is not a folder' if folder.exists() else 'does not exist'}")
    return folder


class _ImageFolder(ImageFolder):
    """torchvision's, without hidden folders, such as notebooks and file managers leave behind."""

    def find_classes(self, directory: str | Path) -> tuple[list[str], dict[str, int]]:
        names = [name for name in super().find_classes(directory)[0] if not name.startswith(".")]
        if not names:
            raise FileNotFoundError(f"no class folder in {directory}")
        return names, {name: index for index, name in enumerate(names)}


def _image_folder(root: str | Path | None, split: str) -> tuple[ImageFolder, list[str]]:
    root = _folder(root)
    if not (root / split).is_dir():
        found = _some(sorted(entry.name for entry in root.iterdir())) or "nothing"
        raise UserError(f"{root} has no folder {split}: expected {split}/CLASS/IMAGE, found {found}")
    try:
        source = _ImageFolder(root / split, loader=load_image)
    except FileNotFoundError as error:
        raise UserError(f"{root / split} needs class folders, with images in each: {_one_line(error)}") from None
    return source, source.classes


def _cifar(name: str, root: str | Path | None, train: bool, download: bool) -> tuple[CIFAR10, list[str]]:
    if root is None:
        raise UserError(f"{name} needs a data folder, and none was given")
    kind = {"CIFAR10": CIFAR10, "CIFAR100": CIFAR100}[name]
    try:
        source = kind(Path(root).expanduser(), train=train, download=download)
    except (OSError, RuntimeError) as error:
        advice = _one_line(error) if download else f"pass --download, or unpack {kind.url} there"
        raise UserError(f"{name} is not in {root}, or not whole: {advice}") from None
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


# --- loaders ----------------------------------------------------------------------------------------------------------


class SeededErasing:
    """timm's random erasing, as a function of the epoch's key and the number of the batch in it."""

    def __init__(self, erasing: RandomErasing, device: torch.device):
        self.erasing, self.device = erasing, device

    def start(self, *key: int, batch: int):
        """Begin the epoch of `key` (seed, epoch, rank) at its batch `batch`."""
        self.key, self.batch = key, batch

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        # the 1 keeps this apart from the seed of the sample at the same position
        with seeded(derive_seed(*self.key, self.batch, 1), self.device):
            images = self.erasing(images)
        self.batch += 1
        return images


class EpochLoader(PrefetchLoader):
    """timm's PrefetchLoader, each epoch of which (random erasing too) follows from seed, epoch and rank alone.

    Yields (images, targets) on the device: images float32 (B, 3, H, W), normalised; targets int64 (B,).
    """

    def __init__(self, loader: DataLoader, *, seed: int, rank: int, **settings: Any):
        super().__init__(loader, **settings)
        self.seed, self.rank = seed, rank
        self.set_epoch(0)
        if self.random_erasing is not None:
            self.random_erasing = SeededErasing(self.random_erasing, self.device)

    def set_epoch(self, epoch: int, first_batch: int = 0):
        """Make the next pass that of `epoch`, from its batch `first_batch` on; those before are not read."""
        self.epoch, self.first_batch = epoch, first_batch

    @property
    def ranges(self) -> int:
        """As of `SeededSampler`."""
        return self.sampler.ranges if isinstance(self.sampler, SeededSampler) else 1

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        self._start_epoch()
        try:
            yield from super().__iter__()
            return
        except UserError as error:
            # From a worker its text is a traceback that ends in the line we want, and its frames hold the iterator in
            # a cycle. Left to the garbage collector, the iterator would wait five seconds for each of its workers.
            line = re.split(r"^[\w.]+Error: ", str(error), flags=re.MULTILINE)[-1].strip()
            error.__traceback__ = None
        raise UserError(line)

    def _start_epoch(self):
        key = self.seed, self.epoch, self.rank
        self.loader.generator.manual_seed(derive_seed(*key))  # from it workers are seeded
        if self.random_erasing is not None:
            self.random_erasing.start(*key, batch=self.first_batch)
        if isinstance(self.sampler, SeededSampler):
            self.sampler.set_epoch(self.epoch, start=self.first_batch * self.loader.batch_size)


def _live_and_die_with_main(worker: int):
    # A terminal and Slurm send signals to every process; what the run makes of one, its main process decides.
    for number in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    if sys.platform == "linux":
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_when_main_says, daemon=True).start()
        # One that waits for a lock which a dead process held would outlive the main process for ever.
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _end_when_main_says():
    # At its end the main process waits for those that it sent a SIGTERM.
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent_process().pid:
        pass
    os._exit(128 + signal.SIGTERM)


def build_loader(
    dataset: ImageDataset,
    *,
    train: bool,
    batch_size: int,
    num_workers: int,
    device: torch.device | str,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    seed: int = 0,
    rank: int = 0,
    world_size: int = 1,
    repeated_aug: bool = False,
    reprob: float = 0.0,
    remode: str = "pixel",
    pin_memory: bool = True,
    collate_fn: Callable = fast_collate,
) -> EpochLoader:
    """Batches of a data set for one process.

    In training every process gets the same number of full batches, shuffled. In evaluation each image comes once over
    all processes, in order; the last batch may be small, and one process may get fewer batches than another, or none.

    Args:
        dataset: One whose transform is `build_transform`'s.
        train: Which of the two.
        batch_size: Images in a batch of one process.
        num_workers: Processes that read for this one; 0 reads in this one.
        device: Where the batches go.
        mean, std: Of each channel, for values from 0 to 1.
        seed: The run's.
        rank, world_size: This process, and the number of those that share the data.
        repeated_aug: Three augmentations of an image on different processes, or side by side on one.
        reprob, remode: timm's random erasing, in training only: share of the images, and "const", "rand" or "pixel".
        pin_memory: Whether batches for a GPU pass through page-locked memory.
        collate_fn: Samples of the data set -> (uint8 images, targets with a method `to`).

    Raises:
        UserError: The training set is smaller than one batch over all processes.
    """
    device = torch.device(device)
    if train and len(dataset) < batch_size * world_size:
        raise UserError(
            f"the training set has {len(dataset)} images, fewer than one batch of {batch_size * world_size} "
            f"({batch_size} on each of {world_size} process(es)); use a smaller batch size"
        )
    if not train:
        sampler = range(rank, len(dataset), world_size)
    else:
        order = dataset.sampler(world_size, rank, repeats=3 if repeated_aug else 1)
        sampler = SeededSampler(order, seed, rank, world_size)
    loader = DataLoader(
        dataset,
        batch_size=batch_size,
        sampler=sampler,
        num_workers=num_workers,
        collate_fn=collate_fn,
        pin_memory=pin_memory and device.type == "cuda",
        drop_last=train,
        persistent_workers=num_workers > 0,
        generator=torch.Generator(),  # the global one would otherwise be drawn from each epoch
        worker_init_fn=_live_and_die_with_main,
    )
    return EpochLoader(
        loader,
        seed=seed,
        rank=rank,
        mean=mean,
        std=std,
        channels=len(mean),
        device=device,
        re_prob=reprob if train else 0.0,
        re_mode=remode,
    )
