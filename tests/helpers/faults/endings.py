"""What ends around a run: its terminal, its launcher, the readers of its output; and what others did to its folder."""
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from helpers import ROOT
from helpers.ports import free_port
from training.signals import EXIT_RESUME

from .kills import ask_to_leave
from .runs import PATIENCE, Course, Fault, TooLate, Verdict, expect, reach_step

EVERY_STEP = ["--save_every_steps", "1", "--num_workers", "0"]


def _kill_torchrun(course: Course, rng: random.Random) -> Verdict:
    """SIGKILL of torchrun alone, which then cannot end its processes: they save themselves, and end."""
    output = course.new_output()
    command = [
        sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--nproc_per_node=2",
        f"--master_port={free_port()}", "main.py", *course.arguments(*EVERY_STEP, "--dist_timeout", "1"),
    ]
    with open(output, "w") as file:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        launcher = subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=file, env=environment)
    wanted = rng.randint(1, 4)
    _wait(launcher, lambda: output.read_text().count("  loss ") >= wanted)
    ranks = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
    launcher.kill()
    launcher.wait()
    end = time.monotonic() + 5
    while (left := [rank for rank in ranks if _runs(rank)]) and time.monotonic() < end:
        time.sleep(0.05)
    for rank in left:
        os.kill(int(rank), signal.SIGKILL)
    text = output.read_text()
    if left or len(ranks) != 2:
        return f"{len(left)} of {len(ranks)} processes outlived torchrun"
    return None if "SIGTERM: stopped in epoch" in text or "time: " in text else f"they did not leave: {text[-2000:]}"


def _runs(pid: str) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


def _wait(process: subprocess.Popen, what: Callable[[], bool]):
    end = time.monotonic() + PATIENCE
    while not what():
        if process.poll() is not None or time.monotonic() > end:
            process.kill()
            process.wait()
            raise TooLate
        time.sleep(0.01)


def _lose_output(redirection: str) -> Callable[[Course, random.Random], Verdict]:
    """Its standard output or error is closed, or its reader ends; SIGTERM then still gives the right exit code."""

    def lose(course: Course, rng: random.Random) -> Verdict:
        before = course.store.steps()
        command = [sys.executable, "-W", "ignore", "main.py", *course.arguments(*EVERY_STEP)]
        # The shell hands over its process: a signal to it is one to the run.
        line = f'exec "$@" {redirection}'
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        run = subprocess.Popen(["bash", "-c", line, "bash", *command], cwd=ROOT, env=environment)
        _wait(run, lambda: len(set(course.store.steps()) - set(before)) >= rng.randint(1, 2))
        run.terminate()
        code = run.wait(PATIENCE)
        if code == 0:
            raise TooLate
        return None if code == EXIT_RESUME else f"exit code {code} with {redirection}"

    return lose


def _leave_halves(course: Course, rng: random.Random) -> Verdict:
    """What is left of a run that was killed while it wrote its recipe or rewrote its log."""
    halves = [course.folder / name for name in (".args.yaml.k3x_81ab", ".log.txt.k3x_81ab")]
    course.folder.mkdir(exist_ok=True)
    for half in halves:
        half.write_text("mode")
    verdict = ask_to_leave(signal.SIGTERM)(course, rng)
    return verdict or (f"{halves} are there" if any(half.exists() for half in halves) else None)


def _lose_folder(course: Course, rng: random.Random) -> Verdict:
    """Somebody removes it between two starts: the run begins again."""
    shutil.rmtree(course.folder, ignore_errors=True)
    return ask_to_leave(signal.SIGTERM)(course, rng)


def _spoil_log(course: Course, rng: random.Random) -> Verdict:
    """Lines that are no records, at any place in the log."""
    course.folder.mkdir(exist_ok=True)
    log = course.folder / "log.txt"
    lines = log.read_bytes().splitlines(keepends=True) if log.exists() else []
    for foreign in (b"[]\n", b"3\n", b'{"epoch": "x"}\n', b"\x00\xff\x80\n"):
        lines.insert(rng.randint(0, len(lines)), foreign)
    log.write_bytes(b"".join(lines))
    attempt = course.start(*EVERY_STEP)
    reach_step(attempt, rng.randint(1, 3))
    attempt.send(signal.SIGTERM)
    return expect(attempt, {EXIT_RESUME}, "4 lines without the record of an epoch, moved to ")


FAULTS = [
    Fault("SIGHUP", ask_to_leave(signal.SIGHUP), times=2),
    Fault("SIGHUP to one or both of two processes", ask_to_leave(signal.SIGHUP), world_size=2),
    Fault("torchrun killed by SIGKILL", _kill_torchrun, world_size=2, times=2),
    Fault("standard output closed, then SIGTERM", _lose_output("1>&- 2> /dev/null")),
    Fault("standard output and error closed, then SIGTERM", _lose_output("1>&- 2>&-")),
    Fault("output read by head -1, then SIGTERM", _lose_output("> >(head -1 > /dev/null) 2>&1")),
    Fault("a recipe and a log left half written", _leave_halves),
    Fault("the output folder removed between two starts", _lose_folder),
    Fault("lines that are no records in the log", _spoil_log, times=2),
]
