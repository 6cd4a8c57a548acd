"""training/meter.py: losses and times of an epoch, and what is not finite."""
import json
import math
from types import SimpleNamespace

import pytest
import torch
from timm.optim import create_optimizer_v2
from torch import nn

from training.distributed import Distributed
from training.meter import Meter, NonFiniteLossError, check_finite, log_line
from training.run import Clock, Run

ALONE = Distributed(torch.device("cpu"))


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
    assert "  0.4 images/s  " in log_line(dict(values, images_per_second=0.44), 0, 2, 5, 0)  # of a detector on a CPU
    slowest = dict(slowest_seconds=0.4121, slowest_process=1)
    assert "  batch 0.500 s  slowest 0.412 s (process 1)  eta " in log_line(values | slowest, 0, 2, 5, 0)
    assert "s  memory 2048 MB  eta" in log_line(dict(values, memory_mb=2048.0), 0, 2, 5, 0)


def test_losses_of_several_processes_are_their_mean():
    together = SimpleNamespace(mean=lambda losses: (losses + 3) / 2, device=torch.device("cpu"), world_size=2)
    meter = Meter(together)
    add(meter, 1.0)
    assert meter.read(epoch=0)["loss"] == 2.0
