"""The packed operator: what its parts compute, one after another, and the gradient in one piece."""
import copy
from unittest.mock import patch

import pytest
import torch

pytest.importorskip("triton")

from helpers.interpreter import DEVICE, needs_working_device
from ops import BiLevelRoutingAttention, RegionGrid, bra
from ops.impl.triton import packed

pytestmark = needs_working_device

# (height, width), regions, top-k: by list, in one pass over the whole map, ragged, all regions, one token
CASES = {
    "by list": ((16, 16), 2, 2),
    "dense": ((12, 12), 6, 20),
    "ragged": ((9, 13), 4, 3),
    "all regions": ((6, 7), 2, 4),
    "one token": ((1, 1), 7, 1),
}
# Small, for operators are called many times over.
OPERATORS = {"by list": ((8, 8), 2, 1), "dense": ((6, 6), 3, 5)}
EACH_OPERATOR = ["dense", pytest.param("by list", marks=pytest.mark.long)]


def module(regions, topk, heads=2, **kwargs):
    torch.manual_seed(0)
    impls = dict(attn_impl="triton", layer_impl="triton") | kwargs
    return BiLevelRoutingAttention(16 * heads, heads, regions, min(topk, regions**2), device=DEVICE, **impls)


def results(attention, x, upstream, dtype=torch.float32):
    """Output and gradients of input and parameters, on a copy in `dtype`."""
    attention, x = copy.deepcopy(attention).to(dtype), x.to(dtype).requires_grad_()
    out = attention(x)
    return [out, *torch.autograd.grad(out, [x, *attention.parameters()], upstream.to(dtype))]


def inputs(size, batch=2, channels=32):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(batch, *size, channels, generator=generator).to(DEVICE) for _ in range(2)]


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_it_computes_what_its_parts_compute(name):
    size, regions, topk = CASES[name]
    fused, parts = module(regions, topk), module(regions, topk, attn_impl="gather", layer_impl="torch")
    x, upstream = inputs(size)
    assert fused._packed_settings(fused.qkv(x)) is not None and parts._packed_settings(parts.qkv(x)) is None
    exact = results(parts, x, upstream, torch.float64)
    for ours, expected in zip(results(fused, x, upstream), exact, strict=True):
        assert (ours - expected).abs().max() <= 2e-5 * expected.abs().max()


@pytest.mark.slow
def test_published_padding_is_fused_too():
    """It reads the padded projection, of which every token counts. Of 4 x 4 regions the last are padding alone."""
    fused = module(4, 3, padding="published")
    parts = module(4, 3, padding="published", attn_impl="gather", layer_impl="torch")
    x, upstream = inputs((5, 5), batch=1)
    with patch.object(packed, "packed_attention", wraps=packed.packed_attention) as calls:
        found = results(fused, x, upstream)
    assert calls.call_count == 1
    exact = results(parts, x, upstream, torch.float64)
    for ours, expected in zip(found, exact, strict=True):
        assert (ours - expected).abs().max() <= 2e-5 * expected.abs().max()


@pytest.mark.long
@pytest.mark.parametrize("name", ["by list", "dense"])
def test_repeated_runs_agree_to_the_bit(name):
    size, regions, topk = CASES[name]
    attention = module(regions, topk)
    first, second = (results(attention, *inputs(size)) for _ in range(2))
    assert all(a.equal(b) for a, b in zip(first, second, strict=True))


def test_it_takes_the_place_of_its_parts_where_both_take_triton():
    x = torch.empty(1, 8, 8, 32, device=DEVICE)

    def is_packed(regions=2, topk=2, x=x, **kwargs):
        attention = module(regions, topk, **kwargs)
        return attention._packed_settings(attention.qkv(x)) is not None

    assert is_packed()
    assert not is_packed(dilation=2)
    assert not is_packed(attn_impl="gather") and not is_packed(layer_impl="torch")
    assert not is_packed(attn_impl="auto") and not is_packed(layer_impl="auto"), "float32"
    assert not is_packed(regions=9, x=torch.empty(1, 9, 9, 32, device=DEVICE)), "81 regions"
    if DEVICE == "cuda":
        with torch.autocast("cuda", dtype=torch.bfloat16):
            assert is_packed(attn_impl="auto", layer_impl="auto")
            assert not is_packed(attn_impl="auto", topk=4), "every region is routed to every other"


def test_hooks_of_the_local_term_are_called():
    attention, x = module(2, 2), torch.randn(1, 8, 8, 32, device=DEVICE)
    assert attention._packed_settings(attention.qkv(x)) is not None
    seen = []
    attention.lepe.register_forward_hook(lambda *args: seen.append(args))
    assert attention._packed_settings(attention.qkv(x)) is None and seen == []
    attention(x)
    assert len(seen) == 1


def test_small_maps_on_which_every_region_is_routed_are_left_to_dense_attention():
    attention = module(7, 16)
    x = torch.empty(1, 4, 4, 32, device=DEVICE)
    attention.lepe.layer_impl = "auto"
    with patch.object(bra, "in_low_precision_on_gpu", lambda x: True):
        assert attention._packed_settings(attention.qkv(x)) is None
        assert attention._packed_settings(attention.qkv(torch.empty(1, 7, 7, 32, device=DEVICE))) is not None


