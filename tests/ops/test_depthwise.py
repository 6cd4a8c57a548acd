"""Depthwise convolution. Without a GPU its kernels run, slowly, in Triton's interpreter: small maps then."""
import copy
from itertools import product

import pytest
import torch
import torch.nn.functional as F

from ops import DepthwiseConv, DepthwiseConv2d, depthwise_conv
from ops.depthwise import choose_depthwise_impl

pytest.importorskip("triton")

from helpers.interpreter import DEVICE, needs_working_device
from ops.fused import depthwise as fused

pytestmark = needs_working_device

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# (kernel, map, channels)
SMALL = [
    *((3, (1, 1), 24), (5, (1, 1), 8)),
    *((3, (5, 7), 24), (5, (5, 7), 64)),
    *((3, (7, 7), 64), (5, (7, 7), 24)),
    *((3, (14, 9), 96), (5, (14, 9), 96)),
    *((3, (33, 2), 8), (5, (33, 2), 8)),
]
# BiFormer-S at 224, and BiFormer-B's first stage on a large image
LARGE = [*product((3, 5), ((56, 64), (28, 128), (14, 256), (7, 512))), (3, (200, 96)), (5, (200, 96))]
NAMES = ("out", "x", "weight", "bias", "residual")


def make_inputs(kernel, size, channels, dtype, batch=2):
    """x as the values of a packed projection, weight, bias and residual."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(*shape, generator=generator).to(DEVICE, dtype)

    x = random(batch, *size, 3 * channels).chunk(3, -1)[2]
    return x, random(channels, 1, kernel, kernel), random(channels), random(batch, *size, channels)


def run(inputs, dtype, impl, residual="other"):
    """Output and the gradient of each input, computed in `dtype`."""
    x, weight, bias, other = (None if t is None else t.detach().to(dtype).requires_grad_() for t in inputs)
    added = {"none": None, "input": x, "other": other}[residual]
    out = depthwise_conv(x, weight, bias, added, impl)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(DEVICE, inputs[0].dtype)
    wanted = [x, weight, *([] if bias is None else [bias]), *([other] if residual == "other" else [])]
    return [out, *torch.autograd.grad(out, wanted, upstream.to(dtype))]


def check_errors(inputs, dtype, residual="other"):
    """The output and each gradient are off by at most twice what eager is off, and by rounding."""
    with torch.backends.cudnn.flags(allow_tf32=False):
        exact, eager = run(inputs, torch.float64, "torch", residual), run(inputs, dtype, "torch", residual)
    ours = run(inputs, dtype, "triton", residual)
    # Products that cancel leave errors of rounding that are not small beside the sum.
    largest = max(t.abs().max().item() for t in inputs if t is not None)
    cancelled = torch.finfo(torch.float32).eps * largest**2 * inputs[1].shape[2]
    for name, ours_, eager_, exact_ in zip(NAMES, ours, eager, exact, strict=False):
        assert ours_.dtype == dtype and ours_.shape == exact_.shape
        rounding = torch.finfo(dtype).eps * exact_.abs().max().item() / 2 + cancelled
        allowed = 2 * (eager_.double() - exact_).abs().max().item() + rounding
        assert (ours_.double() - exact_).abs().max().item() <= allowed, name


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", SMALL, ids=str)
def test_error_is_at_most_twice_that_of_eager(case, dtype):
    check_errors(make_inputs(*case, dtype), dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("residual", ["none", "input", "other"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kernel,size", LARGE)
def test_error_is_at_most_twice_that_of_eager_on_the_networks_maps(kernel, size, dtype, residual):
    side, channels = size
    check_errors(make_inputs(kernel, (side, side), channels, dtype, batch=8), dtype, residual)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("residual", ["none", "input"])
@pytest.mark.parametrize("kernel", [3, 5])
def test_residual_is_the_input_or_none(kernel, residual, dtype):
    check_errors(make_inputs(kernel, (5, 7), 8, dtype), dtype, residual)


@pytest.mark.parametrize("residual", ["none", "other"])
def test_no_bias(residual):
    x, weight, _, other = make_inputs(3, (5, 7), 8, torch.float32)
    check_errors((x, weight, None, other), torch.float32, residual)


@pytest.mark.parametrize("frozen", ["x", "weight", "bias", "x and weight"])
def test_gradients_that_are_not_needed_are_not_missed(frozen):
    inputs = dict(zip(NAMES[1:], make_inputs(3, (5, 7), 8, torch.float32), strict=True))
    wanted = [inputs[name].requires_grad_() for name in inputs if name not in frozen]
    ours, expected = (
        torch.autograd.grad(depthwise_conv(**inputs, impl=impl).square().sum(), wanted) for impl in ("triton", "torch")
    )
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


def test_second_derivatives_are_an_error():
    x, weight, bias, _ = make_inputs(3, (1, 1), 8, torch.float32)
    out = depthwise_conv(x.requires_grad_(), weight, bias, impl="triton")
    for upstream in (torch.ones_like(out), torch.ones_like(out).requires_grad_()):
        (grad,) = torch.autograd.grad(out, x, upstream, create_graph=True)
        with pytest.raises(RuntimeError, match="autograd"):
            (out.sum() + grad.square().sum()).backward(retain_graph=True)


@pytest.mark.slow
def test_programs_that_take_several_places(monkeypatch):
    inputs = make_inputs(3, (31, 5), 8, torch.float32)
    one_each = run(inputs, torch.float32, "triton")
    monkeypatch.setattr(fused, "_PROGRAMS", 1)
    monkeypatch.setitem(fused._WEIGHT_GRADIENT, 3, fused._WEIGHT_GRADIENT[3]._replace(rows=7))
    fused._weight_gradient.cache_clear()
    torch.testing.assert_close(run(inputs, torch.float32, "triton"), one_each, rtol=1e-5, atol=1e-4)
    fused._weight_gradient.cache_clear()


@pytest.mark.slow
@pytest.mark.parametrize("kernel,side,batch", [
    (5, 7, 2), *(pytest.param(k, side, 64, marks=pytest.mark.gpu) for k in (3, 5) for side in (7, 56)),
])
def test_repeated_runs_agree_to_the_bit(kernel, side, batch):
    inputs = make_inputs(kernel, (side, side), 64, torch.bfloat16, batch)
    first, second = (run(inputs, torch.bfloat16, "triton") for _ in range(2))
    assert all(a.equal(b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("kernel", [3, 5])
def test_what_surrounds_the_map_in_memory_is_not_read(kernel):
    x, weight, bias, residual = make_inputs(kernel, (5, 7), 8, torch.float32)
    nan = float("nan")
    packed = torch.full((4, 5, 7, 24), nan, device=DEVICE)[1:3, ..., 8:16].copy_(x)
    cropped = torch.full((4, 9, 11, 20), nan, device=DEVICE)[1:3, 2:7, 2:9, 4:12].copy_(x)
    inside = torch.full((4, 5, 7, 8), nan, device=DEVICE)[1:3].copy_(residual)
    weights = torch.full((24, 1, kernel, kernel), nan, device=DEVICE)[8:16].copy_(weight)
    expected = run((x, weight, bias, residual), torch.float32, "triton")
    for surrounded in (packed, cropped):
        found = run((surrounded, weights, bias, inside), torch.float32, "triton")
        assert all(a.equal(b) for a, b in zip(found, expected, strict=True))


def test_how_far_apart_tokens_lie():
    def stride(x):
        return fused._map_stride(x.shape, x.stride())

    packed = torch.empty(2, 5, 7, 24)
    assert stride(packed) == 24 and stride(packed[..., 8:16]) == 24
    assert stride(packed[:, :1, :1, :8]) == 5 * 7 * 24 and stride(packed[:1, :1, :1, :8]) == 8
    assert stride(packed[:, :4]) is None, "images are further apart than they are long"
    assert stride(packed[:1, :4]) == 24
    assert stride(packed.permute(0, 3, 1, 2)) is None, "channels lie apart"
    assert stride(packed.transpose(1, 2)) is None
    assert stride(packed[:1, :1, :1].expand(2, 5, 7, 24)) is None


@pytest.mark.parametrize("strange", ["batch of 0", "expanded", "apart", "transposed"])
def test_any_strides_and_no_image(strange):
    inputs = list(make_inputs(3, (5, 7), 8, torch.float32, batch=0 if strange == "batch of 0" else 2))
    for i in (0, 3):
        if strange == "expanded":
            inputs[i] = inputs[i][:1, :1, :1].expand(2, 5, 7, 8)
        elif strange == "apart":
            inputs[i] = inputs[i].permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
        elif strange == "transposed":
            inputs[i] = inputs[i].transpose(1, 2).contiguous().transpose(1, 2)
    out = depthwise_conv(*inputs, impl="triton")
    torch.testing.assert_close(out, depthwise_conv(*inputs, impl="torch"), rtol=1e-5, atol=1e-5)
    for t in inputs:
        t.requires_grad_()
    # the gradient of a sum is one number seen from everywhere: all strides are zero
    ours, expected = (
        torch.autograd.grad(depthwise_conv(*inputs, impl=impl).sum(), inputs) for impl in ("triton", "torch")
    )
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("residual", ["none", "input", "other"])
def test_under_autocast_as_eager(residual, x_dtype):
    """bfloat16 products of float32 weights; what is added keeps its type, and the result has that of eager."""
    x, weight, bias, other = make_inputs(3, (5, 7), 8, torch.float32)
    x, other = x.to(x_dtype).requires_grad_(), other.to(x_dtype).requires_grad_()
    weight.requires_grad_()
    bias.requires_grad_()
    added = {"none": None, "input": x, "other": other}[residual]
    wanted = [x, weight, bias, *([other] if residual == "other" else [])]

    def results(impl):
        with torch.autocast(DEVICE, dtype=torch.bfloat16):
            out = depthwise_conv(x, weight, bias, added, impl)
        return [out, *torch.autograd.grad(out.float().square().sum(), wanted)]

    for ours, eager in zip(results("triton"), results("torch"), strict=True):
        assert ours.dtype == eager.dtype
        scale = eager.abs().max().item()
        torch.testing.assert_close(ours, eager, rtol=0, atol=0.02 * scale)


def op_arguments(kernel=3, requires_grad=True):
    return *(t.requires_grad_(requires_grad) for t in make_inputs(kernel, (5, 7), 8, torch.float32)), False


@pytest.mark.slow
def test_operators_pass_opcheck():
    x, weight, bias, residual, add_input = op_arguments()
    op = torch.ops.routed_layers.depthwise_conv.default
    torch.library.opcheck(op, (x, weight, bias, residual, add_input))
    torch.library.opcheck(op, (x, weight, None, None, True))
    x, weight, bias, residual, _ = op_arguments(requires_grad=False)
    backward = torch.ops.routed_layers.depthwise_conv_backward.default
    for needed in ([True, True, True], [False, True, False], [True, False, False]):
        torch.library.opcheck(backward, (residual, x, weight, bias, True, needed))


class Layer(torch.nn.Module):
    """As a network uses it."""

    def __init__(self, residual):
        super().__init__()
        self.conv = torch.nn.Conv2d(8, 8, 3, groups=8, device=DEVICE)
        self.residual = residual

    def forward(self, x):
        residual = {"none": None, "input": x, "other": x.flip(1)}[self.residual]
        return depthwise_conv(x, self.conv.weight, self.conv.bias, residual, "triton")


@pytest.mark.compile
@pytest.mark.parametrize("residual", ["none", "input", "other"])
def test_compiles_into_one_graph(residual):
    layer, x = Layer(residual), torch.randn(2, 5, 7, 8, device=DEVICE, requires_grad=True)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), layer(x))
    wanted = [x, *layer.parameters()]
    ours, expected = (torch.autograd.grad(f(x).square().sum(), wanted) for f in (compiled, layer))
    torch.testing.assert_close(ours, expected)


@pytest.mark.compile
def test_compiles_under_autocast():
    layer, x = Layer("input"), torch.randn(2, 5, 7, 8, device=DEVICE)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        torch.testing.assert_close(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), layer(x))


@pytest.mark.compile
def test_exports():
    layer, x = Layer("input"), torch.randn(2, 5, 7, 8, device=DEVICE)
    program = torch.export.export(layer, (x,), dynamic_shapes=({0: torch.export.Dim("batch", max=64)},))
    assert any("routed_layers.depthwise_conv" in str(node.target) for node in program.graph.nodes)
    torch.testing.assert_close(program.module()(x[:1]), layer(x[:1]))


def test_an_ordinary_call_is_not_one_of_the_operator(monkeypatch):
    monkeypatch.setattr(fused, "forward_op", None)
    monkeypatch.setattr(fused, "backward_op", None)
    run(make_inputs(3, (1, 1), 8, torch.float32), torch.float32, "triton")


@pytest.mark.gpu
def test_cuda_graphs():
    layer, x = Layer("other"), torch.randn(2, 28, 28, 8, device="cuda", requires_grad=True)
    with torch.no_grad():  # else the parameters' gradients would belong to another stream
        expected = layer(x)
    captured = torch.cuda.make_graphed_callables(layer, (x.detach().clone().requires_grad_(),))
    torch.testing.assert_close(captured(x), expected)


def test_torch_is_what_the_networks_compute():
    x, weight, bias, residual = make_inputs(5, (5, 7), 8, torch.float32)
    conv = F.conv2d(x.permute(0, 3, 1, 2), weight, bias, padding=2, groups=8).permute(0, 2, 3, 1)
    assert depthwise_conv(x, weight, bias, residual, "torch").equal(residual + conv)
    assert depthwise_conv(x, weight, bias, impl="torch").equal(conv)


@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("kernel", "stride"), [(9, 8), (5, 2), (3, 1)])
def test_training_in_low_precision_on_a_cpu_computes_in_float32(kernel, stride, dtype, autocast):
    """As oneDNN's gradients in low precision are slow: what it returns is float32's result and gradients, rounded."""
    layer = DepthwiseConv2d(16, kernel, stride, dtype=torch.float32 if autocast else dtype)
    inputs = torch.randn(2, 16, 17, 19).to(dtype).requires_grad_()
    exact = copy.deepcopy(layer).float()
    expected = F.conv2d(inputs.float(), exact.weight, exact.bias, stride, kernel // 2, groups=16).to(dtype)
    with torch.autocast("cpu", dtype, enabled=autocast):
        out = layer(inputs)
    upstream = torch.randn(out.shape).to(dtype)
    grads = torch.autograd.grad(out, [inputs, layer.weight, layer.bias], upstream)
    wanted = torch.autograd.grad(expected, [inputs, exact.weight, exact.bias], upstream)
    assert out.dtype == dtype and torch.equal(out, expected)
    for ours, theirs in zip(grads, wanted, strict=True):
        assert torch.equal(ours, theirs.to(ours.dtype))


def test_auto_takes_it_in_low_precision_on_a_gpu():
    x, weight, bias, residual = (t.cpu() for t in make_inputs(3, (5, 7), 8, torch.bfloat16))
    assert choose_depthwise_impl(x, weight, bias, residual) == "torch"
    if DEVICE == "cuda":
        x, weight, bias, residual = (t.cuda() for t in (x, weight, bias, residual))
        assert choose_depthwise_impl(x, weight, bias, residual) == "triton"
        assert choose_depthwise_impl(x.float(), weight.float()) == "torch"
        assert choose_depthwise_impl(x, weight.float()) == "torch", "eager says what is wrong with it"
        assert choose_depthwise_impl(x, weight.new_empty(8, 1, 7, 7)) == "torch"
        with torch.autocast("cuda", dtype=torch.bfloat16):
            assert choose_depthwise_impl(x.float(), weight.float()) == "triton"


@pytest.mark.parametrize("kernel", [3, 5])
@pytest.mark.parametrize("dilation", [2, 3])
def test_a_dilated_convolution_is_one_of_every_second_or_third_token(kernel, dilation):
    x, weight, bias, residual = make_inputs(kernel, (9, 14), 8, torch.float64)
    found = depthwise_conv(x, weight, bias, residual, dilation=dilation)
    assert found.shape == x.shape
    for row in range(dilation):
        for col in range(dilation):
            every = slice(None), slice(row, None, dilation), slice(col, None, dilation)
            torch.testing.assert_close(found[every], depthwise_conv(x[every], weight, bias, residual[every]))
    module = DepthwiseConv(8, kernel, dilation=dilation, dtype=torch.float64, device=x.device)
    same = depthwise_conv(x, module.weight, module.bias, x, dilation=dilation)
    assert module(x, residual=x).equal(same)


def test_what_it_cannot_do_is_explained(monkeypatch):
    x, weight, bias, residual = make_inputs(3, (5, 7), 8, torch.float32)

    def reason(*args, impl="triton", **kwargs):
        with pytest.raises(ValueError) as error:
            depthwise_conv(*args, impl=impl, **kwargs)
        return str(error.value)

    assert "impl='triton' cannot run: its kernels take 3 x 3 and 5 x 5 weights, got 7 x 7" in reason(
        x, weight.new_empty(8, 1, 7, 7)
    )
    assert "its kernels take no dilation, got 2" in reason(x, weight, dilation=2)
    assert "choose from triton, torch or auto" in reason(x, weight, impl="cudnn")
    assert "weight must be of the input's torch.bfloat16, got torch.float32" in reason(x.bfloat16(), weight)
    assert "residual is torch.float64" in reason(x, weight, bias, residual.double())
    assert "weight is torch.float64" in reason(x.double(), weight.double())
    assert "input must be (batch, height, width, channels), got (5, 7, 8)" in reason(x[0], weight)
    for wrong in (weight[:4], weight[..., :2], weight[..., :2, :2], weight[:, 0]):
        assert "weight must be (8, 1, k, k) for an odd k" in reason(x, wrong)
    assert "bias must be (8,), got (4,)" in reason(x, weight, bias[:4])
    assert "residual must be (2, 5, 7, 8) as the input, got (1, 5, 7, 8)" in reason(x, weight, bias, residual[:1])
    assert "weight is on meta" in reason(x, weight.to("meta"))
    monkeypatch.setattr("ops.support._TRITON_VERSION", None)
    assert "the package triton is not installed" in reason(x, weight)
