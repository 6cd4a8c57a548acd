"""Images in WebDataset shards, from a folder or by HTTP, as a sequence; and a shuffle that keeps to a few of them.

A shard is an uncompressed tar file. Members which follow one another and are named alike up to the first dot are a
sample: `KEY.jpg`, or another of `IMAGE_EXTENSIONS`, and `KEY.cls`, the class index as text; others are passed over.
`shard_list.py` reads which shards there are. The format is WebDataset's (https://github.com/webdataset/webdataset).
That package reads streams, which have no positions to resume from, and runs the command in an address that starts with
`pipe:`; here a sample has an index, and is read from its position in the tar file.
"""
import errno
import hashlib
import math
import os
import re
import tarfile
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from io import BytesIO
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import BinaryIO, NamedTuple

import numpy as np
from PIL import Image
from torch.utils.data import Sampler

from utils import is_url

from .files import IMAGE_EXTENSIONS
from .folders import number_by_names
from .shard_list import HttpFolder, LocalFolder, ShardError, Split, read_split

# How many shards are shuffled together. With 1,000 samples in each, about as many as WebDataset's usual buffer.
WINDOW_SHARDS = 8
# Workers read ahead, from one window into the next.
OPEN_SHARDS = 2 * WINDOW_SHARDS


class ShardClassError(ShardError):
    """A sample is of a class beyond those of the model."""


class UnreadableShardError(ShardError):
    """The system could not read a shard, which says nothing about the shard."""


# --- what a shard holds -----------------------------------------------------------------------------------------------


class Sample(NamedTuple):
    """Where a sample lies in its shard: name of the image; offset and size, in bytes, of the image and of its class."""

    name: str
    image: tuple[int, int]
    target: tuple[int, int]


def index_shard(file: BinaryIO, name: str) -> list[Sample]:
    """The samples of a tar file, by one pass over its headers.

    Args:
        file: The shard, as a real file.
        name: Its name in error messages.

    Raises:
        ShardError: It is no tar file, is truncated, or a sample lacks its image or its class.
    """
    groups: list[tuple[str, dict[str, tarfile.TarInfo]]] = []
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for member in filter(tarfile.TarInfo.isreg, _members(tar, os.fstat(file.fileno()).st_size)):
                path = PurePosixPath(member.name)
                stem, _, extension = path.name.partition(".")
                key = str(path.with_name(stem)) if stem else None
                if not extension or key is None:
                    continue
                if not groups or groups[-1][0] != key:
                    groups.append((key, {}))
                groups[-1][1][extension.lower()] = member
    except OSError as error:
        if error.errno != errno.EINVAL:  # which a place before the beginning of a file is
            raise UnreadableShardError(f"{name} cannot be read: {error.strerror}") from None
        raise ShardError(f"{name} is damaged in sample {len(groups)}; make or copy it again") from None
    except (tarfile.TarError, ValueError, OverflowError, MemoryError) as error:  # of sizes that a header claims
        raise ShardError(
            f"{name} is damaged or cut off in sample {len(groups)}: {error}; make or copy it again"
        ) from None
    samples = [_sample(members) for _, members in groups]
    if None in samples:
        key = groups[samples.index(None)][0]
        complete = len(samples) - samples.count(None)
        raise ShardError(
            f"{name}: sample {key} lacks its .cls or its image next to it; "
            f"{complete} of the {len(samples)} samples in this shard have both"
        )
    return samples


def _members(tar: tarfile.TarFile, length: int) -> Iterator[tarfile.TarInfo]:
    """The members of a tar file of `length` bytes. Raises ValueError after one that does not lie in it."""
    place = 0
    for member in tar:
        if member.offset_data <= place or member.size < 0:  # tarfile would go round in a circle
            raise ValueError("invalid header")
        place = member.offset_data
        yield member
        if place + member.size > length:
            raise ValueError("unexpected end of data")


def _sample(members: dict[str, tarfile.TarInfo]) -> Sample | None:
    image = next((members[extension] for extension in IMAGE_EXTENSIONS if extension in members), None)
    target = members.get("cls")
    if image is None or target is None:
        return None
    return Sample(image.name, (image.offset_data, image.size), (target.offset_data, target.size))


