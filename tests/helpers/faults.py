"""Faults in real training runs, and what they cost; `make test-faults` runs the whole campaign.

A run of a small BiFormer is started, disturbed, and resumed with --auto_resume, until it is done; then its weights, EMA
weights, optimizer and log are compared, bit for bit, with an undisturbed run's. Runs have one process or
two, data loading processes, mixup, random erasing, repeated augmentation and gradient accumulation.
"""
import argparse
import itertools
import multiprocessing
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
if __name__ == "__main__":
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from helpers.photos import write_photos  # noqa: E402
from helpers.ports import free_port  # noqa: E402
from helpers.run_state import differences  # noqa: E402
from training.checkpoints import CheckpointStore  # noqa: E402
from training.signals import EXIT_RESUME, run_and_exit  # noqa: E402

PATIENCE = 120  # seconds after which a run that does not end is said to hang
COMMAND = [
    "--model", "biformer_nano", "--input_size", "32", "--batch_size", "4", "--update_freq", "2", "--device", "cpu",
    "--epochs", "3", "--warmup_epochs", "1", "--lr", "1e-2", "--log_every", "1", "--model_ema_eval",
    "--model_ema_decay", "0.9", "--dist_timeout", "0.1",
]
# What is imported before a process starts is not imported by it again.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["main"])


# --- a run ----------------------------------------------------------------------------------------------------------


def _train(arguments: list[str], environment: dict[str, str], output: Path, file_limit: int | None):
    """In a process of its own: run a command line, with its output in a file."""
    # As when it is started from a shell: its own processes are its children, which end when it does.
    multiprocessing.set_start_method("fork", force=True)
    os.environ.update(environment)
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    if file_limit is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, resource.RLIM_INFINITY))
    import torch

    import main

    torch.set_num_threads(1)
    run_and_exit(lambda: main.main(arguments))


@dataclass
class Attempt:
    """One start of a run: its processes, and what they wrote."""

    ranks: list
    output: Path

    def text(self) -> str:
        return self.output.read_text() if self.output.exists() else ""

    def alive(self) -> bool:
        return all(rank.is_alive() for rank in self.ranks)

    def wait_for(self, what: Callable[[], bool], every: float = 0.01) -> bool:
        """Whether `what` came true while all processes lived."""
        end = time.monotonic() + PATIENCE
        while not what():
            if not self.alive() or time.monotonic() > end:
                return False
            time.sleep(every)
        return True

    def wait_for_step(self, number: int) -> bool:
        return self.wait_for(lambda: self.text().count("  loss ") >= number)

    def end(self) -> list[int | None]:
        """Exit codes; None for a process that hung, and was killed."""
        end = time.monotonic() + PATIENCE
        codes = []
        for rank in self.ranks:
            rank.join(max(0.0, end - time.monotonic()))
            codes.append(rank.exitcode)
            rank.kill()
            rank.join()
        return codes

    def workers(self) -> list[int]:
        """The data loading processes of the first rank."""
        pid = self.ranks[0].pid
        children = Path(f"/proc/{pid}/task/{pid}/children")
        return [int(child) for child in children.read_text().split()] if children.exists() else []


@dataclass
class Course:
    """A training run in its folder, to be started again and again."""

    photos: Path
    folder: Path
    world_size: int
    starts: Iterator[int] = field(default_factory=itertools.count)

    @property
    def store(self) -> CheckpointStore:
        return CheckpointStore(self.folder)

    def arguments(self, *more: str) -> list[str]:
        return [*COMMAND, "--data_path", str(self.photos), "--output_dir", str(self.folder), "--auto_resume", *more]

    def start(self, *more: str, file_limit: int | None = None) -> Attempt:
        """Start the run, or resume it."""
        output = self.folder.with_name(f"{self.folder.name}-{next(self.starts)}.out")
        environment = dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()), WORLD_SIZE=str(self.world_size))
        ranks = []
        for rank in range(self.world_size):
            here = dict(environment, RANK=str(rank), LOCAL_RANK=str(rank))
            ranks.append(PROCESSES.Process(target=_train, args=(self.arguments(*more), here, output, file_limit)))
            ranks[-1].start()
        return Attempt(ranks, output)


# --- faults ---------------------------------------------------------------------------------------------------------

Verdict = str | None
"""What went wrong with the handling of a fault; None where it was as promised."""


class TooLate(Exception):
    """The run was done before it could be disturbed."""


def _expect(attempt: Attempt, codes: set[int], text: str = "") -> Verdict:
    actual = attempt.end()
    if 0 in actual and 0 not in codes:
        raise TooLate
    if not set(actual) <= codes:
        return f"exit codes {actual} instead of {codes}: {attempt.text()[-2000:]}"
    return None if text in attempt.text() else f"no word of {text!r}: {attempt.text()[-2000:]}"


