import copy
import fcntl
import os
import pty
import re
import struct
import sys
import termios

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from engine import Trainer, evaluate
from optim_factory import Schedule
from training.distributed import Distributed
from training.log import RunLog
from training.meter import NonFiniteLossError
from training.precision import Precision
from training.run import Clock, Run, create_ema

ALONE = Distributed(torch.device("cpu"))
FULL = Precision()


def batches(count, size=4, classes=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(size, 3, 2, 2, generator=generator), torch.randint(classes, (size,), generator=generator))
        for _ in range(count)
    ]


def small_model(classes=3):
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(12, classes))


def cross_entropy(logits, targets):
    return F.cross_entropy(logits, targets)


class Loader:
    """The batches of a list, from the first that is asked for on."""

    def __init__(self, batches):
        self.batches, self.dataset, self.asked = batches, None, []

    def set_epoch(self, epoch, first_batch=0):
        self.asked.append((epoch, first_batch))
        self.first_batch = first_batch

    def __len__(self):
        return len(self.batches)

    def __iter__(self):
        return iter(self.batches[self.first_batch :])


class Count:
    """An evaluator of how many images it saw."""

    def __init__(self):
        self.images = 0

    def update(self, network, batch):
        assert not network.training and torch.is_inference_mode_enabled()
        self.images += len(network(batch[0]))

    def compute(self, distributed):
        return dict(images=self.images)


class SmallTask:
    """As much of a task as the engine asks for."""

    def __init__(self, loss=cross_entropy, precision=FULL):
        self.loss_fn, self.distributed, self.eval_processes, self.precision = loss, ALONE, ALONE, precision

    def loss(self, network, batch):
        logits = network(batch[0]).float()
        return self.loss_fn(logits, batch[1]), dict(logits=logits.detach().mean())

    def count(self, batch):
        return len(batch[0])

    def train_mode(self, network):
        network.train()

    def evaluator(self):
        return Count()


