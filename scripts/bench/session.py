"""Tasks measured in a process of their own, under a time budget, into a record that survives a kill.

A kernel that hangs, or that leaves the GPU unusable, ends one contender of one task: the process is replaced.
"""
import json
import multiprocessing
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from utils import replace_file

from .trial import NO_TIME, DeviceLost, Trial, describe, release

# Importing everything, and waking a GPU, takes this long at most.
START_SECONDS = 120.0


@dataclass(frozen=True)
class Task:
    """`measure(case, trial)` gives rows. `patience`: seconds without news after which a contender counts as hung."""
    name: str
    measure: Callable[..., list[dict]]
    case: object
    patience: float = 90.0


@dataclass(frozen=True)
class Section:
    """Tasks in the order of their importance, and their part of the time, relative to the sections still to come."""
    name: str
    share: float
    tasks: tuple[Task, ...]


def allot(seconds: float, shares: list[float]) -> float:
    """What the first of the remaining sections gets; what it leaves unused goes to those after it."""
    return max(0.0, seconds) * shares[0] / sum(shares)


def serve(connection: Connection, device: torch.device):
    """In the process: measure the tasks that arrive, until the other side hangs up or the device is lost."""
    connection.send(("ready",))
    while True:
        try:
            measure, case, settings = connection.recv()
        except EOFError:
            return
        trial = Trial(device, **settings, announce=lambda name: connection.send(("contender", name)))
        try:
            message = ("rows", measure(case, trial))
        except DeviceLost as lost:
            connection.send(("lost", lost.contender, lost.reason))
            return
        except Exception as error:
            message = ("failed", describe(error))
        try:
            release(device)
        except Exception as error:
            connection.send(("lost", None, describe(error)))
            return
        connection.send(message)


class Worker:
    """The process that measures; started when it is needed, and again when it is gone."""

    def __init__(self, device: torch.device, threads: int | None = None, least_rounds: int = 5):
        self.device = device
        self.least_rounds = least_rounds
        self.threads = threads
        self.process = None
        self.connection = None

    def _start(self, end: float):
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_begin, args=(theirs, self.device, self.threads))
        self.process.start()
        theirs.close()
        if not self.connection.poll(max(0.0, min(START_SECONDS, end - time.time()))):
            raise EOFError
        self.connection.recv()

    def stop(self, patience: float = 0.0):
        """End the process, whatever it is doing; one that is idle goes by itself within `patience` seconds."""
        if self.process is not None:
            self.connection.close()
            self.process.join(patience)
            self.process.kill()
            # A process that waits for a hung kernel may outlive its end; nothing here waits for it.
            self.process.join(10)
        self.process = None

    def measure(self, task: Task, deadline: float, section_deadline: float, end: float) -> dict:
        """`dict(rows=...)`, or `dict(failed=reason)`.

        Args:
            task: What to measure.
            deadline: `time.time()` that the task should keep to.
            section_deadline: As of `Trial`.
            end: `time.time()` at which the process is stopped whatever it is doing.
        """
        failures: dict[str, str] = {}
        while True:
            settings = dict(deadline=deadline, section_deadline=section_deadline, failures=failures,
                            least_rounds=self.least_rounds)
            kind, news, contender = self._attempt(task, settings, end)
            if kind == "rows":
                return dict(rows=news)
            if kind == "failed" or contender is None or contender in failures:
                return dict(failed=news)
            failures[contender] = news

    def _attempt(self, task: Task, settings: dict, end: float) -> tuple:
        """("rows", rows, None), ("failed", reason, None) or ("lost", reason, contender or None)."""
        contender = None
        try:
            if self.process is None:
                self._start(end)
            self.connection.send((task.measure, task.case, settings))
            while True:
                left = end - time.time()
                if not self.connection.poll(max(0.0, min(task.patience, left))):
                    self.stop()
                    if left <= task.patience:
                        return "failed", NO_TIME, None
                    return "lost", f"no answer in {task.patience:.0f} s", contender
                kind, *news = self.connection.recv()
                if kind == "contender":
                    contender = news[0]
                elif kind == "lost":
                    self.stop()
                    return "lost", news[1], news[0]
                else:
                    return kind, news[0], None
        except (EOFError, BrokenPipeError, ConnectionResetError):
            self.process.join(5)
            code = self.process.exitcode
            self.stop()
            return "lost", f"the process died (exit code {code})", contender


def _begin(connection: Connection, device: torch.device, threads: int | None):
    if threads:
        torch.set_num_threads(threads)
    serve(connection, device)


def run(
    sections: list[Section],
    worker: Worker,
    start: float,
    budget: float,
    record: dict,
    save: Callable[[dict], None],
):
    """Measure section after section into `record["sections"]`, saving after every task.

    Args:
        sections: In the order to run them in.
        worker: Where.
        start: `time.time()` that the budget counts from.
        budget: Seconds for everything.
        record: Gets, by section, `rows`, `failed` (task: reason), `left_out` (tasks) and `seconds`.
        save: Called with the record.
    """
    end = start + budget
    for i, section in enumerate(sections):
        began = time.time()
        section_deadline = began + allot(end - began, [s.share for s in sections[i:]])
        found = record["sections"][section.name] = dict(rows=[], failed={}, left_out=[], seconds=0.0)
        for j, task in enumerate(section.tasks):
            now = time.time()
            if now >= section_deadline:
                found["left_out"].append(task.name)
                continue
            deadline = now + (section_deadline - now) / (len(section.tasks) - j)
            outcome = worker.measure(task, deadline, section_deadline, end)
            found["rows"] += outcome.get("rows", [])
            if outcome.get("failed") == NO_TIME:
                found["left_out"].append(task.name)
            elif "failed" in outcome:
                found["failed"][task.name] = outcome["failed"]
            found["seconds"] = time.time() - began
            print(f"{time.time() - start:5.0f} s  {section.name}: {task.name}  {time.time() - now:.1f} s"
                  f"{'  ' + outcome['failed'] if 'failed' in outcome else ''}", flush=True)
            save(record)
    save(record)
    worker.stop(patience=10)


def write_json(path: Path, record: dict):
    """Replace a file whole: a kill leaves the old one or the new one."""
    replace_file(path, lambda file: file.write((json.dumps(record, indent=1) + "\n").encode()))
