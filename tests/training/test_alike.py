"""Processes of a run that do not do the same."""
import threading
from pathlib import Path

import pytest
import torch
from torch import nn

from training.alike import (
    DivergedError,
    UnlikeProcessesError,
    check_same_source,
    check_same_start,
    check_same_weights,
    checksum,
)

RECIPE = dict(lr=0.1, seed=0, aa="none", output_dir="a", data_path="/data", num_workers=2, resume="a.pth",
              auto_resume=True)
IMAGES = dict(train="5ac1", val="77")


class Rank:
    """One of several processes, which are threads."""

    is_distributed = True

    def __init__(self, size, kinds=()):
        self.barrier, self.said, self.kinds = threading.Barrier(size), {}, kinds

    @property
    def kind(self):
        return self.kinds[int(threading.current_thread().name)] if self.kinds else "one"

    def gather(self, values):
        self.said[threading.current_thread().name] = values
        self.barrier.wait(10)
        said = [self.said[name] for name in sorted(self.said)]
        self.barrier.wait(10)
        return said

    def max(self, value):
        return max(v[0] for v in self.gather([value]))


def on_all(*calls, kinds=()):
    """What each of these raises, each in a process of its own; they take the processes as `Distributed`."""
    shared, raised = Rank(len(calls), kinds), [None] * len(calls)

    def run(rank):
        try:
            calls[rank](shared)
        except (UnlikeProcessesError, DivergedError) as error:
            raised[rank] = str(error)

    threads = [threading.Thread(target=run, args=(rank,), name=str(rank)) for rank in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return raised


def starting(images=IMAGES, **changes):
    return lambda distributed: check_same_start(RECIPE | changes, images, distributed)


def test_processes_that_are_alike():
    """Each may read its data, and write, elsewhere."""
    elsewhere = starting(output_dir="b", data_path="/scratch", num_workers=9, resume="b.pth")
    assert on_all(starting(), elsewhere, starting()) == [None] * 3


@pytest.mark.parametrize("other,named", [
    (starting(lr=0.2), "lr is 0.2, not 0.1"),
    (starting(resume=None), "resume is unset, not set"),
    (starting(auto_resume=False), "auto_resume is False, not True"),
    (starting(seed=1, aa="é"), "seed is 1, not 0; aa is é, not none"),
    (starting(dict(train="5ac2", val="77")), "the train images are others"),
    (starting(dict(train="5ac1")), "the val images are others"),
])
def test_what_differs_is_named_on_all_of_them(other, named):
    raised = on_all(starting(), starting(), other)
    assert raised == [f"in process 2, unlike in process 0, {named}"] * 3


def models(count, *flipped):
    """As many of the same weights, with one bit flipped in those that are given."""
    torch.manual_seed(0)
    first = nn.Linear(3, 3)
    for rank in range(count):
        model = nn.Linear(3, 3)
        model.load_state_dict(first.state_dict())
        if rank in flipped:
            with torch.no_grad():
                model.weight[1].view(torch.int32)[2] ^= 1 << (5 + rank)
        yield model


@pytest.mark.parametrize("count,flipped,named", [
    (2, (1,), "of the 2 processes, they have weights"), (3, (0,), "of the 3 processes, process 0 has weights"),
    (5, (1, 3), "of the 5 processes, process 1, 3 has weights"),
])
def test_a_bit_that_flipped_in_one_process(count, flipped, named):
    raised = on_all(*(lambda d, model=model: check_same_weights(model, d) for model in models(count, *flipped)))
    assert all(text.startswith(named) for text in raised)


def test_other_weights_from_a_checkpoint():
    raised = on_all(*(lambda d, model=model: check_same_source(model, Path("a.pth"), d) for model in models(2, 1)))
    assert raised == ["of the 2 processes, they have weights unlike the others', read from a.pth: machines must share "
                      "that file"] * 2


@pytest.mark.parametrize("flipped,named", [
    ((1,), None), ((1, 2), "of the 2 processes, they have weights unlike"), ((2,), "of the 2 processes, they have"),
])
def test_devices_of_other_kinds_may_round_otherwise(flipped, named):
    """The first and the last of three processes are of one kind."""
    calls = [lambda d, model=model: check_same_weights(model, d) for model in models(3, *flipped)]
    raised = on_all(*calls, kinds=["A", "B", "A"])
    assert [text and text.startswith(named) for text in raised] == [named and True] * 3


def test_the_same_weights():
    assert on_all(*(lambda d, model=model: check_same_weights(model, d) for model in models(3))) == [None] * 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.uint8])
def test_any_changed_bit_changes_the_sum(dtype):
    values = torch.arange(7).to(dtype)
    before = checksum([values, torch.zeros((), dtype=dtype)])
    raw = values.view(torch.uint8)
    for byte in range(len(raw)):
        for bit in range(8):
            raw[byte] ^= 1 << bit
            assert checksum([values, torch.zeros((), dtype=dtype)]) != before
            raw[byte] ^= 1 << bit
    assert checksum([values, torch.zeros((), dtype=dtype)]) == before
