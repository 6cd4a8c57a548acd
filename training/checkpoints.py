"""The checkpoints of a run, which hold `Run.state_dict`: written atomically, found again."""
import fcntl
import os
import re
import shutil
import socket
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import torch

from storage.weights import HostileFileError, WeightsError, fetch, read_file
from utils import UserError, as_user_error, replace_file

from .distributed import Distributed
from .options import OUTPUTS, CheckpointOptions
from .run import Run


class FolderInUseError(UserError):
    """The output folder holds another run."""


class LaterCheckpointsError(UserError):
    """The output folder holds checkpoints that are later than the one to resume from."""


class NoFolderError(UserError):
    """torchrun restarted a run that has no output folder to resume in."""


class DamagedCheckpointError(UserError):
    """A checkpoint is damaged or truncated."""


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
        UserError: The system cannot read the file, or it holds code.
    """
    if path.exists() and not path.is_file():  # reading a pipe or a device may never end
        raise UserError(f"{path} is no file")
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
    """The checkpoints of one run in its folder, each named after the number of optimizer steps taken.

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
        """The steps of the checkpoints that are there, the newest last."""
        names = (re.fullmatch(r"checkpoint-(\d{8,})\.pth", path.name) for path in self.folder.glob("checkpoint-*.pth"))
        return sorted(int(name[1]) for name in names if name)

    def holds_run(self) -> bool:
        """Whether a run has written here."""
        return bool(self.steps()) or any(p.exists() for p in (self.last, self.best, self.folder / "log.txt"))

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Lock the folder for this process, and remove what a killed run left half written.

        Raises:
            UserError: Another process writes there; says which. Or, meanwhile, something in the folder could not be
                read or written.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            # Not "w": the file names the process that has locked it. A link may lead to a file of somebody's.
            lock = os.open(self.folder / ".lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        except OSError as error:
            raise UserError(f"cannot write to {error.filename}: {error.strerror}") from error
        with open(lock, "r+b", buffering=0) as file:
            try:
                # This lock is the process's own: data loading processes inherit open files, and outlive it by seconds.
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                holder = file.read(200).decode(errors="replace").strip() or "not known which"
                raise UserError(
                    f"another run is writing to {self.folder} ({holder}); stop it, or take another folder"
                ) from None
            except OSError:
                pass  # a file system without locks
            with suppress(OSError):  # a full disk
                file.truncate()
                file.write(f"process {os.getpid()} on {socket.gethostname()}\n".encode())
            # What `replace_file` names so; an editor's files are named otherwise.
            for pattern in (".*.pth.*", ".args.yaml.????????", ".log.txt.????????"):
                for path in self.folder.glob(pattern):
                    path.unlink()
            try:
                yield
            except OSError as error:  # a folder in the place of a file, a circle of links, or nothing any more
                path = error.filename2 or error.filename  # the second is what a file was to replace
                if path is None or not Path(os.fsdecode(path)).is_relative_to(self.folder):
                    raise
                raise UserError(f"{path}: {error.strerror}; {self.kept()}") from error

    def newest_intact(self) -> int | None:
        """The step of the newest intact checkpoint; later ones are renamed to `*.damaged`, with a line about each.

        Raises:
            UserError: There are checkpoints, and none is intact.
        """
        damaged = []
        for step in reversed(self.steps()):
            path = self.path(step)
            if is_intact(path):
                for other in damaged:
                    other.rename(other.with_suffix(".pth.damaged"))
                    print(f"{other} is damaged, and renamed to {other.name}.damaged")
                self._point_last(path)  # the run may have been killed before it did
                return step
            damaged.append(path)
        if damaged:
            raise UserError(f"no checkpoint in {self.folder} is intact; to start a new run, take another folder")
        return None

    def save(self, step: int, state: dict[str, Any]):
        """Write the checkpoint after `step` optimizer steps, point `last.pth` to it, and remove the oldest.

        Raises:
            UserError: It cannot be written; earlier checkpoints are intact.
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
            UserError: It cannot be written; the one before is intact.
        """
        self._write(self.best, state)

    def take_best(self, source: Path, best: dict[str, float | None]) -> bool:
        """Copy the `best.pth` beside the checkpoint `source`, unless one is here; returns whether there is one now.

        One of another best value than `best`, a later one for example, is left where it is.

        Raises:
            UserError: It cannot be written.
        """
        beside = source.parent / self.best.name
        if self.best.exists() or not beside.is_file() or not is_intact(beside):
            return self.best.exists()
        state = read_file(beside, mmap=True)
        if state.get("best") != best:
            return False
        self._write(self.best, read_file(beside))
        return True

    def _write(self, path: Path, state: dict[str, Any]):
        try:
            save_checkpoint(path, state)
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror}; {self.kept()}") from error

    def kept(self) -> str:
        """What an error message says of the last checkpoint."""
        steps = self.steps()
        return f"the last checkpoint is {self.path(steps[-1])}" if steps else "no checkpoint was written yet"


