import math
import re

import pytest
import timm
import torch
from timm.scheduler import create_scheduler_v2

import models  # noqa: F401
from optim_factory import LengthError, OptimizerError, Schedule, ScheduleError, create_optimizer, scaled_lr
from utils import UsageError


def test_learning_rate_is_for_512_images():
    assert scaled_lr(5e-4, 512) == 5e-4
    assert scaled_lr(5e-4, 1024) == 1e-3
    assert scaled_lr(5e-4, 128) == 1.25e-4


def test_no_weight_decay_on_norms_and_biases():
    model = timm.create_model("resnet10t")
    optimizer = create_optimizer(model, "adamw", lr=1e-3, weight_decay=0.05)
    decayed = {id(p) for group in optimizer.param_groups if group["weight_decay"] for p in group["params"]}
    for parameter in model.parameters():
        assert (id(parameter) in decayed) == (parameter.ndim > 1)


@pytest.mark.parametrize("opt,fused", [("adamw", True), ("adam", True), ("sgd", True), ("lamb", None)])
def test_one_pass_over_the_weights_where_torch_has_one(opt, fused):
    optimizer = create_optimizer(timm.create_model("resnet10t"), opt, lr=1e-3, weight_decay=0.05)
    assert optimizer.param_groups[0].get("fused") is fused


def test_layer_decay():
    model = timm.create_model("resnet10t")
    optimizer = create_optimizer(model, "adamw", lr=1e-3, weight_decay=0.05, layer_decay=0.5)
    scales = {group["lr_scale"] for group in optimizer.param_groups}
    assert max(scales) == 1 and min(scales) <= 0.25


# --- weight decay -----------------------------------------------------------------------------------------------------


NORM_OF_BLOCK = r"stages\.\d\.blocks\.\d\.norm[12]\.(weight|bias)"  # batch norm elsewhere
WITHOUT_DECAY = {
    "timm": rf".*\.bias|{NORM_OF_BLOCK}|stem\.norm[12]\.weight|stages\.[123]\.downsample\.norm\.weight|norm\.weight",
    "layernorm": NORM_OF_BLOCK,
    "none": "",
}


@pytest.mark.parametrize("decay_groups,names,count", [(name, WITHOUT_DECAY[name], count) for name, count in (
    ("timm", 77), ("layernorm", 24), ("none", 0),
)])
def test_what_has_no_weight_decay(decay_groups, names, count):
    model = timm.create_model("biformer_nano")
    optimizer = create_optimizer(model, "adamw", 1e-3, weight_decay=0.05, decay_groups=decay_groups)
    decays = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert set(decays.values()) <= {0.0, 0.05}
    without = {name for name, p in model.named_parameters() if decays[id(p)] == 0}
    assert without == {name for name, _ in model.named_parameters() if re.fullmatch(names, name)}
    assert len(without) == count and len(decays) == len(list(model.parameters()))


@pytest.mark.parametrize("decay_groups", WITHOUT_DECAY)
def test_frozen_parameters_are_left_out(decay_groups):
    model = timm.create_model("biformer_nano")
    model.stem.requires_grad_(False)
    optimizer = create_optimizer(model, "adamw", 1e-3, weight_decay=0.05, decay_groups=decay_groups)
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in model.parameters() if p.requires_grad}


# --- optimizers that cannot be used -----------------------------------------------------------------------------------


def test_arguments_that_an_optimizer_does_not_take():
    model = timm.create_model("resnet10t")
    with pytest.raises(OptimizerError, match=r"^the optimizer adan cannot be used with these arguments: ") as error:
        create_optimizer(model, "adan", lr=1e-3, weight_decay=0.05, betas=(0.9, 0.99))
    assert error.value.exit_code == 2
    with pytest.raises(UsageError, match=r"^the optimizer adahessian needs second derivatives"):
        create_optimizer(model, "adahessian", lr=1e-3, weight_decay=0.05)


# --- schedules --------------------------------------------------------------------------------------------------------


