"""Files of web servers: small ones read into memory, others copied into a cache folder of this machine."""
import base64
import hashlib
import http.client
import math
import os
import re
import shutil
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from contextlib import nullcontext, suppress
from io import BytesIO
from pathlib import Path
from typing import BinaryIO

from .locks import locked, open_lock

HTTP_TIMEOUT = 60  # seconds without a byte
RETRY_SECONDS = (1, 2, 4, 8)  # pauses between attempts, of which there is one more
# Bytes of what is read into memory: a list of 500,000 shards with their hashes.
MOST_IN_MEMORY = 64 * 10**6
# Bytes of a file whose size neither the server nor its caller knows, and which might have no end.
MOST_OF_UNKNOWN_SIZE = 16 * 10**9
# What is left out of an address that is shown or kept.
_HIDDEN = "***"
_ADDRESS = re.compile(r"[a-z][a-z0-9+.-]*://", re.IGNORECASE)
_RECORD = re.compile(rb"([0-9a-f]{64}) (\d{1,20})\n")


class TransferError(Exception):
    """A file did not arrive intact; `status` is the server's answer, None if it gave none or stopped in the middle."""

    def __init__(self, reason: object, status: int | None = None, transient: bool | None = None):
        super().__init__(str(reason))
        self.status = status
        # Whether another attempt may succeed.
        self.transient = status is None or status >= 500 or status in (408, 429) if transient is None else transient


class HashMismatchError(TransferError):
    """What arrived is another file than its sha256 says."""

    def __init__(self, expected: str, found: str):
        super().__init__(f'invalid hash value (expected "{expected}", got "{found}")', transient=False)


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with open(path, "rb") as file:
        return _sha256(file)


def _sha256(file: BinaryIO) -> str:
    digest = hashlib.sha256()
    while block := file.read(2**20):
        digest.update(block)
    return digest.hexdigest()


# --- addresses --------------------------------------------------------------------------------------------------------


def public(source: str) -> str:
    """What may be shown and kept of an address: `***` stands for user info and query, which may be a password and a
    signature. What is no address, a path for example, is returned as it is.
    """
    if not _ADDRESS.match(source):
        return source
    without_user = re.sub(r"(?<=://)[^/?#]*@", f"{_HIDDEN}@", source, count=1)
    return re.sub(r"\?[^#]+", f"?{_HIDDEN}", without_user, count=1)


def is_shortened(source: str) -> bool:
    """Whether this is what `public` left of an address."""
    return _ADDRESS.match(source) is not None and _HIDDEN in source and source == public(source)


def _request(url: str) -> urllib.request.Request:
    """Raises ValueError for what is no address."""
    parts = urllib.parse.urlsplit(url)
    user, at, host = parts.netloc.rpartition("@")
    # Some servers refuse urllib's own name.
    request = urllib.request.Request(parts._replace(netloc=host).geturl(), headers={"User-Agent": "routedvit"})
    if at:  # not sent on to where a server redirects
        credentials = base64.b64encode(urllib.parse.unquote_to_bytes(user)).decode()
        request.add_unredirected_header("Authorization", f"Basic {credentials}")
    return request


# --- transfers --------------------------------------------------------------------------------------------------------


def _mb(size: float) -> str:
    return f"{size / 1e6:,.1f} MB"


def _blocks(url: str, size: int | None, room: float, place: str) -> Iterator[bytes]:
    received = 0
    try:
        with urllib.request.urlopen(_request(url), timeout=HTTP_TIMEOUT) as response:
            length = response.headers["Content-Length"] or ""
            announced = int(length) if re.fullmatch(r"[0-9]{1,18}", length) else None
            if None not in (size, announced) and announced != size:
                raise TransferError(f"the server has {announced} bytes, not {size}", transient=False)
            expected = announced if size is None else size
            if expected is not None and expected > room:
                raise TransferError(f"its {_mb(expected)} are more than the {_mb(room)} {place}", transient=False)
            most = min(room, MOST_OF_UNKNOWN_SIZE) if expected is None else expected
            while block := response.read(2**20):
                received += len(block)
                if received > most:
                    kind = "more than the" if expected is None else "another size than its"
                    raise TransferError(f"the server sends {kind} {_mb(most)}", transient=False)
                yield block
    except urllib.error.HTTPError as error:
        raise TransferError(error, error.code) from None
    except (http.client.InvalidURL, ValueError):  # whose texts quote the address
        raise TransferError("this is no valid address", transient=False) from None
    except (OSError, http.client.HTTPException) as error:  # of the connection, of TLS, of the protocol
        raise TransferError(error, transient=not url.startswith("file:")) from None
    if expected is not None and received != expected:
        raise TransferError(f"the server stopped after {received} of {expected} bytes")


