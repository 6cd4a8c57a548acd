"""What a run says of itself: on the terminal, in log.txt and in trackers."""
import json
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from storage.weights import read_checkpoint
from utils import UserError, count, replace_file

from .checkpoints import CheckpointStore
from .distributed import Distributed
from .options import NOT_OF_RUN, WandbOptions
from .run import Clock, Run
from .task import Data, Task
from .trackers import Tracker, open_trackers

PICTURES_EVERY = 60.0  # seconds, between two pictures of evaluations


def print_plan(task: Task, run: Run, data: Data, peak_lr: float, folder: Path):
    """Print what is going to be trained.

    Args:
        task: The task.
        run: Its run, at the start or where it resumes.
        data: What it trains and is evaluated on.
        peak_lr: The learning rate after the warm-up.
        folder: Where the run writes.
    """
    settings, clock, world_size = task.settings, run.clock, task.distributed.world_size
    parameters = sum(p.numel() for p in run.model.parameters())
    trained = sum(p.numel() for p in run.model.parameters() if p.requires_grad)
    of_these = "" if trained == parameters else f", of which {trained:,} are trained"
    classes = f", {task.num_classes} classes" if task.num_classes else ""
    in_all = "" if settings.schedule.max_steps is None else f", {count(clock.total, 'step')} in all"
    lr, images = settings.optimizer.lr, run.global_batch
    print(f"{task.name}: {parameters / 1e6:.2f} M parameters{of_these}{classes}, on {task.distributed.device}")
    print(_images(data, left_out=len(data.train_loader.dataset) - clock.epoch_length * images))
    if advice := settings.advice_for(len(data.train_loader.dataset)):
        print(advice)
    numbered = f" (0 to {clock.epochs - 1})" if clock.epochs > 1 else ""
    print(
        f"{count(clock.epochs, 'epoch')}{numbered} of {count(clock.epoch_length, 'step')} of {count(images, 'image')}"
        f"{in_all}; writes to {folder}"
    )
    print(
        f"global batch {images} = {count(settings.loader.batch_size, 'image')} x {count(world_size, 'process')} "
        f"x {settings.optimizer.update_freq} accumulated; learning rate {peak_lr:.3e} = {lr:g} x {images} / 512"
    )
    recipe_batch = settings.optimizer.recipe_batch
    if recipe_batch not in (None, images):
        times = f"{images / recipe_batch:g} times"
        print(f"the recipe is for a global batch of {recipe_batch}, this run has {images}: its learning rate is "
              f"{times} what it would be there, and a step sees {times} as many images")
    # Where the start would still weigh 5 % at the end, if the decay did not warm up.
    if run.ema is not None and run.ema.decay < 1 and run.ema.decay**clock.total > 0.05:
        decay, enough = run.ema.decay, math.ceil(math.log(0.05) / math.log(run.ema.decay))
        print(
            f"EMA decay: warms up to {run.ema.get_decay(clock.total):.3g} by the last step; {decay:g} is for runs of "
            f"more than {enough:,} steps"
        )


def _images(data: Data, left_out: int) -> str:
    """How many images there are; of those of an epoch, the ones left over by its whole steps are not trained on."""
    rest = f" (each epoch leaves out {left_out}, too few for a step)" if left_out > 0 else ""
    val = "" if data.val_loader is None else f", {count(len(data.val_loader.dataset), 'val image')}"
    return f"{count(len(data.train_loader.dataset), 'training image')}{rest}{val}"


def print_end(run: Run, store: CheckpointStore):
    """Print what a run that has ended leaves behind in its store."""
    clock = run.clock
    if not clock.run_is_over:
        waited = f"{count(run.epochs_without_better, 'epoch')} without a better {run.best_metric.name}"
        print(f"ended early, after epoch {clock.epoch}: {waited}")
    print(f"log: {store.folder / 'log.txt'}\ncheckpoint: {store.last}")
    if run.best is not None:
        among = f" of 0 to {clock.epochs - 1}" if clock.epochs > 1 else ""
        print(f"best: {run.best_metric.name} {run.best:.3f} after epoch {run.best_epoch}{among}, {store.best}")
    print(f"time: {timedelta(seconds=round(run.total_seconds))}")


def is_watched(distributed: Distributed) -> bool:
    """Whether to show a progress bar: to a person at a terminal; a log file gets plain lines alone."""
    return distributed.is_main and sys.stderr.isatty()


def _lines(file: Path) -> list[tuple[bytes, dict[str, Any] | None]]:
    """The lines of a run's `log.txt`, each with its end, and the record of an epoch in it; None where it is no record.

    Raises:
        UserError: There is no file, but something else.
    """
    if not os.path.lexists(file):
        return []
    if not file.is_file():  # reading a pipe or a device may never end
        raise UserError(f"{file} is no file")
    return [(line + b"\n", _record(line)) for line in file.read_bytes().split(b"\n") if line]


def logged(file: Path) -> list[dict[str, Any]]:
    """The records of the epochs in a run's `log.txt`; raises UserError as `RunLog` does."""
    return [record for _, record in _lines(file) if record is not None]


def logged_epochs(file: Path) -> int:
    """How many epochs a run's `log.txt` holds; raises UserError as `RunLog` does."""
    return len(logged(file))


