"""Layer norm and its fused implementation. Without a GPU the kernels run, slowly, in Triton's interpreter."""
import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from ops import LAYER_IMPLS, add_layer_norm, choose_norm_impl, layer_norm, norm_unsupported

pytest.importorskip("triton")

from helpers.interpreter import DEVICE, needs_working_device
from ops.fused import layer_norm as fused

pytestmark = needs_working_device
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
EPS = 1e-6
# Of the four stages of BiFormer-S at 224, 128 images each
NETWORK = [((128, 56, 56), 64), ((128, 28, 28), 128), ((128, 14, 14), 256), ((128, 7, 7), 512)]


def make_inputs(shape, channels, dtype, mean=0.0):
    """x and branch of `dtype`, weight and bias of float32, and what arrives at the sum and at the norm."""
    generator = torch.Generator().manual_seed(0)
    maps = [torch.randn(*shape, channels, generator=generator) for _ in range(4)]
    parameters = [torch.randn(channels, generator=generator).to(DEVICE) for _ in range(2)]
    x, branch, *upstream = (x.to(DEVICE, dtype) for x in (maps[0] + mean, *maps[1:]))
    return [x, branch, *parameters], upstream


def run(inputs, upstream, impl, dtype=None):
    """Sum, norm of the sum, and the gradients of all inputs; in `dtype` if it is given."""
    inputs = [(x if dtype is None else x.to(dtype)).detach().requires_grad_() for x in inputs]
    outputs = add_layer_norm(*inputs, EPS, impl=impl)
    upstream = [up.to(out.dtype) for up, out in zip(upstream, outputs, strict=True)]
    return [*outputs, *torch.autograd.grad(outputs, inputs, upstream)]


def run_alone(inputs, upstream, impl, dtype=None):
    """The norm of x, and the gradients of x, weight and bias."""
    inputs = [(x if dtype is None else x.to(dtype)).detach().requires_grad_() for x in (inputs[0], *inputs[2:])]
    out = layer_norm(*inputs, EPS, impl=impl)
    return [out, *torch.autograd.grad(out, inputs, upstream[1].to(out.dtype))]


def eager(compute, inputs, upstream):
    """What PyTorch computes of inputs that are rounded as ours are: its layer norm takes parameters of x's type."""
    return compute(inputs, upstream, "torch", inputs[0].dtype)


def check_errors(compute, inputs, upstream):
    dtype = inputs[0].dtype
    ours, theirs = compute(inputs, upstream, "triton"), eager(compute, inputs, upstream)
    exact = compute(inputs, upstream, "torch", torch.float64)
    expected_dtypes = [dtype] * (len(ours) - 2) + [torch.float32] * 2
    for ours_, eager_, exact_, expected_dtype in zip(ours, theirs, exact, expected_dtypes, strict=True):
        assert ours_.dtype == expected_dtype and ours_.shape == exact_.shape
        rounding = torch.finfo(dtype).eps * exact_.abs().max().item() / 2
        allowed = 2 * (eager_.double() - exact_).abs().max().item() + rounding
        assert (ours_.double() - exact_).abs().max().item() <= allowed


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", [1, 24, 64, 96, 512, 768])
@pytest.mark.parametrize("compute", [run, run_alone])
def test_error_is_at_most_twice_that_of_eager(compute, channels, dtype):
    check_errors(compute, *make_inputs((3, 5, 7), channels, dtype))


@pytest.mark.parametrize("shape", [(), (1,), (67,)])
def test_any_leading_axes(shape):
    check_errors(run, *make_inputs(shape, 64, torch.float32))


def test_programs_take_several_tiles(monkeypatch):
    monkeypatch.setattr(fused, "_BACKWARD_PROGRAMS", 2)
    check_errors(run, *make_inputs((150,), 64, torch.float32))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape,channels", NETWORK)
