import json
import math
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from timm.optim import create_optimizer_v2
from torch import nn

from training.distributed import Distributed
from training.log import Meter, NonFiniteLossError, RunLog, check_finite, log_line, open_log
from training.options import WandbOptions
from training.run import Clock, Run
from utils import UserError

ALONE = Distributed(torch.device("cpu"))


def test_run_log(tmp_path):
    log = open_log(tmp_path, Clock(epoch_length=3, total=6), WandbOptions(), {})
    log.scalars("train", dict(loss=1.0), 3)
    log.epoch(dict(epoch=0, train_loss=1.0))
    log.epoch(dict(epoch=1, train_loss=0.5))
    lines = [json.loads(line) for line in (tmp_path / "log.txt").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [0, 1]
    assert list((tmp_path / "tensorboard").glob("events*"))
    RunLog(None).epoch({})


def test_without_tensorboard_there_are_no_curves(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    log = open_log(tmp_path, Clock(epoch_length=3, total=6), WandbOptions(), {})
    log.scalars("train", dict(loss=1.0), 1)
    log.epoch(dict(epoch=0))
    log.close()
    assert capsys.readouterr().out.count("pip install tensorboard\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["log.txt"]


class Shown:
    """A `training.trackers.Tracker` that remembers."""

    def __init__(self):
        self.values, self.drawn, self.closed = [], [], False

    def close(self):
        self.closed = True

    def scalars(self, values, step):
        self.values.append((values, step))

    def picture(self, name, pixels, step):
        self.drawn.append((name, step))


def test_pictures_of_evaluations_cost_a_long_run_little_and_are_there_at_its_end(monkeypatch):
    """Of three epochs, the first takes a second, the second a minute; the last one is drawn whatever it takes."""
    tracker, now = Shown(), [0.0]
    monkeypatch.setattr("training.log.time.monotonic", lambda: now[0])
    log = RunLog(None, trackers=[tracker])
    for step, seconds in ((3, 1), (6, 60), (9, 1)):
        now[0] += seconds
        log.evaluations(dict(val=dict(acc1=1.0), ema=dict(acc1=2.0)), lambda: dict(confusion=None), step)
    assert tracker.drawn == [("ema/confusion", 6)]
    assert tracker.values[-2:] == [({"val/acc1": 1.0}, 9), ({"ema/acc1": 2.0}, 9)]
    log.close()
    assert tracker.drawn == [("ema/confusion", 6), ("ema/confusion", 9)] and tracker.closed
    silent = RunLog(None)
    silent.evaluations(dict(val={}), lambda: pytest.fail("drawn for nobody"), 1)
    silent.close()


def test_trackers_are_closed_whatever_fails():
    class Broken(Shown):
        def close(self):
            super().close()
            raise OSError("no space")

    trackers = [Broken(), Shown(), Broken()]
    log = RunLog(None, trackers=trackers)
    log.evaluations(dict(val={}), lambda: 1 / 0, 1)
    with pytest.raises(OSError, match="no space"):
        log.close()
    assert all(tracker.closed for tracker in trackers)


def test_nothing_is_drawn_after_a_fault():
    tracker = Shown()
    with pytest.raises(KeyError, match="the fault"), RunLog(None, trackers=[tracker]) as log:
        log.evaluations(dict(val={}), lambda: pytest.fail("drawn after a fault"), 1)
        raise KeyError("the fault")
    assert tracker.closed


def test_a_resumed_log_forgets_what_comes_again(tmp_path):
    """Also half a line, and a line of a run that went further."""
    (tmp_path / "log.txt").write_text('{"epoch": 0, "a": 1}\n{"epoch": 1, "a": 2}\n{"epoch": 2, "a": 3}\n{"epoch": 0')
    log = RunLog(tmp_path, epoch=1)
    log.epoch(dict(epoch=1, a=5))
    log.close()
    assert (tmp_path / "log.txt").read_text() == '{"epoch": 0, "a": 1}\n{"epoch": 1, "a": 5}\n'


RECORD = '{"epoch": 0, "a": 1}\n'


@pytest.mark.parametrize("line", [
    b"[]", b"3", b"{}", b'{"epoch": "x"}', b'{"epoch": null}', b"\x00\xff\x80", b"a note", b'{"epoch": ' + b"1" * 5000,
    b"[" * 10**5,
])
def test_what_is_no_record_is_moved_out_of_the_log(tmp_path, line, capsys):
    """With one line that says so; nothing of it is lost, and a second time it joins the first."""
    file, aside = tmp_path / "log.txt", tmp_path / "log.txt.damaged"
    for number in (1, 2):
        file.write_bytes(line + b"\n\n" + RECORD.encode() + b'{"epoch": 1}')
        RunLog(tmp_path, epoch=1)
        assert file.read_text() == RECORD and aside.read_bytes() == (line + b"\n") * number
        said = f"{file}: 1 line without the record of an epoch, moved to {aside}\n"
        assert capsys.readouterr().out == said


def test_a_whole_log_is_not_written_again(tmp_path, monkeypatch):
    (tmp_path / "log.txt").write_text(RECORD)
    monkeypatch.setattr("training.log.replace_file", lambda *_: pytest.fail("written again"))
    RunLog(tmp_path, epoch=1)
    assert [path.name for path in tmp_path.iterdir()] == ["log.txt"]


def test_a_last_line_without_its_end_does_not_run_into_the_next(tmp_path):
    (tmp_path / "log.txt").write_text(RECORD.strip())
    RunLog(tmp_path, epoch=1).epoch(dict(epoch=1))
    assert (tmp_path / "log.txt").read_text() == RECORD + '{"epoch": 1}\n'


@pytest.mark.parametrize("make", [
    Path.mkdir, os.mkfifo, lambda path: path.symlink_to("/dev/zero"), lambda path: path.symlink_to(path.name),
], ids=["folder", "pipe", "device", "circle"])
def test_a_log_that_is_no_file(tmp_path, make):
    make(tmp_path / "log.txt")
    with pytest.raises(UserError, match=r"log\.txt is no file$"):
        RunLog(tmp_path)


def add(meter, *losses, step=0, **parts):
    for loss in losses:
        values = dict({name: torch.tensor(value) for name, value in parts.items()}, loss=torch.tensor(loss))
        meter.add(values, images=4, data_seconds=0.1, step=step, lr=0.5)


def test_means_are_of_the_line_and_of_the_epoch():
    meter = Meter(ALONE)
    add(meter, 1.0, 2.0, box=0.5)
    assert meter.read(epoch=0)["loss"] == 1.5
    add(meter, 6.0, box=2.0)
    line = meter.read(epoch=0)
    assert (line["loss"], line["lr"], line["data_seconds"]) == (6.0, 0.5, pytest.approx(0.1))
    means = meter.epoch_means()
    assert (means["loss"], means["box"], means["lr"]) == (3.0, 1.0, 0.5) and meter.images == 12


def test_sums_do_not_depend_on_when_they_are_read():
    """Of two meters, one is saved and read in the middle."""
    whole, first = Meter(ALONE), Meter(ALONE)
    losses = [0.1, 0.7, 1e-3, 0.3]
    add(whole, *losses, part=0.1)
    add(first, *losses[:3], part=0.1)
    first.gather(0)
    rest = Meter(ALONE, json.loads(json.dumps(first.state_dict())))
    add(rest, *losses[3:], part=0.1)
    assert rest.read(0)["loss"] == whole.read(0)["loss"]
    a, b = whole.epoch_means(), rest.epoch_means()
    assert (a["loss"], a["part"]) == (b["loss"], b["part"])


class OfTwo(Distributed):
    """One of two processes, which see the same losses."""

    def mean(self, values):
        return values


def test_an_epoch_that_is_resumed_on_fewer_processes_is_weighted_by_its_images():
    """Of 24 images, 16 were trained on in two batches by two processes, and 8 in as many by one."""
    meter = Meter(OfTwo(torch.device("cpu"), 0, 2))
    add(meter, 1.0, 1.0, box=0.5)
    meter.gather(epoch=0)
    meter = Meter(ALONE, meter.state_dict())
    add(meter, 4.0, 4.0, box=2.0)
    meter.gather(epoch=0)
    means = meter.epoch_means()
    assert (means["loss"], means["box"]) == (2.0, 1.0)
    assert means["images_per_second"] * means["seconds"] == pytest.approx(24)


def test_losses_of_a_checkpoint_before_losses_had_parts():
    meter = Meter(ALONE, dict(loss_sum=2.0, batches=2, images=8, lr=0.1, losses=[], seconds=1.0))
    assert meter.epoch_means()["loss"] == 1.0


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_the_first_loss_that_is_not_finite_is_named(value):
    meter = Meter(ALONE)
    add(meter, 1.0, step=6)
    add(meter, value, step=7)
    add(meter, math.nan, step=8)
    with pytest.raises(NonFiniteLossError, match=f"the loss became {value} in epoch 2 at step 7, learning rate 0.5"):
        meter.gather(epoch=2)


@pytest.mark.parametrize("spoil", [lambda m: m[0].weight, lambda m: m[1].running_var])
def test_weights_and_statistics_that_are_not_finite(spoil):
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    run = run_of(model)
    check_finite(run)
    with torch.no_grad():
        spoil(model)[0] = math.nan
    with pytest.raises(NonFiniteLossError, match="weights became NaN or infinite in epoch 3"):
        check_finite(run)


def run_of(model, opt="sgd"):
    return Run(model, None, create_optimizer_v2(model, opt, lr=0.1), None, Clock(3, 12, epoch=3, step=1), 4)


@pytest.mark.parametrize("opt,gradient", [("adamw", 1e30), ("nadamw", 1e30), ("sgd", math.inf)])
def test_a_gradient_that_spoils_the_optimizer_alone(opt, gradient):
    """1e30 squared is infinite: AdamW never moves that weight again, which looks finite for ever."""
    run = run_of(nn.Linear(2, 2), opt)
    for value in (1.0, gradient):
        check_finite(run)
        for p in run.model.parameters():
            p.grad = torch.full_like(p, value)
        run.optimizer.step()
    with torch.no_grad():
        for p in run.model.parameters():
            p.nan_to_num_()
    with pytest.raises(NonFiniteLossError, match="the optimizer's state became NaN or infinite in epoch 3"):
        check_finite(run)


def test_a_log_line():
    values = dict(loss=1.23456, lr=1e-3, images_per_second=99.6, data_seconds=0.01, batch_seconds=0.5, memory_mb=0.0)
    assert log_line(values, 0, 2, 5, seconds_left=3661) == (
        "epoch 0 [2/5]  loss 1.2346  lr 1.000e-03  100 images/s  data 0.010 s  batch 0.500 s  eta 1:01:01"
    )
    slowest = dict(slowest_seconds=0.4121, slowest_process=1)
    assert "  batch 0.500 s  slowest 0.412 s (process 1)  eta " in log_line(values | slowest, 0, 2, 5, 0)
    assert "s  memory 2048 MB  eta" in log_line(dict(values, memory_mb=2048.0), 0, 2, 5, 0)


def test_losses_of_several_processes_are_their_mean():
    together = SimpleNamespace(mean=lambda losses: (losses + 3) / 2, device=torch.device("cpu"), world_size=2)
    meter = Meter(together)
    add(meter, 1.0)
    assert meter.read(epoch=0)["loss"] == 2.0
