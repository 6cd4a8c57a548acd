"""Checkpoint files: written whole or not at all."""
import fcntl
import os
import re
import shutil
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch

from storage.weights import HostileFileError, WeightsError, read_file
from utils import UserError, replace_file


@contextmanager
def translate_weights_errors() -> Iterator[None]:
    """Raises the errors of `storage.weights` as UserError."""
    try:
        yield
    except WeightsError as error:
        raise UserError(str(error)) from error


# --- the checkpoints of a run ---------------------------------------------------------------------------------------


class _Output:
    """A file that remembers why it could not be written, which torch.save forgets."""

    def __init__(self, file: BinaryIO):
        self.file = file
        self.flush = file.flush
        self.error: Exception | None = None

    def write(self, data: bytes) -> int:
        try:
            return self.file.write(data)
        except Exception as error:  # the system's, or that of a signal: a process that reads images has died
            self.error = error
            raise


def save_checkpoint(path: Path, state: dict[str, Any]):
    """Write `state` (tensors, numbers, strings, and containers of them) so that `path` is never half written.

    Raises:
        OSError: It cannot be written; what was there is as it was.
    """

    def write(file: BinaryIO):
        output = _Output(file)
        try:
            torch.save(state, output)
        except RuntimeError as error:
            raise output.error or error from None

    replace_file(path, write)


def is_whole(path: Path) -> bool:
    """Whether a checkpoint of ours can be read, every byte as it was written: torch.load does not look at checksums.

    Raises:
        UserError: The system cannot read the file, or it holds code.
    """
    try:
        with open(path, "rb") as file:
            while file.read(2**24):
                pass
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    try:
        with zipfile.ZipFile(path) as archive:
            if archive.testzip() is not None:
                return False
        read_file(path)
    except HostileFileError as error:
        raise UserError(str(error)) from error
    except Exception:  # damaged bytes make zipfile raise nearly anything
        return False
    return True


class CheckpointStore:
    """The checkpoints of one run in its folder, named by the number of optimizer steps taken.

    `last.pth` is a link to the newest, `best.pth` a file of its own.

    Args:
        folder: The run's.
        keep: How many of the newest to keep.
    """

    def __init__(self, folder: Path, keep: int = 2):
        self.folder, self.keep = folder, keep
        self.last, self.best = folder / "last.pth", folder / "best.pth"

    def path(self, step: int) -> Path:
        """The file of the checkpoint after `step` optimizer steps."""
        return self.folder / f"checkpoint-{step:08d}.pth"

    def steps(self) -> list[int]:
        """Those of the checkpoints that are there, the newest last."""
        names = (re.fullmatch(r"checkpoint-(\d{8,})\.pth", path.name) for path in self.folder.glob("checkpoint-*.pth"))
        return sorted(int(name[1]) for name in names if name)

    def holds_run(self) -> bool:
        """Whether a run has written here."""
        return bool(self.steps()) or any(p.exists() for p in (self.last, self.best, self.folder / "log.txt"))

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Make the folder this process's own, and sweep up what a run that was killed left half written.

        Raises:
            UserError: Another process writes there.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            lock = open(self.folder / ".lock", "wb")  # noqa: SIM115, closed below
        except OSError as error:
            raise UserError(f"cannot write to {self.folder}: {error.strerror}") from error
        with lock as file:
            try:
                # A process's own: those that read images inherit files, and outlive one that is killed by seconds.
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(f"another run is writing to {self.folder}; end it, or take another folder") from None
            except OSError:
                pass  # a file system without locks
            for path in self.folder.glob(".*.pth.*"):
                path.unlink()
            yield

    def newest_whole(self) -> int | None:
        """The newest checkpoint that is whole; those after it are renamed to `*.damaged`, with a line about each.

        Raises:
            UserError: There are checkpoints, and none is whole.
        """
        damaged = []
        for step in reversed(self.steps()):
            path = self.path(step)
            if is_whole(path):
                for other in damaged:
                    other.rename(other.with_suffix(".pth.damaged"))
                    print(f"{other} is damaged, and set aside as {other.name}.damaged")
                self._point_last(path)  # the run may have ended before it did
                return step
            damaged.append(path)
        if damaged:
            raise UserError(f"no checkpoint in {self.folder} is whole; to start anew, take another folder")
        return None

    def save(self, step: int, state: dict[str, Any]):
        """Write the checkpoint after `step` optimizer steps, point `last.pth` to it, and remove the oldest.

        Raises:
            UserError: It cannot be written; those before are as they were.
        """
        path = self.path(step)
        self._write(path, state)
        self._point_last(path)
        for old in self.steps()[: -self.keep]:
            if old != step:
                self.path(old).unlink()

    def _point_last(self, path: Path):
        temporary = self.folder / f".{self.last.name}.{os.getpid()}"
        temporary.unlink(missing_ok=True)
        try:
            temporary.symlink_to(path.name)
        except OSError:  # a file system without links
            shutil.copyfile(path, temporary)
        os.replace(temporary, self.last)

    def save_best(self, state: dict[str, Any]):
        """Write `best.pth`.

        Raises:
            UserError: It cannot be written; the one before is as it was.
        """
        self._write(self.best, state)

    def _write(self, path: Path, state: dict[str, Any]):
        try:
            save_checkpoint(path, state)
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror}; {self.kept()}") from error

    def kept(self) -> str:
        """What an error message says of the last checkpoint."""
        steps = self.steps()
        return f"the last checkpoint is {self.path(steps[-1])}" if steps else "no checkpoint was written yet"
