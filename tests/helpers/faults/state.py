"""What a run has saved, what it trains on and what it computes, changed behind its back."""
import os
import random
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from training.signals import EXIT_NON_FINITE, EXIT_RESUME

from .runs import Course, Fault, TooLate, Verdict, expect, reach_step

EVERY_STEP = ["--save_every_steps", "1", "--num_workers", "0"]


def leave(course: Course, rng: random.Random, within_epoch: bool = False, most: int = 4) -> Verdict:
    """Have a run leave, somewhere or in the middle of an epoch; it is asked to after at most so many steps."""
    while True:  # to its end at most, where `expect` raises TooLate
        attempt = course.start(*EVERY_STEP)
        reach_step(attempt, rng.randint(1, most))
        attempt.send(signal.SIGTERM)
        verdict = expect(attempt, {EXIT_RESUME})
        if not within_epoch or " after step 0 of " not in attempt.text():
            return verdict


def first_wrong(*verdicts: Verdict) -> Verdict:
    return next(filter(None, verdicts), None)


# --- checkpoints ------------------------------------------------------------------------------------------------------


def refused(course: Course, text: str, *words: str, **start) -> Verdict:
    """Start a run that is to end with one line, and to leave every checkpoint where it is."""
    before = sorted(path.name for path in course.folder.glob("*.pth*"))
    try:
        verdict = expect(course.start(*words, **start), {1}, text)
    except TooLate:  # what it resumed from had steps to go: it was struck, and did not notice
        return f"it trained to its end, without a word of {text!r}"
    after = sorted(path.name for path in course.folder.glob("*.pth*"))
    return verdict or (None if before == after else f"checkpoints became {after} from {before}")


def _lose_all_but_last(course: Course, rng: random.Random) -> Verdict:
    verdict = leave(course, rng)
    last = course.store.last
    shutil.copyfile(last.resolve(), course.folder / "copy")
    last.unlink()
    (course.folder / "copy").rename(last)
    for step in course.store.steps():
        course.store.path(step).unlink()
    attempt = course.start(*EVERY_STEP)
    reach_step(attempt, 1)
    attempt.send(signal.SIGTERM)
    return first_wrong(verdict, expect(attempt, {EXIT_RESUME}, "holds no checkpoint but last.pth"))


@contextmanager
def _moved(paths: list[Path], folder: Path) -> Iterator[None]:
    folder.mkdir()
    for path in paths:
        path.rename(folder / path.name)
    try:
        yield
    finally:
        for path in paths:
            (folder / path.name).rename(path)
        folder.rmdir()


def _lose_checkpoints(course: Course, rng: random.Random) -> Verdict:
    verdict = leave(course, rng)
    with _moved([course.store.path(step) for step in course.store.steps()], course.folder / "away"):
        return first_wrong(verdict, refused(course, "has no checkpoint-*.pth any more"))


def _no_memory_to_read():
    import torch

    def fail(*_, **__):
        raise MemoryError

    torch.load = fail


def _failing_reads():
    import zipfile

    def fail(*_):
        raise OSError(5, "Input/output error")

    zipfile.ZipFile.testzip = fail


def _cannot_read(prepare: Callable[[], None], text: str) -> Callable[[Course, random.Random], Verdict]:
    def strike(course: Course, rng: random.Random) -> Verdict:
        return first_wrong(leave(course, rng), refused(course, text, prepare=prepare))

    return strike


# --- what it is asked for, and trains on ------------------------------------------------------------------------------


def _change_images(course: Course, rng: random.Random) -> Verdict:
    """In the middle of an epoch; the run is resumed once they are as they were."""
    verdict = leave(course, rng, within_epoch=True)
    first, second = sorted((course.data / "train").iterdir())[:2]
    image, away = next(first.iterdir()), course.data / "away"
    change = rng.choice(["removed", "renamed", "swapped"])
    moves = {
        "removed": [(image, away)], "renamed": [(image, first / "other.png")],
        "swapped": [(first, away), (second, first), (away, second)],
    }[change]
    for source, target in moves:
        source.rename(target)
    try:
        return first_wrong(verdict, refused(course, "written in the middle of an epoch"))
    finally:
        for source, target in reversed(moves):
            target.rename(source)


def _change_settings(course: Course, rng: random.Random) -> Verdict:
    verdict = leave(course, rng, within_epoch=True)
    change = rng.choice([["--seed", "1"], ["--mixup", "0.1"], ["--repeated_aug", "false"], ["--input_size", "64"]])
    return first_wrong(verdict, refused(course, "written in the middle of an epoch", *change))


def _start_unlike(course: Course, rng: random.Random) -> Verdict:
    change = rng.choice([["--lr", "0.02"], ["--seed", "3"], ["--clip_grad", "1"], ["--mixup", "0.3"]])
    return expect(course.start(of_rank={1: change}), {1}, f"unlike in process 0, {change[0][2:]} is {change[1]}")


