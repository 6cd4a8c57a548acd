"""Spikes of the loss, and the slowest process; `check_loss_scale` is tested with the trainer."""
import pytest
import torch

from training.distributed import Distributed
from training.health import WINDOW, LossWatch, OwnTime

QUIET = [1.0, 1.1, 0.9, 1.0] * (WINDOW // 4)


def test_a_spike_is_twice_the_median_of_the_losses_before_it():
    watch = LossWatch()
    assert watch.add(QUIET) is None and watch.add([1.9, 1.2]) is None
    assert watch.add([1.0, 2.5, 7.0, 3.0, 1.0]) == (2, 7.0, 1.0)  # the highest


def test_too_few_losses_have_no_spike():
    watch = LossWatch()
    assert watch.add([0.1, *QUIET[:-2], 9.0]) is None
    assert watch.add([30.0]) == (0, 30.0, 1.0)


@pytest.mark.parametrize("losses", [[0.01, 0.5] * 200, [-1.0] * 300, [0.0] * 300, [10 * 0.9**i for i in range(300)]])
def test_a_noisy_small_or_falling_loss_has_no_spikes(losses):
    watch = LossWatch()
    assert all(watch.add([loss]) is None for loss in losses)


def test_a_loss_that_stays_high_is_told_once():
    watch = LossWatch()
    watch.add(QUIET)
    assert [watch.add([5.0]) is not None for _ in range(300)] == [True] + [False] * 299


def test_the_slowest_process_is_named_by_its_own_time():
    class Together(Distributed):
        def sum(self, values):
            return values + torch.tensor([0.1, 0.0, 0.3])

    own = OwnTime()
    for seconds in (0.1, 0.3):
        own.add(seconds)
    values = own.read(Together(torch.device("cpu"), rank=1, world_size=3))
    assert values == dict(slowest_seconds=pytest.approx(0.3), slowest_process=2)
    own.add(0.4)
    assert own.read(Together(torch.device("cpu"), rank=1, world_size=3))["slowest_process"] == 1
    assert OwnTime().read(Distributed(torch.device("cpu"))) == {}
