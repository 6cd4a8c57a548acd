"""Runs that hang, and runs that are asked to leave before they take a step."""
import ctypes
import itertools
import os
import random
import re
import signal
import time

from PIL import Image

import engine
import main
from training.signals import EXIT_RESUME

from .runs import PATIENCE, Course, Fault, Verdict, expect, reach_step

# In minutes; a step on a busy machine takes a second.
WATCHED = ["--num_workers", "0", "--save_every_steps", "1", "--dist_timeout", "2", "--hang_timeout", "0.1"]


def _stop_rank(course: Course, rng: random.Random) -> Verdict:
    attempt = course.start(*WATCHED)
    reach_step(attempt, rng.randint(1, 3))
    stopped = rng.randrange(2)
    attempt.send(signal.SIGSTOP, attempt.ranks[stopped].pid)
    attempt.ranks[1 - stopped].join(PATIENCE)
    attempt.ranks[stopped].kill()
    verdict = expect(attempt, {1, -signal.SIGKILL}, f"process {stopped} does not answer")
    return verdict or _stacks(course, 1 - stopped)


def _stacks(course: Course, rank: int) -> Verdict:
    stacks = course.folder / f"stacks-{rank}.txt"
    written = stacks.exists() and "main.py" in stacks.read_text()
    return None if written else f"no stacks of process {rank}"


def _read_for_ever():
    """Read some images in one of the processes, and one without end, as from a file server that does not answer."""
    number, open_image = itertools.count(), Image.open

    def hang(*args, **kwargs):
        if os.environ["RANK"] == os.environ["HANGS"] and next(number) == 20:
            time.sleep(1000)
        return open_image(*args, **kwargs)

    Image.open = hang


def _hang_in_reading(course: Course, rng: random.Random) -> Verdict:
    hangs = rng.randrange(course.world_size)
    attempt = course.start(*WATCHED, environment=dict(HANGS=str(hangs)), prepare=_read_for_ever)
    reach_step(attempt, 1)
    which = f"process {hangs}" if course.world_size > 1 else "the run"
    verdict = expect(attempt, {1}, f"error: {which} has made no progress for 0.1 minutes, ")
    if attempt.text().count("error:") != 1:
        return f"not one line: {attempt.text()[-2000:]}"
    return verdict or next(filter(None, (_stacks(course, rank) for rank in range(course.world_size))), None)


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


def _signal_at_start():
    """Ask this process to leave once it is about to train, as a time limit does that is too short."""
    plan = main.print_plan
    main.print_plan = lambda *args: (os.kill(os.getpid(), signal.SIGUSR1), plan(*args))


def _leave_without_a_step(course: Course, rng: random.Random) -> Verdict:
    ends = [(EXIT_RESUME, "stopped in epoch")] * 2 + [(1, "3 starts in a row got no further")]
    verdicts = (expect(course.start(prepare=_signal_at_start), {code}, text) for code, text in ends)
    return next(filter(None, verdicts), None)


def _read_slowly():
    """Take longer for each image in one of the processes, as on a machine whose storage is slow."""
    open_image = Image.open

    def slow(*args, **kwargs):
        time.sleep(0.05 if os.environ["RANK"] == os.environ["SLOW"] else 0)
        return open_image(*args, **kwargs)

    Image.open = slow


def _slow_process(course: Course, rng: random.Random) -> Verdict:
    slow = rng.randrange(course.world_size)
    attempt = course.start("--num_workers", "0", environment=dict(SLOW=str(slow)), prepare=_read_slowly)
    reach_step(attempt, 3)
    attempt.send(signal.SIGTERM, attempt.ranks[0].pid)
    verdict = expect(attempt, {EXIT_RESUME})
    named = re.findall(r"  slowest 0\.\d+ s \(process (\d)\)", attempt.text())
    return verdict or (None if set(named) == {str(slow)} else f"process {slow} is slow, not {named}: {attempt.text()}")


FAULTS = [
    Fault("one of two processes slow", _slow_process, world_size=2, times=2),
    Fault("three starts that are asked to leave before a step", _leave_without_a_step),
    Fault("an image that is read for ever", _hang_in_reading),
    Fault("an image that is read for ever, by one of two processes", _hang_in_reading, world_size=2, times=2),
    Fault("C code that keeps Python's threads from running", _hang_in_c),
    Fault("one of two processes stopped, and watched", _stop_rank, world_size=2, times=2),
]
