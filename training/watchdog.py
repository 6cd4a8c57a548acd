"""A watch on runs that hang: where no process gets any further, the stacks of all are written, and the run ends.

In each process a thread looks every few seconds whether the main thread has noted anything new (`training.progress`).
Most processes of a run that hangs wait in a collective operation for another one. Which one that is they find out by
telling one another where they are (`training.exchange`).
"""
import faulthandler
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn

from utils import printable, some

from .distributed import Distributed
from .exchange import Exchange, Report
from .progress import Doing
from .run import Clock
from .signals import MachineFault

# Seconds that the first step may take at least: a model is compiled in it.
START = 1800.0
# Looks without an answer, after which a process is said to give none.
UNANSWERED = 4


class HangFault(MachineFault):
    """The run gets no further."""


class Watch:
    """Watches the main thread of this process, in a thread of its own.

    Time is counted in looks: a run that is stopped as a whole, as by Ctrl-Z, and continued later has not hung.

    Args:
        distributed: This process.
        clock: Where the run is.
        folder: Where stacks are written.
        limit: Seconds without progress after which the run hangs; in its first step, at least `START`.
    """

    def __init__(self, distributed: Distributed, clock: Clock, folder: Path, limit: float):
        self.rank, self.progress, self.clock = distributed.rank, distributed.progress, clock
        self.folder, self.limit, self.pid = folder, limit, os.getpid()
        self.steps_before = clock.steps_taken
        self.interval = min(5.0, limit / 10)
        self.ended = threading.Event()
        self.exchange = Exchange(distributed, self.interval, self.ended)
        self.ticks, self.notes, self.silent, self.looked_at = 0, None, 0.0, time.monotonic()
        # What was heard last of a process, or of the exchange, and at which tick that was new.
        self.heard: dict[Any, tuple[Any, int]] = {}

    def run(self):
        """Look again and again until the run ends, or end it where it hangs."""
        self._arm()
        try:
            while not self.ended.wait(self.interval):
                self._arm()
                self.look()
                line = self.verdict()
                if line is not None or self.exchange.declared:
                    self.end(line)
        finally:
            faulthandler.cancel_dump_traceback_later()

    def _arm(self):
        """Set the last resort, where C code keeps Python's threads from running, and this one from looking."""
        faulthandler.dump_traceback_later(2 * self.limit, exit=True, file=2)

    def look(self):
        """Look at the main thread, and report where it is."""
        now = time.monotonic()
        passed, self.looked_at = min(now - self.looked_at, 2 * self.interval), now
        notes = self.progress.notes, self._written()
        self.silent, self.notes = self.silent + passed if notes == self.notes else 0.0, notes
        self.ticks += 1
        clock, doing = self.clock, self.progress.doing
        report = Report(self.ticks, self.silent, self.progress.waits, clock.epoch, clock.step, doing)
        self.exchange.own, self.exchange.listens = report, self._is_too_long(self.silent)

    def _written(self) -> int:
        """Bytes of a checkpoint that is being written, for which much may wait: a slow disk is no hang."""
        with suppress(OSError):  # it has just been renamed
            return sum(path.stat().st_size for path in self.folder.glob(".*.pth.*"))
        return 0

    def verdict(self) -> str | None:
        """Which process keeps the run from getting further, and where it is; None where the run does get further."""
        own, exchange = self.exchange.own, self.exchange
        if not self._is_too_long(own.silent):
            self.heard.clear()
            return None
        if not exchange.peers:
            return self._line([self.rank], own)
        if not self._is_new(None, exchange.rounds):
            return f"{exchange.host} does not answer; {self._line([self.rank], own)}"
        reports = {rank: exchange.heard.get(rank) for rank in exchange.peers}
        silent = [rank for rank, report in reports.items() if not self._is_new(rank, report)]
        if silent:
            return self._no_answer(silent, reports[silent[0]])
        if not all(report is not None and self._is_too_long(report.silent) for report in reports.values()):
            return None
        reports[self.rank] = own
        least = min(report.order for report in reports.values())
        ranks = [rank for rank in sorted(reports) if reports[rank].order == least]
        return self._line(ranks, reports[ranks[0]])

    def _is_too_long(self, silent: float) -> bool:
        starts = self.clock.steps_taken == self.steps_before and self.progress.doing != Doing.EVALUATING
        return silent >= (max(self.limit, START) if starts else self.limit)

    def _is_new(self, what: Any, value: Any) -> bool:
        """Whether a value has changed in the last looks."""
        if what not in self.heard or self.heard[what][0] != value:
            self.heard[what] = value, self.ticks
        return self.ticks - self.heard[what][1] < UNANSWERED

    def _line(self, ranks: Sequence[int], report: Report) -> str:
        which, stacks = self._which(ranks), ranks[0] if len(ranks) == 1 else "*"
        return f"{which}{self._no_progress(ranks)}, {report.place}; stacks in {self.folder}/stacks-{stacks}.txt"

    def _no_answer(self, ranks: Sequence[int], report: Report | None) -> str:
        which, do = self._which(ranks), "does" if len(ranks) == 1 else "do"
        where = f", last {report.place}" if report else ""
        return (
            f"{which} {do} not answer{where}, and the run{self._no_progress()}; "
            f"stacks of the others in {self.folder}/stacks-*.txt"
        )

    def _which(self, ranks: Sequence[int]) -> str:
        if not self.exchange.peers:
            return "the run"
        return f"process {ranks[0]}" if len(ranks) == 1 else f"processes {some([str(rank) for rank in ranks])}"

    def _no_progress(self, ranks: Sequence[int] = (0,)) -> str:
        return f" {'has' if len(ranks) == 1 else 'have'} made no progress for {self.limit / 60:g} minutes"

    def end(self, line: str | None) -> NoReturn:
        """Write this process's stacks and end it; `line` says why, where this process has found that the run hangs."""
        self._write_stacks()
        self.exchange.declares = line is not None
        # Until the others know: a process that left before would be the fault that they report.
        time.sleep(2 * self.interval)
        if line is not None and self.exchange.declared < 2:
            _tell(HangFault(line))
        time.sleep(2 * self.interval)
        os._exit(HangFault.exit_code)

    def _write_stacks(self):
        with suppress(OSError):
            self.folder.mkdir(parents=True, exist_ok=True)
            with open(self.folder / f"stacks-{self.rank}.txt", "w") as file:
                file.write(f"process {self.rank}: {self.exchange.own.place}\n")
                file.flush()
                faulthandler.dump_traceback(file)

    def suspend(self, number: int, frame: Any):
        """Stop this process, as SIGTSTP does, without its last resort, which counts the time until it continues."""
        if os.getpid() == self.pid:  # not one that it has started, which inherits the handler
            faulthandler.cancel_dump_traceback_later()
        os.kill(os.getpid(), signal.SIGSTOP)


