"""The contract of a task: a second one, `helpers.regression`, gets all that a run of classification has."""
import json
import os
import re
import signal
import subprocess
import sys
from collections import OrderedDict, namedtuple

import pytest
import torch

import main as program
from helpers import ROOT
from helpers.ports import free_port
from helpers.regression import RegressionTask
from helpers.run_state import differences
from training.buffers import discarded_pass
from training.data.loader import ToDevice
from training.distributed import Distributed
from training.precision import Precision

TASKS = {"regression": RegressionTask}
# 26 images: 3 steps an epoch, each of two batches.
COMMAND = ["--task", "regression", "--batch_size", "4", "--update_freq", "2", "--num_workers", "2", "--device", "cpu",
           "--epochs", "3", "--warmup_epochs", "1", "--lr", "1", "--log_every", "1", "--model_ema_eval",
           "--model_ema_decay", "0.9"]
STEPS = 3


def run(*arguments):
    return program.main([*COMMAND, *map(str, arguments)], TASKS)


def start(*arguments, processes=1, dies_at=None):
    """The same command line as a program, under a torchrun that restarts it once where there are several processes."""
    command = [sys.executable, "tests/helpers/regression.py"]
    if processes > 1:
        launcher = ["-m", "torch.distributed.run", f"--nproc_per_node={processes}", "--max-restarts=1"]
        command[1:1] = [*launcher, f"--master_port={free_port()}"]
    dies = dict(REGRESSION_DIES_AT=str(dies_at), REGRESSION_DIES_WITH=f"checkpoint-0000000{STEPS + 1}.pth")
    environment = {**os.environ, **dies, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*command, *COMMAND, *map(str, arguments)], cwd=ROOT, env=environment, capture_output=True, text=True,
        timeout=120,
    )