# --- where a run writes, and what it resumes from ---------------------------------------------------------------------


def open_store(options: CheckpointOptions, name: str, started: int) -> CheckpointStore:
    """The checkpoints of the output folder or, by default, of a folder named after the model and the start time.

    Args:
        options: What was asked for.
        name: The model's.
        started: When the run started, in nanoseconds since 1970; the same on every process.

    Raises:
        FolderInUseError: The folder holds another run.
        NoFolderError: torchrun restarted the run, and there is no output folder.
    """
    if options.output_dir is None:
        if options.resumes:
            raise NoFolderError("torchrun restarted the run, which can only resume in a folder that was named")
        # A script may start several runs in one second.
        seconds, microseconds = divmod(started // 1000, 10**6)
        date = time.strftime("%Y%m%d-%H%M%S", time.localtime(seconds))
        return CheckpointStore(OUTPUTS / name / f"{date}-{microseconds:06}", options.keep_checkpoints)
    store = CheckpointStore(Path(options.output_dir), options.keep_checkpoints)
    # `Path.resolve` raises where links lead in a circle.
    source = options.resume and os.path.realpath(options.resume)
    resumed_here = source and os.path.dirname(source) == os.path.realpath(store.folder)
    if store.holds_run() and not options.resumes and not resumed_here:
        raise FolderInUseError(f"{store.folder} already holds a run")
    return store


def find_start(options: CheckpointOptions, store: CheckpointStore, distributed: Distributed) -> Path | None:
    """The checkpoint to resume from, the same on every process; None for the start of a run.

    Raises:
        UserError: It is not there, is damaged, or is older than what the output folder holds.
    """
    if options.resumes:
        newest = store.newest_intact() if distributed.is_main else None
        step = distributed.max(-1 if newest is None else newest)
        if step >= 0:
            path = store.path(step)
            if not path.exists():
                raise UserError(f"{path} is not seen by every process; machines must share the output folder")
            return path
    return _named_start(options.resume, store) if options.resume else None


def _named_start(source: str, store: CheckpointStore) -> Path:
    with as_user_error(WeightsError):
        path = fetch(source).resolve()
    # Files of other formats hold no run; reading them says so.
    if zipfile.is_zipfile(path) and not is_intact(path):
        raise DamagedCheckpointError(f"{source}: damaged or truncated")
    steps = store.steps()
    if path.parent == store.folder.resolve() and steps and path != store.path(steps[-1]).resolve():
        raise LaterCheckpointsError(f"{store.folder} holds later checkpoints than {path.name}")
    return path


def keep_best(run: Run, source: Path, store: CheckpointStore, distributed: Distributed):
    """Have the `best.pth` of a run that resumes from `source` in its folder too; without one, the best is reset."""
    if run.best is None:
        return
    best = {run.best_metric.name: run.best}
    if not distributed.max(int(distributed.is_main and store.take_best(source, best))):
        if distributed.is_main:
            print(f"the best.pth of {run.best_metric.name} {run.best:.3f} is not beside {source}: the best is reset")
        run.best = run.best_epoch = None