def _flush():
    with suppress(OSError, ValueError):
        sys.stdout.flush()


def _tell(error: HangFault):
    from .advice import with_advice  # which knows this module's error

    # What the main thread has printed; it may hold the lock of a stream whose reader hangs.
    flush = threading.Thread(target=_flush, daemon=True)
    flush.start()
    flush.join(2.0)
    with suppress(OSError):  # nobody may read it
        os.write(2, f"error: {printable(with_advice(error))}\n".encode(errors="backslashreplace"))


@contextmanager
def watched(distributed: Distributed, clock: Clock, folder: Path, minutes: float) -> Iterator[None]:
    """End the process, with exit code 1, where its run makes no progress for so many minutes.

    Every process writes its stacks to `stacks-RANK.txt` in the folder, and one of them prints which process keeps the
    run from getting further, and where it is. Nothing is raised: the main thread may never get to it.

    Args:
        distributed: This process; where its main thread is, `distributed.progress` says.
        clock: Where the run is.
        folder: The run's.
        minutes: How long; the first step may take longer, see `START`.
    """
    watch = Watch(distributed, clock, folder, 60 * minutes)
    threads = [threading.Thread(target=watch.run, daemon=True)]
    if distributed.is_distributed:
        threads.append(threading.Thread(target=watch.exchange.run, daemon=True))
    before = signal.signal(signal.SIGTSTP, watch.suspend)
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        watch.ended.set()
        threads[0].join()  # it does not end where it is about to end the process
        signal.signal(signal.SIGTSTP, before)