class TarShards(Sequence):
    """(decoded image, class index) by index over all shards of a split, which are opened when they are needed.

    Forked and spawned workers may share one: reads are by position, and open files are not pickled.

    Args:
        folder: Folder of the shards.
        split: The list of the split's shards.
        decode: Takes an image file in memory, with its `name`; raises UserError if it cannot be read.
        most_classes: Number of classes, where the list of shards does not give it; None accepts any class index.
        classes: Names of the network's classes, by which the samples are numbered where the list names their classes;
            None for the numbers in the shards.

    Attributes:
        classes: Names of the classes, the network's or the list's; None where the list does not name its classes.
        notes: What a user should know about them, a line each.

    Raises:
        UserError: The network has no class for one that the list names.
        ShardError: On reading, if the shard is missing, damaged, or holds another number of samples than the list says;
            ShardClassError for a class index that is too large.
    """

    def __init__(
        self,
        folder: LocalFolder | HttpFolder,
        split: Split,
        decode: Callable[[BinaryIO], Image.Image],
        most_classes: int | None = None,
        classes: list[str] | None = None,
    ):
        self.folder, self.split, self.decode = folder, split, decode
        self.classes, self.notes, self._numbers = split.classes, [], None
        if split.classes is not None and classes is not None:
            numbering = number_by_names(split.classes, classes, str(folder), "classes")
            self.classes, self.notes = classes, [] if numbering.note is None else [numbering.note]
            self._numbers = [numbering.indices[name] for name in split.classes]
        self.most_classes = split.num_classes or most_classes or math.inf
        self.lengths = np.array(split.lengths, dtype=np.int64)
        self._ends = self.lengths.cumsum()
        self._length = int(self.lengths.sum())
        self._open: OrderedDict[int, tuple[BinaryIO, list[Sample]]] = OrderedDict()

    def __getstate__(self) -> dict:
        return {**vars(self), "_open": OrderedDict()}

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        shard, place = self._locate(index)
        file, samples = self._shard(shard)
        sample = samples[place]
        name = f"{sample.name} in {self.folder}/{self.split.filenames[shard]}"
        target = self._target(_read(file, sample.target, name), name)
        image = BytesIO(_read(file, sample.image, name))
        image.name = name
        return self.decode(image), target

    def _locate(self, index: int) -> tuple[int, int]:
        """The number of a sample's shard, and the sample's in it."""
        shard = int(self._ends.searchsorted(index, side="right"))
        return shard, index - int(self._ends[shard] - self.lengths[shard])

    def name(self, index: int) -> str:
        """SHARD/IMAGE of a sample; of a URL, whose copies may be gone again, its number in its shard."""
        number, place = self._locate(index)
        shard = self.split.filenames[number]
        if isinstance(self.folder, HttpFolder):
            return f"image {place} of {shard}"
        return f"{shard}/{self._shard(number)[1][place].name}"

    def names(self) -> list[str] | None:
        """SHARD/IMAGE of every sample; None for shards of a URL, whose copies may be gone again."""
        if isinstance(self.folder, HttpFolder):
            return None
        shards = enumerate(self.split.filenames)
        return [f"{shard}/{sample.name}" for number, shard in shards for sample in self._shard(number)[1]]

    def fingerprint(self) -> str:
        """A hash of what the list of shards says of them: names, lengths, hashes and classes."""
        split = self.split
        listed = split.filenames, split.lengths, split.sha256, split.num_classes, split.classes
        return hashlib.sha256(repr(listed).encode(errors="backslashreplace")).hexdigest()

    def arriving(self) -> frozenset[tuple[str, int]] | None:
        """What changes while shards of a URL are copied; None for those of this machine."""
        return self.folder.cache.arriving() if isinstance(self.folder, HttpFolder) else None

    def sampler(self, num_replicas: int, rank: int, repeats: int) -> "ShardSampler":
        """The order in which process `rank` of `num_replicas` trains on the samples; see `ShardSampler`."""
        return ShardSampler(self.lengths, num_replicas, rank, repeats)

    def _target(self, text: bytes, name: str) -> int:
        if not re.fullmatch(rb"\s*[0-9]{1,18}\s*", text):
            raise ShardError(f"the .cls of {name} should be a class index, and is {text[:20]!r}")
        target = int(text)
        if target >= self.most_classes:
            if self.split.num_classes:
                kind, source = ShardError, f"num_classes of {self.split.info}"
            else:
                kind, source = ShardClassError, "the number of classes of the model"
            raise kind(f"{name} is of class {target}, which must be below {self.most_classes}, {source}")
        return target if self._numbers is None else self._numbers[target]

    def _shard(self, number: int) -> tuple[BinaryIO, list[Sample]]:
        if number not in self._open:
            while len(self._open) >= OPEN_SHARDS:
                self._open.popitem(last=False)[1][0].close()
            self._open[number] = self._open_shard(number)
        self._open.move_to_end(number)
        return self._open[number]

    def _open_shard(self, number: int) -> tuple[BinaryIO, list[Sample]]:
        name, sha256 = self.split.filenames[number], self.split.sha256[number]
        file = self.folder.open(name, sha256, self.split.sizes[number])
        try:
            samples = index_shard(file, f"{self.folder}/{name}")
            if len(samples) != self.lengths[number]:
                raise ShardError(
                    f"{self.folder}/{name} holds {len(samples)} samples, and {self.split.info} says "
                    f"{self.lengths[number]}; correct shard_lengths and num_samples there, or make the shard again"
                )
        except ShardError as error:
            file.close()
            is_damaged = not isinstance(error, UnreadableShardError)
            if is_damaged and isinstance(self.folder, HttpFolder):  # a damaged file of the user's stays
                self.folder.discard(name, sha256)
            raise
        return file, samples


