"""Data that do not come: data loading processes do not answer, or lack what they need to hand over batches."""
import ctypes
import multiprocessing
import os
import random
import resource
import signal
import tempfile
import time
from collections.abc import Callable
from functools import partial

from training import waits
from training.signals import EXIT_RESUME

from .runs import Attempt, Course, Fault, TooLate, Verdict, expect, reach_step

SOON = 30  # seconds within which a run leaves, five for each of its processes that does not answer
_CLONE_NEWNS, _MS_REC, _MS_PRIVATE = 0x20000, 0x4000, 0x40000  # of Linux's sched.h and sys/mount.h


def _stop_workers(attempt: Attempt, rng: random.Random):
    """Have some of the first rank's data loading processes answer no more."""
    reach_step(attempt, rng.randint(1, 4))
    workers = attempt.workers()
    if not workers:
        attempt.end()
        raise TooLate
    attempt.send(signal.SIGSTOP, *rng.sample(workers, rng.randint(1, len(workers))))


def _hang_worker(course: Course, rng: random.Random) -> Verdict:
    attempt = course.start("--num_workers", "2", "--save_every_steps", "1", "--loader_timeout", "2")
    _stop_workers(attempt, rng)
    return expect(attempt, {1}, "no data for 2 seconds")


def _hang_storage(course: Course, rng: random.Random) -> Verdict:
    """As of a file server that is gone: to open a file takes for ever."""
    attempt = course.start("--num_workers", rng.choice("01"), "--save_every_steps", "1", "--loader_timeout", "2")
    found = attempt.wait_for_step(rng.randint(1, 4))
    folder = course.data / "train" / "class0"
    away = course.data.with_name("away")
    folder.rename(away)
    folder.mkdir()
    try:
        for image in away.iterdir():
            os.mkfifo(folder / image.name)
        if not found:
            attempt.end()
            raise TooLate
        return expect(attempt, {1}, "no data for 2 seconds")
    finally:
        for pipe in folder.iterdir():
            pipe.unlink()
        away.rename(folder)


def _leave_soon():
    waits.GRACE = waits.GRACE_WITH_PEERS = 3


def _ask_to_leave_without_data(course: Course, rng: random.Random) -> Verdict:
    """A single process saves itself; of two, the one that waits names what is saved, and the other loses its peer.

    Where what was handed over before is enough, they reach the next step and leave together.
    """
    attempt = course.start("--num_workers", "2", "--save_every_steps", "1", prepare=_leave_soon)
    _stop_workers(attempt, rng)
    time.sleep(rng.uniform(0, 1))
    start = time.monotonic()
    attempt.send(signal.SIGTERM)
    may_be = {EXIT_RESUME} if course.world_size == 1 else {EXIT_RESUME, 1}
    verdict = expect(attempt, may_be, "SIGTERM: stopped in epoch")
    seconds, codes, text = time.monotonic() - start, [rank.exitcode for rank in attempt.ranks], attempt.text()
    if verdict is None and 1 in codes and not (EXIT_RESUME in codes and "without data, the last checkpoint is" in text):
        verdict = f"exit codes {codes}: {text[-2000:]}"
    return verdict or (f"it took {seconds:.0f} s to leave" if seconds > SOON else None)


def _shrink_shared_memory(size: str):
    libc = ctypes.CDLL(None, use_errno=True)
    if (
        libc.unshare(_CLONE_NEWNS)
        or libc.mount(b"none", b"/", None, _MS_REC | _MS_PRIVATE, None)
        or libc.mount(b"none", b"/dev/shm", b"tmpfs", 0, f"size={size}".encode())
    ):
        raise OSError(ctypes.get_errno(), "cannot mount /dev/shm")


def fill_shared_memory(*sizes: str) -> Callable[[Course, random.Random], Verdict]:
    """With a /dev/shm of one of these sizes, which is that of a process of its own."""

    def fill(course: Course, rng: random.Random) -> Verdict:
        shrink = partial(_shrink_shared_memory, rng.choice(sizes))
        return expect(course.start("--num_workers", "2", prepare=shrink), {1}, "shared memory, /dev/shm, is too small")

    return fill


def _forget_temporary_folder():
    # They were found before the variable was set.
    tempfile.tempdir = None
    multiprocessing.current_process()._config.pop("tempdir", None)


def _lengthen_temporary_folder(course: Course, rng: random.Random) -> Verdict:
    with tempfile.TemporaryDirectory(prefix="x" * rng.randint(90, 200)) as folder:
        attempt = course.start("--num_workers", "1", environment=dict(TMPDIR=folder), prepare=_forget_temporary_folder)
        return expect(attempt, {1}, f"the path of the temporary folder {folder} is too long")


def _limit_open_files(more: int):
    limit = max(map(int, os.listdir("/proc/self/fd"))) + more
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))


def _limit_open_files_of_run(course: Course, rng: random.Random) -> Verdict:
    limit = partial(_limit_open_files, rng.randint(4, 14))
    return expect(course.start("--num_workers", "2", prepare=limit), {1}, "oo many open files")


def _put_pipe_among_images(course: Course, rng: random.Random) -> Verdict:
    pipe = course.data / "train" / "class1" / "0.png"
    os.mkfifo(pipe)
    try:
        attempt = course.start("--num_workers", rng.choice("01"))
        reach_step(attempt, rng.randint(1, 4))
        attempt.send(signal.SIGTERM)
        return expect(attempt, {EXIT_RESUME}, "1 pipe, socket or device")
    finally:
        pipe.unlink()


FAULTS = [
    Fault("data loading processes stopped", _hang_worker, times=3),
    Fault("storage that does not answer", _hang_storage, times=3),
    Fault("SIGTERM while waiting for data", _ask_to_leave_without_data, times=4),
    Fault("SIGTERM to two processes, one waiting for data", _ask_to_leave_without_data, world_size=2, times=2),
    Fault("a temporary folder of too long a path", _lengthen_temporary_folder),
    Fault("too many open files", _limit_open_files_of_run, times=3),
    Fault("a pipe among the images", _put_pipe_among_images),
]
if os.geteuid() == 0:  # who else may mount another
    FAULTS.append(Fault("a small /dev/shm", fill_shared_memory("4k", "16k", "32k"), times=2))
