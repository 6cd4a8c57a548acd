"""Files of web servers: small ones read into memory, others copied into a cache folder of this machine."""
import hashlib
import http.client
import math
import os
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from io import BytesIO
from pathlib import Path
from typing import BinaryIO

try:
    import fcntl
except ImportError:  # a system without POSIX locks
    fcntl = None

HTTP_TIMEOUT = 60  # seconds without a byte
RETRY_SECONDS = (1, 2, 4, 8)  # pauses between attempts, of which there is one more


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
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def _blocks(url: str) -> Iterator[bytes]:
    received = 0
    # Some servers refuse urllib's own name.
    request = urllib.request.Request(url, headers={"User-Agent": "routedvit"})
    try:
        with urllib.request.urlopen(request, timeout=HTTP_TIMEOUT) as response:
            expected = response.headers["Content-Length"]
            while block := response.read(2**20):
                received += len(block)
                yield block
    except urllib.error.HTTPError as error:
        raise TransferError(error, error.code) from None
    except (OSError, http.client.HTTPException) as error:  # of the connection, of TLS, of the protocol
        raise TransferError(error, transient=not url.startswith("file:")) from None
    if expected is not None and received != int(expected):
        raise TransferError(f"the server stopped after {received} of {expected} bytes")


def download(url: str, file: BinaryIO):
    """Write what lies at `url` to `file`, with further attempts where the fault may be transient.

    Raises:
        TransferError: The last attempt failed.
        OSError: `file` cannot be written.
    """
    for pause in (*RETRY_SECONDS, None):
        file.seek(0)
        file.truncate()
        try:
            for block in _blocks(url):
                file.write(block)
            return
        except TransferError as error:
            if pause is None or not error.transient:
                raise
            time.sleep(pause)


def read_bytes(url: str) -> bytes:
    """The content of a small file. Raises TransferError."""
    content = BytesIO()
    download(url, content)
    return content.getvalue()


@contextmanager
def _locked(path: Path) -> Iterator[bool]:
    """Hold `path` against other processes and threads of this machine; False where the file system has no locks.

    The system releases the lock of a process that dies.
    """
    with open(path, "w") as file:
        held = fcntl is not None
        if held:
            try:
                fcntl.flock(file, fcntl.LOCK_EX)
            except OSError:
                held = False
        yield held


class RemoteCache:
    """Copies of remote files in a folder, each made when it is first asked for.

    A copy is there intact or not at all, and is made by one process while others wait for it; where the file system has
    no locks, each process downloads for itself. The caller names the copies: one name for each address and hash.

    Args:
        folder: Where copies are kept, best on a disk of this machine. Other files in it are left alone.
        max_bytes: Before copies of the same suffix would exceed this sum, those opened longest ago are removed.
        on_download: Called with the address before a download, in the process that downloads.
    """

    def __init__(
        self, folder: Path, max_bytes: float = math.inf, on_download: Callable[[str], None] | None = None
    ):
        self.folder, self.max_bytes, self.on_download = folder, max_bytes, on_download

    def open(self, url: str, name: str, sha256: str | None = None) -> BinaryIO:
        """The copy `name` of `url`, opened for reading; it stays readable when the cache removes it.

        Args:
            url: Address of the file.
            name: Name of the copy in the folder.
            sha256: Hash, or the beginning of it, with which a download is compared.

        Raises:
            TransferError: The download failed; HashMismatchError where it brought another file.
            OSError: The folder cannot be written.
        """
        copy = self.folder / name
        self.folder.mkdir(parents=True, exist_ok=True)
        with suppress(FileNotFoundError):
            return self._open_copy(copy)
        with _locked(copy.with_suffix(".lock")) as held:
            with suppress(FileNotFoundError):  # another process has just made it
                return self._open_copy(copy)
            # Under the lock, what a killed process left is overwritten; without it, the name must be no other's.
            part = copy.with_suffix(".part" if held else f".{uuid.uuid4().hex}.part")
            return self._download(url, part, copy, sha256)

    def path(self, url: str, name: str, sha256: str | None = None) -> Path:
        """The path of the copy that `open` opens, for a cache without a bound; raises as `open` does."""
        self.open(url, name, sha256).close()
        return self.folder / name

    def discard(self, name: str):
        """Remove a copy that turned out to be unusable, so that it is downloaded again when it is next asked for."""
        (self.folder / name).unlink(missing_ok=True)

    def _open_copy(self, copy: Path) -> BinaryIO:
        file = copy.open("rb")
        with suppress(OSError):  # a read-only cache serves as well
            os.utime(copy)
        return file

    def _download(self, url: str, part: Path, copy: Path, sha256: str | None) -> BinaryIO:
        if self.on_download is not None:
            self.on_download(url)
        try:
            with open(part, "wb") as file:
                download(url, file)
                file.flush()
                os.fsync(file.fileno())
            if sha256 is not None and not (found := sha256_of(part)).startswith(sha256.lower()):
                raise HashMismatchError(sha256, found)
            # One process at a time: two that made room at once would both find it, and exceed the bound together.
            with nullcontext() if self.max_bytes == math.inf else _locked(self.folder / f".room{copy.suffix}.lock"):
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
