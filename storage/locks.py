"""Files that processes of one machine lock, to take turns."""
import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

try:
    import fcntl
except ImportError:  # a system without POSIX locks
    fcntl = None


def open_lock(path: Path) -> BinaryIO:
    """Open a file to lock, for reading and appending; it is made where there is none, and keeps what it holds.

    Raises:
        OSError: It cannot be written, or is a symbolic link: what lies behind a link is not ours.
    """
    def without_links(name: str, flags: int) -> int:
        return os.open(name, flags | getattr(os, "O_NOFOLLOW", 0), 0o666)

    try:
        return open(path, "a+b", opener=without_links)
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        raise OSError(error.errno, f"{path.name} is a symbolic link; remove it", str(path)) from None


@contextmanager
def locked(path: Path) -> Iterator[bool]:
    """Hold `path` against other processes and threads of this machine.

    The system releases the lock of a process that dies. False where the file system has no locks, or cannot be written.

    Raises:
        OSError: As `open_lock` does, but where it only lacks the right to write.
    """
    try:
        file = open_lock(path)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise
        yield False
        return
    with file:
        held = fcntl is not None
        if held:
            try:
                fcntl.flock(file, fcntl.LOCK_EX)
            except OSError:
                held = False
        yield held
