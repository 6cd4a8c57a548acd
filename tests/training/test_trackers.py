"""Where a run is shown: TensorBoard, and Weights & Biases, which a module stands for here."""
import importlib.machinery
import os
import signal
import sys
import types

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

import main as program
from tasks.classification.metrics import Accuracy
from training.checkpointer import Checkpointer
from training.options import WandbOptions
from training.signals import EXIT_RESUME
from training.trackers import WandbError, open_trackers
from utils import UserError

SMALL = ["--model", "biformer_nano", "--input_size", "32", "--batch_size", "4", "--num_workers", "0", "--device", "cpu",
         "--warmup_epochs", "0", "--lr", "1e-2"]


class FakeWandb(types.ModuleType):
    """What is used of wandb; remembers the runs and what they were told."""

    class Error(Exception):
        pass

    class Image:
        def __init__(self, pixels):
            self.shape = pixels.shape

    def __init__(self):
        super().__init__("wandb")
        self.__spec__ = importlib.machinery.ModuleSpec("wandb", None)
        self.starts, self.logged, self.finished, self.error = [], [], 0, None

    def init(self, **asked):
        if self.error:
            raise self.error
        self.starts.append(asked)
        return self

    def log(self, values, step):
        assert not self.logged or step >= self.logged[-1][0], "wandb drops a step that goes back"
        self.logged.append((step, values))

    def finish(self):
        self.finished += 1


@pytest.fixture
def wandb(monkeypatch):
    module = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


def run(photos, folder, *arguments):
    return program.main([*SMALL, "--data_path", str(photos), "--output_dir", str(folder), *arguments])


def test_a_run_is_logged_to_wandb_and_resumed_there(photos, tmp_path, wandb):
    """Under one id, at the steps of TensorBoard."""
    wanted = ["--enable_wandb", "--project", "flowers", "--log_every", "1"]
    assert run(photos, tmp_path, "--epochs", "1", *wanted) == 0
    steps = [step for step, _ in wandb.logged]
    keys = set().union(*(values for _, values in wandb.logged))
    assert sorted(steps) == steps and {1, 2, 3} <= set(steps)
    assert {"train/loss", "train/lr", "val/acc1", "val/predictions", "val/confusion"} <= keys
    (start,) = wandb.starts
    assert start["project"] == "flowers" and start["name"] == tmp_path.name and start["config"]["lr"] == 1e-2
    assert run(photos, tmp_path, "--epochs", "2", "--auto_resume", *wanted) == 0
    assert wandb.starts[1]["id"] == start["id"] == (tmp_path / "wandb_id").read_text()
    assert wandb.starts[1]["resume"] == "allow" and wandb.finished == 2


def test_where_wandb_is_missing_or_cannot_start_a_run_ends_with_one_line(photos, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr("training.options.find_spec", lambda name: None)
    assert run(photos, tmp_path, "--epochs", "1", "--enable_wandb") == 2
    assert capfd.readouterr().err == "error: --enable_wandb needs the package wandb: pip install wandb\n"
    monkeypatch.undo()
    module = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", module)
    module.error = module.Error("no API key")
    assert run(photos, tmp_path, "--epochs", "1", "--enable_wandb") == 1
    err = capfd.readouterr().err
    assert err.startswith("error: wandb cannot start: no API key; log in with `wandb login`") and err.count("\n") == 1


def test_tensorboard_shows_curves_and_pictures(tmp_path):
    (tracker,) = open_trackers(tmp_path, 0, WandbOptions(), {})
    pixels = np.arange(2 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3)
    tracker.scalars({"val/acc1": 50.0}, 7)
    tracker.picture("val/confusion", pixels, 7)
    tracker.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    (point,), (picture,) = events.Scalars("val/acc1"), events.Images("val/confusion")
    assert (point.step, point.value, picture.step, picture.width, picture.height) == (7, 50.0, 7, 3, 2)


def test_a_run_shows_its_last_evaluation_in_tensorboard(photos, tmp_path):
    assert run(photos, tmp_path, "--epochs", "2") == 0
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert {"val/predictions", "val/confusion"} == set(events.Tags()["images"])
    (picture,) = events.Images("val/predictions")
    assert picture.step == torch.load(tmp_path / "last.pth", weights_only=True)["total_steps"]


@pytest.fixture
def closed(monkeypatch):
    """The closed ones of TensorBoard's writers."""
    writers = []
    close = SummaryWriter.close
    monkeypatch.setattr(SummaryWriter, "close", lambda writer: writers.append(writer) or close(writer))
    return writers


def test_a_fault_in_an_evaluation_is_what_is_reported(photos, tmp_path, wandb, closed, monkeypatch, capfd):
    """And not that its pictures cannot be drawn; nor are those of the evaluation before."""
    update, images = Accuracy.update, []

    def fail_in_the_second_epoch(accuracy, network, batch):
        if len(batch[0]) == 4 and len(images) > 7:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        images.extend(batch[0])
        return update(accuracy, network, batch)

    monkeypatch.setattr(Accuracy, "update", fail_in_the_second_epoch)
    assert run(photos, tmp_path, "--epochs", "2", "--enable_wandb") == 1
    err = capfd.readouterr().err
    assert err.startswith("error: out of memory (") and err.count("\n") == 1
    assert wandb.finished == len(closed) == 1 and not any("val/predictions" in values for _, values in wandb.logged)


def test_a_run_that_is_stopped_in_an_epoch_shows_no_picture_of_the_last_one(photos, tmp_path, wandb, monkeypatch):
    """Its step is in the past, which wandb drops: the run that resumes draws."""
    after_step = Checkpointer.after_step

    def stop_in_the_second_epoch(self, meter):
        if (self.run.clock.epoch, self.run.clock.step) == (1, 1):
            os.kill(os.getpid(), signal.SIGTERM)
        after_step(self, meter)

    monkeypatch.setattr(Checkpointer, "after_step", stop_in_the_second_epoch)
    asked = ["--epochs", "2", "--enable_wandb", "--log_every", "1"]
    assert run(photos, tmp_path, *asked) == EXIT_RESUME
    assert wandb.finished == 1
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    assert run(photos, tmp_path, *asked, "--auto_resume") == 0
    assert sum("val/predictions" in values for _, values in wandb.logged) == 1


@pytest.mark.parametrize("what", ["main.create_trainer", "training.options.save"])
def test_trackers_are_closed_where_a_run_cannot_begin(photos, tmp_path, wandb, closed, monkeypatch, what):
    def fail(*_, **__):
        raise UserError("no")

    monkeypatch.setattr(what, fail)
    assert run(photos, tmp_path, "--epochs", "1", "--enable_wandb") == 1
    assert wandb.finished == len(closed) == 1


def test_tensorboard_is_closed_where_wandb_cannot_start(tmp_path, wandb, closed):
    wandb.error = wandb.Error("no API key")
    with pytest.raises(WandbError):
        open_trackers(tmp_path, 0, WandbOptions(enable_wandb=True), {})
    assert len(closed) == 1
