"""The list of shards, `_info.json`, and the folder that it lies in: on this machine, or on a web server.

`_info.json` or `info.json`, as timm writes it, lists the shards of each split and the number of samples in each:

    {"splits": {"train": {"name": "train", "num_samples": 2, "filenames": ["train-0.tar"], "shard_lengths": [2]}}}

beside which the list may give `num_classes` and `classes`, their names in order, and a split `sha256`, its shards'
hashes in hexadecimal.
"""
import hashlib
import json
import math
import unicodedata
import urllib.parse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from storage.remote import HashMismatchError, RemoteCache, TransferError, read_bytes
from utils import LostDataError, some

INFO_NAMES = ("_info.json", "info.json")


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
        return path.read_bytes() if path.is_file() else None

    def missing(self, names: Sequence[str]) -> list[str]:
        """The `names` of which there is no file."""
        return [name for name in names if not (self.root / name).is_file()]

    def open(self, name: str, sha256: str | None) -> BinaryIO:
        """A shard, opened for reading. Its hash is not checked, which would read all of it."""
        try:
            return open(self.root / name, "rb")
        except OSError as error:
            raise ShardError(f"{self.root / name} cannot be opened: {error.strerror}") from None


class HttpFolder:
    """Shards in a folder of a web server, each copied into `cache` when it is first opened; see `RemoteCache`.

    A copy's name holds a hash of its address and its `sha256`, so that where a list gives hashes an old copy never
    stands for a new shard.

    Args:
        url: The folder.
        cache: Folder for the copies.
        cache_bytes: How much they may take; those opened longest ago are removed.
    """

    def __init__(self, url: str, cache: Path, cache_bytes: float = math.inf):
        self.url, self.cache = url.rstrip("/"), RemoteCache(cache, cache_bytes)

    def __str__(self) -> str:
        return self.url

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

    def open(self, name: str, sha256: str | None) -> BinaryIO:
        """A shard, opened for reading; it stays readable when its copy is removed."""
        try:
            return self.cache.open(self._url(name), self._copy(name, sha256), sha256)
        except HashMismatchError:
            raise ShardError(f"{self._url(name)} is not the file whose sha256 the list of shards gives") from None
        except TransferError as error:
            raise self._unreachable(name, error) from None
        except OSError as error:
            raise ShardCacheError(f"{name} cannot be kept in {self.cache.folder}: {error.strerror}") from None

    def discard(self, name: str, sha256: str | None):
        """Remove a copy that turned out to be unusable, so that the next run downloads it again."""
        self.cache.discard(self._copy(name, sha256))

    def _unreachable(self, name: str, error: TransferError) -> ShardError:
        return ShardError(f"{self._url(name)} cannot be fetched: {error}; see that the server has it, then start again")

    def _url(self, name: str) -> str:
        return f"{self.url}/{urllib.parse.quote(name)}"

    def _copy(self, name: str, sha256: str | None) -> str:
        key = hashlib.sha256(f"{self._url(name)} {sha256}".encode()).hexdigest()[:16]
        return f"{PurePosixPath(name).name}-{key}.shard"


# --- the list ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Split:
    """One split in the list of shards: for each shard its name, number of samples and, if it is known, hash.

    `num_classes` and `classes`, their names in Unicode NFC, are None where the list does not give them.
    """

    info: str
    filenames: tuple[str, ...]
    lengths: tuple[int, ...]
    sha256: tuple[str | None, ...]
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
        filenames, lengths = tuple(map(str, split["filenames"])), tuple(map(int, split["shard_lengths"]))
        hashes = tuple(split.get("sha256") or [None] * len(filenames))
        consistent = len(filenames) == len(lengths) == len(hashes) and sum(lengths) == split["num_samples"]
    except StopIteration:
        raise ShardError(
            f"{folder}/{info} lists no split {' or '.join(names)}; it lists {some(sorted(known)) or 'none'}"
        ) from None
    except (ValueError, KeyError, TypeError, AttributeError):
        consistent = False
    if not consistent or min(lengths, default=0) < 0:
        raise ShardError(
            f"{folder}/{info} should list, for a split {' or '.join(names)}, filenames, as many shard_lengths, "
            "and num_samples, the sum of these"
        )
    num_classes, classes = _classes(listed, f"{folder}/{info}")
    if split.get("alt_label"):
        raise ShardError(f"{folder}/{info} takes classes from JSON ({split['alt_label']}); write them as .cls instead")
    outside = [name for name in filenames if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts]
    if outside:
        raise ShardError(f"{folder}/{info} lists a shard outside of its folder: {outside[0]}")
    missing = folder.missing(filenames)
    if missing:
        raise ShardError(f"{folder} lacks shards that {info} lists: {some(missing)}")
    return Split(info, filenames, lengths, hashes, num_classes, classes)


def _classes(listed: dict[str, Any], place: str) -> tuple[int | None, list[str] | None]:
    """The number and the names of the classes in a list of shards; raises ShardError as `read_split` does."""
    number, names = listed.get("num_classes"), listed.get("classes")
    if number is not None and (not isinstance(number, int) or number < 1):
        raise ShardError(f"{place}: num_classes should be a number of at least 1, and is {number!r}")
    if names is None:
        return number, None
    if isinstance(names, list) and names and all(isinstance(name, str) for name in names):
        composed = [unicodedata.normalize("NFC", name) for name in names]
        if len(set(composed)) == len(names) == (number or len(names)):
            return len(names), composed
    raise ShardError(f"{place}: classes should be a list of names, one for each class and no two the same")
