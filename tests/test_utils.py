import json
import random

import numpy as np
import pytest
import torch

import utils
from utils import Process, RunLog, UserError


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