def download(url: str, file: BinaryIO, size: int | None = None, room: float = math.inf, place: str = "") -> str:
    """Write what lies at `url` to `file`, with further attempts where the fault may be transient; returns its SHA-256.

    Args:
        url: Address of the file. A user and password in it are sent as Basic authentication.
        file: Where to write.
        size: Number of bytes, where it is known: a file of another size is refused.
        room: Most bytes that may be written; a file that its server says is larger is not begun.
        place: For messages, what has this room: "that are free in /cache".

    Raises:
        TransferError: The last attempt failed, or the file is too large.
        OSError: `file` cannot be written.
    """
    if is_shortened(url):
        raise TransferError("its password or signature is not kept: give the whole address again", transient=False)
    for pause in (*RETRY_SECONDS, None):
        file.seek(0)
        file.truncate()
        digest = hashlib.sha256()
        try:
            for block in _blocks(url, size, room, place):
                file.write(block)
                digest.update(block)
            return digest.hexdigest()
        except TransferError as error:
            if pause is None or not error.transient:
                raise
            time.sleep(pause)
    raise AssertionError("the last attempt returns or raises")


def read_bytes(url: str) -> bytes:
    """The content of a small file, of at most `MOST_IN_MEMORY` bytes. Raises TransferError."""
    content = BytesIO()
    download(url, content, room=MOST_IN_MEMORY, place="that such a file may have")
    return content.getvalue()


def _free(folder: Path) -> float:
    """Bytes that can be written to a folder, as far as its file system says."""
    with suppress(OSError):
        usage = shutil.disk_usage(folder)
        if usage.total:
            return usage.free
    return math.inf


