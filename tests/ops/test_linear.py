"""A linear layer and its GELU: oneDNN's operator, and PyTorch's in place."""
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from helpers.onednn import needs_onednn
from ops import apply_linear, linear, linear_gelu, reuses_memory

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
@pytest.mark.parametrize("shape", [(196,), (6, 14, 14), *((rows, 1) for rows in (1, 3, 4, 8, 16))], ids=str)
def test_error_is_at_most_twice_that_of_eager(shape, channels):
    check_error(*make_inputs(shape, channels))


@pytest.mark.parametrize("channels", WIDTHS)
def test_no_bias(channels):
    x, weight, _ = make_inputs((6, 14, 14), channels)
    check_error(x, weight, None)


@pytest.mark.parametrize("channels", [64, 256])
@pytest.mark.parametrize("change", [
    lambda x: x.transpose(0, 1),
    lambda x: x[:, ::2],
    lambda x: x[..., 1:].as_strided(x[:1].shape, (0, *x.stride()[1:])),
    lambda x: x.permute(2, 0, 1).contiguous().permute(1, 2, 0),
], ids=["transposed", "every second", "shifted", "channels first"])
def test_any_strides(change, channels):
    x, weight, bias = make_inputs((64, 48), channels)
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


def make_layer(channels, bias=True):
    x, weight, numbers = make_inputs((64, 48), channels)
    layer = nn.Linear(channels, len(weight), bias=bias)
    layer.weight.data.copy_(weight)
    if bias:
        layer.bias.data.copy_(numbers)
    return layer, x


@pytest.fixture
def called(monkeypatch):
    """The linear layers that were called as modules."""
    layers, forward = [], nn.Linear.forward
    monkeypatch.setattr(nn.Linear, "forward", lambda self, x: layers.append(self) or forward(self, x))
    return layers


@needs_onednn
@pytest.mark.parametrize("change", [lambda x: x, lambda x: x.transpose(0, 1), lambda x: x[:, ::2], lambda x: x[:, :20]])
@pytest.mark.parametrize("channels", [64, linear._ONEDNN_INPUTS])
def test_a_narrow_layer_infers_without_the_copy_of_its_bias(channels, change, called):
    layer, x = make_layer(channels)
    x = change(x)
    exact = F.linear(x.double(), layer.weight.double(), layer.bias.double())
    with torch.no_grad():
        ours = apply_linear(layer, x)
        assert not called
        eager_error = (layer(x) - exact).abs().max()
    assert (ours - exact).abs().max() <= 2 * eager_error + torch.finfo(x.dtype).eps * exact.abs().max()


@torch.no_grad()
def test_other_layers_are_called(called):
    cases = [make_layer(64, bias=False), make_layer(linear._ONEDNN_INPUTS + 1), (make_layer(64)[0], torch.randn(0, 64)),
             (make_layer(64)[0], torch.randn(linear._ONEDNN_ROWS - 1, 64))]
    hooked, numbers = make_layer(64)
    hooked.register_forward_hook(lambda module, inputs, out: out + 1)
    for layer, x in [*cases, (hooked, numbers)]:
        called.clear()
        out = apply_linear(layer, x)
        assert called == [layer] and torch.equal(out, layer(x))
    quantised = torch.ao.quantization.quantize_dynamic(nn.Sequential(make_layer(64)[0]), {nn.Linear})[0]
    for other in (quantised, nn.Identity(), nn.Sequential(make_layer(64)[0])):
        assert torch.equal(apply_linear(other, numbers), other(numbers))


def test_a_layer_that_is_trained_cast_or_traced_is_called(called):
    layer, x = make_layer(64)
    gradient = torch.autograd.grad(apply_linear(layer, x).sum(), layer.bias)[0]
    assert called == [layer] and torch.equal(gradient, torch.full((192,), 64.0 * 48))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(apply_linear(layer, x), layer(x))
    with torch.no_grad():
        layer.requires_grad_(False)
        traced = torch.jit.trace(lambda x: apply_linear(layer, x), x)
        torch.testing.assert_close(traced(x[:1]), layer(x[:1]))
        torch.testing.assert_close(torch.func.vmap(lambda x: apply_linear(layer, x))(x), layer(x))


