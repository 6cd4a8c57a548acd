import json
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import utils
from utils import Process, RunLog, UserError

ROOT = Path(__file__).resolve().parent.parent


def test_seed_everything_is_a_function_of_its_arguments():
    def draw(*key):
        utils.seed_everything(*key)
        return random.random(), np.random.rand(), torch.rand(1).item()

    assert draw(0, 1, 2) == draw(0, 1, 2)
    assert len({draw(0, 1, 2), draw(0, 2, 1), draw(1, 1, 2)}) == 3


def test_run_log(tmp_path):
    log = RunLog(tmp_path)
    log.scalars("train", dict(loss=1.0), 3)
    log.epoch(dict(epoch=0, train_loss=1.0))
    log.epoch(dict(epoch=1, train_loss=0.5))
    lines = [json.loads(line) for line in (tmp_path / "log.txt").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [0, 1]
    assert list((tmp_path / "tensorboard").glob("events*"))
    RunLog(None).epoch({})


def test_unknown_device():
    with pytest.raises(UserError, match="--device toaster cannot be used"):
        utils.start_process("toaster")


def test_single_process():
    process = Process(torch.device("cpu"))
    assert process.is_main and not process.is_distributed
    assert process.mean(torch.tensor([2.0])).item() == 2


@pytest.mark.parametrize("error,words", [
    (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. "), "a process that reads images was killed"),
    (RuntimeError("[gloo/transport/tcp/pair.cc:530] Read error: reset by peer"), "another process of the run"),
    (RuntimeError("Application timeout caused pair closure"), "did not answer within --dist_timeout"),
    (OSError(28, "No space left on device"), "No space left on device in the output folder"),
    (torch.distributed.DistNetworkError("Failed to recv, got 0 bytes."), "another process of the run ended"),
    (OSError(28, "No space left on device", "log.txt"), "No space left on device: log.txt"),
])
def test_faults_of_the_machine_are_told_in_words(error, words):
    assert words in utils.fault_of_machine(error)


def test_a_bug_ends_the_process_too():
    """With its traceback, and whatever still runs: the other processes of the run wait for this one."""
    script = (
        "import threading, utils\n"
        "threading.Thread(target=threading.Event().wait).start()\n"
        "utils.run_and_exit(lambda: 1 / 0)"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and "ZeroDivisionError" in done.stderr


@pytest.mark.parametrize("error", [
    RuntimeError("Caught RuntimeError in DataLoader worker process 0."),
    RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
    OSError(2, "no", "x"),
])
def test_what_may_be_the_code_is_left_to_a_traceback(error):
    assert utils.fault_of_machine(error) is None


@pytest.mark.parametrize("code", [0, 1, 2, utils.EXIT_RESUME])
def test_a_fault_ends_the_process_without_waiting_for_others(code):
    """Python would wait for this thread for ever; only after a fault must it not."""
    script = (
        "import sys, threading, utils\n"
        f"threading.Thread(target=threading.Event().wait, daemon={code == 0}).start()\n"
        f"print('said'); utils.exit_with({code})"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (code, "said\n")