class RemoteCache:
    """Copies of remote files in a folder, each made when it is first asked for.

    A copy is there intact or not at all, and is made by one process while others wait for it; where the file system has
    no locks, each process downloads for itself. The caller names the copies: one name for each address and hash.

    A disk may lose what was written long ago: a copy that was not compared with its hash since this object was made is
    compared when it is opened, with the hash that was asked for, or else with that of the download. The file that
    processes lock holds this hash and the time, so that those that share this object, or made theirs before, need not
    compare again. A damaged copy is removed, and downloaded again.

    Args:
        folder: Where copies are kept, best on a disk of this machine. Other files in it are left alone.
        max_bytes: Before copies of the same suffix would exceed this sum, those opened longest ago are removed.
        on_download: Called with the address before a download, in the process that downloads.
    """

    def __init__(
        self, folder: Path, max_bytes: float = math.inf, on_download: Callable[[str], None] | None = None
    ):
        self.folder, self.max_bytes, self.on_download = folder, max_bytes, on_download
        self.started = time.time_ns()
        self._checked: set[str] = set()

    def open(self, url: str, name: str, sha256: str | None = None, size: int | None = None) -> BinaryIO:
        """The copy `name` of `url`, opened for reading; it stays readable when the cache removes it.

        Args:
            url: Address of the file.
            name: Name of the copy in the folder.
            sha256: Hash, or the beginning of it, with which the file is compared.
            size: Number of its bytes, where it is known.

        Raises:
            TransferError: The download failed; HashMismatchError where it brought another file.
            OSError: The folder cannot be written.
        """
        copy = self.folder / name
        lock = copy.with_suffix(".lock")
        self.folder.mkdir(parents=True, exist_ok=True)
        if self._is_checked(name, lock):
            with suppress(FileNotFoundError):
                return self._open_copy(copy)
        with locked(lock) as held:
            with suppress(FileNotFoundError):
                file = self._open_copy(copy)
                # Another process may have just made or compared it.
                if self._is_checked(name, lock) or self._is_intact(file, lock, sha256):
                    self._checked.add(name)
                    return file
                file.close()
                copy.unlink()
            # Under the lock, what a killed process left is removed; without it, the name must be no other's.
            part = copy.with_suffix(".part" if held else f".{uuid.uuid4().hex}.part")
            part.unlink(missing_ok=True)
            return self._download(url, part, copy, sha256, size)

    def path(self, url: str, name: str, sha256: str | None = None) -> Path:
        """The path of the copy that `open` opens, for a cache without a bound; raises as `open` does."""
        self.open(url, name, sha256).close()
        return self.folder / name

    def arriving(self) -> frozenset[tuple[str, int]]:
        """Names and sizes of what is in the folder: they change while any process downloads something."""
        found = set()
        for path in self.folder.glob("*"):
            with suppress(OSError):  # it has gone meanwhile
                found.add((path.name, path.stat().st_size))
        return frozenset(found)

    def discard(self, name: str):
        """Remove a copy that turned out to be unusable, so that it is downloaded again when it is next asked for."""
        self._checked.discard(name)
        (self.folder / name).unlink(missing_ok=True)

    def _is_checked(self, name: str, lock: Path) -> bool:
        """Whether a copy was compared with its hash, or downloaded, since this object was made."""
        record = _read_record(lock)
        return name in self._checked or (record is not None and record[1] >= self.started)

    def _is_intact(self, file: BinaryIO, lock: Path, sha256: str | None) -> bool:
        """Whether a copy has the hash that is asked for, or else that of its download, if either is known."""
        found, record = _sha256(file), _read_record(lock)
        file.seek(0)
        if not found.startswith((sha256 or (record[0] if record else "")).lower()):
            return False
        with suppress(OSError):  # a read-only cache serves as well
            _write_record(lock, found)
        return True

    def _open_copy(self, copy: Path) -> BinaryIO:
        file = copy.open("rb")
        with suppress(OSError):  # a read-only cache serves as well
            os.utime(copy)
        return file

    def _download(self, url: str, part: Path, copy: Path, sha256: str | None, size: int | None) -> BinaryIO:
        if self.on_download is not None:
            self.on_download(public(url))
        try:
            with open(part, "xb") as file:  # never through a link
                found = download(url, file, size, _free(self.folder), f"that are free in {self.folder}")
                file.flush()
                os.fsync(file.fileno())
            if sha256 is not None and not found.startswith(sha256.lower()):
                raise HashMismatchError(sha256, found)
            _write_record(copy.with_suffix(".lock"), found)
            # One process at a time: two that made room at once would both find it, and exceed the bound together.
            with nullcontext() if self.max_bytes == math.inf else locked(self.folder / f".room{copy.suffix}.lock"):
                self._make_room(part.stat().st_size, copy.suffix)
                file = part.open("rb")  # before another process could remove the copy to make room for its own
                os.replace(part, copy)
            return file
        finally:
            part.unlink(missing_ok=True)

    def _make_room(self, size: int, suffix: str):
        if self.max_bytes == math.inf:
            return
        copies = []
        for path in self.folder.glob(f"*{suffix}"):
            with suppress(FileNotFoundError):
                status = path.stat()
                copies.append((status.st_mtime, status.st_size, path))
        total = size + sum(length for _, length, _ in copies)
        for _, length, path in sorted(copies):
            if total <= self.max_bytes:
                break
            path.unlink(missing_ok=True)
            total -= length


def _read_record(lock: Path) -> tuple[str, int] | None:
    """The SHA-256 of a copy, and when it had that, in nanoseconds since 1970; None where that is not known."""
    with suppress(OSError), open(lock, "rb") as file:
        if record := _RECORD.fullmatch(file.read(100)):
            return record[1].decode(), int(record[2])
    return None


def _write_record(lock: Path, sha256: str):
    """Note that a copy has this hash now, unless the file holds something else. Raises OSError."""
    with open_lock(lock) as file:
        if file.tell() == 0 or _read_record(lock) is not None:
            file.truncate(0)
            file.write(f"{sha256} {time.time_ns()}\n".encode())