@pytest.mark.parametrize("compute", [run, run_alone])
def test_error_is_at_most_twice_that_of_eager_on_the_networks_maps(compute, shape, channels, dtype):
    check_errors(compute, *make_inputs(shape, channels, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_large_mean_costs_no_digits(dtype):
    """A variance of float32 mean squares of numbers near 1000 would have an error of 0.06; these vary by 1."""
    inputs, upstream = make_inputs((37,), 96, dtype, mean=1000.0)
    check_errors(run, inputs, upstream)
    check_errors(run_alone, inputs, upstream)
    exact = layer_norm(inputs[0].double(), *(x.double() for x in inputs[2:]), EPS)
    ours = layer_norm(inputs[0].float(), *inputs[2:], EPS, impl="triton")
    torch.testing.assert_close(ours.double(), exact, rtol=0, atol=1e-3)


def test_the_sum_is_normalised_as_it_was_rounded():
    # not bfloat16, in which the interpreter rounds what lies halfway between two numbers otherwise than GPUs do
    inputs, _ = make_inputs((9,), 64, torch.float16)
    total, out = add_layer_norm(*inputs, EPS, impl="triton")
    assert total.equal(inputs[0] + inputs[1])
    torch.testing.assert_close(out, layer_norm(total, *inputs[2:], EPS, impl="triton"))


def test_types_are_promoted_as_eager_does():
    (x, branch, *parameters), upstream = make_inputs((9,), 24, torch.float32)
    mixed = [x, branch.bfloat16(), parameters[0].bfloat16(), parameters[1]]
    ours = run(mixed, upstream, "triton")
    expected = run([x.float() for x in mixed], upstream, "torch")
    for ours_, expected_, dtype in zip(ours, expected, [torch.float32] * 2 + [x.dtype for x in mixed], strict=True):
        assert ours_.dtype == dtype
        torch.testing.assert_close(ours_, expected_.to(dtype), rtol=1e-2 if dtype != torch.float32 else 1e-4, atol=1e-4)
    swapped = run([mixed[1], mixed[0], *mixed[2:]], upstream, "triton")
    assert swapped[0].equal(ours[0])
    torch.testing.assert_close(swapped[1:4], [ours[1], ours[3], ours[2]])


def other_strides(x, way):
    if way == "channels first":
        return x.transpose(1, -1).contiguous().transpose(1, -1)
    if way == "part of wider rows":
        return torch.cat([torch.full_like(x, float("nan")), x, torch.full_like(x, float("nan"))], -1).chunk(3, -1)[1]
    if way == "odd offset":
        return torch.cat([x.new_full((1,), float("nan")), x.flatten()])[1:].view_as(x)
    return torch.cat([x, torch.full_like(x, float("nan"))], 1)[:, : x.shape[1]]  # rows that are no single sequence


@pytest.mark.parametrize("way", ["channels first", "part of wider rows", "odd offset", "part of a taller map"])
def test_any_strides(way):
    inputs, upstream = make_inputs((2, 3, 5), 24, torch.bfloat16)
    strided = [*(other_strides(x, way) for x in inputs[:2]), *inputs[2:]]
    upstream = [other_strides(x, way) for x in upstream]
    assert way == "odd offset" or not any(x.is_contiguous() for x in (*strided[:2], *upstream))
    check_errors(run, strided, upstream)
    check_errors(run_alone, strided, upstream)


def test_one_number_as_the_gradient_of_everything():
    """The gradient of a sum is one number seen from everywhere: all strides are zero."""
    (x, _, *parameters), _ = make_inputs((2, 5), 24, torch.float32)
    x.requires_grad_()
    (ours,) = torch.autograd.grad(layer_norm(x, *parameters, EPS, impl="triton").sum(), x)
    (expected,) = torch.autograd.grad(layer_norm(x, *parameters, EPS, impl="torch").sum(), x)
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("used", [0, 1])
def test_only_one_of_the_outputs_is_used(used):
    inputs, upstream = make_inputs((2, 5), 24, torch.float32)
    gradients = {}
    for impl in LAYER_IMPLS:
        leaves = [x.detach().requires_grad_() for x in inputs]
        out = add_layer_norm(*leaves, EPS, impl=impl)[used]
        gradients[impl] = torch.autograd.grad(out, leaves, upstream[used], allow_unused=True)
    for ours, expected in zip(gradients["triton"], gradients["torch"], strict=True):
        assert (ours is None) == (expected is None)
        if ours is not None:
            torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


def test_frozen_parameters():
    inputs, _ = make_inputs((2, 5), 24, torch.float32)
    inputs[0].requires_grad_()
    _, out = add_layer_norm(*inputs, EPS, impl="triton")
    out.square().sum().backward()
    assert inputs[0].grad is not None and all(x.grad is None for x in inputs[1:])


def test_repeated_runs_agree_to_the_bit():
    arguments = make_inputs((67,), 96, torch.bfloat16)
    first, second = (run(*arguments, "triton") for _ in range(2))
    assert all(a.equal(b) for a, b in zip(first, second, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("shape,channels", NETWORK)
def test_repeated_runs_agree_to_the_bit_on_the_networks_maps(shape, channels):
    arguments = make_inputs(shape, channels, torch.bfloat16)
    first = run(*arguments, "triton")
    for _ in range(3):
        assert all(a.equal(b) for a, b in zip(first, run(*arguments, "triton"), strict=True))


def test_empty_batch():
    inputs, upstream = make_inputs((0, 7), 24, torch.float32)
    total, out, *gradients = run(inputs, upstream, "triton")
    assert total.shape == out.shape == inputs[0].shape
    assert [x.shape for x in gradients] == [x.shape for x in inputs]
    assert all(not x.any() for x in gradients)


def test_second_derivatives_are_refused():
    (x, _, *parameters), _ = make_inputs((3,), 24, torch.float32)
    x.requires_grad_()
    out = layer_norm(x, *parameters, EPS, impl="triton")
    for loss in (out.square().sum(), out.sum()):  # the gradient that arrives depends on x, or does not
        (grad,) = torch.autograd.grad(loss, x, create_graph=True)
        with pytest.raises(RuntimeError, match="autograd"):
            (loss + grad.square().sum()).backward(retain_graph=True)


@pytest.mark.parametrize("dtype", DTYPES)
def test_autocast(dtype):
    """`torch` returns float32, the kernels what the next linear layer would round that to."""
    inputs, _ = make_inputs((9,), 64, dtype)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        total, out = add_layer_norm(*inputs, EPS, impl="triton")
        alone = layer_norm(total, *inputs[2:], EPS, impl="triton")
        expected_total, expected = add_layer_norm(*inputs, EPS, impl="torch")
    torch.testing.assert_close(total, expected_total)
    assert out.dtype == alone.dtype == (torch.bfloat16 if dtype == torch.float32 else dtype)
    torch.testing.assert_close(out.float(), expected.float(), rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(alone, out)


def test_autocast_trains_float32_maps():
    inputs, upstream = make_inputs((9,), 64, torch.float32)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        ours, expected = run(inputs, upstream, "triton"), run(inputs, upstream, "torch")
    assert [x.dtype for x in ours] == [torch.float32, torch.bfloat16] + 4 * [torch.float32]
    for ours_, expected_ in zip(ours, expected, strict=True):
        torch.testing.assert_close(ours_.float(), expected_.float(), rtol=2e-2, atol=5e-2)


# --- operators --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_operators_pass_opcheck():
    inputs, upstream = make_inputs((2, 5), 24, torch.float32)
    x, branch, weight, bias = (x.requires_grad_() for x in inputs)
    torch.library.opcheck(torch.ops.routed_layers.layer_norm.default, (x, weight, bias, EPS, torch.bfloat16))
    torch.library.opcheck(
        torch.ops.routed_layers.add_layer_norm.default, (x, branch, weight, bias, EPS, torch.float32)
    )
    x, weight, bias = (x.detach() for x in (x, weight, bias))
    stats = torch.ops.routed_layers.layer_norm(x, weight, bias, EPS, torch.float32)[1]
    for grad_total in (None, upstream[0]):
        arguments = upstream[1], grad_total, x, weight, stats
        torch.library.opcheck(torch.ops.routed_layers.layer_norm_backward.default, arguments)


class Norms(torch.nn.Module):
    def __init__(self, impl):
        super().__init__()
        self.weight, self.bias = (torch.nn.Parameter(torch.randn(24, device=DEVICE)) for _ in range(2))
        self.impl = impl

    def forward(self, x):
        """Uses both calls, and both outputs of the second."""
        y = layer_norm(x, self.weight, self.bias, EPS, impl=self.impl)
        total, out = add_layer_norm(x, y, self.weight, self.bias, EPS, impl=self.impl)
        return total * out


@pytest.mark.compile
@pytest.mark.parametrize("impl", ["triton", "auto"])
def test_compiles_into_one_graph(impl):
    module = Norms(impl)
    x = torch.randn(2, 5, 24, device=DEVICE, requires_grad=True)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), module(x))
    leaves = x, module.weight, module.bias
    for ours, expected in zip(
        torch.autograd.grad(compiled(x).square().sum(), leaves),
        torch.autograd.grad(module(x).square().sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(ours, expected)


@pytest.mark.compile
@pytest.mark.parametrize("impl", ["triton", "auto"])
def test_exports(impl):
    module = Norms(impl)
    x = torch.randn(2, 5, 24, device=DEVICE)
    program = torch.export.export(module, (x,), dynamic_shapes=({0: torch.export.Dim("batch", max=64)},))
    assert any("routed_layers" in str(node.target) for node in program.graph.nodes) == (impl == "triton")
    torch.testing.assert_close(program.module()(x[:1]), module(x[:1]))


def test_fake_tensors_go_through_the_operators():
    with torch._subclasses.FakeTensorMode():
        x, parameter = torch.empty(2, 5, 24, dtype=torch.bfloat16), torch.empty(24)
        total, out = fused.add_layer_norm(x, x, parameter, parameter, EPS, torch.bfloat16)
    assert total.shape == out.shape == x.shape and total.dtype == out.dtype == torch.bfloat16


def test_activation_checkpointing():
    module = Norms("triton")
    x = torch.randn(2, 5, 24, device=DEVICE, requires_grad=True)
    (expected,) = torch.autograd.grad(module(x).square().sum(), x)
    (again,) = torch.autograd.grad(checkpoint(module, x, use_reentrant=False).square().sum(), x)
    assert again.equal(expected)


# --- the public calls -------------------------------------------------------------------------------------------------


def test_torch_is_pytorchs_own():
    (x, branch, *parameters), _ = make_inputs((2, 5), 24, torch.float32)
    expected = F.layer_norm(x + branch, (24,), *parameters, EPS)
    total, out = add_layer_norm(x, branch, *parameters, EPS, impl="torch")
    assert total.equal(x + branch) and out.equal(expected)
    assert layer_norm(total, *parameters, EPS, impl="torch").equal(expected)


def test_auto_takes_it_on_a_gpu_in_low_precision():
    def chosen(dtype, device=DEVICE, branch_dtype=None):
        maps = [torch.empty(2, 24, dtype=d, device=device) for d in (dtype, branch_dtype) if d is not None]
        return choose_norm_impl(*maps, *torch.empty(2, 24, device=device))

    assert {chosen(dtype, "cpu") for dtype in (*DTYPES, torch.float64)} == {"torch"}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert chosen(torch.float32, "cpu") == "torch"
    if DEVICE == "cuda":
        assert [chosen(dtype) for dtype in (*DTYPES, torch.float64)] == ["torch", "triton", "triton", "torch"]
        assert chosen(torch.bfloat16, branch_dtype=torch.float32) == "torch"
        with torch.autocast("cuda", dtype=torch.bfloat16):
            assert [chosen(torch.float32), chosen(torch.float64)] == ["triton", "torch"]


def test_auto_leaves_derivatives_of_any_kind_off_a_gpu():
    # in double precision, for the two derivatives are sums in another order
    generator = torch.Generator().manual_seed(0)
    x, tangent = torch.randn(2, 3, 5, 24, dtype=torch.float64, generator=generator)
    weight, bias = torch.randn(2, 24, dtype=torch.float64, generator=generator)

    def call(x):
        total, out = add_layer_norm(x, x, weight, bias, EPS)
        return (total + layer_norm(out, weight, bias, EPS)).square().sum()

    gradient = torch.func.grad(call)(x)
    torch.testing.assert_close(torch.func.jvp(call, (x,), (tangent,))[1], (gradient * tangent).sum())
    assert torch.func.vmap(torch.func.grad(call))(x).shape == x.shape


def test_what_it_cannot_do_is_explained(monkeypatch):
    (x, branch, weight, bias), _ = make_inputs((2, 5), 24, torch.float32)
    with pytest.raises(ValueError, match=r"impl='triton' cannot run: .*not in torch.float64"):
        layer_norm(x.double(), weight, bias, EPS, impl="triton")
    with pytest.raises(ValueError, match=r"impl='triton' cannot run: .*not in torch.float64"):
        add_layer_norm(x, branch.double(), weight, bias, EPS, impl="triton")
    with pytest.raises(ValueError, match=r"impl='cuda' cannot run: .*choose from torch, triton or auto"):
        layer_norm(x, weight, bias, EPS, impl="cuda")
    with pytest.raises(ValueError, match=r"each channel of \(2, 5, 24\), got \(23,\) and \(24,\)"):
        layer_norm(x, weight[1:], bias, EPS)
    with pytest.raises(ValueError, match=r"each channel of \(\), got \(24,\) and \(24,\)"):
        layer_norm(x[0, 0, 0], weight, bias, EPS)
    with pytest.raises(ValueError, match=r"one shape, got \(2, 5, 24\) and \(5, 24\)"):
        add_layer_norm(x, branch[0], weight, bias, EPS)
    with pytest.raises(ValueError, match=f"one device, got {DEVICE}.* and meta"):
        layer_norm(x, weight.to("meta"), bias, EPS)
    assert norm_unsupported("triton") is None and norm_unsupported("torch", x.double()) is None
    assert "up to 4096 channels, got 4097" in norm_unsupported("triton", torch.empty(1, 4097))
    monkeypatch.setattr("ops.support._TRITON_INTERPRETED", False)
    assert "on CUDA GPUs, the tensors are on cpu" in norm_unsupported("triton", torch.empty(1, 8))
    monkeypatch.setattr("ops.support._TRITON_VERSION", None)
    assert norm_unsupported("triton") == "the package triton is not installed"