def rates(schedule, peak=1.0, scales=(1.0,)):
    """step -> the learning rate of each parameter group, at any step in any order."""
    groups = [dict(params=[torch.nn.Parameter(torch.zeros(1))], lr=peak, lr_scale=scale) for scale in scales]
    optimizer = torch.optim.SGD(groups, lr=peak)
    scheduler = schedule.build(optimizer)

    def at(step):
        scheduler.step_update(step)
        values = [group["lr"] for group in optimizer.param_groups]
        return values[0] if len(values) == 1 else values

    return at


def test_cosine_with_warmup():
    lr = rates(Schedule("cosine", total=40, warmup=8, warmup_lr=0.1, min_lr=0.01))
    assert lr(0) == pytest.approx(0.1)
    assert lr(4) == pytest.approx(0.55)
    falling = [lr(step) for step in range(8, 40)]
    assert falling == sorted(falling, reverse=True)
    for step in (8, 20, 39):
        assert lr(step) == pytest.approx(0.01 + 0.99 * (1 + math.cos(math.pi * step / 40)) / 2)
    assert lr(40) == pytest.approx(0.01)
    # a function of the step alone, so that a resumed run needs no more than the step
    assert lr(20) == falling[12]


@pytest.mark.parametrize("kind", ["cosine", "poly", "tanh"])
def test_cooldown(kind):
    """What comes before is as of a run that ends with it."""
    lr, shorter = (rates(Schedule(kind, total=total, cooldown=cooldown, warmup=8, warmup_lr=0.1, min_lr=0.01))
                   for total, cooldown in ((50, 10), (40, 0)))
    assert [lr(step) for step in range(40)] == [shorter(step) for step in range(40)]
    assert [lr(step) for step in range(40, 50)] == pytest.approx([0.01] * 10)


@pytest.mark.parametrize("kind", ["cosine", "poly", "tanh"])
@pytest.mark.parametrize("total", [2, 3])
def test_cooldown_after_one_step(kind, total):
    lr = rates(Schedule(kind, total=total, cooldown=total - 1, min_lr=0.01))
    assert [lr(step) for step in range(total)] == pytest.approx([1.0] + [0.01] * (total - 1))


@pytest.mark.parametrize("power", [1.0, 0.9, 2.0])
def test_poly_with_warmup(power):
    lr = rates(Schedule("poly", total=100, warmup=10, warmup_lr=1e-3, min_lr=0.01, power=power))

    def expected(step):
        return 0.01 + 0.99 * (1 - step / 100) ** power

    assert lr(0) == pytest.approx(1e-3) and lr(5) == pytest.approx(1e-3 + 0.999 / 2)
    for step in (10, 50, 99):
        assert lr(step) == pytest.approx(expected(step))
    assert lr(100) == pytest.approx(0.01)


def test_steps_with_warmup():
    """As the published detection recipes: 500 steps of warm-up, a tenth from two milestones on, to the step."""
    lr = rates(Schedule("step", total=120, warmup=5, warmup_lr=1e-3, min_lr=0.5, milestones=[80, 110], decay_rate=0.1))
    assert lr(0) == pytest.approx(1e-3) and lr(4) == pytest.approx(1e-3 + 0.999 * 4 / 5)
    assert [lr(step) for step in (5, 60, 79)] == [1.0] * 3
    assert [lr(step) for step in (80, 109)] == pytest.approx([0.1] * 2)
    assert [lr(step) for step in (110, 119, 500)] == pytest.approx([0.01] * 3)


# By hand: the half of a cosine is 1/2, of a power p 0.5 ** p, and tanh(1.5) = 0.905148.
HALFWAY = {
    "cosine": (dict(), 0.01 + 0.99 * 0.5),
    "poly": (dict(), 0.01 + 0.99 * 0.5),
    "poly squared": (dict(power=2.0), 0.01 + 0.99 * 0.25),
    "tanh": (dict(), 0.01 + 0.99 * 0.952574),
    "step": (dict(milestones=[500, 800], decay_rate=0.1), 0.1),
}


