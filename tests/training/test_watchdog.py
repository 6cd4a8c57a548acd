"""A run that hangs is found, and the process that keeps it from getting further is named."""
import os
import signal
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch.distributed import HashStore

from helpers import ROOT
from training.distributed import Distributed
from training.exchange import Report
from training.progress import Doing
from training.run import Clock
from training.watchdog import START, UNANSWERED, Watch

LIMIT = 60.0
LOADING = Report(tick=1, silent=100.0, waits=False, epoch=0, step=4, doing=Doing.LOADING)
WAITING = replace(LOADING, waits=True, doing=Doing.GRADIENTS)


@pytest.fixture
def now(monkeypatch):
    """A clock that moves by hand."""
    value = [0.0]
    monkeypatch.setattr("training.watchdog.time.monotonic", lambda: value[0])
    return value


def create_watch(folder, rank=0, world_size=1, steps=4):
    """The watch of a process that has taken so many steps since it started."""
    clock = Clock(epoch_length=9, total=18)
    watch = Watch(Distributed(torch.device("cpu"), rank, world_size), clock, folder, LIMIT)
    clock.step = clock.steps_taken = steps
    return watch


def look(watch, now, seconds, heard=None):
    """What the watch says after so many seconds, in which the other processes have said this at every look."""
    for _ in range(round(seconds / watch.interval)):
        now[0] += watch.interval
        watch.look()
        watch.exchange.rounds += 1
        watch.exchange.heard = {
            rank: replace(report, tick=watch.ticks) if report.tick else report for rank, report in (heard or {}).items()
        }
        if line := watch.verdict():
            return line
    return None


def test_a_process_that_makes_no_progress_is_found_after_the_limit(tmp_path, now):
    watch = create_watch(tmp_path)
    watch.progress.note(Doing.LOADING)
    assert look(watch, now, LIMIT) is None
    assert look(watch, now, watch.interval) == (
        f"the run has made no progress for 1 minutes, loading data in epoch 0 after step 4; "
        f"stacks in {tmp_path}/stacks-0.txt"
    )


@pytest.mark.parametrize("doing", [Doing.LOADING, Doing.EVALUATING])
def test_progress_is_a_batch(tmp_path, now, doing):
    watch = create_watch(tmp_path)
    for _ in range(5):
        watch.progress.note(doing)
        assert look(watch, now, LIMIT) is None


def test_the_first_step_may_take_longer(tmp_path, now):
    watch = create_watch(tmp_path, steps=0)
    watch.progress.note(Doing.GRADIENTS)
    assert look(watch, now, START) is None
    assert "computing gradients" in look(watch, now, LIMIT)


def test_a_run_that_was_stopped_and_continues_has_not_hung(tmp_path, now):
    watch = create_watch(tmp_path)
    watch.look()
    now[0] += 10 * LIMIT
    watch.look()
    assert watch.verdict() is None and watch.silent < LIMIT


def test_a_checkpoint_that_grows_is_progress(tmp_path, now):
    watch = create_watch(tmp_path)
    watch.progress.note(Doing.SAVING)
    for size in range(5):
        (tmp_path / ".checkpoint-00000004.pth.xyz").write_bytes(bytes(size))
        assert look(watch, now, LIMIT) is None
    assert "saving a checkpoint" in look(watch, now, LIMIT)


@pytest.mark.parametrize("own,other,named", [
    (WAITING, LOADING, "process 1 has made no progress for 1 minutes, loading data"),
    (LOADING, WAITING, "process 0 has made no progress for 1 minutes, loading data"),
    # Where buffers are shared in the forward pass, it may wait too.
    (replace(LOADING, doing=Doing.LOSS), LOADING, "process 1 has made no progress for 1 minutes, loading data"),
    (replace(LOADING, doing=Doing.SAVING), replace(WAITING, doing=Doing.UPDATING), "process 0 has made no progress"),
    (WAITING, WAITING, "processes 0, 1 have made no progress for 1 minutes, computing gradients"),
])
def test_who_waits_for_another_is_not_named(tmp_path, now, own, other, named):
    watch = create_watch(tmp_path, world_size=2)
    watch.progress.note(Doing(own.doing))
    with watch.progress.waiting() if own.waits else open(os.devnull):
        assert look(watch, now, 2 * LIMIT, {1: other}).startswith(named)


