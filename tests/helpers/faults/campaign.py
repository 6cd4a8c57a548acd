"""A campaign of faults: which there are, how they strike runs, and what comes of it."""
import itertools
import random
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from operator import itemgetter
from pathlib import Path

from helpers.run_state import differences

from . import detection, downloads, endings, kills, loader, state, watch
from .runs import Course, Fault, TooLate, Verdict

# By topic.
FAULTS = {
    "detection": detection.FAULTS, "downloads": downloads.FAULTS, "endings": endings.FAULTS, "kills": kills.FAULTS,
    "loader": loader.FAULTS, "state": state.FAULTS, "watch": watch.FAULTS,
}
SHORT = {
    "SIGKILL at a random moment", "SIGKILL in the middle of writing a checkpoint", "SIGTERM",
    "SIGKILL, then the newest checkpoint cut off", "one of two processes killed",
}


@dataclass
class Campaign:
    """What came of the faults: how often each was tried and survived, and how the disturbed runs ended."""

    tried: Counter = field(default_factory=Counter)
    survived: Counter = field(default_factory=Counter)
    late: Counter = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    runs: int = 0
    lost: list[str] = field(default_factory=list)

    def count(self, fault: Fault, verdict: Verdict):
        self.tried[fault.name] += 1
        self.survived[fault.name] += verdict is None
        if verdict is not None:
            self.failures.append(f"{fault.name}: {verdict}")

    def again(self, fault: Fault) -> list[Fault]:
        """What is left to be tried of a fault that came too late for a run; not for ever."""
        self.late[fault.name] += 1
        if self.late[fault.name] < 10 * fault.times:
            return [fault]
        self.count(fault, "never came before a run was over")
        return []

    def compare(self, course: Course, reference: Path):
        self.runs += 1
        self.lost += [f"{course.folder.name}: {difference}" for difference in differences(course.folder, reference)]

    def table(self) -> str:
        """Markdown."""
        names = dict.fromkeys(fault.name for topic in FAULTS.values() for fault in topic)
        rows = [f"| {name} | {self.tried[name]} | {self.survived[name]} |" for name in names if self.tried[name]]
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
    campaign = Campaign()
    subjects = {(fault.subject.name, fault.world_size): fault.subject for fault in faults}
    for (name, world_size), subject in sorted(subjects.items(), key=itemgetter(0)):
        data = work / f"data-{name}"
        if not data.exists():
            subject.write_data(data)
        reference = Course(data, work / f"reference-{name}-{world_size}", world_size, subject)
        finish(reference)
        waiting = [fault for fault in faults if (fault.subject, fault.world_size) == (subject, world_size)]
        for number in itertools.count():
            if not waiting:
                break
            course = Course(data, work / f"disturbed-{name}-{world_size}-{number}", world_size, subject)
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
                return [*campaign.again(fault), *faults[index + 1 :]]
            say(f"{course.folder.name}: {fault.name}: came too late, to be tried again")
            return [*faults[index + 1 :], *campaign.again(fault)]
        campaign.count(fault, verdict)
        say(f"{course.folder.name}: {fault.name}: {verdict or 'survived'} ({time.monotonic() - start:.1f} s)")
    return []


def done(course: Course) -> bool:
    log = course.folder / "log.txt"
    return log.exists() and len(log.read_text().splitlines()) == course.subject.epochs
