"""The runs of a comparison: main.py in processes of their own, some at once, stopped and resumed at any time."""
import math
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import main
from training import flags
from training.log import logged
from training.options import NO_RESULT
from training.process import end_with_parent
from training.signals import EXIT_NON_FINITE, EXIT_RESUME
from utils import UserError, replace_file

from .plan import Plan

ROOT = Path(__file__).resolve().parents[2]
METRIC = "val_acc1"
# A run may be resumed on another machine, with or without graphs.
NOT_COMPARED = NO_RESULT | {"cuda_graph"}
DIVERGED = "diverged"  # a file in the run's folder: with the same settings, it would do so again
POLL_SECONDS = 0.2


class OutOfTime(Exception):
    """The time for this call is over; runs that were still going have saved a checkpoint."""


@dataclass(frozen=True)
class PlannedRun:
    """One run of a contender, in a folder of its own."""

    contender: str
    lr: float
    seed: int
    epochs: int
    folder: Path

    def __str__(self) -> str:
        return f"{self.contender}, lr {self.lr:g}, seed {self.seed}, {self.epochs} epochs"

    @property
    def log(self) -> list[dict]:
        """The records of its epochs so far."""
        return logged(self.folder / "log.txt")

    @property
    def accuracy(self) -> float | None:
        """Top-1 accuracy after the last epoch, in percent; None where the run has not come so far."""
        log = self.log
        return log[-1][METRIC] if log and log[-1]["epoch"] + 1 == self.epochs else None

    def beside(self, ending: str) -> Path:
        """A file beside the run's folder, which is main.py's: its recipe (yaml), messages (txt), machine (json)."""
        return self.folder.with_name(f"{self.folder.name}.{ending}")

    @property
    def has_diverged(self) -> bool:
        return (self.folder / DIVERGED).exists()

    @property
    def has_ended(self) -> bool:
        return self.has_diverged or self.accuracy is not None


def short_runs(plan: Plan, folder: Path) -> dict[str, list[PlannedRun]]:
    """By contender, the runs that choose its learning rate; none where there is no choice."""
    return {
        name: [PlannedRun(name, lr, plan.seeds[0], plan.lr_epochs, folder / name / f"lr-{lr:g}") for lr in rates]
        if len(rates := plan.rates(name)) > 1 else []
        for name in plan.runs
    }


def chosen_lr(short: list[PlannedRun]) -> float | None:
    """The learning rate of the highest accuracy, the lower one of equals; None while short runs are missing."""
    if not all(run.has_ended for run in short):
        return None
    accuracies = [-math.inf if run.has_diverged else run.accuracy for run in short]
    return min(run.lr for run, value in zip(short, accuracies, strict=True) if value == max(accuracies))


def long_runs(plan: Plan, folder: Path) -> dict[str, list[PlannedRun]]:
    """By contender, the runs that are compared; none while its learning rate is not chosen."""
    found = {}
    for name, short in short_runs(plan, folder).items():
        lr = chosen_lr(short) if short else plan.rates(name)[0]
        seeds = [] if lr is None else plan.seeds
        found[name] = [PlannedRun(name, lr, seed, plan.epochs, folder / name / f"seed-{seed}") for seed in seeds]
    return found


def remaining(plan: Plan, folder: Path) -> Iterator[PlannedRun]:
    """Runs that have not ended: the short ones of all contenders, then every contender with the first seed, and so on.
    """
    for runs in short_runs(plan, folder).values():
        yield from (run for run in runs if not run.has_ended)
    for i in range(len(plan.seeds)):
        yield from (runs[i] for runs in long_runs(plan, folder).values() if runs and not runs[i].has_ended)


def check_settings(plan: Plan, folder: Path, **given: Any):
    """Check the runs that are in the folder, ended or not, before any is compared with others.

    Args:
        plan: What is compared.
        folder: Of its runs.
        given: Settings that stand above the plan's.

    Raises:
        UserError: One of them has other settings than the plan gives it.
    """
    for runs in (*short_runs(plan, folder).values(), *long_runs(plan, folder).values()):
        for run in (run for run in runs if (run.folder / "args.yaml").is_file()):
            has = flags.as_recipe(main.parse(["--config", str(run.folder / "args.yaml")])[1])
            asked = flags.as_recipe(plan.parse(run.contender, lr=run.lr, seed=run.seed, epochs=run.epochs, **given))
            others = [f"{key} {has[key]}, not {asked[key]}" for key in asked.keys() & has.keys() - NOT_COMPARED
                      if has[key] != asked[key]]
            if others:
                raise UserError(f"{run.folder} holds a run of other settings: {'; '.join(sorted(others))}; give "
                                "another --output_dir")


class Pool(AbstractContextManager):
    """Runs that are trained at the same time, each from where it was left.

    At the end of the `with` block, runs that are still going are interrupted, and save a checkpoint.

    Args:
        jobs: The most at a time.
        deadline: `time.monotonic()` at which all of them are interrupted.
    """

    def __init__(self, jobs: int, deadline: float):
        self.jobs, self.deadline = jobs, deadline
        self.going: dict[PlannedRun, subprocess.Popen] = {}

    def __exit__(self, *error):
        self.stop()

    @property
    def free(self) -> int:
        """How many more runs may begin."""
        return self.jobs - len(self.going)

    def begin(self, run: PlannedRun, recipe: str):
        """Raises OutOfTime where it is too late to."""
        if time.monotonic() >= self.deadline:
            raise OutOfTime
        run.folder.parent.mkdir(parents=True, exist_ok=True)
        replace_file(run.beside("yaml"), lambda file: file.write(recipe.encode()))
        words = [sys.executable, str(ROOT / "main.py"), "--config", str(run.beside("yaml")), "--output_dir"]
        with open(run.beside("txt"), "ab") as output:
            self.going[run] = subprocess.Popen(
                [*words, str(run.folder), "--auto_resume"], stdin=subprocess.DEVNULL, stdout=output,
                stderr=subprocess.STDOUT, start_new_session=True, preexec_fn=partial(end_with_parent, signal.SIGTERM),
            )

    def wait(self) -> PlannedRun:
        """The next run whose process ends. One that has neither ended nor diverged then has failed.

        Raises:
            OutOfTime: It is past the deadline, or a run was interrupted by another than this process.
        """
        while time.monotonic() < self.deadline:
            for run, process in self.going.items():
                if (code := process.poll()) is None:
                    continue
                self._end(run)
                if code == EXIT_RESUME:
                    raise OutOfTime
                return run
            time.sleep(POLL_SECONDS)
        raise OutOfTime

    def stop(self):
        """Interrupt the runs that are still going, and wait until they have ended."""
        for process in self.going.values():
            process.terminate()
        for run in list(self.going):
            self._end(run)

    def _end(self, run: PlannedRun):
        """Wait for a run's process to end, and keep that it diverged."""
        if self.going[run].wait() == EXIT_NON_FINITE:
            (run.folder / DIVERGED).touch()
        del self.going[run]


@contextmanager
def interrupted_by_sigterm() -> Iterator[None]:
    """SIGTERM, by which a scheduler ends a program, acts as Ctrl-C."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