def _read(file: BinaryIO, extent: tuple[int, int], name: str) -> bytes:
    offset, size = extent
    try:
        data = os.pread(file.fileno(), size, offset)
    except OSError as error:
        raise UnreadableShardError(f"{name} cannot be read: {error.strerror}") from None
    if len(data) != size:
        raise ShardError(f"{name} was cut off while it was read")
    return data


def open_shards(
    root: str | Path,
    splits: Sequence[str],
    decode: Callable[[BinaryIO], Image.Image],
    cache: Path,
    cache_gb: float | None = None,
    most_classes: int | None = None,
    classes: list[str] | None = None,
) -> TarShards:
    """The shards of the first of `splits` that the folder `root`, on this machine or of a URL, has.

    Args:
        root: Path or URL of the folder.
        splits: Names of the split, one of which must be there.
        decode: See `TarShards`.
        cache, cache_gb: For a URL, where copies are kept, and at most how many GB (1e9 bytes) of them.
        most_classes, classes: See `TarShards`.

    Raises:
        ShardError: There is no list of shards there, or it is malformed.
        UserError: See `TarShards`.
    """
    cache_bytes = math.inf if cache_gb is None else cache_gb * 1e9
    folder = HttpFolder(str(root), cache, cache_bytes) if is_url(root) else LocalFolder(Path(root))
    return TarShards(folder, read_split(folder, splits), decode, most_classes, classes)


# --- order ------------------------------------------------------------------------------------------------------------


class ShardSampler(Sampler[int]):
    """Shuffles so that a process reads few shards at a time, and about 1/num_replicas of them in an epoch.

    An epoch concatenates the shards in random order, each with its samples in random order, and cuts the sequence into
    `num_replicas` ranges of one length: no sample comes twice, and fewer than `num_replicas` are left out. Within a
    range, the parts of `WINDOW_SHARDS` successive shards are shuffled together. The order is a function of the epoch.

    Unlike DistributedSampler's, the order depends on the number of processes: a run that resumes in the middle of an
    epoch needs as many processes as before.

    Args:
        lengths: Number of samples in each shard.
        num_replicas, rank: Processes that share the samples, and which of them this is.
        repeats: How many times in succession a sample comes; an epoch has as many times fewer different samples.
    """

    def __init__(self, lengths: Sequence[int], num_replicas: int, rank: int, repeats: int = 1):
        self.lengths = np.asarray(lengths, dtype=np.int64)
        self.num_replicas, self.rank, self.repeats = num_replicas, rank, repeats
        self.epoch = 0

    @property
    def ranges(self) -> int:
        """The number of ranges that an epoch is cut into."""
        return self.num_replicas

    def set_epoch(self, epoch: int):
        self.epoch = epoch

    def __len__(self) -> int:
        return int(self.lengths.sum()) // self.num_replicas

    def __iter__(self) -> Iterator[int]:
        return islice(self._indices(), len(self))

    def _indices(self) -> Iterator[int]:
        different = math.ceil(len(self) / self.repeats)
        first, last = self.rank * different, (self.rank + 1) * different
        order = self._generator(0).permutation(len(self.lengths))
        ends = self.lengths[order].cumsum()
        touched = range(int(ends.searchsorted(first, side="right")), int(ends.searchsorted(last, side="left")) + 1)
        for start in range(0, len(touched), WINDOW_SHARDS):
            window = touched[start:start + WINDOW_SHARDS]
            indices = np.concatenate([self._part(order[place], int(ends[place]), first, last) for place in window])
            self._generator(1, self.rank, start).shuffle(indices)
            yield from indices.repeat(self.repeats).tolist()

    def _part(self, shard: int, end: int, first: int, last: int) -> np.ndarray:
        """Indices of a shard's samples with positions in [first, last), where it ends at `end` of the sequence."""
        start = end - int(self.lengths[shard])
        shuffled = self._generator(2, int(shard)).permutation(self.lengths[shard])
        return shuffled[max(first - start, 0):last - start] + self.lengths[:shard].sum()

    def _generator(self, *key: int) -> np.random.Generator:
        return np.random.default_rng((self.epoch, *key))
