"""A training run that is disturbed: how it is started, watched and resumed, and what a fault is."""
import itertools
import multiprocessing
import os
import random
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from helpers.photos import write_photos
from helpers.ports import free_port
from training.checkpoints import CheckpointStore
from training.signals import run_and_exit

PATIENCE = 120  # seconds after which a run that does not end is said to hang
# What is imported before a process starts is not imported by it again.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["main"])


# --- what is trained ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Subject:
    """What a run trains, small enough to be trained many times.

    Args:
        name: Of folders.
        write_data: Writes the data set at a path.
        command: Flags of main.py, but for those that say where the run lies.
        epochs: How many.
    """

    name: str
    write_data: Callable[[Path], object]
    command: tuple[str, ...]
    epochs: int

    @property
    def words(self) -> list[str]:
        return [
            *self.command, "--epochs", str(self.epochs), "--model", "biformer_nano", "--update_freq", "2", "--device",
            "cpu", "--log_every", "1", "--model_ema_eval", "--model_ema_decay", "0.9", "--dist_timeout", "0.1",
        ]


CLASSIFIER = Subject(
    "classifier", partial(write_photos, train=101, val=7),
    ("--input_size", "32", "--batch_size", "4", "--warmup_epochs", "1", "--lr", "1e-2"), epochs=3,
)


# --- a run ----------------------------------------------------------------------------------------------------------


def _train(arguments: list[str], environment: dict[str, str], output: Path, prepare: Callable[[], None] | None):
    """In a process of its own: run a command line, with its output in a file."""
    # As when it is started from a shell: its own processes are its children, which end when it does.
    multiprocessing.set_start_method("fork", force=True)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # also where the campaign itself is started under nohup
    os.environ.update(environment)
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    import torch

    import main

    torch.set_num_threads(1)
    if prepare is not None:
        prepare()
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

    def send(self, number: int, *pids: int):
        """Send a signal to these of its processes, by default to all but those that load data.

        One that has ended meanwhile is passed over: how it ended, `expect` says.
        """
        for pid in pids or [rank.pid for rank in self.ranks]:
            with suppress(ProcessLookupError):
                os.kill(pid, number)

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

    data: Path
    folder: Path
    world_size: int
    subject: Subject = CLASSIFIER
    starts: Iterator[int] = field(default_factory=itertools.count)

    @property
    def store(self) -> CheckpointStore:
        return CheckpointStore(self.folder)

    def arguments(self, *more: str) -> list[str]:
        paths = ["--data_path", str(self.data), "--output_dir", str(self.folder)]
        return [*self.subject.words, *paths, "--auto_resume", *more]

    def new_output(self) -> Path:
        """Where the next start writes what it prints."""
        return self.folder.with_name(f"{self.folder.name}-{next(self.starts)}.out")

    def start(
        self,
        *more: str,
        of_rank: Mapping[int, list[str]] | None = None,
        environment: Mapping[str, str] | None = None,
        prepare: Callable[[], None] | None = None,
    ) -> Attempt:
        """Start the run, or resume it.

        Args:
            more: Words of the command line.
            of_rank: More of them, for one process of several.
            environment: Variables of all processes.
            prepare: Called in each process before it trains, to put limits on it for example; a function of a module.
        """
        output = self.new_output()
        peers = dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()), WORLD_SIZE=str(self.world_size))
        ranks = []
        for rank in range(self.world_size):
            here = {**peers, "RANK": str(rank), "LOCAL_RANK": str(rank), **(environment or {})}
            words = self.arguments(*more, *(of_rank or {}).get(rank, []))
            ranks.append(PROCESSES.Process(target=_train, args=(words, here, output, prepare)))
            ranks[-1].start()
        return Attempt(ranks, output)


# --- a fault --------------------------------------------------------------------------------------------------------

Verdict = str | None
"""What went wrong with the handling of a fault; None where it was as promised."""


class TooLate(Exception):
    """The run was done before it could be disturbed."""


@dataclass(frozen=True)
class Fault:
    """A kind of fault, how many processes the run has that it strikes, how often it comes, and what is trained."""

    name: str
    strike: Callable[[Course, random.Random], Verdict]
    world_size: int = 1
    times: int = 1
    subject: Subject = CLASSIFIER


def expect(attempt: Attempt, codes: set[int], text: str = "") -> Verdict:
    """Wait for the end of an attempt, whose exit codes are to be among these, and whose output is to hold `text`."""
    actual = attempt.end()
    if 0 in actual and 0 not in codes:
        raise TooLate
    if not set(actual) <= codes:
        return f"exit codes {actual} instead of {codes}: {attempt.text()[-2000:]}"
    return None if text in attempt.text() else f"no word of {text!r}: {attempt.text()[-2000:]}"


def reach_step(attempt: Attempt, number: int):
    """Wait until an attempt has logged so many steps. Raises TooLate where it ends before."""
    if not attempt.wait_for_step(number):
        attempt.end()
        raise TooLate
