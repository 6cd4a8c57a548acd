"""Which calls are ordinary ones on the CPU."""
import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.utils import parametrizations
from torch.utils.flop_counter import FlopCounterMode

from helpers.onednn import needs_onednn
from ops import onednn

X = torch.randn(3, 4)


class Subclass(torch.Tensor):
    pass


@needs_onednn
def test_an_ordinary_call():
    assert onednn.runs_on_onednn(X, None, nn.Parameter(X))
    with torch.inference_mode():
        assert onednn.runs_on_onednn(X.clone())


@pytest.mark.parametrize("x", [X.double(), X.bfloat16(), X.to_sparse(), X.to("meta"), X.as_subclass(Subclass)])
def test_other_tensors(x):
    assert not onednn.runs_on_onednn(X, x)


def test_autocast_and_the_switch_of_onednn():
    with torch.autocast("cpu", torch.bfloat16):
        assert not onednn.runs_on_onednn(X)
    with torch.backends.mkldnn.flags(enabled=False):
        assert not onednn.runs_on_onednn(X)


def seen(call):
    """What `runs_on_onednn` says of a tensor that exists outside, while `call` is given a function to run."""
    said = []

    def ask(x):
        said.append(onednn.runs_on_onednn(X))
        return x * 2

    call(ask)
    return said


def forward_mode(ask):
    with torch.autograd.forward_ad.dual_level():
        ask(X)


def under(mode):
    def call(ask):
        with mode:
            ask(X)

    return call


@pytest.mark.parametrize("call", [
    lambda ask: torch.jit.trace(ask, X, check_trace=False),
    lambda ask: torch.func.vmap(ask)(X),
    lambda ask: torch.func.grad(lambda x: ask(x).sum())(X),
    lambda ask: torch.func.jvp(ask, (X,), (X,)),
    forward_mode,
    under(FakeTensorMode(allow_non_fake_inputs=True)),
    under(FlopCounterMode(display=False)),
    under(torch.device("cpu")),
], ids=["trace", "vmap", "grad", "jvp", "forward mode", "fake tensors", "FLOP counter", "default device"])
def test_whatever_sees_the_calls(call):
    assert not any(seen(call))


@pytest.mark.compile
def test_compilers_and_exporters():
    def choose(x):
        return x + 1 if onednn.runs_on_onednn(x) else x

    torch.testing.assert_close(torch.compile(choose, backend="eager", fullgraph=True)(X), X)


def test_needs_grad():
    weight = nn.Parameter(X)
    assert onednn.needs_grad(X, None, weight) and not onednn.needs_grad(X, None, weight.detach())
    with torch.no_grad():
        assert not onednn.needs_grad(weight)


def with_hook(register):
    def change(layer):
        getattr(layer, register)(lambda *args: None)
        return layer

    return change


def with_its_own_forward(layer):
    layer.forward = lambda x: x
    return layer


@pytest.mark.parametrize("change", [
    with_hook("register_forward_hook"),
    with_hook("register_forward_pre_hook"),
    with_hook("register_full_backward_hook"),
    with_its_own_forward,
    parametrizations.weight_norm,
    parametrizations.orthogonal,
    torch.nn.utils.spectral_norm,
    lambda layer: nn.Sequential(layer),
])
def test_what_watches_or_changes_a_module(change):
    assert onednn.is_plain(nn.Linear(4, 4), nn.Linear) and not onednn.is_plain(change(nn.Linear(4, 4)), nn.Linear)


def test_hooks_of_all_modules():
    handle = nn.modules.module.register_module_forward_hook(lambda *args: None)
    try:
        assert not onednn.is_plain(nn.Linear(4, 4), nn.Linear)
    finally:
        handle.remove()
