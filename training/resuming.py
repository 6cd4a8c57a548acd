"""Where a run writes, and which checkpoint it resumes from."""
import os
import time
import zipfile
from pathlib import Path

from storage.remote import public
from storage.weights import WeightsError, fetch
from utils import UserError, as_user_error

from .checkpoints import CheckpointStore, FolderInUseError, is_intact
from .distributed import Distributed
from .log import logged_epochs
from .options import OUTPUTS, CheckpointOptions
from .run import Run


class LaterCheckpointsError(UserError):
    """The output folder holds checkpoints that are later than the one to resume from."""


class NoFolderError(UserError):
    """torchrun restarted a run that has no output folder to resume in."""


class DamagedCheckpointError(UserError):
    """A checkpoint is damaged or truncated."""


class LostCheckpointsError(UserError):
    """A folder in which a run has saved itself holds no checkpoint any more, but other results of it."""


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
        return CheckpointStore(OUTPUTS / name / f"{date}-{microseconds:06}", options.keep_checkpoints, is_new=True)
    folder = Path(options.output_dir)
    # `Path.resolve` raises where links lead in a circle.
    source = options.resume and os.path.realpath(options.resume)
    resumed_here = source and os.path.dirname(source) == os.path.realpath(folder)
    store = CheckpointStore(folder, options.keep_checkpoints, is_new=not options.resumes and not resumed_here)
    if store.is_new and store.holds_run():
        raise FolderInUseError(f"{store.folder} already holds a run")
    return store


def find_start(options: CheckpointOptions, store: CheckpointStore, distributed: Distributed) -> Path | None:
    """The checkpoint to resume from, the same on every process; None for the start of a run.

    Raises:
        LostCheckpointsError: The run to resume has saved itself, and its checkpoints are gone.
        UserError: It is not there, is damaged, cannot be read, or is older than what the output folder holds.
    """
    if options.resumes:
        newest = store.newest_intact() if distributed.is_main else None
        step = distributed.max(-1 if newest is None else newest)
        if step >= 0:
            path = store.path(step)
            if not path.exists():
                raise UserError(f"{path} is not seen by every process; machines must share the output folder")
            return path
        if not options.resume and distributed.is_main:
            _check_nothing_is_lost(store, options.save_every)
    return _named_start(options.resume, store) if options.resume else None


def _check_nothing_is_lost(store: CheckpointStore, save_every: int):
    """Check that a folder without checkpoints never had one: a run that starts there empties its log."""
    log = store.folder / "log.txt"
    left = [path.name for path in (store.best, store.last) if os.path.lexists(path)]
    left += [log.name] if logged_epochs(log) >= save_every else []
    if left:
        raise LostCheckpointsError(f"{store.folder} has no checkpoint-*.pth any more, but a run's {', '.join(left)}")


def _named_start(source: str, store: CheckpointStore) -> Path:
    with as_user_error(WeightsError):
        path = fetch(source).resolve()
    # Files of other formats hold no run; reading them says so.
    if zipfile.is_zipfile(path) and not is_intact(path):
        raise DamagedCheckpointError(f"{public(source)}: damaged or truncated")
    steps = store.steps()
    if path.parent == store.folder.resolve() and steps and not path.samefile(store.path(steps[-1])):
        raise LaterCheckpointsError(f"{store.folder} holds later checkpoints than {path.name}")
    return path


def keep_best(run: Run, source: Path, store: CheckpointStore, distributed: Distributed):
    """Have the `best.pth` of a run that resumes from `source` in its folder too; without one, the best is reset."""
    if run.best is None:
        return
    if not distributed.max(int(distributed.is_main and store.take_best(source, run.best_epoch))):
        if distributed.is_main:
            print(f"the best.pth of {run.best_metric.name} {run.best:.3f} is not beside {source}: the best is reset")
        run.best = run.best_epoch = None