def test_the_run_goes_on_while_another_process_does(tmp_path, now):
    """One that has evaluated its batches waits for the others."""
    watch = create_watch(tmp_path, world_size=3)
    assert look(watch, now, 5 * LIMIT, {1: WAITING, 2: replace(LOADING, silent=LIMIT / 2)}) is None


def test_a_process_that_does_not_answer_is_named(tmp_path, now):
    watch = create_watch(tmp_path, world_size=3)
    line = look(watch, now, 2 * LIMIT, {1: WAITING, 2: replace(LOADING, tick=0, silent=0.0)})
    assert line == (
        "process 2 does not answer, last loading data in epoch 0 after step 4, and the run has made no progress for "
        f"1 minutes; stacks of the others in {tmp_path}/stacks-*.txt"
    )
    assert LIMIT <= watch.silent <= LIMIT + (UNANSWERED + 1) * watch.interval


def test_where_the_store_does_not_answer_its_process_is_named(tmp_path, now):
    watch = create_watch(tmp_path, rank=1, world_size=2)
    watch.exchange.rounds = -1000
    watch.progress.note(Doing.GRADIENTS)
    for _ in range(20):
        now[0] += watch.interval
        watch.look()
        watch.exchange.rounds = 7
        line = watch.verdict()
    assert line.startswith("process 0 does not answer; process 1 has made no progress for 1 minutes, computing")


def test_processes_hear_one_another(tmp_path):
    """What is heard is what is said; the first to say that the run hangs learns that it is the first."""
    store = HashStore()
    watches = [create_watch(tmp_path, rank, world_size=2) for rank in range(2)]
    exchanges = [watch.exchange for watch in watches]
    for watch in watches:
        watch.look()
        watch.exchange.listens = True
    for exchange in exchanges * 2:
        exchange.exchange(store)
    assert [exchange.heard for exchange in exchanges] == [{1: exchanges[1].own}, {0: exchanges[0].own}]
    assert [exchange.declared for exchange in exchanges] == [0, 0]
    exchanges[1].declares = exchanges[0].declares = True
    for exchange in reversed(exchanges):
        exchange.exchange(store)
    assert [exchange.declared for exchange in exchanges] == [2, 1]


PROGRAM = """
import ctypes, os, sys, threading, time
from pathlib import Path
sys.path[:0] = [{root!r}]
import torch
from training.distributed import Distributed
from training.progress import Doing
from training.run import Clock
from training.watchdog import watched
distributed, clock = Distributed(torch.device("cpu")), Clock(9, 18)
with watched(distributed, clock, Path({folder!r}), minutes=0.005):
    clock.advance()
    distributed.progress.note(Doing.LOADING)
    print("it loads")
    {hang}
"""


def run_program(folder, hang):
    command = [sys.executable, "-W", "ignore", "-c", PROGRAM.format(root=str(ROOT), folder=str(folder), hang=hang)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


@pytest.mark.slow
def test_a_run_that_hangs_ends_with_a_line_and_stacks(tmp_path):
    done = run_program(tmp_path, "time.sleep(100)")
    assert done.returncode == 1 and done.stdout == "it loads\n"
    assert done.stderr.startswith("error: the run has made no progress for 0.005 minutes, loading data in ")
    assert done.stderr.count("\n") == 1 and "--hang_timeout" in done.stderr and "--auto_resume" in done.stderr
    assert "most recent call first" in (tmp_path / "stacks-0.txt").read_text()


@pytest.mark.slow
def test_a_run_whose_python_hangs_in_c_ends_with_stacks(tmp_path):
    """A thread that keeps the interpreter's lock keeps the watch from running too."""
    done = run_program(tmp_path, "ctypes.PyDLL(None).sleep(100)")
    assert done.returncode == 1 and "Timeout" in done.stderr and "most recent call first" in done.stderr


@pytest.mark.slow
def test_a_run_that_is_suspended_is_not_ended(tmp_path):
    """Ctrl-Z, and on again later than the last resort."""
    suspend = (
        "os.fork() or (time.sleep(1), os.kill(os.getppid(), 18), os._exit(0)); "
        "os.kill(os.getpid(), 20); distributed.progress.note(Doing.SAVING); print('continues'); os._exit(7)"
    )
    done = run_program(tmp_path, suspend)
    assert done.returncode == 7, done.stderr
    assert signal.SIGTSTP == 20 and signal.SIGCONT == 18
