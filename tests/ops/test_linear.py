"""A linear layer and its GELU: oneDNN's operator, and PyTorch's in place."""
import pytest
import torch
import torch.nn.functional as F

from helpers.onednn import needs_onednn
from ops import linear, linear_gelu, reuses_memory

WIDTHS = [64, 128, linear._ONEDNN_INPUTS, 256, 512]


def make_inputs(shape, channels, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(*shape, generator=generator).to(dtype)

    return random(*shape, channels), random(3 * channels, channels) * channels**-0.5, random(3 * channels)


def eager(x, weight, bias):
    return F.gelu(F.linear(x, weight, bias))


def check_error(x, weight, bias):
    """Off by at most twice what eager is off, and by rounding."""
    exact = eager(*(None if t is None else t.double() for t in (x, weight, bias)))
    ours, eagers = linear_gelu(x, weight, bias), eager(x, weight, bias)
    assert ours.dtype == x.dtype and ours.shape == exact.shape
    rounding = torch.finfo(x.dtype).eps * exact.abs().max()
    assert (ours.double() - exact).abs().max() <= 2 * (eagers.double() - exact).abs().max() + rounding


@pytest.mark.parametrize("channels", WIDTHS)
@pytest.mark.parametrize("shape", [(196,), (2, 14, 14), (3, 1)], ids=str)
def test_error_is_at_most_twice_that_of_eager(shape, channels):
    check_error(*make_inputs(shape, channels))


@pytest.mark.parametrize("channels", WIDTHS)
def test_no_bias(channels):
    x, weight, _ = make_inputs((2, 14, 14), channels)
    check_error(x, weight, None)


@pytest.mark.parametrize("channels", [64, 256])
@pytest.mark.parametrize("change", [
    lambda x: x.transpose(0, 1),
    lambda x: x[:, ::2],
    lambda x: x[..., 1:].as_strided(x[:1].shape, (0, *x.stride()[1:])),
    lambda x: x.permute(2, 0, 1).contiguous().permute(1, 2, 0),
], ids=["transposed", "every second", "shifted", "channels first"])
def test_any_strides(change, channels):
    x, weight, bias = make_inputs((4, 6), channels)
    weight = weight.t().contiguous().t()
    x_before = x.clone()
    check_error(change(x), weight, bias)
    assert torch.equal(x, x_before)


@pytest.mark.parametrize("shape", [(0, 7, 7), (0,), ()], ids=str)
def test_empty_batch_and_a_single_vector(shape):
    x, weight, bias = make_inputs(shape, 64)
    torch.testing.assert_close(linear_gelu(x, weight, bias), eager(x, weight, bias))


@needs_onednn
def test_inference_on_the_cpu_makes_no_copies(monkeypatch):
    inputs = make_inputs((2, 3), 64)
    monkeypatch.setattr(linear.F, "gelu", None)
    linear_gelu(*inputs)
    with torch.no_grad():
        linear_gelu(*(t.requires_grad_() for t in inputs))


@pytest.mark.parametrize("trained", range(3), ids=["x", "weight", "bias"])
def test_training_is_pytorchs_own(trained):
    inputs = make_inputs((2, 3), 64)
    inputs[trained].requires_grad_()
    assert not reuses_memory(*inputs)
    ours, expected = (torch.autograd.grad(f(*inputs).sum(), inputs[trained]) for f in (linear_gelu, eager))
    assert torch.equal(*ours, *expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_types_are_pytorchs_own(dtype):
    inputs = make_inputs((2, 3), 64, dtype)
    assert not reuses_memory(*inputs) and torch.equal(linear_gelu(*inputs), eager(*inputs))


def test_autocast():
    inputs = make_inputs((2, 3), 64)
    with torch.autocast("cpu", torch.bfloat16):
        assert linear_gelu(*inputs).dtype == torch.bfloat16
        assert torch.equal(linear_gelu(*inputs), eager(*inputs))


@pytest.mark.parametrize("wrong", [(2, 63), (64,), ()], ids=str)
def test_what_does_not_fit_is_refused_as_by_pytorch(wrong):
    x, weight, bias = make_inputs((2, 3), 64)
    assert not reuses_memory(x, torch.randn(wrong), bias) and not reuses_memory(x, weight, torch.randn(1))
    with pytest.raises(RuntimeError):
        linear_gelu(x, weight, torch.randn(63))


def test_transforms_see_pytorchs_own():
    x, weight, bias = make_inputs((2, 3), 64)
    torch.testing.assert_close(torch.func.vmap(linear_gelu, (0, None, None))(x, weight, bias), eager(x, weight, bias))
    out, tangent = torch.func.jvp(lambda x: linear_gelu(x, weight, bias), (x,), (x,))
    torch.testing.assert_close((out, tangent), torch.func.jvp(lambda x: eager(x, weight, bias), (x,), (x,)))
