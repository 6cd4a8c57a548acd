"""ops.launch: a compiled kernel is used again only where it fits. Real launches are tested with the kernels."""
import pytest
import torch

from ops import launch


class Kernel:
    """Stands in for a Triton kernel on a GPU: notes what it compiles, and what the compiled kernels are called with."""

    arg_names = ("x", "number", "BLOCK", "FLAG")

    def __init__(self):
        self.fn, self.compiled, self.calls = object(), [], []

    def __getitem__(self, grid):
        def compile_and_launch(*arguments, **constants):
            self.compiled.append((grid, constants))
            return {(grid[0], 1, 1): lambda *all_of_them: self.calls.append(all_of_them)}

        return compile_and_launch


@pytest.fixture
def kernel(monkeypatch):
    monkeypatch.setattr(launch, "_compiled", {})
    return Kernel()


def go(kernel, x, number=3, programs=2, **constants):
    constants = dict(FLAG=True, BLOCK=16, num_warps=4) | constants
    launch._launch(kernel, programs, (x, number), constants, device=0)


def test_a_launch_like_an_earlier_one_compiles_nothing(kernel):
    first, second = torch.zeros(8), torch.ones(8)
    go(kernel, first)
    go(kernel, second)
    assert len(kernel.compiled) == 1
    assert len(kernel.calls) == 1 and kernel.calls[0][0] is second and kernel.calls[0][1:] == (3, 16, True)


def test_another_type_alignment_number_or_constant_is_another_kernel(kernel):
    aligned = torch.zeros(64)
    assert aligned.data_ptr() % 16 == 0
    for x, number, constants in (
        (aligned, 3, {}), (aligned[1:], 3, {}), (aligned.half(), 3, {}), (aligned, 1, {}), (aligned, None, {}),
        (aligned, (3, 1), {}), (aligned, 3, {"BLOCK": 32}), (aligned, 3, {"num_warps": 8}),
    ):
        go(kernel, x, number, **constants)
    assert len(kernel.compiled) == 8 and kernel.calls == []


def test_the_memory_of_launches_is_bounded(kernel, monkeypatch):
    monkeypatch.setattr(launch, "_MOST", 5)
    for number in range(20):
        go(kernel, torch.zeros(8), number)
        assert len(launch._compiled) <= 5


def test_off_a_gpu_the_kernel_is_called_as_it_is():
    calls = []

    class Interpreted:
        def __getitem__(self, grid):
            return lambda *arguments, **constants: calls.append((grid, arguments, constants))

    x = torch.zeros(3)
    launch.launch(Interpreted(), 7, (x, 2), {"BLOCK": 16})
    assert calls == [((7,), (x, 2), {"BLOCK": 16})]
