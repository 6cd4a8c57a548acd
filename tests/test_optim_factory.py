import math

import pytest
import timm
import torch

from optim_factory import create_optimizer, create_schedule, scaled_lr


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


def test_cosine_with_warmup():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = create_schedule(
        optimizer, "cosine", epochs=10, steps_per_epoch=4, warmup_epochs=2, warmup_lr=0.1, min_lr=0.01
    )

    def lr(step):
        schedule.step_update(step)
        return optimizer.param_groups[0]["lr"]

    assert lr(0) == pytest.approx(0.1)
    assert lr(4) == pytest.approx(0.55)
    rates = [lr(step) for step in range(8, 40)]
    assert rates == sorted(rates, reverse=True)
    for step in (8, 20, 39):
        assert lr(step) == pytest.approx(0.01 + 0.99 * (1 + math.cos(math.pi * step / 40)) / 2)
    assert lr(40) == pytest.approx(0.01)
    # a function of the step alone, so that a resumed run needs no more than the step
    assert lr(20) == rates[12]