def _record(line: bytes) -> dict[str, Any] | None:
    with suppress(ValueError, RecursionError):
        record = json.loads(line)
        if isinstance(record, dict) and isinstance(record.get("epoch"), int):
            return record
    return None


class RunLog:
    """One line of JSON per epoch in `log.txt`, and curves and pictures by `training.trackers`.

    Args:
        folder: The run's; None for a silent log, on all processes but the main one.
        epoch: The epoch in which the run starts or resumes. Lines of it and of later ones, which the run had logged
            before it was stopped, are removed.
        trackers: What else is told, and closed at the end.

    As a context, it is closed at the end whatever happens, and after a fault nothing more is drawn.
    """

    def __init__(self, folder: Path | None, epoch: int = 0, trackers: Sequence[Tracker] = ()):
        self.file = None
        self.trackers, self.drawn_at, self.undrawn = trackers, time.monotonic(), None
        if folder is not None:
            self.file = folder / "log.txt"
            self._remove_from(epoch)

    def _remove_from(self, epoch: int):
        lines = _lines(self.file)
        kept = [line for line, record in lines if record is not None and record["epoch"] < epoch]
        if foreign := [line for line, record in lines if record is None]:  # or half a line, of a run that was killed
            aside = self.file.with_name(f"{self.file.name}.damaged")
            with open(aside, "ab") as file:
                file.writelines(foreign)
            print(f"{self.file}: {count(len(foreign), 'line')} without the record of an epoch, moved to {aside}")
        if lines and b"".join(kept) != self.file.read_bytes():
            replace_file(self.file, lambda file: file.writelines(kept))

    def scalars(self, group: str, values: dict[str, float], step: int):
        """Points of the curves `group/NAME` at an optimizer step."""
        for tracker in self.trackers:
            tracker.scalars({f"{group}/{name}": value for name, value in values.items()}, step)

    def evaluations(
        self, results: dict[str, dict[str, float]], pictures: Callable[[], dict[str, np.ndarray]], step: int
    ):
        """Points of the curves of an epoch's evaluations, by group, and the pictures, uint8 (H, W, 3), of the last.

        An epoch may take less time than pictures do: they are drawn at most every `PICTURES_EVERY` seconds, and those
        of the last epoch when the log is closed. What is called later must not change with what is evaluated then.
        """
        for group, values in results.items():
            self.scalars(group, values, step)
        self.undrawn = group, pictures, step
        if time.monotonic() - self.drawn_at >= PICTURES_EVERY:
            self._draw()

    def _draw(self):
        if self.trackers and self.undrawn is not None:
            group, pictures, step = self.undrawn
            for name, pixels in pictures().items():
                for tracker in self.trackers:
                    tracker.picture(f"{group}/{name}", pixels, step)
        self.undrawn, self.drawn_at = None, time.monotonic()

    def epoch(self, record: dict[str, Any]):
        """Append the line of an epoch to `log.txt`."""
        if self.file is not None:
            for tracker in self.trackers:
                tracker.flush()
            with open(self.file, "a") as file:
                file.write(json.dumps({name: _finite(value) for name, value in record.items()}) + "\n")

    def close(self):
        """Draw what is still to be drawn, and close all trackers, though drawing or one of them fails."""
        with ExitStack() as stack:
            for tracker in self.trackers:
                stack.callback(tracker.close)
            self._draw()

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None):
        if kind is not None:  # a picture could fail too, and would be of a step in the past
            self.undrawn = None
        self.close()


def _finite(value: Any) -> Any:
    """JSON has no NaN, and no infinity."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def is_complete(
    clock: Clock, source: Path | None, folder: Path, recipe: dict[str, Any], distributed: Distributed
) -> bool:
    """Whether every epoch of a run that resumes is trained, evaluated and logged; the same on all processes.

    A run saves its last epoch before it evaluates it: its log tells whether that was done.

    Args:
        clock: Where the run is.
        source: The checkpoint that it resumes from.
        folder: Its output folder.
        recipe: What it was asked for now; of another evaluation, the log says nothing.
        distributed: This process.
    """
    if clock.run_is_over or source is None or not clock.is_trained:
        return clock.run_is_over
    return bool(distributed.max(int(distributed.is_main and _is_logged(clock, source, folder, recipe))))


def _is_logged(clock: Clock, source: Path, folder: Path, recipe: dict[str, Any]) -> bool:
    last = next((record for _, record in reversed(_lines(folder / "log.txt")) if record is not None), {})
    then = read_checkpoint(str(source), mmap=True)["args"]
    differ = {name for name in then.keys() | recipe.keys() if then.get(name) != recipe.get(name)}
    return (last.get("epoch"), last.get("step")) == (clock.epoch, clock.global_step) and not differ - NOT_OF_RUN


def open_log(folder: Path | None, clock: Clock, wandb: WandbOptions, recipe: dict[str, Any]) -> RunLog:
    """The log of a run that starts or resumes where its clock is, with its trackers; silent where `folder` is None.

    Trackers count the steps that were taken: with another batch size, steps of whole epochs would count backwards.

    Raises:
        WandbError: Weights & Biases is asked for, and cannot be used.
    """
    trackers = () if folder is None else open_trackers(folder, clock.steps_taken, wandb, recipe)
    return RunLog(folder, clock.epoch, trackers)