def create_trainer(
    model, loader, *, epoch=0, step=0, epochs=1, loss=cross_entropy, precision=FULL, lr=0.1, ema=None,
    optimizer=None, **kwargs
):
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=lr)
    clock = Clock(len(loader) // kwargs.get("update_freq", 1), 0, epoch, step)
    clock.total = epochs * clock.epoch_length
    schedule = Schedule("cosine", clock.total, min_lr=lr).build(optimizer)
    run = Run(model, ema, optimizer, precision.grad_scaler(), clock, global_batch=4)
    return Trainer(SmallTask(loss, precision), run, model, schedule, RunLog(None), **kwargs)


def train(model, batches, saver=None, **kwargs):
    return create_trainer(model, batches, **kwargs).train_epoch(Loader(batches), saver)


def test_an_epoch_is_plain_gradient_descent():
    model, loader = small_model(), batches(3)
    expected, losses = copy.deepcopy(model), []
    for images, targets in loader:
        loss = F.cross_entropy(expected(images), targets)
        expected.zero_grad()
        loss.backward()
        losses.append(loss.item())
        with torch.no_grad():
            for p in expected.parameters():
                p -= 0.1 * p.grad
    stats = train(model, loader)
    torch.testing.assert_close(model.state_dict(), expected.state_dict())
    assert stats["loss"] == pytest.approx(sum(losses) / 3)
    assert stats["lr"] == pytest.approx(0.1) and stats["images_per_second"] > 0 and "logits" in stats


def test_accumulated_batches_are_one_large_batch():
    small, large = small_model(), small_model()
    loader = batches(4, size=2)
    merged = [tuple(torch.cat(x) for x in zip(*loader[i : i + 2], strict=True)) for i in (0, 2)]
    train(small, loader, update_freq=2)
    train(large, merged)
    torch.testing.assert_close(small.state_dict(), large.state_dict())


def test_batches_that_make_no_whole_step_are_left_out():
    five, four = small_model(), small_model()
    train(five, batches(5), update_freq=2)
    train(four, batches(5)[:4], update_freq=2)
    torch.testing.assert_close(five.state_dict(), four.state_dict())


def test_gradients_are_clipped():
    model = small_model()
    before = copy.deepcopy(model.state_dict())
    train(model, batches(1), lr=1.0, clip_grad=1e-3)
    moved = torch.cat([(model.state_dict()[k] - v).flatten() for k, v in before.items()]).norm()
    assert moved == pytest.approx(1e-3, rel=1e-3)


def moved_by_steps(decay, *steps):
    """Of weights that every step moves by the same amount, how many steps the EMA has moved after each of `steps`.

    From one clock after another, as a run that was stopped and resumed.
    """
    model, lr = small_model(), 0.01
    start, ema = model[1].bias.detach().clone(), create_ema(model, decay)
    moved, taken = [], 0
    for step in steps:
        loader = batches(step - taken)
        trainer = create_trainer(model, loader, loss=lambda logits, _: logits[:, 0].mean(), lr=lr, ema=ema)
        trainer.run.clock.steps_taken = taken
        trainer.train_epoch(Loader(loader))
        taken = step
        moved.append(((start - ema.module[1].bias)[0] / lr).item())
    return moved


def test_average_of_the_weights_starts_at_their_first_step_and_follows():
    """After step t, the decay is (t - 1) / (9 + t): 0, 1 / 11, 2 / 12."""
    after_two = 1 * 1 / 11 + 2 * 10 / 11
    assert moved_by_steps(0.99996, 1, 2, 3) == pytest.approx([1, after_two, after_two * 2 / 12 + 3 * 10 / 12], rel=1e-4)


def test_average_of_a_short_run_is_of_its_last_tenth():
    """At the published decay, which alone would leave it near the random weights that it started from."""
    (moved,) = moved_by_steps(0.99996, 200)
    assert 200 - moved == pytest.approx(200 / 11, rel=0.06)


def test_average_of_the_weights_has_the_decay_that_was_asked_for_in_the_end():
    assert moved_by_steps(0.5, 60) == pytest.approx([60 - 1], rel=1e-4)
    ema = create_ema(small_model(), 0.99996)
    assert [ema.get_decay(step) for step in (249_000, 250_001, 375_000)] == pytest.approx([0.99996] * 3, abs=2e-7)
    assert ema.get_decay(249_000) < 0.99996 == ema.get_decay(250_001) == ema.get_decay(375_000)


def test_average_of_the_weights_is_the_same_after_resuming():
    assert moved_by_steps(0.99996, 7, 20)[-1] == moved_by_steps(0.99996, 20)[-1]


@pytest.mark.parametrize("bad,log_every", [(0, 50), (3, 50), (3, 2), (6, 2)])
def test_a_loss_that_is_not_finite_is_named_by_its_step(bad, log_every):
    calls = []

    def loss(logits, targets):
        calls.append(None)
        return F.cross_entropy(logits, targets) * (float("nan") if len(calls) == bad + 1 else 1.0)

    with pytest.raises(NonFiniteLossError, match=rf"became nan in epoch 2 at step {2 * 7 + bad}, learning rate 0.1"):
        train(small_model(), batches(7), loss=loss, epoch=2, epochs=3, log_every=log_every)


def test_low_precision_is_the_models_and_not_the_losses():
    model, types = small_model(), []
    model[1].register_forward_hook(lambda module, args, out: types.append(out.dtype))

    def loss(logits, targets):
        types.append(logits.dtype)
        return F.cross_entropy(logits, targets)

    train(model, batches(1), loss=loss, precision=Precision("cpu", torch.bfloat16))
    assert types == [torch.bfloat16, torch.float32]


def test_weights_that_are_not_finite_after_a_finite_loss():
    def loss(logits, targets):
        logits.register_hook(lambda grad: grad * float("inf"))
        return F.cross_entropy(logits, targets)

    with pytest.raises(NonFiniteLossError, match="weights became NaN or infinite in epoch 0"):
        train(small_model(), batches(1), loss=loss)


def test_a_spike_of_the_loss_is_told_once_by_its_step(capsys):
    """Batches 121 and 122 are those of step 61."""
    calls = []

    def loss(logits, targets):
        calls.append(None)
        return F.cross_entropy(logits, targets) * (50.0 if len(calls) in (121, 122) else 1.0)

    train(small_model(), batches(160), loss=loss, lr=1e-6, update_freq=2, log_every=20, epoch=2, epochs=3)
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "warning" in line]
    assert re.match(r"warning: the loss of \S+ in epoch 2 at step 61 is more than twice the median of 100", line)


