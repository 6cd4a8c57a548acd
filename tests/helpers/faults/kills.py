"""Processes that are killed, stopped or asked to leave, full disks, and data that is gone."""
import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from helpers import ROOT
from helpers.ports import free_port
from training.signals import EXIT_RESUME

from .runs import PATIENCE, Attempt, Course, Fault, TooLate, Verdict, expect, reach_step


def _run_until_random_moment(course: Course, rng: random.Random) -> Attempt:
    """Mostly while it trains, saves or evaluates; one time in five while it starts."""
    attempt = course.start(*_way_to_save(rng))
    if rng.random() < 0.8:
        reach_step(attempt, rng.randint(1, 5))
    time.sleep(rng.uniform(0, 0.5))
    return attempt


def _way_to_save(rng: random.Random) -> list[str]:
    """The result must depend neither on it nor on the number of data loading processes."""
    every = rng.choice([["--save_every_steps", "1"], ["--save_every_steps", "3"], ["--save_every_minutes", "0.005"]])
    return [*every, "--num_workers", rng.choice("012"), "--keep_checkpoints", rng.choice("23")]


def kill(course: Course, rng: random.Random) -> Verdict:
    attempt = _run_until_random_moment(course, rng)
    workers = attempt.workers()
    for rank in attempt.ranks:
        rank.kill()
    verdict = expect(attempt, {-signal.SIGKILL})
    left = _outlive(workers)
    return f"{left} data loading processes outlived the run" if left else verdict


def _outlive(pids: list[int]) -> int:
    """How many of these processes still run after a second."""
    left = 0
    for _ in range(20):
        states = [Path(f"/proc/{pid}/stat") for pid in pids]
        left = sum(state.exists() and state.read_text().rpartition(")")[2].split()[0] != "Z" for state in states)
        if not left:
            break
        time.sleep(0.05)
    return left


def _kill_in_write(course: Course, rng: random.Random) -> Verdict:
    attempt = course.start("--save_every_steps", "1", "--num_workers", rng.choice("01"))
    writes = rng.randint(1, 3)

    def writing() -> bool:
        return any(course.folder.glob(".checkpoint-*.pth.*")) or any(course.folder.glob(".best.pth.*"))

    for _ in range(writes):
        if not (attempt.wait_for(lambda: not writing(), every=0) and attempt.wait_for(writing, every=0)):
            attempt.end()
            raise TooLate
    time.sleep(rng.uniform(0, 0.004))
    for rank in attempt.ranks:
        rank.kill()
    verdict = expect(attempt, {-signal.SIGKILL})
    if not writing():
        raise TooLate
    return verdict


def _damage(course: Course, rng: random.Random, how: Callable[[bytearray], None]) -> Verdict:
    verdict = kill(course, rng)
    steps = course.store.steps()
    if len(steps) < 2:
        raise TooLate
    path = course.store.path(steps[-1])
    data = bytearray(path.read_bytes())
    how(data)
    path.write_bytes(data)
    return verdict


def _truncate(course: Course, rng: random.Random) -> Verdict:
    def cut(data: bytearray):
        del data[rng.randrange(len(data)) :]

    return _damage(course, rng, cut)


def _flip_bits(course: Course, rng: random.Random) -> Verdict:
    def flip(data: bytearray):
        for _ in range(64):
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)

    return _damage(course, rng, flip)


def _limit_files(size: int):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def _fill_disk(course: Course, rng: random.Random) -> Verdict:
    every = str(rng.randint(1, 4))
    limit = partial(_limit_files, 1_000_000)
    attempt = course.start("--save_every_steps", every, "--num_workers", "0", prepare=limit)
    return expect(attempt, {1}, "cannot write")


def ask_to_leave(number: signal.Signals) -> Callable[[Course, random.Random], Verdict]:
    def ask(course: Course, rng: random.Random) -> Verdict:
        attempt = course.start(*_way_to_save(rng))
        reach_step(attempt, rng.randint(1, 5))
        # As a scheduler may: to one process, or to all, data loading processes included.
        pids = [attempt.ranks[-1].pid] if rng.random() < 0.5 else [r.pid for r in attempt.ranks] + attempt.workers()
        attempt.send(number, *pids)
        return expect(attempt, {EXIT_RESUME}, " --auto_resume")

    return ask


