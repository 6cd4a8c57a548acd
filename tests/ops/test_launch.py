"""ops.launch: a compiled kernel is used again only where it fits. Real launches are tested with the kernels."""
import pytest
import torch

from ops import launch

CONSTANTS = dict(FLAG=True, BLOCK=16, num_warps=4)


class Kernel:
    """Stands in for a Triton kernel on a GPU: notes what it compiles, and what the compiled kernels are called with."""

    arg_names = ("x", "y", "number", "BLOCK", "FLAG")

    def __init__(self):
        self.fn, self.compiled, self.calls = object(), [], []

    def __getitem__(self, grid):
        def compile_and_launch(*arguments, **constants):
            self.compiled.append((arguments, constants))
            return {(grid[0], 1, 1): lambda *all_of_them: self.calls.append(all_of_them)}

        return compile_and_launch


@pytest.fixture
def kernel(monkeypatch):
    monkeypatch.setattr(launch, "_compiled", {})
    return Kernel()


def go(kernel, x, y=None, number=3, constants=CONSTANTS):
    launch._launch(kernel, 2, (x, y), (number,), constants)


def test_a_launch_like_an_earlier_one_compiles_nothing(kernel):
    first, second = torch.zeros(8), torch.ones(8)
    go(kernel, first)
    go(kernel, second)
    assert kernel.compiled == [((first, None, 3), CONSTANTS)]
    assert len(kernel.calls) == 1 and kernel.calls[0][0] is second and kernel.calls[0][1:] == (None, 3, 16, True)


def test_another_type_alignment_number_or_set_of_constants_is_another_kernel(kernel):
    aligned = torch.zeros(64)
    assert aligned.data_ptr() % 16 == 0
    for arguments in (
        (aligned,), (aligned[1:],), (aligned.half(),), (aligned, aligned), (aligned, None, 1), (aligned, None, (3, 1)),
        (aligned, None, 3, dict(CONSTANTS, BLOCK=32)),
    ):
        go(kernel, *arguments)
    assert len(kernel.compiled) == 7 and kernel.calls == []


def test_constants_that_are_gone_are_not_taken_for_others(kernel):
    """A dict's id is free again once it is gone."""
    for block in range(50):
        go(kernel, torch.zeros(8), constants=dict(CONSTANTS, BLOCK=block))
    assert [constants["BLOCK"] for _, constants in kernel.compiled] == list(range(50))


def test_the_memory_of_launches_is_bounded(kernel, monkeypatch):
    monkeypatch.setattr(launch, "_MOST", 5)
    for number in range(20):
        go(kernel, torch.zeros(8), number=number)
        assert len(launch._compiled) <= 5


def test_off_a_gpu_the_kernel_is_called_as_it_is():
    calls = []

    class Interpreted:
        def __getitem__(self, grid):
            return lambda *arguments, **constants: calls.append((grid, arguments, constants))

    x = torch.zeros(3)
    launch.launch(Interpreted(), 7, (x, None), (2,), CONSTANTS)
    assert calls == [((7,), (x, None, 2), CONSTANTS)]
