"""timm's switch of fused attention: without it networks are plain products, which have all derivatives."""
import pytest
import torch
from timm.layers import set_fused_attn
from torch import nn

from helpers.families import FAMILIES, shallow
from models import _agent_attention


@pytest.fixture(autouse=True)
def fused_afterwards():
    yield
    set_fused_attn(True)


def network(name, fused, dtype=torch.float64, **kwargs):
    """With one block in each stage, and biases by position that matter."""
    set_fused_attn(fused)
    model = shallow(name, num_classes=3, dtype=dtype, **kwargs).eval()
    for key, parameter in model.named_parameters():
        if "bias_table" in key or "offsets" in key:
            nn.init.normal_(parameter, std=0.1)
    return model


@pytest.fixture
def fused_calls(monkeypatch):
    """How often PyTorch's fused attention is called."""
    calls, fused = [], nn.functional.scaled_dot_product_attention

    def count(*args, **kwargs):
        calls.append(args)
        return fused(*args, **kwargs)

    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", count)
    return calls


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("dtype,tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_both_compute_the_same(name, dtype, tolerance, fused_calls):
    x = torch.randn(2, 3, 96, 72, dtype=dtype)
    fused, plain = network(name, True, dtype), network(name, False, dtype)
    expected = fused(x)
    assert fused_calls
    fused_calls.clear()
    torch.testing.assert_close(plain(x), expected, rtol=tolerance, atol=tolerance)
    assert not fused_calls


@pytest.mark.parametrize("name", ["biformer_nano", "debiformer_nano"])
def test_implementations_that_are_named_stay(name):
    model = network(name, False, attn_impl="masked", layer_impl="torch")
    assert {m.attn_impl for m in model.modules() if hasattr(m, "attn_impl")} == {"masked"}
    model = network(name, False)
    assert {m.attn_impl for m in model.modules() if hasattr(m, "attn_impl")} == {"gather"}
    assert {m.layer_impl for m in model.modules() if hasattr(m, "layer_impl")} == {"torch"}
    model = network(name, True)
    assert {m.attn_impl for m in model.modules() if hasattr(m, "attn_impl")} == {"auto"}


def direction(model, x):
    """A loss of images, and a step in which its curvature is measured."""
    torch.manual_seed(1)
    return lambda x: model(x).square().sum(), torch.randn_like(x)


@pytest.mark.parametrize("name,band", [*((name, None) for name in FAMILIES), ("debiformer_nano", 1)])
def test_second_derivatives(name, band, monkeypatch):
    """The gradient of a gradient's product with a step agrees with a difference of gradients; in bands of rows too."""
    if band is not None:
        monkeypatch.setattr(_agent_attention, "_BAND_BYTES", {"cpu": band})
    model = network(name, False)
    x = torch.randn(1, 3, 64, 64, dtype=torch.float64, requires_grad=True)
    loss, step = direction(model, x)

    def gradient(x, **kwargs):
        return torch.autograd.grad(loss(x), x, **kwargs)[0]

    (curvature,) = torch.autograd.grad((gradient(x, create_graph=True) * step).sum(), x)
    h = 1e-6
    expected = (gradient(x + h * step) - gradient(x - h * step)) / (2 * h)
    torch.testing.assert_close(curvature, expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item())


@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "debiformer_nano"])
def test_forward_derivatives(name):
    """Of functions and in forward mode, which are the derivatives backwards too."""
    model = network(name, False)
    x = torch.randn(1, 3, 64, 64, dtype=torch.float64, requires_grad=True)
    loss, step = direction(model, x)
    expected = (torch.autograd.grad(loss(x), x)[0] * step).sum()
    _, found = torch.func.jvp(loss, (x.detach(),), (step,))
    torch.testing.assert_close(found, expected)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x.detach(), step)
        found = torch.autograd.forward_ad.unpack_dual(loss(dual)).tangent
    torch.testing.assert_close(found, expected)


def test_pytorch_samples_without_forward_derivatives():
    """DeBiFormer's points; where this fails, its own test of forward derivatives can be written."""
    model = network("debiformer_nano", False)
    x = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    with pytest.raises(NotImplementedError, match="forward AD with grid_sampler_2d"):
        torch.func.jvp(model, (x,), (x,))