HALF = Precision("cpu", torch.float16)


def overflowing(*steps):
    """A loss whose gradient is infinite at these steps, from 0, or at all where none is named."""
    calls = []

    def loss(logits, targets):
        calls.append(None)
        if not steps or len(calls) - 1 in steps:
            logits.register_hook(lambda grad: grad * float("inf"))
        return F.cross_entropy(logits, targets)

    return loss


@pytest.mark.parametrize("length,epochs,step", [(30, 2, 24), (22, 2, 22), (3, 1, 3)])
def test_a_float16_run_whose_every_step_overflows_ends(length, epochs, step):
    """At the first log line or end of an epoch after twenty halvings of the loss scale, or after no step at all."""
    with pytest.raises(NonFiniteLossError, match=f"float16 overflowed .* epoch 0 after step {step}: "):
        train(small_model(), batches(length), loss=overflowing(), precision=HALF, epochs=epochs, log_every=12)


def test_a_float16_run_that_resumes_knows_that_it_took_no_step():
    loader = batches(5)
    trainer = create_trainer(small_model(), loader, step=2, loss=overflowing(), precision=HALF)
    trainer.run.clock.steps_taken = 2
    trainer.run.scaler.load_state_dict(dict(trainer.run.scaler.state_dict(), scale=2.0**14))
    with pytest.raises(NonFiniteLossError, match="after step 5: "):
        trainer.train_epoch(Loader(loader))


def test_a_float16_run_may_skip_steps():
    """Those at its start, while the loss scale is found, and all of a short epoch."""
    train(small_model(), batches(8), loss=overflowing(0, 1, 2, 3, 4, 6, 7), precision=HALF)
    train(small_model(), batches(2), loss=overflowing(), precision=HALF, epochs=2)


def test_log_lines(capsys):
    train(small_model(), batches(5), epochs=2, log_every=2)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in lines] == ["epoch 0 [2/5]", "epoch 0 [4/5]", "epoch 0 [5/5]"]
    for part in ("loss", "lr", "images/s", "data", "eta"):
        assert part in lines[0]


def test_the_learning_rate_of_a_log_is_the_one_of_the_last_layers():
    model = small_model()
    groups = [dict(params=[model[1].bias], lr_scale=0.1), dict(params=[model[1].weight], lr_scale=1.0)]
    stats = train(model, batches(1), optimizer=torch.optim.SGD(groups, lr=0.1))
    assert stats["lr"] == pytest.approx(0.1)


# --- the clock --------------------------------------------------------------------------------------------------------


class Watch:
    """A saver that notes where the clock is; a signal that comes at one step ends the epoch there."""

    def __init__(self, clock, leaves_at=None):
        self.clock, self.leaves_at, self.seen = clock, leaves_at, []

    def after_step(self, meter):
        self.seen.append((self.clock.epoch, self.clock.step, self.clock.steps_taken))
        if self.clock.step == self.leaves_at:
            meter.gather(self.clock.epoch)
            self.meter = meter.state_dict()
            raise InterruptedError

    def after_epoch(self, meter):
        self.seen.append("epoch")


def test_the_trainer_advances_the_clock():
    """After each step and before it is saved; the next epoch is main.py's to start."""
    trainer = create_trainer(small_model(), batches(3), epochs=2)
    watch, clock = Watch(trainer.run.clock), trainer.run.clock
    trainer.train_epoch(Loader(batches(3)), watch)
    assert watch.seen == [(0, 1, 1), (0, 2, 2), (0, 3, 3), "epoch"]
    assert (clock.epoch, clock.step, clock.epoch_is_over) == (0, 3, True)


def test_an_epoch_that_is_over_reads_nothing_and_is_saved_where_it_is_not():
    trainer = create_trainer(small_model(), batches(3), step=3)
    trainer.run.meter = dict(loss_sum=6.0, batches=3, images=12, lr=0.1, part_sums=dict(logits=3.0))
    loader, watch = Loader(batches(3)), Watch(trainer.run.clock)
    stats = trainer.train_epoch(loader, watch)
    assert watch.seen == ["epoch"] and loader.asked == [] and (stats["loss"], stats["logits"]) == (2.0, 1.0)


