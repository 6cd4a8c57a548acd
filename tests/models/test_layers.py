"""The MLP that families share, beside timm's."""
import pytest
import timm.layers
import torch
from torch import nn

from models import _layers
from models._layers import Mlp


def make(**kwargs):
    torch.manual_seed(0)
    mlp = Mlp(64, 192, **kwargs).eval()
    return mlp, torch.randn(2, 7, 7, 64)


@pytest.fixture
def calls(monkeypatch):
    """The calls of `ops.linear_gelu`, where every one that could be made is."""
    made = []

    def count(*args):
        made.append(args)
        return nn.functional.gelu(nn.functional.linear(*args))

    monkeypatch.setattr(_layers, "linear_gelu", count)
    monkeypatch.setattr(_layers, "reuses_memory", lambda *args: True)
    return made


def test_agrees_with_timms():
    mlp, x = make()
    with torch.no_grad():
        torch.testing.assert_close(mlp(x), timm.layers.Mlp.forward(mlp, x))
    assert mlp.state_dict().keys() == timm.layers.Mlp(64, 192).state_dict().keys()


def test_inference_is_one_call(calls):
    mlp, x = make(drop=0.5)
    mlp(x)
    assert len(calls) == 1


def test_fc2_and_its_dropout_are_called(calls):
    mlp, x = make()
    seen = []
    mlp.fc2.register_forward_hook(lambda *args: seen.append("fc2"))
    mlp.drop2.register_forward_hook(lambda *args: seen.append("drop2"))
    mlp(x)
    assert seen == ["fc2", "drop2"] and len(calls) == 1


@pytest.mark.parametrize("name", ["fc1", "act", "drop1", "norm"])
def test_hooks_are_called(name, calls):
    mlp, x = make()
    seen = []
    getattr(mlp, name).register_forward_hook(lambda *args: seen.append(name))
    mlp(x)
    assert seen == [name] and not calls


class Wrapped(nn.Module):
    """As libraries wrap a layer that they add something to; it has no weight of its own."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x) + 1


@pytest.mark.parametrize("change", [
    lambda mlp: setattr(mlp, "fc1", Wrapped(mlp.fc1)),
    lambda mlp: setattr(mlp, "act", nn.ReLU()),
    lambda mlp: setattr(mlp, "act", nn.GELU("tanh")),
    lambda mlp: setattr(mlp, "norm", nn.LayerNorm(192)),
    lambda mlp: nn.utils.parametrizations.weight_norm(mlp.fc1),
    lambda mlp: torch.ao.quantization.quantize_dynamic(mlp, {nn.Linear}, inplace=True),
], ids=["wrapped", "relu", "tanh", "norm", "parametrised", "quantised"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_what_was_changed_is_computed_as_timm_does(change, calls):
    mlp, x = make()
    change(mlp)
    torch.testing.assert_close(mlp(x), timm.layers.Mlp.forward(mlp, x))
    assert not calls


def test_dropout_in_training(calls):
    mlp, x = make(drop=0.5)
    mlp.train()(x)
    assert not calls
