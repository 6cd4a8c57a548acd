"""What is said and done before a wrapped network takes its first step."""
import re

import pytest
import torch

from training.distributed import Distributed
from training.options import MachineOptions
from training.precision import Precision
from training.wrap import compiled_as_asked, warm_up, wrap

CPU = torch.device("cpu")
COMPILED = MachineOptions(compile=True)


def network():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))


@pytest.fixture
def passes(monkeypatch):
    """The networks given to a torch.compile that does nothing."""
    given = []
    monkeypatch.setattr(torch, "compile", lambda network: given.append(network) or network)
    return given


@pytest.mark.parametrize("rank,lines", [(0, 2), (1, 0)])
def test_the_compiler_says_that_it_works_and_how_long_it_took(rank, lines, passes, capsys):
    model = network()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    process = Distributed(CPU, rank)
    wrapped = wrap(model, COMPILED, Precision(), process)
    assert passes == [model] and len(capsys.readouterr().out.splitlines()) == lines // 2
    losses = []
    warm_up(wrapped, COMPILED, process, lambda: losses.append(wrapped(torch.ones(8, 3)).sum()) or losses[-1])
    out = capsys.readouterr().out
    assert len(losses) == 1 and len(out.splitlines()) == lines // 2
    if rank == 0:
        assert re.fullmatch(r"compiled in \d:\d\d:\d\d\n", out)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_an_evaluation_says_it_too(passes, capsys):
    compiled_as_asked(network(), COMPILED, Distributed(CPU))
    assert capsys.readouterr().out.startswith("compiling the network: its first pass takes minutes, or seconds where")


def test_without_the_compiler_nothing_is_said_and_no_pass_is_taken(passes, capsys):
    plain = MachineOptions()
    model = network()
    process = Distributed(CPU)
    assert wrap(model, plain, Precision(), process) is compiled_as_asked(model, plain, process) is model
    warm_up(model, plain, process, loss=None)
    assert passes == [] and capsys.readouterr().out == ""
