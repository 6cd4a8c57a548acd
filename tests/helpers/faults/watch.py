"""Runs that hang, and runs that are asked to leave before they take a step."""
import ctypes
import os
import random
import shutil
import signal

import engine

from .runs import PATIENCE, Course, Fault, Verdict, expect, reach_step

# In minutes; a step on a busy machine takes a second.
WATCHED = ["--num_workers", "0", "--save_every_steps", "1", "--dist_timeout", "2", "--hang_timeout", "0.1"]


def _stop_rank(course: Course, rng: random.Random) -> Verdict:
    attempt = course.start(*WATCHED)
    reach_step(attempt, rng.randint(1, 3))
    stopped = rng.randrange(2)
    os.kill(attempt.ranks[stopped].pid, signal.SIGSTOP)
    attempt.ranks[1 - stopped].join(PATIENCE)
    attempt.ranks[stopped].kill()
    verdict = expect(attempt, {1, -signal.SIGKILL}, f"process {stopped} does not answer")
    return verdict or _stacks(course, 1 - stopped)


def _stacks(course: Course, rank: int) -> Verdict:
    stacks = course.folder / f"stacks-{rank}.txt"
    written = stacks.exists() and "main.py" in stacks.read_text()
    return None if written else f"no stacks of process {rank}"


def _hang_in_reading(course: Course, rng: random.Random) -> Verdict:
    """An image that is read for ever, as from a file server that does not answer: here, a pipe without a writer."""
    attempt = course.start(*WATCHED)
    reach_step(attempt, rng.randint(1, 3))
    away = course.photos.with_name("away")
    course.photos.rename(away)
    try:
        shutil.copytree(away, course.photos, copy_function=_as_pipe)
        verdict = expect(attempt, {1}, ", loading data in epoch ")
    finally:
        shutil.rmtree(course.photos, ignore_errors=True)
        away.rename(course.photos)
    return verdict or next(filter(None, (_stacks(course, rank) for rank in range(course.world_size))), None)


def _as_pipe(source: str, target: str):
    os.mkfifo(target)


def _hold_interpreter():
    """Call C code that keeps Python's threads from running, as soon as a step was taken."""
    update = engine.Trainer._update_weights

    def hang(trainer: engine.Trainer):
        update(trainer)
        if trainer.run.clock.step == 2:
            ctypes.PyDLL(None).sleep(1000)

    engine.Trainer._update_weights = hang


def _hang_in_c(course: Course, rng: random.Random) -> Verdict:
    attempt = course.start(*WATCHED, prepare=_hold_interpreter)
    reach_step(attempt, 1)
    return expect(attempt, {1}, "most recent call first")


FAULTS = [
    Fault("an image that is read for ever", _hang_in_reading),
    Fault("an image that is read for ever, by two processes", _hang_in_reading, world_size=2),
    Fault("C code that keeps Python's threads from running", _hang_in_c),
    Fault("one of two processes stopped, and watched", _stop_rank, world_size=2, times=2),
]