def _run_until_random_moment(course: Course, rng: random.Random) -> Attempt:
    """Mostly while it trains, saves or evaluates; one time in five while it starts."""
    attempt = course.start(*_way_to_save(rng))
    if rng.random() < 0.8 and not attempt.wait_for_step(rng.randint(1, 5)):
        attempt.end()
        raise TooLate
    time.sleep(rng.uniform(0, 0.5))
    return attempt


def _way_to_save(rng: random.Random) -> list[str]:
    """The result must depend neither on it nor on the number of data loading processes."""
    every = rng.choice([["--save_every_steps", "1"], ["--save_every_steps", "3"], ["--save_every_minutes", "0.005"]])
    return [*every, "--num_workers", rng.choice("012"), "--keep_checkpoints", rng.choice("23")]


def _kill(course: Course, rng: random.Random) -> Verdict:
    attempt = _run_until_random_moment(course, rng)
    workers = attempt.workers()
    for rank in attempt.ranks:
        rank.kill()
    verdict = _expect(attempt, {-signal.SIGKILL})
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
    verdict = _expect(attempt, {-signal.SIGKILL})
    if not writing():
        raise TooLate
    return verdict


def _damage(course: Course, rng: random.Random, how: Callable[[bytearray], None]) -> Verdict:
    verdict = _kill(course, rng)
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


def _fill_disk(course: Course, rng: random.Random) -> Verdict:
    attempt = course.start("--save_every_steps", str(rng.randint(1, 4)), "--num_workers", "0", file_limit=1_000_000)
    return _expect(attempt, {1}, "cannot write")


def _ask_to_leave(number: signal.Signals) -> Callable[[Course, random.Random], Verdict]:
    def ask(course: Course, rng: random.Random) -> Verdict:
        attempt = course.start(*_way_to_save(rng))
        if not attempt.wait_for_step(rng.randint(1, 5)):
            attempt.end()
            raise TooLate
        # As a scheduler may: to one process, or to all, data loading processes included.
        pids = [attempt.ranks[-1].pid] if rng.random() < 0.5 else [r.pid for r in attempt.ranks] + attempt.workers()
        for pid in pids:
            os.kill(pid, number)
        return _expect(attempt, {EXIT_RESUME}, " --auto_resume")

    return ask


def _kill_worker(course: Course, rng: random.Random) -> Verdict:
    attempt = course.start("--num_workers", "2", "--save_every_steps", "1")
    if not attempt.wait_for_step(rng.randint(1, 3)) or not attempt.workers():
        attempt.end()
        raise TooLate
    os.kill(rng.choice(attempt.workers()), signal.SIGKILL)
    return _expect(attempt, {1}, "a data loading process was killed")


def _lose_data(course: Course, rng: random.Random) -> Verdict:
    attempt = course.start("--num_workers", rng.choice("02"), "--save_every_steps", "1")
    found = attempt.wait_for_step(rng.randint(1, 4))
    away = course.photos.with_name("away")
    course.photos.rename(away)
    try:
        if not found:
            attempt.end()
            raise TooLate
        return _expect(attempt, {1}, "its folder is gone")
    finally:
        away.rename(course.photos)


def _drop_rank(course: Course, rng: random.Random) -> Verdict:
    attempt = _run_until_random_moment(course, rng)
    dropped = rng.randrange(2)
    attempt.ranks[dropped].kill()
    return _expect(attempt, {1, -signal.SIGKILL}, "another process of the run ended")


def _hang_rank(course: Course, rng: random.Random) -> Verdict:
    attempt = course.start("--save_every_steps", "1", "--num_workers", "0")
    if not attempt.wait_for_step(rng.randint(1, 5)):
        attempt.end()
        raise TooLate
    stopped = attempt.ranks[rng.randrange(2)]
    os.kill(stopped.pid, signal.SIGSTOP)
    other = next(rank for rank in attempt.ranks if rank is not stopped)
    other.join(PATIENCE)
    gave_up = other.exitcode is not None
    stopped.kill()
    if not gave_up:
        attempt.end()
        return "the other process did not give up by itself"
    return _expect(attempt, {1, -signal.SIGKILL}, "did not answer in time")


def _restart_by_torchrun(course: Course, rng: random.Random) -> Verdict:
    """A rank is killed, and torchrun starts all of them again by itself; the run is then left by a signal."""
    output = course.folder.with_name(f"{course.folder.name}-{next(course.starts)}.out")
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


@dataclass(frozen=True)
class Fault:
    """A kind of fault, how many processes the run has that it strikes, and how often it comes in a campaign."""

    name: str
    strike: Callable[[Course, random.Random], Verdict]
    world_size: int = 1
    times: int = 1


