"""The runs of a comparison: main.py in processes of their own, one after the other, stopped and resumed at any time."""
import math
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import yaml

from training.log import logged
from training.options import NO_RESULT
from training.process import end_with_parent
from training.signals import EXIT_RESUME
from utils import UserError, replace_file

from .plan import Plan

ROOT = Path(__file__).resolve().parents[2]
METRIC = "val_acc1"


class OutOfTime(Exception):
    """The time for this call is over; the run that was going on has saved itself."""


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
        """Top-1 accuracy after the last epoch, in percent; None where the run has not ended, NaN where it diverged."""
        log = self.log
        if not log or log[-1]["epoch"] + 1 < self.epochs:
            return None
        return math.nan if log[-1][METRIC] is None else log[-1][METRIC]


def short_runs(plan: Plan, folder: Path) -> dict[str, list[PlannedRun]]:
    """By contender, the runs that choose its learning rate; none where there is no choice."""
    return {
        name: [PlannedRun(name, lr, plan.seeds[0], plan.lr_epochs, folder / name / f"lr-{lr:g}") for lr in rates]
        if len(rates := plan.rates(name)) > 1 else []
        for name in plan.runs
    }


def chosen_lr(short: list[PlannedRun]) -> float | None:
    """The learning rate of the highest accuracy, the lower one of equals; None while short runs are missing."""
    accuracies = [run.accuracy for run in short]
    if None in accuracies:
        return None
    best = max(accuracies, key=lambda value: -math.inf if math.isnan(value) else value)
    return min(run.lr for run, value in zip(short, accuracies, strict=True) if value == best or math.isnan(best))


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
        yield from (run for run in runs if run.accuracy is None)
    for i in range(len(plan.seeds)):
        yield from (runs[i] for runs in long_runs(plan, folder).values() if runs and runs[i].accuracy is None)


def check_settings(run: PlannedRun, recipe: str):
    """Raises UserError where the folder holds a run with other settings, which would be compared with the rest."""
    file = run.folder / "args.yaml"
    if not file.is_file():
        return
    has, asked = (yaml.safe_load(text) for text in (file.read_text(), recipe))
    others = [
        f"{key} {has.get(key)}, not {value}" for key, value in asked.items()
        if key not in NO_RESULT and has.get(key) != value
    ]
    if others:
        raise UserError(f"{run.folder} holds a run of other settings: {'; '.join(others)}; give another --output_dir")


def train(run: PlannedRun, recipe: str, deadline: float) -> int:
    """Train, or resume, until the run or the time is over; returns the exit code.

    Raises:
        OutOfTime: `time.monotonic()` is past the deadline, and the run has saved itself.
        KeyboardInterrupt: This process was told to end, and so was the run, which has saved itself.
    """
    run.folder.parent.mkdir(parents=True, exist_ok=True)
    file = run.folder.with_name(f"{run.folder.name}.yaml")
    replace_file(file, lambda opened: opened.write(recipe.encode()))
    words = [sys.executable, str(ROOT / "main.py"), "--config", str(file), "--output_dir", str(run.folder)]
    with open(run.folder.with_name(f"{run.folder.name}.txt"), "ab") as output, interrupted_by_sigterm():
        process = subprocess.Popen(
            [*words, "--auto_resume"], stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
            start_new_session=True, preexec_fn=partial(end_with_parent, signal.SIGTERM),
        )
        try:
            code = process.wait(timeout=None if deadline == math.inf else max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.terminate()
            code = process.wait()
        except KeyboardInterrupt:
            process.terminate()
            process.wait()
            raise
    if code == EXIT_RESUME:
        raise OutOfTime
    return code


@contextmanager
def interrupted_by_sigterm() -> Iterator[None]:
    """SIGTERM, by which a scheduler ends a program, acts as Ctrl-C."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