@pytest.mark.parametrize("channels", [64, 256])
@pytest.mark.parametrize("change", [
    lambda bias: torch.stack((bias, bias + 1), -1)[:, 0],
    lambda bias: bias[:1].expand(len(bias)),
], ids=["every second", "expanded"])
def test_bias_of_any_strides(change, channels):
    x, weight, bias = make_inputs((64, 48), channels)
    check_error(x, weight, change(bias))
    layer = nn.Linear(channels, len(weight))
    layer.weight.data, layer.bias.data = weight, change(bias)
    with torch.no_grad():
        torch.testing.assert_close(apply_linear(layer, x), F.linear(x, weight, change(bias)))


# --- training on a GPU ------------------------------------------------------------------------------------------------

IN_LOW_PRECISION = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
GPU = pytest.param("cuda", marks=pytest.mark.gpu)


def gradients(function, x, layer, grad):
    inputs = (x, layer.weight, layer.bias)
    return torch.autograd.grad(function(*inputs), inputs, grad)


def rows_and_layer(device, dtype, parameters=torch.float32, rows=(4, 999)):
    layer, _ = make_layer(64)
    layer = layer.to(device, parameters)
    generator = torch.Generator().manual_seed(1)
    x, grad = (torch.randn(*rows, n, generator=generator).to(device, dtype) for n in (64, 192))
    return layer, x.requires_grad_(), grad


@IN_LOW_PRECISION
@pytest.mark.parametrize("same_type", [False, True], ids=["cast", "same type"])
@pytest.mark.parametrize("device", ["cpu", GPU])
def test_gradients_in_low_precision_are_no_further_off_than_pytorchs(device, same_type, dtype):
    layer, x, grad = rows_and_layer(device, dtype, dtype if same_type else torch.float32)
    exact = gradients(F.linear, x.double(), layer.double(), grad.double())
    layer = layer.to(dtype if same_type else torch.float32)
    eagers = gradients(lambda x, w, b: F.linear(x, w.to(dtype), b.to(dtype)), x, layer, grad)
    ours = gradients(linear._LowPrecisionLinear.apply, x, layer, grad)
    for name, found, eager, expected in zip(("x", "weight", "bias"), ours, eagers, exact, strict=True):
        assert found.dtype == eager.dtype, name
        rounding = torch.finfo(dtype).eps * expected.norm()
        assert (found.double() - expected).norm() <= 2 * (eager.double() - expected).norm() + rounding, name


def test_second_derivatives_in_low_precision():
    layer, x, grad = rows_and_layer("cpu", torch.bfloat16, rows=(6,))
    found = []
    for function in (linear._LowPrecisionLinear.apply, lambda x, w, b: F.linear(x, w.bfloat16(), b.bfloat16())):
        grads = torch.autograd.grad(function(x, layer.weight, layer.bias), (x, layer.weight), grad, create_graph=True)
        found.append(torch.autograd.grad(sum(g.float().square().sum() for g in grads), (x, layer.weight)))
    torch.testing.assert_close(found[0], found[1], rtol=0.02, atol=0.1)


@pytest.mark.parametrize("frozen", range(3), ids=["x", "weight", "bias"])
def test_what_is_frozen_gets_no_gradient(frozen):
    layer, x, grad = rows_and_layer("cpu", torch.bfloat16)
    inputs = [x.detach(), layer.weight.detach(), layer.bias.detach()]
    for index, tensor in enumerate(inputs):
        tensor.requires_grad_(index != frozen)
    linear._LowPrecisionLinear.apply(*inputs).backward(grad)
    assert [tensor.grad is None for tensor in inputs] == [index == frozen for index in range(3)]


@pytest.mark.gpu
@IN_LOW_PRECISION
def test_a_layer_trained_in_low_precision_on_a_gpu(dtype, called):
    layer, x, grad = rows_and_layer("cuda", dtype)
    with torch.autocast("cuda", dtype):
        first, second = (gradients(lambda *_: apply_linear(layer, x), x, layer, grad) for _ in range(2))
        assert not called
        expected = gradients(lambda *_: layer(x), x, layer, grad)
        called.clear()
        assert torch.equal(apply_linear(layer, x), layer(x))
        called.clear()
        with torch.no_grad():
            apply_linear(layer, x)
        apply_linear(layer, x.float())
        layer.bias.requires_grad_(False)
        apply_linear(layer, x)
    assert called == 3 * [layer], "inference, other types and frozen layers are PyTorch's own"
    for a, b, c in zip(first, second, expected, strict=True):
        assert torch.equal(a, b)
        torch.testing.assert_close(a, c, rtol=0.02, atol=0.05 * c.abs().max().item())