def _start_on_other_images(course: Course, rng: random.Random) -> Verdict:
    """One process sees one image fewer, as on a machine to which not all was copied."""
    other = course.folder.with_name(f"{course.folder.name}-photos")
    if not other.exists():
        shutil.copytree(course.data, other)
        next((other / "train").rglob("*.png")).unlink()
    return expect(course.start(of_rank={1: ["--data_path", str(other)]}), {1}, "the train images are others")


# --- what it computes -------------------------------------------------------------------------------------------------


def _spoil_step(step: int, spoil: str, rank: str | None = None):
    """At the optimizer step `step` from the start, spoil a gradient or, in one process, a weight."""
    import torch

    import engine

    update, taken = engine.Trainer._update_weights, []

    def spoiled(self):
        taken.append(None)
        here = len(taken) == step and rank in (None, os.environ["RANK"])
        weight = next(value for value in self.run.model.parameters() if value.dim() == 1)
        if here and spoil == "gradient":
            weight.grad.fill_(1e30)
        update(self)
        if here and spoil == "weight":
            with torch.no_grad():
                weight.view(torch.int32)[0] ^= 1 << 20
        if here and spoil == "nan":
            with torch.no_grad():
                weight[0] = float("nan")

    engine.Trainer._update_weights = spoiled


def _compute_wrongly(
    spoil: str, code: int, text: str, rank: str | None = None
) -> Callable[[Course, random.Random], Verdict]:
    """A save in the next step must not take place."""

    def strike(course: Course, rng: random.Random) -> Verdict:
        prepare = partial(_spoil_step, rng.randint(1, 4), spoil, rank)
        return expect(course.start(*EVERY_STEP, prepare=prepare), {code}, text)

    return strike


# --- several faults at once -------------------------------------------------------------------------------------------


def _signal_then_kill(course: Course, rng: random.Random) -> Verdict:
    """As a scheduler does whose patience is short: perhaps while the run saves itself."""
    attempt = course.start("--num_workers", rng.choice("01"))
    reach_step(attempt, rng.randint(1, 5))
    attempt.send(signal.SIGTERM)
    time.sleep(rng.uniform(0, 0.15))
    for process in attempt.ranks:
        process.kill()
    return expect(attempt, {-signal.SIGKILL, EXIT_RESUME})


def _interrupt_twice(course: Course, rng: random.Random) -> Verdict:
    attempt = course.start("--num_workers", rng.choice("01"), "--save_every_steps", "1")
    reach_step(attempt, rng.randint(1, 5))
    attempt.send(signal.SIGINT)
    time.sleep(rng.uniform(0, 0.02))
    attempt.send(signal.SIGINT)
    return expect(attempt, {128 + signal.SIGINT, EXIT_RESUME})


def _kill_in_evaluation(course: Course, rng: random.Random) -> Verdict:
    attempt = course.start("--num_workers", rng.choice("01"))
    if not attempt.wait_for(lambda: "* Acc@1" in attempt.text(), every=0.001):
        attempt.end()
        raise TooLate
    time.sleep(rng.uniform(0, 0.1))  # that of the average weights follows, and best.pth
    for process in attempt.ranks:
        process.kill()
    return expect(attempt, {-signal.SIGKILL})


def _stop_and_continue(course: Course, rng: random.Random) -> Verdict:
    """Ctrl-Z and fg, for longer than a run may hang: nothing is to happen."""
    attempt = course.start("--num_workers", rng.choice("01"), *EVERY_STEP[:2], "--hang_timeout", "0.05")
    reach_step(attempt, rng.randint(1, 3))
    attempt.send(signal.SIGTSTP)
    time.sleep(8)
    attempt.send(signal.SIGCONT)
    reach_step(attempt, attempt.text().count("  loss ") + 1)
    attempt.send(signal.SIGTERM)
    return expect(attempt, {EXIT_RESUME})


FAULTS = [
    Fault("all checkpoints gone but a whole last.pth", _lose_all_but_last, times=2),
    Fault("all checkpoints gone", _lose_checkpoints, times=2),
    Fault("no memory to read a checkpoint", _cannot_read(_no_memory_to_read, "out of memory")),
    Fault("a checkpoint's read fails", _cannot_read(_failing_reads, "Input/output error")),
    Fault("images changed in the middle of an epoch", _change_images, times=3),
    Fault("settings changed in the middle of an epoch", _change_settings, times=3),
    Fault("two processes asked for other things", _start_unlike, world_size=2, times=3),
    Fault("two processes with other images", _start_on_other_images, world_size=2),
    Fault("a gradient of 1e30",
          _compute_wrongly("gradient", EXIT_NON_FINITE, "the optimizer's state became NaN or infinite"), times=2),
    Fault("a weight that became NaN", _compute_wrongly("nan", EXIT_NON_FINITE, "became"), times=2),
    Fault("a bit flipped in the weights of one of two processes",
          _compute_wrongly("weight", 1, "of the 2 processes, they have weights unlike", "1"), world_size=2, times=2),
    Fault("SIGTERM, then SIGKILL at once", _signal_then_kill, times=4),
    Fault("SIGINT twice", _interrupt_twice, times=2),
    Fault("SIGKILL in an evaluation", _kill_in_evaluation, times=3),
    Fault("stopped as a whole, and continued", _stop_and_continue, times=2),
]
