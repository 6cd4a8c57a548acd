import json
import random
import subprocess
import sys

import numpy as np
import pytest
import torch

import utils
from helpers import ROOT
from utils import Process, RunLog, UserError


def test_seed_everything_is_a_function_of_its_arguments():
    def draw(*key):
        utils.seed_everything(*key)
        return random.random(), np.random.rand(), torch.rand(1).item()

    assert draw(0, 1, 2) == draw(0, 1, 2)
    assert len({draw(0, 1, 2), draw(0, 2, 1), draw(1, 1, 2)}) == 3


@pytest.mark.parametrize("key, mixed", [
    ((0, 1, 2), 3071860871404845570), ((5,), 12631478326263854183), ((2**32 - 1, 3, 4, 5), 9581789998422283073),
])
def test_seeds_stay_what_they_were(key, mixed):
    """A run that is gone on with draws what it would have drawn before: the same mix everywhere, of two widths."""
    def draw():
        return random.random(), np.random.rand(), torch.rand(1).item()

    assert utils.derive_seed(*key) == mixed
    narrow = mixed % 2**32
    random.seed(narrow)
    np.random.seed(narrow)
    torch.manual_seed(narrow)
    expected = draw()
    utils.seed_everything(*key)
    assert draw() == expected
    utils.seed_generators(narrow, torch.manual_seed)
    assert draw() == expected


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
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB."), "lower --batch_size"),
    (RuntimeError("grid_sampler_2d_backward_cuda does not have a deterministic implementation, but you set"),
     "--deterministic cannot train this network"),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), "lower --batch_size"),
    (OSError(28, "No space left on device"), "No space left on device in the output folder"),
    (torch.distributed.DistNetworkError("Failed to recv, got 0 bytes."), "another process of the run ended"),
    (OSError(28, "No space left on device", "log.txt"), "No space left on device: log.txt"),
])
def test_faults_of_the_machine_are_told_in_words(error, words):
    assert words in utils.explain_fault(error)


@pytest.mark.parametrize("error", [
    RuntimeError("[gloo/transport/tcp/pair.cc:530] Read error: reset by peer"),
    RuntimeError("[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer"),
    RuntimeError("Application timeout caused pair closure"),
])
def test_a_peer_that_is_gone(error, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "did not answer within --dist_timeout" in utils.explain_fault(error)
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert utils.explain_fault(error) is None


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
    OSError(2, "No such file or directory", "/data/gloomy/x"),
])
def test_what_may_be_the_code_is_left_to_a_traceback(error):
    assert utils.explain_fault(error) is None


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
