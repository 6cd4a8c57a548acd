"""The list of shards, `_info.json`, and the folder that it lies in: on this machine, or on a web server.

`_info.json` or `info.json`, as timm writes it, lists the shards of each split and the number of samples in each:

    {"splits": {"train": {"name": "train", "num_samples": 2, "filenames": ["train-0.tar"], "shard_lengths": [2]}}}

beside which the list may give `num_classes` and `classes`, their names in order, and a split `sha256`, its shards'
hashes in hexadecimal, and `shard_bytes`, their sizes. A list comes from others: nothing in it is relied on unchecked.
"""
import hashlib
import json
import math
import os
import re
import unicodedata
import urllib.parse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from storage.remote import MOST_IN_MEMORY, HashMismatchError, RemoteCache, TransferError, public, read_bytes
from utils import LostDataError, some

INFO_NAMES = ("_info.json", "info.json")
# Beyond any data set of labelled images; below what the order of an epoch has no memory for.
_MOST_SAMPLES, _MOST_IN_SHARD, _MOST_CLASSES = 10**9, 10**7, 10**7
_MOST_BYTES, _MOST_OF_NAME = 2**50, 200


class ShardError(LostDataError):
    """A shard or the list of shards is missing or wrong: more than one unreadable image, which could be skipped."""


class ShardCacheError(ShardError):
    """The folder for copies of shards cannot be written."""


# --- where shards lie -------------------------------------------------------------------------------------------------


class LocalFolder:
    """Shards in a folder of this machine."""

    def __init__(self, root: Path):
        self.root = root

    def __str__(self) -> str:
        return str(self.root)

    def read(self, name: str) -> bytes | None:
        """The bytes of a small file, or None if there is no such file."""
        path = self.root / name
        try:
            if not path.is_file():
                return None
            with open(path, "rb") as file:
                content = file.read(MOST_IN_MEMORY + 1)
        except OSError as error:
            raise ShardError(f"{path} cannot be read: {error.strerror}") from None
        if len(content) > MOST_IN_MEMORY:
            raise ShardError(f"{path} is larger than a list of shards may be, {MOST_IN_MEMORY / 1e6:.0f} MB")
        return content

    def missing(self, names: Sequence[str]) -> list[str]:
        """The `names` of which there is no file."""
        return [name for name in names if not (self.root / name).is_file()]

    def open(self, name: str, sha256: str | None, size: int | None = None) -> BinaryIO:
        """A shard, opened for reading. Its hash is not checked, which would read all of it; its size, if known, is."""
        path = self.root / name
        try:
            file = open(path, "rb")  # noqa: SIM115, the caller closes it
        except OSError as error:
            raise ShardError(f"{path} cannot be opened: {error.strerror}") from None
        found = os.fstat(file.fileno()).st_size
        if size not in (None, found):
            file.close()
            raise ShardError(f"{path} has {found} bytes, not the {size} that the list of shards gives; copy it again")
        return file


class HttpFolder:
    """Shards in a folder of a web server, each copied into `cache` when it is first opened; see `RemoteCache`.

    A copy's name holds a hash of its address and its `sha256`, so that where a list gives hashes an old copy never
    stands for a new shard, and another signature finds the same copy.

    Args:
        url: The folder. A query, for example the signature for all of a folder, is sent with each file's name.
        cache: Folder for the copies.
        cache_bytes: How much they may take; those opened longest ago are removed.

    Raises:
        ShardError: The address ends in a hash, of which a folder has none.
    """

    def __init__(self, url: str, cache: Path, cache_bytes: float = math.inf):
        parts = urllib.parse.urlsplit(url)
        if "#" in url:
            raise ShardError(f"{public(url)}: a folder has no hash; the list of shards gives one for each of them")
        self.url, self.query = parts._replace(query="").geturl().rstrip("/"), parts.query
        self.cache = RemoteCache(cache, cache_bytes)

    def __str__(self) -> str:
        return public(self.url)

    def read(self, name: str) -> bytes | None:
        """The bytes of a small file, or None if there is no such file."""
        try:
            return read_bytes(self._url(name))
        except TransferError as error:
            if error.status == 404:
                return None
            raise self._unreachable(name, error) from None

    def missing(self, names: Sequence[str]) -> list[str]:
        """Always empty: asking the server for each would take long."""
        return []

    def open(self, name: str, sha256: str | None, size: int | None = None) -> BinaryIO:
        """A shard, opened for reading; it stays readable when its copy is removed."""
        try:
            return self.cache.open(self._url(name), self._copy(name, sha256), sha256, size)
        except HashMismatchError:
            raise ShardError(f"{self}/{name} is not the file whose sha256 the list of shards gives") from None
        except TransferError as error:
            raise self._unreachable(name, error) from None
        except OSError as error:
            raise ShardCacheError(f"{name} cannot be kept in {self.cache.folder}: {error.strerror}") from None

    def discard(self, name: str, sha256: str | None):
        """Remove a copy that turned out to be unusable, so that the next run downloads it again."""
        self.cache.discard(self._copy(name, sha256))

    def _unreachable(self, name: str, error: TransferError) -> ShardError:
        return ShardError(
            f"{public(self._url(name))} cannot be fetched: {error}; see that the server has it, then start again"
        )

    def _url(self, name: str) -> str:
        return f"{self.url}/{urllib.parse.quote(name)}{'?' * bool(self.query)}{self.query}"

    def _copy(self, name: str, sha256: str | None) -> str:
        # Without a hash, another query may be another file.
        url = self._url(name) if sha256 is None else public(self._url(name))
        key = hashlib.sha256(f"{url} {sha256}".encode()).hexdigest()[:16]
        return f"{PurePosixPath(name).name}-{key}.shard"