FAULTS = [
    Fault("SIGKILL at a random moment", _kill, times=12),
    Fault("SIGKILL at a random moment, both of two processes", _kill, world_size=2, times=4),
    Fault("SIGKILL in the middle of writing a checkpoint", _kill_in_write, times=8),
    Fault("SIGKILL, then the newest checkpoint cut off", _truncate, times=5),
    Fault("SIGKILL, then bits of the newest checkpoint flipped", _flip_bits, times=5),
    Fault("disk full (a file-size limit)", _fill_disk, times=3),
    Fault("SIGTERM", _ask_to_leave(signal.SIGTERM), times=3),
    Fault("SIGINT", _ask_to_leave(signal.SIGINT), times=2),
    Fault("SIGUSR1", _ask_to_leave(signal.SIGUSR1), times=2),
    Fault("SIGTERM to one or both of two processes", _ask_to_leave(signal.SIGTERM), world_size=2, times=3),
    Fault("a data loading process killed", _kill_worker, times=3),
    Fault("the data folder gone", _lose_data, times=2),
    Fault("one of two processes killed", _drop_rank, world_size=2, times=5),
    Fault("one of two processes stopped", _hang_rank, world_size=2, times=2),
    Fault("one of two processes killed under torchrun --max-restarts", _restart_by_torchrun, world_size=2, times=2),
]
SHORT = {
    "SIGKILL at a random moment", "SIGKILL in the middle of writing a checkpoint", "SIGTERM",
    "SIGKILL, then the newest checkpoint cut off", "one of two processes killed",
}


# --- a campaign -----------------------------------------------------------------------------------------------------


@dataclass
class Campaign:
    """What came of the faults: how often each was tried and survived, and how the disturbed runs ended."""

    tried: Counter = field(default_factory=Counter)
    survived: Counter = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    runs: int = 0
    lost: list[str] = field(default_factory=list)

    def count(self, fault: Fault, verdict: Verdict):
        self.tried[fault.name] += 1
        self.survived[fault.name] += verdict is None
        if verdict is not None:
            self.failures.append(f"{fault.name}: {verdict}")

    def compare(self, course: Course, reference: Path):
        self.runs += 1
        self.lost += [f"{course.folder.name}: {difference}" for difference in differences(course.folder, reference)]

    def table(self) -> str:
        """Markdown."""
        rows = [f"| {name} | {tried} | {self.survived[name]} |" for name, tried in self.tried.items()]
        lost = len(self.lost) or "none"
        return "\n".join([
            "| fault | tried | survived |", "|---|---|---|", *rows,
            f"| **all** | **{self.tried.total()}** | **{self.survived.total()}** |", "",
            f"State lost in the {self.runs} disturbed runs, compared with undisturbed ones: {lost}.",
        ])


def finish(course: Course):
    """Let a run end by itself."""
    attempt = course.start("--num_workers", "1")
    codes = attempt.end()
    if set(codes) != {0}:
        raise RuntimeError(f"an undisturbed run ended with {codes}: {attempt.text()[-2000:]}")


def strike_all(faults: list[Fault], work: Path, rng: random.Random, say: Callable[[str], None]) -> Campaign:
    """Strike runs in `work` with each of the faults, in the order given, and compare each run when it is done."""
    photos = write_photos(work / "photos", train=101, val=7)
    campaign = Campaign()
    for world_size in sorted({fault.world_size for fault in faults}):
        reference = Course(photos, work / f"reference-{world_size}", world_size)
        finish(reference)
        waiting = [fault for fault in faults if fault.world_size == world_size]
        for number in itertools.count():
            if not waiting:
                break
            course = Course(photos, work / f"disturbed-{world_size}-{number}", world_size)
            waiting = strike_one(course, waiting, campaign, rng, say)
            finish(course)
            campaign.compare(course, reference.folder)
    return campaign


def strike_one(course: Course, faults: list[Fault], campaign: Campaign, rng: random.Random, say) -> list[Fault]:
    """Strike one run until it is done; returns the faults that are left."""
    for index, fault in enumerate(faults):
        start = time.monotonic()
        try:
            verdict = fault.strike(course, rng)
        except TooLate:
            if course.store.steps() and done(course):
                return faults[index:]
            say(f"{course.folder.name}: {fault.name}: came too late, to be tried again")
            return [*faults[index + 1 :], fault]
        campaign.count(fault, verdict)
        say(f"{course.folder.name}: {fault.name}: {verdict or 'survived'} ({time.monotonic() - start:.1f} s)")
    return []


def done(course: Course) -> bool:
    log = course.folder / "log.txt"
    return log.exists() and len(log.read_text().splitlines()) == 3


def main():
    parser = argparse.ArgumentParser(description="Strike training runs with faults, and print what they cost.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="file for the table")
    args = parser.parse_args()
    faults = [fault for fault in FAULTS for _ in range(fault.times)]
    rng = random.Random(args.seed)
    rng.shuffle(faults)
    work = Path(tempfile.mkdtemp(prefix="faults-"))
    start = time.monotonic()
    campaign = strike_all(faults, work, rng, say=lambda line: print(line, flush=True))
    print(f"\n{campaign.table()}\n\n{time.monotonic() - start:.0f} s")
    for line in [*campaign.failures, *campaign.lost]:
        print(line)
    if args.output:
        args.output.write_text(campaign.table() + "\n")
    if campaign.failures or campaign.lost:
        sys.exit(f"outputs are in {work}")
    shutil.rmtree(work)


if __name__ == "__main__":
    main()
