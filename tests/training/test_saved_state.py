"""Checkpoints that lack something of a run, or hold something else."""
import pytest
import torch

from training.saved_state import BrokenRunError, NoRunError, check_is_run, taking_state

RUN = dict(
    model={}, model_ema=None, optimizer={}, scaler={}, epoch=1, step=2, total_steps=5, steps=3,
    meter=dict(loss_sum=1.0, parts=dict(a=[1.0])), best=dict(acc1=None), args=dict(opt="adamw"),
)
LATER = dict(
    global_batch=4, ranges=1, best_epoch=None, seconds=1.5, held_out=None, held_out_images=None, images=3,
    fingerprint="x",
)


def test_a_run(tmp_path):
    check_is_run(RUN, tmp_path)
    check_is_run(RUN | LATER, tmp_path)
    check_is_run(RUN | LATER | dict(held_out_images=torch.zeros(2), best=dict(acc1=1.0)), tmp_path)


@pytest.mark.parametrize("name", [name for name in RUN if name != "model_ema"])
def test_what_is_missing(name, tmp_path):
    lacking = {key: value for key, value in RUN.items() if key != name}
    with pytest.raises((NoRunError, BrokenRunError), match=f"no run.*{name}$|only weights, no run to resume"):
        check_is_run(lacking, tmp_path)


@pytest.mark.parametrize("name", RUN | LATER)
def test_what_is_of_another_kind(name, tmp_path):
    for value in ([("x", 1)], b"x", object()):
        with pytest.raises(BrokenRunError, match=f"no run's {name}$"):
            check_is_run(RUN | LATER | {name: value}, tmp_path)


@pytest.mark.parametrize("name,value", [
    ("epoch", -1), ("step", True), ("steps", 1.0), ("total_steps", 2**70), ("meter", dict(losses=["a"])),
    ("meter", dict(loss_sum=torch.ones(1))), ("best", dict(acc1="high")),
])
def test_values_that_are_none_of_a_run(name, value, tmp_path):
    with pytest.raises(BrokenRunError, match=f"no run's {name}$"):
        check_is_run(RUN | {name: value}, tmp_path)


@pytest.mark.parametrize("error", [
    torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("DefaultCPUAllocator: can't allocate memory"),
])
def test_a_fault_of_the_machine_is_none_of_the_content(error, tmp_path):
    with pytest.raises(type(error)) as raised, taking_state(tmp_path):
        raise error
    assert raised.value is error


@pytest.mark.parametrize("error", [KeyError("param_groups"), TypeError("x"), AttributeError("x"), RuntimeError("x")])
def test_what_its_content_raises_is_one_line(error, tmp_path):
    with pytest.raises(BrokenRunError, match=f"cannot be resumed: {type(error).__name__}: "), taking_state(tmp_path):
        raise error
