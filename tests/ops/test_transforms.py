"""Modules that torch.fx records whole."""
import copy
import pickle

import pytest
import torch
from torch import nn

from ops import BiLevelRoutingAttention, fx_leaf


@fx_leaf
class Halves(nn.Module):
    """Iterates over a shape, which no proxy has."""

    def forward(self, x, bias=0.0):
        return x.view(list(x.shape)) / 2 + bias


class Quarters(Halves):
    def forward(self, x, bias=0.0):
        return super().forward(super().forward(x, bias), bias)


class Network(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x + 1, bias=x)


@pytest.mark.parametrize("layer", [Halves, Quarters])
def test_a_call_is_recorded_with_its_arguments(layer):
    network, x = Network(layer()), torch.randn(2, 3)
    traced = torch.fx.symbolic_trace(network)
    (call,) = [node for node in traced.graph.nodes if node.op == "call_module"]
    assert call.target == "layer" and list(call.kwargs) == ["bias"]
    for same in (traced, copy.deepcopy(traced), pickle.loads(pickle.dumps(traced))):
        torch.testing.assert_close(same(x), network(x), rtol=0, atol=0)


def test_without_a_proxy_modules_are_called_as_ever():
    network, x = Network(Halves()), torch.randn(2, 3)
    expected = network(x)
    for same in (torch.jit.trace(network, x), torch.func.vmap(network)):
        torch.testing.assert_close(same(x), expected, rtol=0, atol=0)
    torch.testing.assert_close(Halves()(x=x + 1, bias=x), expected, rtol=0, atol=0)


@pytest.mark.compile
def test_compilers_look_into_them():
    network, x = Network(Halves()), torch.randn(2, 3)
    compiled = torch.compile(network, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), network(x))
    program = torch.export.export(network, (x,))
    assert not any(node.op == "call_module" for node in program.graph.nodes)


def test_a_network_of_ones_own():
    """Of a plain tracer and our modules among others."""
    network = nn.Sequential(nn.Linear(8, 64), BiLevelRoutingAttention(64, 2), nn.GELU(), nn.Linear(64, 8)).eval()
    x = torch.randn(1, 9, 13, 8)
    torch.testing.assert_close(torch.fx.symbolic_trace(network)(x), network(x), rtol=0, atol=0)