@pytest.mark.parametrize("name", HALFWAY)
def test_every_schedule_ends_at_its_minimum(name):
    """To a tenth of it, where it is 1 % of the peak, in a run of 1000 steps; it never rises after the warm-up."""
    options, halfway = HALFWAY[name]
    lr = rates(Schedule(name.split()[0], total=1000, warmup=100, warmup_lr=1e-3, min_lr=0.01, **options))
    values = [lr(step) for step in range(1000)]
    assert values[0] == pytest.approx(1e-3) and values[:100] == sorted(values[:100])
    assert values[100:] == sorted(values[100:], reverse=True)
    assert values[500] == pytest.approx(halfway, rel=1e-5) and values[999] == pytest.approx(0.01, rel=0.1)


@pytest.mark.parametrize("kind", ["cosine", "poly", "step", "tanh"])
def test_a_run_of_one_step_takes_it_at_the_peak(kind, caplog):
    """And timm does not say that its schedule has no effect."""
    lr = rates(Schedule(kind, total=1, min_lr=0.01))
    assert lr(0) == pytest.approx(1.0, rel=2e-3) and caplog.text == ""  # tanh nearly


def test_cosine_is_timms_to_the_bit():
    asked = dict(total=97, warmup=13, warmup_lr=1e-6, min_lr=1e-5)
    lr = rates(Schedule("cosine", **asked), peak=1e-3)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1e-3)
    timms, _ = create_scheduler_v2(optimizer, "cosine", num_epochs=97, warmup_epochs=13, warmup_lr=1e-6, min_lr=1e-5,
                                   step_on_epochs=False, updates_per_epoch=1)
    for step in range(100):
        timms.step_update(step)
        assert optimizer.param_groups[0]["lr"] == lr(step)


@pytest.mark.parametrize("kind", ["cosine", "poly", "step", "tanh"])
def test_without_warmup_a_schedule_starts_at_its_peak(kind):
    lr = rates(Schedule(kind, total=10, warmup_lr=1e-6, milestones=[5] if kind == "step" else []))
    assert lr(0) == pytest.approx(1.0, rel=2e-3)  # tanh nearly


@pytest.mark.parametrize("kind", ["cosine", "poly", "step", "tanh"])
def test_layers_keep_their_share_of_the_learning_rate(kind):
    lr = rates(Schedule(kind, total=10, warmup=2, milestones=[5] if kind == "step" else []), scales=(1.0, 0.25))
    for step in range(10):
        last, first = lr(step)
        assert first == pytest.approx(0.25 * last)


@pytest.mark.parametrize("schedule,error,message", [
    (Schedule("cosine", 10, min_lr=0.2), ScheduleError,
     "min_lr 0.2 is above the learning rate of this batch size, 0.1"),
    (Schedule("poly", 10, 2, warmup_lr=0.3), ScheduleError,
     "warmup_lr 0.3 is above the learning rate of this batch size, 0.1"),
    (Schedule("cosine", 10, 10), LengthError, "a warm-up of 10 steps leaves nothing of the run's 10"),
    (Schedule("step", 10, 12, milestones=[5]), LengthError, "a warm-up of 12 steps leaves nothing of the run's 10"),
    (Schedule("poly", 10, 4, cooldown=6), LengthError,
     "a warm-up of 4 steps and a cool-down of 6 steps leave nothing of the run's 10"),
    (Schedule("poly", 10, cooldown=10), LengthError, "a cool-down of 10 steps leaves nothing of the run's 10"),
])
def test_schedules_that_cannot_be(schedule, error, message):
    with pytest.raises(error) as raised:
        schedule.check(lr=0.1)
    assert str(raised.value) == message and raised.value.exit_code == 2


@pytest.mark.parametrize("schedule", [
    Schedule("cosine", 10, 9, warmup_lr=0.1, min_lr=0.1),
    Schedule("cosine", 10, 4, cooldown=5),
    Schedule("cosine", 10, warmup_lr=0.3),  # there is no warm-up
    Schedule("step", 10, min_lr=0.3, milestones=[5]),  # which does not end at it
])
def test_schedules_that_can_be(schedule):
    schedule.check(lr=0.1)