@pytest.mark.parametrize("update_freq", [1, 2])
def test_the_rest_of_an_epoch_is_what_was_left_of_it(update_freq):
    """Weights, the clock and the means of the log, at the step where the clock says that it is."""
    whole, left = small_model(), small_model()
    data = batches(3 * update_freq)
    expected = train(whole, data, epoch=1, epochs=2, update_freq=update_freq)
    first = create_trainer(left, data, epoch=1, epochs=2, update_freq=update_freq)
    watch = Watch(first.run.clock, leaves_at=2)
    with pytest.raises(InterruptedError):
        first.train_epoch(Loader(data), watch)
    rest = create_trainer(left, data, epoch=1, step=2, epochs=2, update_freq=update_freq)
    rest.run.meter, loader = watch.meter, Loader(data)
    stats = rest.train_epoch(loader)
    assert loader.asked == [(1, 2 * update_freq)]
    assert (stats["loss"], stats["logits"], stats["lr"]) == (expected["loss"], expected["logits"], expected["lr"])
    assert all(map(torch.equal, left.state_dict().values(), whole.state_dict().values()))


def test_the_last_epoch_takes_no_more_steps_than_are_left():
    trainer = create_trainer(small_model(), batches(3), epoch=1, epochs=2)
    trainer.run.clock.total = 5
    watch = Watch(trainer.run.clock)
    trainer.train_epoch(Loader(batches(3)), watch)
    assert watch.seen == [(1, 1, 1), (1, 2, 2), "epoch"]


# --- evaluation -------------------------------------------------------------------------------------------------------


def test_evaluation_shows_the_evaluator_every_batch():
    model = small_model().train()
    loader = Loader([*batches(2), *batches(1, size=3)])
    loader.set_epoch(0)
    results, evaluator = evaluate(SmallTask(), model, loader)
    assert results == dict(images=11) and evaluator.images == 11


def test_evaluation_is_in_the_precision_of_the_task():
    model, types = small_model(), []
    model[1].register_forward_hook(lambda module, args, out: types.append(out.dtype))
    loader = Loader(batches(1))
    loader.set_epoch(0)
    evaluate(SmallTask(precision=Precision("cpu", torch.bfloat16)), model, loader)
    assert types == [torch.bfloat16]


# --- the progress bar -------------------------------------------------------------------------------------------------


class Left(Exception):
    """The run was asked to leave."""


class LeavingSaver:
    def after_step(self, meter):
        raise Left("at once")


class LeavingEvaluator(Count):
    def update(self, network, batch):
        raise Left("at once")


class LeavingTask(SmallTask):
    def evaluator(self):
        return LeavingEvaluator()


@pytest.mark.parametrize("part", ["epoch", "evaluation"])
def test_what_ends_a_part_of_the_run_is_told_on_a_line_of_its_own(part, monkeypatch):
    """On a terminal, where there is a progress bar."""
    reader, writer = pty.openpty()
    fcntl.ioctl(writer, termios.TIOCSWINSZ, struct.pack("4H", 24, 80, 0, 0))  # a bar needs a width
    loader = Loader(batches(3))
    loader.set_epoch(0)
    with os.fdopen(writer, "w", buffering=1) as file:
        monkeypatch.setattr(sys, "stderr", file)
        with pytest.raises(Left) as left:
            if part == "epoch":
                create_trainer(small_model(), loader.batches).train_epoch(loader, LeavingSaver())
            else:
                evaluate(LeavingTask(), small_model(), loader)
        print(f"stopped: {left.value}", file=sys.stderr)  # and with it, what it was raised in is kept until here
        written = ""
        while not written.endswith("stopped: at once\r\n"):
            written += os.read(reader, 100_000).decode()
    os.close(reader)
    *bars, cleared, message = written.removesuffix("\r\n").split("\r")
    assert part in "".join(bars) and cleared.strip() == "" and message == "stopped: at once"