def records(folder):
    return [json.loads(line) for line in (folder / "log.txt").read_text().splitlines()]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that never stopped."""
    folder = tmp_path_factory.mktemp("whole")
    assert run("--output_dir", folder, "--save_every_steps", "2", "--keep_checkpoints", "9") == 0
    return folder


def test_it_learns(tmp_path):
    assert run("--output_dir", tmp_path, "--epochs", "20", "--lr", "4", "--num_workers", "0") == 0
    errors = [record["val_mae"] for record in records(tmp_path)]
    assert len(errors) == 20 and errors[-1] < errors[0] / 2


def test_the_parts_of_its_loss_are_logged(whole):
    for record in records(whole):
        assert record["train_squared"] + record["train_spread"] == pytest.approx(record["train_loss"])
        assert record["train_squared"] > 0 and record["train_spread"] > 0


def test_its_metric_is_the_best_where_it_is_lowest(whole):
    logged = [record["val_mae"] for record in records(whole)]
    best = torch.load(whole / "best.pth", weights_only=True)
    assert min(logged) < max(logged) and best["epoch"] == logged.index(min(logged))


def test_a_metric_of_its_average_decides_too_and_what_it_decided_on_is_evaluated(tmp_path, capfd):
    assert run("--output_dir", tmp_path, "--best_metric", "ema_mae") == 0
    path = tmp_path / "best.pth"
    logged = [record["ema_mae"] for record in records(tmp_path)]
    assert torch.load(path, weights_only=True)["epoch"] == logged.index(min(logged))
    capfd.readouterr()
    assert program.main(["--eval", "--resume", str(path), "--device", "cpu"], TASKS) == 0
    out = capfd.readouterr().out
    assert f"{path}: the EMA weights are taken, since the run's best metric is ema_mae\n" in out
    assert float(re.search(r"mae (\d\.\d{3})", out)[1]) == pytest.approx(min(logged), abs=1e-3)


def test_evaluation(whole, capfd):
    assert run("--eval", "--resume", whole / "last.pth") == 0
    printed = re.fullmatch(r"\* mae (\d\.\d{3}) of the network on 9 val images\n", capfd.readouterr().out)
    assert float(printed[1]) == pytest.approx(records(whole)[-1]["val_mae"], abs=1e-3)
    assert run("--eval", "--resume", whole / "last.pth", "--model_key", "model_ema") == 0
    printed = re.search(r"mae (\d\.\d{3})", capfd.readouterr().out)
    assert float(printed[1]) == pytest.approx(records(whole)[-1]["ema_mae"], abs=1e-3)


def test_a_network_that_keeps_its_layers_in_a_model_is_read_again(whole, tmp_path, monkeypatch, capfd):
    """All of its names begin with the prefix that Lightning writes."""
    layers = RegressionTask.network

    def network(task):
        return torch.nn.Sequential(OrderedDict(model=layers(task)))

    monkeypatch.setattr(RegressionTask, "network", network)
    assert run("--output_dir", tmp_path, "--epochs", "2") == 0
    assert run("--output_dir", tmp_path, "--auto_resume") == 0
    assert len(records(tmp_path)) == 3
    assert all(name.startswith("model.") for name in torch.load(tmp_path / "last.pth", weights_only=True)["model"])
    for key in ("model", "model_ema"):
        assert run("--eval", "--resume", tmp_path / "last.pth", "--model_key", key) == 0
    assert "error" not in capfd.readouterr().err


def test_what_runs_can_be_run_again(whole, tmp_path):
    """Its recipe names the task and its own flags."""
    recipe = whole / "args.yaml"
    assert "task: regression\n" in recipe.read_text() and "width: 8\n" in recipe.read_text()
    assert program.main(["--config", str(recipe), "--output_dir", str(tmp_path)], TASKS) == 0
    assert differences(tmp_path, whole) == []


@pytest.mark.slow
@pytest.mark.distributed
def test_killed_in_the_middle_of_a_step(whole, tmp_path):
    """Between the two batches of the second step of the second epoch, which is resumed after its first."""
    arguments = ["--output_dir", tmp_path, "--save_every_steps", "2", "--keep_checkpoints", "9"]
    assert start(*arguments, dies_at=2 * STEPS + 4).returncode == -signal.SIGKILL
    resumed = start(*arguments, "--auto_resume")
    assert resumed.returncode == 0, resumed.stderr
    assert f"checkpoint-0000000{STEPS + 1}.pth: epoch 1, step 1 of {STEPS}" in resumed.stdout
    assert differences(tmp_path, whole) == []


@pytest.mark.long
@pytest.mark.distributed
def test_two_processes(whole, tmp_path):
    """The main process is killed as above; torchrun restarts both, and the run ends as if it had never stopped."""
    arguments = ["--batch_size", "2", "--save_every_steps", "2", "--keep_checkpoints", "9", "--output_dir"]
    alone = start(*arguments, tmp_path / "whole", processes=2)
    assert alone.returncode == 0, alone.stderr
    assert alone.stdout.count("of the network on 9 val images") == 3
    assert [record["step"] for record in records(tmp_path / "whole")] == [STEPS, 2 * STEPS, 3 * STEPS]
    killed = start(*arguments, tmp_path / "killed", processes=2, dies_at=2 * STEPS + 4)
    assert killed.returncode == 0, killed.stderr
    assert f"checkpoint-0000000{STEPS + 1}.pth: epoch 1, step 1 of {STEPS}" in killed.stdout
    assert differences(tmp_path / "killed", tmp_path / "whole") == []


def test_mistakes_are_one_line(capfd):
    for code, message, *arguments in (
        (2, "unknown task 'regresion'; choose from regression", "--task", "regresion"),
        (2, "unknown flag --widht; did you mean --width?", "--widht", "3"),
        (2, "--width must be at least 1, got 0", "--width", "0"),
        (2, "unknown flag --model; did you mean", "--model", "biformer_nano"),
        (2, "--best_metric must be one of mae, ema_mae, got acc1", "--best_metric", "acc1"),
        (1, "no such checkpoint file", "--eval", "--resume", "nowhere.pth"),
    ):
        assert run(*arguments) == code
        error = capfd.readouterr().err
        assert error.startswith(f"error: {message}") or (code == 1 and message in error)
        assert len(error.splitlines()) == 1


def test_its_own_errors_have_its_own_advice(whole, monkeypatch, capfd):
    monkeypatch.setitem(sys.modules["helpers.regression"].IMAGES, "val", 0)
    assert run("--eval", "--resume", whole / "last.pth") == 1
    assert capfd.readouterr().err == "error: there was no image to evaluate; give it images\n"


def test_a_network_that_cannot_take_the_data(monkeypatch, capfd, tmp_path):
    monkeypatch.setattr("helpers.regression.SIDE", 3)
    monkeypatch.setattr(RegressionTask, "network", lambda self: torch.nn.Linear(5, 1))
    assert run("--output_dir", tmp_path / "out") == 2
    assert capfd.readouterr().err.startswith("error: brightness cannot take such input: mat1 and mat2 shapes")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("batch_size,number,advice", [(1, "one", "; give --batch_size 2 or more"), (8, "two", "")])
def test_a_network_that_cannot_be_trained(batch_size, number, advice, monkeypatch, capfd, tmp_path):
    def loss(self, network, batch):
        assert network.training and not torch.is_grad_enabled()
        raise ValueError("not so")

    monkeypatch.setattr(RegressionTask, "loss", loss)
    assert run("--output_dir", tmp_path / "out", "--batch_size", str(batch_size)) == 2
    message = f"brightness cannot be trained on such input, {number} at a time: not so{advice}"
    assert capfd.readouterr().err == f"error: {message}\n"
    assert not (tmp_path / "out").exists()


def test_looking_at_a_network_changes_nothing_in_it():
    settings = program.parse(COMMAND, TASKS)[1]
    task = RegressionTask(settings, Distributed(torch.device("cpu")), Precision())
    network = task.network()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    task.check_input(network)
    assert "2.num_batches_tracked" in before
    torch.testing.assert_close(network.state_dict(), before, rtol=0, atol=0)


def test_looking_at_a_network_trains_what_the_run_trains(monkeypatch):
    """The batch norm that a task holds takes batches of one image."""
    modes = []

    def train_mode(self, network):
        network.train()
        network[2].eval()

    def loss(self, network, batch):
        modes.append((network.training, network[2].training))
        return network(batch["image"]).square().mean(), {}

    monkeypatch.setattr(RegressionTask, "train_mode", train_mode)
    monkeypatch.setattr(RegressionTask, "loss", loss)
    settings = program.parse([*COMMAND, "--batch_size", "1"], TASKS)[1]
    task = RegressionTask(settings, Distributed(torch.device("cpu")), Precision())
    network = task.network()
    task.check_input(network)
    discarded_pass(network.eval(), lambda: task.dummy_loss(network))
    assert modes == 2 * [(True, False)]


Sample = namedtuple("Sample", "image weight")


@pytest.mark.parametrize("batch", [
    dict(image=torch.ones(2), names=["a", "b"], boxes=[torch.ones(1, 4), torch.ones(2, 4)]),
    (torch.ones(2), (torch.ones(3), torch.ones(4))),
    Sample(torch.ones(2), torch.ones(2)),
])
def test_batches_of_any_kind_are_moved(batch):
    def devices(value):
        if isinstance(value, torch.Tensor):
            return {value.device.type}
        values = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
        return set().union(*map(devices, values))

    moved, = ToDevice([batch], torch.device("meta"))
    assert type(moved) is type(batch) and len(moved) == len(batch) and devices(moved) == {"meta"}


def test_its_help_says_its_flags_alone(capsys):
    with pytest.raises(SystemExit) as end:
        run("--help")
    assert end.value.code == 0
    out = capsys.readouterr().out
    assert "width of the hidden layer (default: 8)" in out and "--batch_size" in out
    assert "--mixup" not in out and "--model " not in out