def kill_worker(course: Course, rng: random.Random) -> Verdict:
    attempt = course.start("--num_workers", "2", "--save_every_steps", "1")
    found = attempt.wait_for_step(rng.randint(1, 3))
    workers = attempt.workers()
    if not found or not workers:
        attempt.end()
        raise TooLate
    attempt.send(signal.SIGKILL, rng.choice(workers))
    return expect(attempt, {1}, "a data loading process was killed")


def _lose_data(course: Course, rng: random.Random) -> Verdict:
    attempt = course.start("--num_workers", rng.choice("02"), "--save_every_steps", "1")
    found = attempt.wait_for_step(rng.randint(1, 4))
    away = course.data.with_name("away")
    course.data.rename(away)
    try:
        if not found:
            attempt.end()
            raise TooLate
        return expect(attempt, {1}, "its folder is gone")
    finally:
        away.rename(course.data)


def _drop_rank(course: Course, rng: random.Random) -> Verdict:
    attempt = _run_until_random_moment(course, rng)
    dropped = rng.randrange(2)
    attempt.ranks[dropped].kill()
    return expect(attempt, {1, -signal.SIGKILL}, "another process of the run ended")


def _hang_rank(course: Course, rng: random.Random) -> Verdict:
    attempt = course.start("--save_every_steps", "1", "--num_workers", "0")
    reach_step(attempt, rng.randint(1, 5))
    stopped = attempt.ranks[rng.randrange(2)]
    attempt.send(signal.SIGSTOP, stopped.pid)
    other = next(rank for rank in attempt.ranks if rank is not stopped)
    other.join(PATIENCE)
    gave_up = other.exitcode is not None
    stopped.kill()
    if not gave_up:
        attempt.end()
        return "the other process did not give up by itself"
    return expect(attempt, {1, -signal.SIGKILL}, "did not answer in time")


def _restart_by_torchrun(course: Course, rng: random.Random) -> Verdict:
    """A rank is killed, and torchrun starts all of them again by itself; the run is then left by a signal."""
    output = course.new_output()
    command = [
        sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--nproc_per_node=2", "--max-restarts=2",
        "--monitor-interval=0.1", f"--master_port={free_port()}", "main.py",
        # Two processes that start at once on a busy machine may be seconds apart.
        *course.arguments("--save_every_steps", "1", "--num_workers", "0", "--dist_timeout", "1"),
    ]
    with open(output, "w") as file:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        launcher = subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=file, env=environment)
    end = time.monotonic() + 2 * PATIENCE

    def lines(number: int) -> bool:
        while output.read_text().count("  loss ") < number:
            if launcher.poll() is not None or time.monotonic() > end:
                return False
            time.sleep(0.05)
        return True

    before = rng.randint(1, 3)
    seen = lines(before)
    starts = output.read_text().count("resuming from")
    if seen:
        children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
        os.kill(int(rng.choice(children)), signal.SIGKILL)
        lines(before + 3)
    launcher.terminate()
    launcher.wait(PATIENCE)
    text = output.read_text()
    if not seen:
        raise TooLate
    return None if text.count("resuming from") > starts else f"torchrun did not resume: {text[-2000:]}"


FAULTS = [
    Fault("SIGKILL at a random moment", kill, times=12),
    Fault("SIGKILL at a random moment, both of two processes", kill, world_size=2, times=4),
    Fault("SIGKILL in the middle of writing a checkpoint", _kill_in_write, times=8),
    Fault("SIGKILL, then the newest checkpoint cut off", _truncate, times=5),
    Fault("SIGKILL, then bits of the newest checkpoint flipped", _flip_bits, times=5),
    Fault("disk full (a file-size limit)", _fill_disk, times=3),
    Fault("SIGTERM", ask_to_leave(signal.SIGTERM), times=3),
    Fault("SIGINT", ask_to_leave(signal.SIGINT), times=2),
    Fault("SIGUSR1", ask_to_leave(signal.SIGUSR1), times=2),
    Fault("SIGTERM to one or both of two processes", ask_to_leave(signal.SIGTERM), world_size=2, times=3),
    Fault("a data loading process killed", kill_worker, times=3),
    Fault("the data folder gone", _lose_data, times=2),
    Fault("one of two processes killed", _drop_rank, world_size=2, times=5),
    Fault("one of two processes stopped", _hang_rank, world_size=2, times=2),
    Fault("one of two processes killed under torchrun --max-restarts", _restart_by_torchrun, world_size=2, times=2),
]
