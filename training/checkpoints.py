"""The checkpoints of a run, which hold `Run.state_dict`: written atomically, found again."""
import fcntl
import os
import re
import shutil
import socket
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import torch

from storage.locks import open_lock
from storage.weights import HostileFileError, UnreadableError, read_file, system_fault
from utils import UserError, replace_file, some

from .background import BackgroundWriter
from .run import SpoiledRunError
from .tensors import copy_to_memory


class FolderInUseError(UserError):
    """The output folder holds another run."""


# --- files ------------------------------------------------------------------------------------------------------------


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
        OSError: It cannot be written; what was there is intact.
    """

    def write(file: BinaryIO):
        output = _Output(file)
        try:
            torch.save(state, output)
        except RuntimeError as error:
            raise output.error or error from None

    replace_file(path, write)


def is_intact(path: Path) -> bool:
    """Whether a checkpoint of ours can be read and its checksums are right, which torch.load does not look at.

    Raises:
        UserError: The system cannot read the file or has no memory for it, which says nothing about the file; or it
            holds code.
    """
    if path.exists() and not path.is_file():  # reading a pipe or a device may never end
        raise UserError(f"{path} is no file")
    try:
        with open(path, "rb") as file:
            while file.read(2**24):
                pass
        with zipfile.ZipFile(path) as archive:
            if archive.testzip() is not None:
                return False
        read_file(path, mmap=True)
    except (HostileFileError, UnreadableError) as error:
        raise UserError(str(error)) from error
    except Exception as error:  # damaged bytes make zipfile raise nearly anything
        if fault := system_fault(error):
            raise UserError(f"{path} cannot be read: {fault}") from error
        return False
    return True


class CheckpointStore:
    """The checkpoints of one run in its folder, each named after the number of optimizer steps taken.

    `last.pth` is a link to the newest. `best.pth` is another name of the best one, which outlives the removal of that.
    They are written behind the training, never two at once; `finish` waits for it.

    Args:
        folder: The run's.
        keep: How many of the newest to keep.
        is_new: Whether no run may be there.
    """

    def __init__(self, folder: Path, keep: int = 2, is_new: bool = False):
        self.folder, self.keep, self.is_new = folder, keep, is_new
        self.last, self.best = folder / "last.pth", folder / "best.pth"
        self._writer = BackgroundWriter()
        self._saved: int | None = None

    def path(self, step: int) -> Path:
        """The file of the checkpoint after `step` optimizer steps."""
        return self.folder / f"checkpoint-{step:08d}.pth"

    def steps(self) -> list[int]:
        """The steps of the checkpoints that are there, the newest last."""
        names = (re.fullmatch(r"checkpoint-(\d{8,})\.pth", path.name) for path in self.folder.glob("checkpoint-*.pth"))
        return sorted(int(name[1]) for name in names if name)

    def holds_run(self) -> bool:
        """Whether a run has written here."""
        return bool(self.steps()) or any(p.exists() for p in (self.last, self.best, self.folder / "log.txt"))

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Lock the folder for this process, remove what a killed run left half written, and finish at the end.

        Raises:
            UserError: Another process writes there; says which. FolderInUseError where one has written since
                `open_store` looked. Or, meanwhile, something in the folder could not be read or written.
            SpoiledRunError: One that is raised within says in addition which checkpoint there is.
        """
        with self._lock():
            if self.is_new and self.holds_run():
                raise FolderInUseError(f"{self.folder} already holds a run")
            # What `replace_file` names so; an editor's files are named otherwise.
            for pattern in (".*.pth.*", ".args.yaml.????????", ".log.txt.????????"):
                for path in self.folder.glob(pattern):
                    path.unlink()
            try:
                yield
                self.finish()
            except SpoiledRunError as error:
                self.finish()
                raise type(error)(f"{error}; {self.kept()}") from error
            except OSError as error:  # a folder in the place of a file, a circle of links, or nothing any more
                path = error.filename2 or error.filename  # the second is what a file was to replace
                if path is None or not Path(os.fsdecode(path)).is_relative_to(self.folder):
                    raise
                raise UserError(f"{path}: {error.strerror}; {self.kept()}") from error
            finally:
                self.finish()

    @contextmanager
    def _lock(self) -> Iterator[None]:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            file = open_lock(self.folder / ".lock")
        except OSError as error:
            raise UserError(f"cannot write to {error.filename or self.folder}: {error.strerror}") from error
        with file:
            try:
                # This lock is the process's own: data loading processes inherit open files, and outlive it by seconds.
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.seek(0)
                holder = file.read(200).decode(errors="replace").strip() or "not known which"
                raise UserError(
                    f"another run is writing to {self.folder} ({holder}); stop it, or take another folder"
                ) from None
            except OSError:
                pass  # a file system without locks
            with suppress(OSError):  # a full disk
                file.truncate(0)
                file.write(f"process {os.getpid()} on {socket.gethostname()}\n".encode())
                file.flush()
            yield

    # --- reading ------------------------------------------------------------------------------------------------------

    def newest_intact(self) -> int | None:
        """The step of the newest intact checkpoint; later ones are renamed to `*.damaged`, with a line about each.

        Where there is no checkpoint, but a whole `last.pth` that is no link, that is the newest.

        Raises:
            UserError: There are checkpoints, and none is intact, or one cannot be read.
        """
        damaged = []
        for step in reversed(self.steps() or self._steps_of_last()):
            path = self.path(step)
            if is_intact(path):
                for other in damaged:
                    _set_aside(other)
                self._point_last(path)  # the run may have been killed before it did
                return step
            damaged.append(path)
        if damaged:
            names = some([path.name for path in damaged])
            raise UserError(f"no checkpoint in {self.folder} is intact ({names}); a new run needs another folder")
        return None

    def _steps_of_last(self) -> list[int]:
        """Where `last.pth` alone is left, a file of its own: give it the name of a checkpoint; its step, or nothing."""
        if self.last.is_symlink() or not self.last.is_file() or not is_intact(self.last):
            return []
        step = read_file(self.last, mmap=True).get("total_steps")
        if not isinstance(step, int):
            return []
        print(f"{self.folder} holds no checkpoint but {self.last.name}, of step {step}")
        os.replace(self.last, self.path(step))
        return [step]

    def take_best(self, source: Path, epoch: int) -> bool:
        """Take the `best.pth` beside the checkpoint `source` along, unless one is here; whether there is one now.

        One of another epoch, a later one for example, is left where it is. One that is damaged is renamed.

        Raises:
            UserError: It cannot be read or written.
        """
        if self.best.exists() and not self.best.samefile(source) and not is_intact(self.best):
            _set_aside(self.best)
        beside = source.parent / self.best.name
        if self.best.exists() or not beside.is_file() or not is_intact(beside):
            return self.best.exists()
        if read_file(beside, mmap=True).get("epoch") != epoch:
            return False
        with self._writing(self.best):
            self._link(beside, self.best)
        return True

    def kept(self) -> str:
        """What an error message says of the last checkpoint."""
        steps = self.steps()
        return f"the last checkpoint is {self.path(steps[-1])}" if steps else "no checkpoint was written yet"

    # --- writing ------------------------------------------------------------------------------------------------------

    def save(self, step: int, state: dict[str, Any]):
        """Copy `state`, and return; the copy is written as the checkpoint after `step` optimizer steps.

        Then `last.pth` is pointed to it, and the oldest is removed.

        Raises:
            UserError: An earlier one could not be written; those before it are intact.
        """
        self.finish()
        copy = copy_to_memory(state)
        self._saved = step
        self._writer.start(lambda: self._write(step, copy))

    def has(self, step: int) -> bool:
        """Whether the checkpoint after `step` optimizer steps is there, or being written."""
        return self._saved == step or self.path(step).exists()

    def save_best(self, step: int):
        """Make `best.pth` the checkpoint after `step` optimizer steps, once that is written; raises as `check` does."""
        self.check()
        self._writer.start(lambda: self._write_best(step))

    def check(self):
        """Raises UserError where what was last saved could not be written; does not wait for it."""
        self._writer.check()

    def finish(self):
        """Wait until everything is written. Raises UserError where something could not be."""
        self._writer.finish()

    def _write(self, step: int, state: dict[str, Any]):
        path = self.path(step)
        with self._writing(path):
            save_checkpoint(path, state)
            self._point_last(path)
            for old in self.steps()[: -self.keep]:
                if old != step:
                    self.path(old).unlink()

    def _write_best(self, step: int):
        with self._writing(self.best):
            self._link(self.path(step), self.best)

    @contextmanager
    def _writing(self, path: Path) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror}; {self.kept()}") from error

    def _point_last(self, path: Path):
        temporary = self._temporary(self.last)
        try:
            temporary.symlink_to(path.name)
        except OSError:  # a file system without links
            shutil.copyfile(path, temporary)
        os.replace(temporary, self.last)

    def _link(self, source: Path, path: Path):
        """Make `path` another name of the file `source`, or a copy where the file system has one name for a file."""
        temporary = self._temporary(path)
        try:
            os.link(source, temporary)
        except OSError:
            with open(source, "rb") as file:
                replace_file(path, lambda target: shutil.copyfileobj(file, target))
            return
        os.replace(temporary, path)
        temporary.unlink(missing_ok=True)  # left there where both were names of the file before

    def _temporary(self, path: Path) -> Path:
        temporary = self.folder / f".{path.name}.{os.getpid()}"
        temporary.unlink(missing_ok=True)
        return temporary


def _set_aside(path: Path):
    damaged = path.rename(path.with_name(f"{path.name}.damaged"))
    print(f"{path} is damaged, and renamed to {damaged.name}")
