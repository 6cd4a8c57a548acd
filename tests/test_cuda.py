"""Training on a GPU: resumed runs are exact, and what cannot be is said. On the CPU the same is tested elsewhere."""
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import timm
import torch

from helpers import ROOT
from helpers.families import FAMILIES
from helpers.run_state import differences
from helpers.segments import write_segments
from training.cuda_graphs import GraphedTraining
from training.precision import Precision

pytestmark = pytest.mark.gpu
# Small, with everything that has a state of its own: EMA, accumulation, mixup, erasing, stochastic depth.
RUN = [
    *("--config", "configs/train/quickstart.yaml", "--device", "cuda", "--amp", "bf16", "--deterministic", "true"),
    *("--epochs", "2", "--warmup_epochs", "1", "--update_freq", "2", "--mixup", "0.8", "--reprob", "0.25"),
    *("--drop_path", "0.1", "--model_ema", "true", "--model_ema_decay", "0.9", "--save_every_steps", "2"),
]


def command(output, *more):
    return [sys.executable, "main.py", *RUN, "--output_dir", str(output), *more]


def kill_in_second_epoch(output, *more):
    """SIGKILL as soon as the first epoch is logged."""
    process = subprocess.Popen(command(output, *more), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 200
    while not (output / "log.txt").exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL


GRAPHS = ["--cuda_graph", "--update_freq", "1"]
COMPILED = pytest.mark.compile


@pytest.mark.parametrize("more", [
    pytest.param([], id="eager"),
    pytest.param(GRAPHS, id="cuda_graph"),
    pytest.param(["--compile"], id="compile", marks=COMPILED),
    pytest.param(["--compile", *GRAPHS], id="compile-cuda_graph", marks=COMPILED),
])
def test_a_killed_and_resumed_run_is_exact(tmp_path, more):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    subprocess.run(command(whole, *more), cwd=ROOT, check=True, capture_output=True)
    kill_in_second_epoch(killed, *more)
    subprocess.run(command(killed, *more, "--auto_resume", "true"), cwd=ROOT, check=True, capture_output=True)
    assert differences(whole, killed) == []


@pytest.mark.parametrize("head", ["upernet", "semantic_fpn"])
def test_segmenters_train_deterministically(tmp_path, head):
    """Two runs are equal, bit for bit."""
    data = write_segments(tmp_path / "data", train=9, val=3)
    for name in ("first", "second"):
        run = [sys.executable, "main.py", "--task", "segmentation", "--data_path", str(data), "--head", head,
               "--model", "biformer_nano", "--input_size", "64", "--short_side", "64", "--batch_size", "4",
               "--device", "cuda", "--amp", "bf16", "--deterministic", "--max_steps", "4", "--warmup_epochs", "0"]
        subprocess.run([*run, "--output_dir", str(tmp_path / name)], cwd=ROOT, check=True, capture_output=True)
    assert differences(tmp_path / "first", tmp_path / "second") == []


def test_deformable_attention_cannot_be_deterministic_and_says_so(tmp_path):
    one_step = ["--model", "debiformer_tiny", "--max_steps", "1", "--warmup_epochs", "0"]
    result = subprocess.run(command(tmp_path, *one_step), cwd=ROOT, capture_output=True, text=True)
    assert result.returncode != 0 and "cannot be trained deterministically" in result.stderr, result.stderr[-500:]
    assert "leave out --deterministic" in result.stderr and "Traceback" not in result.stderr


@pytest.mark.parametrize("how", [
    pytest.param([], id="eager"), pytest.param(["--compile"], id="compiled", marks=COMPILED)
])
def test_graphs_train_what_launched_steps_train(tmp_path, how):
    """The same kernels one after another: equal losses and weights, but for what a GPU adds in another order."""
    shared = ["--update_freq", "1", "--epochs", "2", "--drop_path", "0.1", *how]
    for name, more in (("eager", []), ("graphs", ["--cuda_graph"])):
        subprocess.run(command(tmp_path / name, *shared, *more), cwd=ROOT, check=True, capture_output=True)
    eager, graphs = (torch.load(tmp_path / name / "last.pth", weights_only=True) for name in ("eager", "graphs"))
    for name, weight in eager["model"].items():
        torch.testing.assert_close(graphs["model"][name], weight, rtol=0, atol=2e-3, msg=name)
    losses = [json.loads((tmp_path / name / "log.txt").read_text().splitlines()[-1]) for name in ("eager", "graphs")]
    assert losses[1]["train_loss"] == pytest.approx(losses[0]["train_loss"], rel=1e-2)


def gradients(network, images):
    """All parameters' gradients in one row."""
    network.zero_grad()
    network(images).square().mean().backward()
    return torch.cat([p.grad.flatten().cpu() for p in network.parameters()])


@pytest.mark.parametrize("graphed", [False, True], ids=["launched", "graph"])
@pytest.mark.parametrize("name", FAMILIES)
def test_gradients_are_those_of_a_cpu(name, graphed):
    """Of three batches in turn: nothing of one, nor of memory as it was found, is left in the gradients of the next."""
    torch.manual_seed(0)
    network = timm.create_model(name, num_classes=10).train()
    for module in network.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0  # a GPU draws other numbers
    batches = torch.randn(3, 2, 3, 64, 64)
    expected = [gradients(network, images) for images in batches]
    network = network.to("cuda")
    if graphed:
        network = GraphedTraining(network, Precision.on(torch.device("cuda"), "off", True))
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        found = [gradients(network, images.to("cuda")) for images in batches]
    for one, other in zip(found, expected, strict=True):
        assert (one - other).norm() < 1e-2 * other.norm()
