"""What a field says of its flag, and when its value is checked."""
from dataclasses import dataclass

import pytest

from training import flags
from training.flags import Group, at_least, flag, fraction, not_negative, positive
from utils import UsageError


@dataclass(frozen=True)
class Optimizer(Group):
    """Optimizer"""

    steps: int = flag(1, "how many", type=int, check=at_least(1))
    lr: float = flag(5e-4, "learning rate", type=float, check=positive)
    clip_grad: float | None = flag(None, "clip the gradients", type=float, check=positive)
    sched: str = flag("cosine", "schedule", choices=["cosine", "poly"])

    def check(self):
        if self.sched == "poly" and self.lr > 1:
            raise UsageError("--sched poly needs an --lr of at most 1")


@pytest.mark.parametrize("make,message", [
    (lambda: Optimizer(steps=0), "--steps must be at least 1, got 0"),
    (lambda: Optimizer(lr=-1.0), "--lr must be above 0 and finite, got -1.0"),
    (lambda: Optimizer(sched="poly", lr=2.0), "--sched poly needs an --lr of at most 1"),
])
def test_a_group_is_checked_however_it_is_made(make, message):
    with pytest.raises(UsageError) as error:
        make()
    assert str(error.value) == message
    assert Optimizer(clip_grad=None).clip_grad is None


@pytest.mark.parametrize("check,good,bad", [
    (at_least(1), [1, 5], [0, -1]),
    (not_negative, [0, 0.5], [-1e-9, float("inf"), float("nan")]),
    (positive, [1e-9, 5], [0, -1, float("inf"), float("nan")]),
    (fraction, [0, 0.5, 1], [-0.1, 1.1, float("nan")]),
])
def test_ranges(check, good, bad):
    assert [check(value) for value in good] == [None] * len(good)
    assert all(check(value).startswith("must ") for value in bad)


def test_paths_begin_at_home(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    given = ["~/a", "~", "/x/~", "https://a.b/~c/d", "https://a.b/~c#sha256=1", "", "a~b"]
    assert [flags.path(text) for text in given] == ["/home/me/a", "/home/me", *given[2:]]