@pytest.mark.slow
def test_parameters_of_any_strides():
    attention = module(2, 2)
    weight = attention.lepe.weight.detach()
    x, upstream = inputs((8, 8))
    expected = results(attention, x, upstream)
    attention.lepe.weight = torch.nn.Parameter(weight.transpose(2, 3).contiguous().transpose(2, 3))
    assert not attention.lepe.weight.is_contiguous()
    for ours, theirs in zip(results(attention, x, upstream), expected, strict=True):
        assert ours.equal(theirs)


@pytest.mark.slow
def test_second_derivatives_are_an_error():
    attention = module(2, 2).requires_grad_(False)
    x = inputs((8, 8))[0].requires_grad_()
    out = attention(x).sum()
    (grad,) = torch.autograd.grad(out, x, create_graph=True)
    with pytest.raises(RuntimeError):
        (out + grad.square().sum()).backward()


def op_arguments(name, requires_grad=True):
    (height, width), regions, topk = OPERATORS[name]
    generator = torch.Generator().manual_seed(0)
    shapes = (1, height, width, 96), (32, 1, 5, 5), (32,)
    tensors = [torch.randn(shape, generator=generator).to(DEVICE).requires_grad_(requires_grad) for shape in shapes]
    grid = RegionGrid.fit(height, width, regions)
    return *tensors, [grid.rows, grid.cols], 2, min(topk, grid.num_regions), 0.3, name == "dense"


@pytest.mark.slow
@pytest.mark.parametrize("name", EACH_OPERATOR)
def test_operators_pass_opcheck(name):
    torch.library.opcheck(torch.ops.routed_attention.packed.default, op_arguments(name))
    arguments = op_arguments(name, requires_grad=False)
    out, attended, lse, *tables = packed.packed(*arguments)
    arguments = (torch.randn_like(out), *arguments[:3], attended, lse, tables, *arguments[3:])
    torch.library.opcheck(torch.ops.routed_attention.packed_backward.default, arguments)


@pytest.mark.compile
@pytest.mark.parametrize("name", EACH_OPERATOR)
def test_compiles_into_one_graph_and_exports(name):
    size, regions, topk = OPERATORS[name]
    attention = module(regions, topk)
    assert packed.settings_for(attention.qkv(inputs(size)[0]), 2, regions, topk, 1.0).dense == (name == "dense")
    x, upstream = inputs(size)
    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), attention(x))
    parameter = attention.qkv.weight
    expected, found = (torch.autograd.grad(f(x), parameter, upstream)[0] for f in (attention, compiled))
    torch.testing.assert_close(found, expected)
    program = torch.export.export(attention, (x,), dynamic_shapes=({0: torch.export.Dim("batch", max=64)},))
    assert any("routed_attention.packed" in str(node.target) for node in program.graph.nodes)
    torch.testing.assert_close(program.module()(x[:1]), attention(x[:1]))


@pytest.mark.gpu
@pytest.mark.parametrize("side,topk,heads", [(56, 1, 2), (28, 4, 4), (14, 16, 8), (14, 16, 12)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_error_on_the_networks_maps(side, topk, heads, dtype):
    """In low precision, at most twice what the parts lose that PyTorch computes."""
    fused, parts = (module(7, topk, heads, **kwargs) for kwargs in ({}, dict(attn_impl="gather", layer_impl="torch")))
    fused, parts = fused.to(dtype), parts.to(dtype)
    generator = torch.Generator(DEVICE).manual_seed(0)
    qkv = torch.randn(8, side, side, 48 * heads, generator=generator, device=DEVICE, dtype=dtype)
    settings = packed.settings_for(qkv, heads, 7, topk, fused.scale)
    upstream = torch.randn(8, side, side, 16 * heads, generator=generator, device=DEVICE, dtype=dtype)

    def run(attend, qkv, lepe):
        qkv = qkv.detach().requires_grad_()
        out = attend(qkv)
        return [out, *torch.autograd.grad(out, [qkv, lepe.weight, lepe.bias], upstream.to(qkv.dtype))]

    lepe = fused.lepe
    ours = run(lambda x: packed.packed_attention(x, lepe.weight, lepe.bias, settings), qkv, lepe)
    eager = run(parts._attend, qkv, parts.lepe)
    exact = run(parts.double()._attend, qkv.double(), parts.lepe)
    for a, b, c in zip(ours, eager, exact, strict=True):
        allowed = 2 * (b - c).abs().max() + torch.finfo(dtype).eps * c.abs().max() / 2
        assert (a - c).abs().max() <= allowed


@pytest.mark.gpu
def test_it_is_captured_in_a_cuda_graph():
    attention = module(7, 16).bfloat16()
    x = torch.randn(2, 14, 14, 32, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    reference = copy.deepcopy(attention)  # capturing changes the module itself
    captured = torch.cuda.make_graphed_callables(attention, (x,))
    for _ in range(2):  # other images, other routes
        y = torch.randn_like(x, requires_grad=True)
        out, expected = captured(y), reference(y)
        assert out.equal(expected)
        grad, expected = (torch.autograd.grad(z.float().square().sum(), y)[0] for z in (out, expected))
        assert grad.equal(expected)