# --- the list ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Split:
    """One split in the list of shards: for each shard its name, number of samples and, if known, hash and bytes.

    `num_classes` and `classes`, their names in Unicode NFC, are None where the list does not give them.
    """

    info: str
    filenames: tuple[str, ...]
    lengths: tuple[int, ...]
    sha256: tuple[str | None, ...]
    sizes: tuple[int | None, ...]
    num_classes: int | None
    classes: list[str] | None = None


def read_split(folder: LocalFolder | HttpFolder, names: Sequence[str]) -> Split:
    """The first of the splits `names` that the list of shards in `folder` has.

    Raises:
        ShardError: There is no such list or split, or it is malformed.
    """
    found = ((name, content) for name in INFO_NAMES if (content := folder.read(name)) is not None)
    info, content = next(found, (None, b""))
    if info is None:
        raise ShardError(f"{folder} has no _info.json, which lists the shards of each split")
    try:
        listed = json.loads(content)
        splits = listed["splits"]
        known = splits.keys()
        split = splits[next(name for name in names if name in known)]
        filenames, lengths, hashes, sizes = _shards(split)
    except StopIteration:
        raise ShardError(
            f"{folder}/{info} lists no split {' or '.join(names)}; it lists {some(sorted(known)) or 'none'}"
        ) from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise ShardError(
            f"{folder}/{info} should list, for a split {' or '.join(names)}, filenames, as many shard_lengths, "
            "and num_samples, the sum of these; and it may list as many sha256 and shard_bytes"
        ) from None
    num_classes, classes = _classes(listed, f"{folder}/{info}")
    if label := split.get("alt_label"):
        raise ShardError(f"{folder}/{info} takes classes from JSON ({label!s:.50}); write them as .cls instead")
    outside = [name for name in filenames if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts]
    if outside:
        raise ShardError(f"{folder}/{info} lists a shard outside of its folder: {outside[0]}")
    missing = folder.missing(filenames)
    if missing:
        raise ShardError(f"{folder} lacks shards that {info} lists: {some(missing)}")
    return Split(info, filenames, lengths, hashes, sizes, num_classes, classes)


def _shards(split: dict[str, Any]) -> tuple[tuple, tuple, tuple, tuple]:
    """Names, numbers of samples, hashes and sizes of the shards of a split, each of the kind that it should be.

    Raises:
        ValueError: It is malformed; KeyError, TypeError and AttributeError too.
    """
    filenames = tuple(split["filenames"])
    lengths = tuple(_within(length, _MOST_IN_SHARD) for length in split["shard_lengths"])
    hashes, sizes = (tuple(split.get(key) or [None] * len(filenames)) for key in ("sha256", "shard_bytes"))
    for name in filenames:
        if not (name.isprintable() and PurePosixPath(name).name and len(name.encode()) <= _MOST_OF_NAME):
            raise ValueError("no name of a file")
    for sha256 in hashes:
        if sha256 is not None and not re.fullmatch("[0-9a-fA-F]{8,64}", sha256):
            raise ValueError("no hash")
    sizes = tuple(size if size is None else _within(size, _MOST_BYTES) for size in sizes)
    if not len(filenames) == len(lengths) == len(hashes) == len(sizes):
        raise ValueError("lists of different lengths")
    if sum(lengths) != split["num_samples"] or sum(lengths) > _MOST_SAMPLES:
        raise ValueError("another number of samples, or too many")
    return filenames, lengths, hashes, sizes


def _within(number: Any, most: int) -> int:
    """A number in a list; raises ValueError where it is no whole number from 0 to `most`."""
    if type(number) is not int or not 0 <= number <= most:
        raise ValueError("no such number")
    return number


def _classes(listed: dict[str, Any], place: str) -> tuple[int | None, list[str] | None]:
    """The number and the names of the classes in a list of shards; raises ShardError as `read_split` does."""
    number, names = listed.get("num_classes"), listed.get("classes")
    if number is not None and (type(number) is not int or not 1 <= number <= _MOST_CLASSES):
        raise ShardError(f"{place}: num_classes should be a number of at least 1, and is {number!r:.50}")
    if names is None:
        return number, None
    if isinstance(names, list) and names and all(isinstance(name, str) for name in names):
        composed = [unicodedata.normalize("NFC", name) for name in names]
        if len(set(composed)) == len(names) == (number or len(names)):
            return len(names), composed
    raise ShardError(f"{place}: classes should be a list of names, one for each class and no two the same")
