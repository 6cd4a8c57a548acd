"""The fused implementation. Without a GPU its kernels run, slowly, in Triton's interpreter: small maps then."""
import copy
import os
import subprocess
import sys
from itertools import pairwise

import numpy as np
import pytest
import timm
import torch
from torch.utils.checkpoint import checkpoint

import models  # noqa: F401, registers our models with timm
from helpers import ROOT
from ops import BiLevelRoutingAttention, RegionGrid, Routing, choose_impl, route_regions, routed_attention, unsupported

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

from helpers.interpreter import DEVICE, needs_working_device  # noqa: E402
from ops.impl.triton import op as fused_op  # noqa: E402
from ops.impl.triton import routed_attention as fused  # noqa: E402
from ops.impl.triton import tuning  # noqa: E402
from ops.impl.triton.tiles import divide  # noqa: E402
from ops.impl.triton.tuning import MAX_BITS, choose_tile, is_dense, make_plan  # noqa: E402
from ops.support import is_too_old  # noqa: E402

DTYPES = [torch.float32, torch.bfloat16, torch.float16]

# (query map, query regions, key map, key regions, top-k)
SMALL = {
    "even": ((16, 16), 2, (16, 16), 2, 2),
    "packed": ((12, 12), 3, (12, 12), 3, 3),
    "ragged": ((5, 7), 2, (5, 7), 2, 2),
    "several tiles of a ragged region": ((19, 21), 2, (19, 21), 2, 1),
    "small queries on a large map": ((3, 3), 3, (12, 10), 2, 2),
    "large queries on a small map": ((9, 8), 2, (3, 4), 2, 1),
    "all regions": ((6, 7), 2, (6, 7), 2, 4),
    "one region": ((5, 7), 1, (5, 7), 1, 1),
    "one token": ((1, 1), 7, (1, 1), 7, 1),
    "one row": ((1, 17), 7, (1, 17), 7, 3),
    "more regions than bits": ((9, 8), 9, (9, 8), 9, 2),
}
LARGE = {
    **{
        f"{side}, top-{topk}": ((side, side), 7, (side, side), 7, topk)
        for sides in ((56, 28, 14), (96, 48, 24))
        for side, topk in zip(sides, (1, 4, 16), strict=True)
    },
    **{
        f"{height} x {width}, {regions} x {regions} regions, top-{topk}": (
            (height, width), regions, (height, width), regions, topk
        )
        for regions in (7, 16)
        for (height, width), topk in zip(((200, 334), (100, 167), (50, 84)), (1, 4, 16), strict=True)
    },
    "agents": ((7, 7), 7, (56, 56), 7, 4),
    "agents on all": ((7, 7), 7, (56, 56), 7, 49),
}  # fmt: skip


pytestmark = needs_working_device


@pytest.fixture(autouse=DEVICE == "cpu")
def bfloat16_products_in_the_interpreter(monkeypatch):
    """The interpreter holds bfloat16 as the integers of its bits, and would multiply those."""
    builder = type(triton.runtime.interpreter.interpreter_builder)
    create_dot = builder.create_dot

    def wide(handle):
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        data = (handle.data.astype(np.uint32) << 16).view(np.float32)
        return triton.runtime.interpreter.TensorHandle(data, tl.float32)

    monkeypatch.setattr(builder, "create_dot", lambda self, a, b, *rest: create_dot(self, wide(a), wide(b), *rest))


@pytest.fixture(autouse=True)
def memory_for_the_others(request):
    """The float64 reference of the largest maps takes 9 to 12 GB, which other processes on the same GPU need."""
    yield
    if request.node.get_closest_marker("gpu") is not None:
        torch.cuda.empty_cache()


def make_inputs(case, dtype, heads=2, head_dim=32, batch=1):
    """Views of packed projections where the maps are one, and their routing."""
    query_size, query_regions, key_size, key_regions, topk = case
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(*shape, heads, head_dim, generator=generator).to(DEVICE, dtype)

    query_grid, key_grid = RegionGrid.fit(*query_size, query_regions), RegionGrid.fit(*key_size, key_regions)
    if query_size == key_size:
        query, key, value = random(batch, *query_size, 3).unbind(3)
    else:
        query, (key, value) = random(batch, *query_size), random(batch, *key_size, 2).unbind(3)
    return query, key, value, route_regions(query, key, query_grid, key_grid, topk)


def run(attention, inputs, dtype, **kwargs):
    """Output and gradients of the queries, keys and values, computed in `dtype`."""
    query, key, value = (x.detach().to(dtype).requires_grad_() for x in inputs[:3])
    out = attention(query, key, value, *inputs[3:], **kwargs)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(DEVICE, inputs[0].dtype)
    return [out, *torch.autograd.grad(out, (query, key, value), upstream.to(dtype))]


def check_errors(case, dtype, dense, **kwargs):
    inputs = make_inputs(case, dtype, **kwargs)
    scale = inputs[0].shape[-1] ** -0.5
    exact = run(routed_attention, inputs, torch.float64, impl="gather")
    eager = run(routed_attention, inputs, dtype, impl="gather")
    ours = run(fused, inputs, dtype, scale=scale, dense=dense)
    largest = max(x.abs().max().item() for x in inputs[:3])
    # The gradient of a logit is a difference of two sums over a head, alike where a query has few keys: in float32 they
    # differ by rounding, which is no error of `eager` where it happens to add in the same order.
    cancelled = torch.finfo(torch.float32).eps * scale * inputs[0].shape[-1] * largest**3
    for ours_, eager_, exact_ in zip(ours, eager, exact, strict=True):
        assert ours_.dtype == dtype and ours_.shape == exact_.shape
        rounding = torch.finfo(dtype).eps * exact_.abs().max().item() / 2 + cancelled
        allowed = 2 * (eager_.double() - exact_).abs().max().item() + rounding
        assert (ours_.double() - exact_).abs().max().item() <= allowed


def ways(case):
    """By lists of regions, and through the whole map where the regions fit the bits.

    The largest maps are left out of the second: it is never chosen there, and would multiply 4.5 billion pairs of
    tokens for each head, 16 times those of the next map, whose tests take the same code.
    """
    query_size, query_regions, key_size, key_regions, topk = case
    query_grid, key_grid = RegionGrid.fit(*query_size, query_regions), RegionGrid.fit(*key_size, key_regions)
    is_largest = query_grid.height * query_grid.width > 100 * 167 and not is_dense(query_grid, key_grid, topk)
    return [False] if is_largest or key_grid.num_regions > MAX_BITS else [False, True]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name,dense", [(name, dense) for name, case in SMALL.items() for dense in ways(case)])
def test_error_is_at_most_twice_that_of_eager(name, dense, dtype):
    check_errors(SMALL[name], dtype, dense, heads=1, head_dim=16)


@pytest.mark.slow
@pytest.mark.parametrize("head_dim", [8, 24, 32, 48, 80, 128])
def test_any_head_dim(head_dim):
    check_errors(SMALL["ragged"], torch.float32, False, heads=2, head_dim=head_dim)


def test_strides_are_said_to_be_multiples_of_8_only_where_all_are():
    """A false claim would have a GPU load from addresses that it cannot."""

    def claimed(*maps):
        return fused_op._strides_of_8(fused_op._strides(*maps))

    packed = torch.empty(2, 5, 7, 3, 3, 24)
    assert claimed(*packed.unbind(3)) and claimed(packed[0].unbind(2)[0].expand(2, 5, 7, 3, 24))
    assert not claimed(*torch.empty(2, 5, 7, 3, 2, 20).unbind(3)), "heads lie 20 numbers apart"
    wide = torch.empty(2, 5, 7, 76)[..., :72].unflatten(-1, (3, 24))
    assert not claimed(packed[:, :, :, 0], wide), "tokens lie 76 numbers apart"
    assert not claimed(packed.permute(0, 1, 2, 3, 5, 4)[..., 0, :, :]), "heads lie 1 number apart"


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [16, 32, 64, 128])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name,dense", [(name, dense) for name, case in LARGE.items() for dense in ways(case)])
def test_error_is_at_most_twice_that_of_eager_on_the_networks_maps(name, dense, dtype, head_dim):
    check_errors(LARGE[name], dtype, dense, batch=2, head_dim=head_dim)


@pytest.mark.slow
@pytest.mark.parametrize("dense", [False, True])
def test_heads_and_images_do_not_mix(dense):
    inputs = make_inputs(SMALL["ragged"], torch.float32, heads=3, head_dim=16, batch=2)
    for ours, one_by_one in zip(
        run(fused, inputs, torch.float32, scale=0.3, dense=dense),
        run(routed_attention, inputs, torch.float32, scale=0.3, impl="gather"),
        strict=True,
    ):
        # A GPU's exponential is an approximation: ex2.approx.
        torch.testing.assert_close(ours, one_by_one, rtol=1e-5, atol=1e-5 if DEVICE == "cuda" else 2e-6)


@pytest.mark.slow
@pytest.mark.parametrize("dense", [False, True])
def test_repeated_runs_agree_to_the_bit(dense):
    inputs = make_inputs(SMALL["packed"], torch.float32, heads=1, head_dim=16)
    first, second = (run(fused, inputs, torch.float32, scale=0.3, dense=dense) for _ in range(2))
    assert all(a.equal(b) for a, b in zip(first, second, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name,dense", [(name, dense) for name, case in LARGE.items() for dense in ways(case)])
def test_repeated_runs_agree_to_the_bit_on_the_networks_maps(name, dense, dtype):
    inputs = make_inputs(LARGE[name], dtype, batch=8)
    first = run(fused, inputs, dtype, scale=0.3, dense=dense)
    for _ in range(3):
        assert all(a.equal(b) for a, b in zip(first, run(fused, inputs, dtype, scale=0.3, dense=dense), strict=True))


@pytest.mark.parametrize("dense", [False, True])
def test_what_surrounds_the_map_in_memory_is_not_read(dense):
    inputs = make_inputs(SMALL["ragged"], torch.float32, heads=1, head_dim=16)
    embedded = []
    for x in inputs[:3]:
        larger = torch.full((3, 9, 11, 4, 20), float("nan"), device=DEVICE)
        embedded.append(larger[1:2, 2:7, 3:10, 2:3, 3:19].copy_(x))
    out = fused(*inputs, scale=0.3, dense=dense)
    assert fused(*embedded, *inputs[3:], scale=0.3, dense=dense).equal(out)


def test_networks_maps_are_tested_in_every_way_that_is_chosen():
    for query_size, query_regions, key_size, key_regions, topk in LARGE.values():
        query_grid, key_grid = RegionGrid.fit(*query_size, query_regions), RegionGrid.fit(*key_size, key_regions)
        expected = [is_dense(query_grid, key_grid, topk)]
        assert set(expected) <= set(ways((query_size, query_regions, key_size, key_regions, topk)))
    assert ways(LARGE["200 x 334, 7 x 7 regions, top-1"]) == [False]
    assert ways(LARGE["100 x 167, 7 x 7 regions, top-4"]) == ways(SMALL["ragged"]) == [False, True]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("name", ["ragged", "packed"])
def test_padding_of_lse_and_delta_is_written(name, dtype, monkeypatch):
    """The dense kernels read it unmasked: what memory held before, here no numbers, must not reach a gradient.

    In float32 two kernels compute the gradients, in 16 bits one, which has no delta in memory.
    """
    inputs = make_inputs(SMALL[name], dtype, heads=2, head_dim=16)

    def poisoned(allocate):
        def allocate_and_fill(*args, **kwargs):
            x = allocate(*args, **kwargs).detach()
            return x.fill_(float("nan")) if x.is_floating_point() else x

        return allocate_and_fill

    for owner, name in ((torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))
    for ours in run(fused, inputs, dtype, scale=0.3, dense=True):
        assert ours.isfinite().all()
    monkeypatch.undo()
    query, key, value, (routes, query_grid, key_grid, _) = inputs
    grids = [query_grid.rows, query_grid.cols], [key_grid.rows, key_grid.cols]
    lse = fused_op.forward(query, key, value, *fused_op.route_bits(inputs[3]), *grids, 0.3)[1]
    tokens = query_grid.height * query_grid.width
    assert lse.shape[2] % 128 == 0 and lse[..., :tokens].isfinite().all() and lse[..., tokens:].isposinf().all()
    listed = fused_op.forward(query, key, value, routes, None, *grids, 0.3)[1]
    torch.testing.assert_close(listed, lse[..., :tokens], rtol=1e-5, atol=1e-5)


ONE_PASS = {
    "even": SMALL["even"],
    "ragged": SMALL["ragged"],
    "several tiles of keys": ((9, 13), 3, (9, 13), 3, 4),
    "more queries than keys": SMALL["large queries on a small map"],
    "fewer queries than keys": SMALL["small queries on a large map"],
}


@pytest.mark.slow
@pytest.mark.parametrize("head_dim", [16, 40])
@pytest.mark.parametrize("name", ONE_PASS)
def test_gradients_in_one_pass_are_those_of_two_kernels(name, head_dim):
    """Written into views of one packed map, several images and heads; twice, and to the bit; nothing beside them."""
    query, key, value, routing = make_inputs(ONE_PASS[name], torch.float16, heads=3, head_dim=head_dim, batch=2)
    routes, bits = fused_op.route_bits(routing)
    settings = [routing[1].rows, routing[1].cols], [routing[2].rows, routing[2].cols], 0.3
    problem = fused_op.make_problem(query, key, value, routes, bits, *settings)
    assert tuning.fits_one_pass(*problem.grids, head_dim, query.dtype)
    out, lse = fused_op.forward(query, key, value, routes, bits, *settings)
    grad_out = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)

    def gradients(launch):
        packed = [torch.full((*x.shape[:3], 2, *x.shape[3:]), float("nan")).to(x) for x in (query, key, value)]
        grads = tuple(x[:, :, :, 0] for x in packed)
        launch(grads)
        assert all(x[:, :, :, 1].isnan().all() for x in packed)
        return grads

    def two_kernels(grads):
        delta = torch.empty_like(lse)
        fused_op.launch_query_gradient(problem, out, grad_out, lse, delta, grads[0])
        fused_op.launch_key_value_gradient(problem, fused_op.inverse_of(problem), grad_out, lse, delta, grads[1:])

    def one_pass(grads):
        fused_op.launch_gradients(problem, fused_op.inverse_of(problem), out, grad_out, lse, grads)

    ours, again, expected = gradients(one_pass), gradients(one_pass), gradients(two_kernels)
    for one, other, two in zip(ours, again, expected, strict=True):
        assert one.equal(other)
        torch.testing.assert_close(one, two, rtol=0, atol=2e-3 * two.abs().max().item())


def test_one_pass_is_taken_where_it_fits(monkeypatch):
    """16 bits, dense and small; a tile that does not hold the whole map is refused, as it would leave the tensors."""
    launched = []
    for kernel in ("query_gradient", "key_value_gradient", "one_pass_gradients"):
        name = f"launch_{kernel}"
        launch = getattr(fused_op, name)
        monkeypatch.setattr(fused_op, name, lambda *a, k=kernel, f=launch: (launched.append(k), f(*a)))
    one, two = ["one_pass_gradients"], ["query_gradient", "key_value_gradient"]
    for dtype, dense, expected in (
        (torch.float16, True, one), (torch.float16, False, two), (torch.float32, True, two)
    ):  # fmt: skip
        launched.clear()
        inputs = make_inputs(SMALL["ragged"], dtype, heads=1, head_dim=16)
        run(fused, inputs, dtype, scale=0.3, dense=dense)
        assert launched == expected

    def fits(side, other, head_dim=32):
        grids = RegionGrid.fit(side, side), RegionGrid.fit(other, other)
        return tuning.fits_one_pass(*grids, head_dim, torch.bfloat16)

    assert fits(14, 14) and fits(16, 16) and fits(14, 14, 64) and not fits(14, 14, 80)
    assert not fits(17, 17) and not fits(7, 56) and not fits(56, 7)
    query, key, value, routing = make_inputs(SMALL["several tiles of a ragged region"], torch.float16)
    routes, bits = fused_op.route_bits(routing)
    problem = fused_op.make_problem(query, key, value, routes, bits, [2, 2], [2, 2], 0.3)
    with pytest.raises(ValueError, match="one tile must hold all queries"):
        problem.kind.plan_of_one_pass()


@pytest.mark.parametrize("head_dim", [8, 32, 64])
@pytest.mark.parametrize("tokens", [1, 16, 17, 49, 100, 196, 256])
def test_tiles_of_one_pass_hold_the_map(tokens, head_dim):
    tile = tuning.choose_one_pass_tile(tokens, head_dim)
    assert tokens <= tile.block_m < max(2 * tokens, 17) and tile.block_n in (16, 32, 64) and tile.num_stages == 1
    assert tile.num_warps in (1, 2, 4, 8)


def test_heads_that_lie_apart_in_memory():
    inputs = make_inputs(SMALL["ragged"], torch.float32, heads=1, head_dim=16)
    apart = [x.transpose(-1, -2).contiguous().transpose(-1, -2).requires_grad_() for x in inputs[:3]]
    assert all(x.stride(-1) != 1 or x.shape[-2] == 1 for x in apart)
    out = fused(*apart, *inputs[3:], scale=0.3)
    assert out.equal(fused(*inputs, scale=0.3))
    # the gradient of a sum is one number seen from everywhere: all strides are zero
    assert all(g is not None for g in torch.autograd.grad(out.sum(), apart))


@pytest.mark.slow
def test_extreme_logits():
    """Weights that underflow, and a first tile without a single routed key, must not make numbers that are none."""
    grid = RegionGrid.fit(16, 16, 2)
    # small integers: their products are exact, in whatever order they are added
    torch.manual_seed(0)
    query, key, value = torch.randint(-3, 4, (3, 1, 16, 16, 1, 16)).float().to(DEVICE)
    routing = Routing(torch.tensor([[[3], [3], [3], [0]]], device=DEVICE), grid, grid)
    for dense in (False, True):
        out = fused(query * 64, key * 64, value, routing, 1.0, dense=dense)
        expected = routed_attention(query * 64, key * 64, value, routing, 1.0, impl="gather")
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)


def test_keys_that_no_query_chose_have_no_gradient():
    grid = RegionGrid.fit(8, 8, 2)
    query, key, value = (torch.randn(1, 8, 8, 1, 16, device=DEVICE, requires_grad=True) for _ in range(3))
    routing = Routing(torch.ones(1, 4, 1, dtype=torch.int64, device=DEVICE), grid, grid)
    for dense in (False, True):
        out = fused(query, key, value, routing, 0.3, dense=dense)
        for grad in torch.autograd.grad(out.square().sum(), (key, value)):
            assert grad[:, :4, 4:].abs().min() > 0
            grad[:, :4, 4:] = 0
            assert grad.abs().max() == 0


def test_empty_batch():
    query, key, value, routing = make_inputs(SMALL["ragged"], torch.float32, batch=0)
    query.requires_grad_()
    out = fused(query, key, value, routing, 0.3)
    assert out.shape == query.shape and torch.autograd.grad(out.sum(), query)[0].shape == query.shape


def op_arguments(dense, requires_grad=True):
    *maps, routing = make_inputs(SMALL["ragged"], torch.float32, heads=1, head_dim=16)
    routes, query_grid, key_grid, _ = routing
    maps = [x.detach().clone().requires_grad_(requires_grad) for x in maps]
    routes, bits = fused_op.route_bits(routing) if dense else (routes, None)
    return *maps, routes, bits, [query_grid.rows, query_grid.cols], [key_grid.rows, key_grid.cols], 0.3


@pytest.mark.slow
@pytest.mark.parametrize("dense", [False, True])
def test_operators_pass_opcheck(dense):
    arguments = op_arguments(dense)
    torch.library.opcheck(torch.ops.routed_attention.forward.default, arguments)
    query, key, value, routes, bits, *settings = op_arguments(dense, requires_grad=False)
    out, lse = torch.ops.routed_attention.forward(query, key, value, routes, bits, *settings)
    gradient = (query, key, value, routes, bits, out, torch.randn_like(out), lse, *settings)
    torch.library.opcheck(torch.ops.routed_attention.backward.default, gradient)


def small_module():
    return BiLevelRoutingAttention(dim=16, num_heads=1, num_regions=2, topk=2, attn_impl="triton", device=DEVICE)


@pytest.mark.compile
@pytest.mark.parametrize("size", [(6, 6), (5, 7)])
def test_compiles_into_one_graph(size):
    attention = small_module()
    x = torch.randn(1, *size, 16, device=DEVICE)
    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), attention(x))
    expected = torch.autograd.grad(attention(x).square().sum(), attention.qkv.weight)[0]
    torch.testing.assert_close(torch.autograd.grad(compiled(x).square().sum(), attention.qkv.weight)[0], expected)


@pytest.mark.compile
def test_exports():
    attention = small_module()
    x = torch.randn(2, 5, 7, 16, device=DEVICE)
    program = torch.export.export(attention, (x,), dynamic_shapes=({0: torch.export.Dim("batch", max=64)},))
    assert any("routed_attention.forward" in str(node.target) for node in program.graph.nodes)
    torch.testing.assert_close(program.module()(x[:1]), attention(x[:1]))


def test_activation_checkpointing():
    attention = small_module()
    x = torch.randn(1, 5, 7, 16, device=DEVICE, requires_grad=True)
    (expected,) = torch.autograd.grad(attention(x).square().sum(), x)
    (again,) = torch.autograd.grad(checkpoint(attention, x, use_reentrant=False).square().sum(), x)
    assert again.equal(expected)


@pytest.mark.gpu
def test_cuda_graphs():
    attention = BiLevelRoutingAttention(dim=64, num_heads=2, topk=4, attn_impl="triton").cuda()
    x = torch.randn(2, 28, 28, 64, device="cuda", requires_grad=True)
    reference = copy.deepcopy(attention)  # capturing changes the module itself
    captured = torch.cuda.make_graphed_callables(attention, (x,))
    for _ in range(2):  # other images, other routes
        y = torch.randn_like(x, requires_grad=True)
        out = captured(y)
        (grad,) = torch.autograd.grad(out.square().sum(), y)
        expected = reference(y)
        torch.testing.assert_close(out, expected)
        torch.testing.assert_close(grad, torch.autograd.grad(expected.square().sum(), y)[0])


@pytest.mark.parametrize("impl", ["triton", "gather"])
def test_autocast_runs_in_low_precision(impl):
    inputs = make_inputs(SMALL["ragged"], torch.float32, heads=1, head_dim=16)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        out = routed_attention(*inputs, impl=impl)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), routed_attention(*inputs, impl="gather"), rtol=0.05, atol=0.05)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["56, top-1", "28, top-4", "200 x 334, 16 x 16 regions, top-1"])
def test_memory(name):
    """One float for each query and head, and in the backward pass another, beside inputs, outputs and routes."""
    inputs = make_inputs(LARGE[name], torch.bfloat16, batch=4)
    query, key, value = (x.detach().requires_grad_() for x in inputs[:3])
    routes = inputs[3].routes
    floats = 4 * query[..., 0].numel()
    inverse = 6 * 8 * routes.numel() + 2**20
    fused(query, key, value, *inputs[3:], scale=0.3)

    def extra(compute):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_stats()["requested_bytes.all.current"]
        outputs = compute()
        return outputs, torch.cuda.memory_stats()["requested_bytes.all.peak"] - before

    out, forward = extra(lambda: fused(query, key, value, *inputs[3:], scale=0.3))
    assert forward <= out.nbytes + floats + inverse
    upstream = torch.randn_like(out)
    grads, backward = extra(lambda: torch.autograd.grad(out, (query, key, value), upstream))
    assert backward <= sum(g.nbytes for g in grads) + floats + inverse


def test_more_regions_than_bits_are_refused():
    inputs = make_inputs(SMALL["more regions than bits"], torch.float32, heads=1, head_dim=16)
    with pytest.raises(ValueError, match="64 key regions, got 72"):
        fused(*inputs, scale=0.3, dense=True)


@pytest.mark.parametrize("name", ["ragged", "small queries on a large map", "large queries on a small map"])
def test_route_bits(name):
    """A query and a key share a bit where the key's region is among the routes; what pads the tables shares none."""
    routing = make_inputs(SMALL[name], torch.float32, batch=2)[3]
    routes, query_grid, key_grid, _ = routing
    query_bits, key_bits = fused_op.route_bits(routing)
    regions = [
        [y // g.region_height * g.cols + x // g.region_width for y in range(g.height) for x in range(g.width)]
        for g in (query_grid, key_grid)
    ]
    assert query_bits.shape[1] % 128 == 0 and key_bits.shape[1] % 128 == 0
    meet = (query_bits[:, :, None] & key_bits[:, None, :]) != 0
    num_queries, num_keys = (len(r) for r in regions)
    expected = torch.zeros_like(meet)
    for image, listed in enumerate(routes.tolist()):
        rows = [[key in listed[query] for key in regions[1]] for query in regions[0]]
        expected[image, :num_queries, :num_keys] = torch.tensor(rows)
    assert meet.equal(expected)


def test_inverse_routes():
    routes = torch.tensor([[[0, 2], [2, 1], [2, 0]], [[3, 1], [3, 0], [3, 2]]])
    members, bounds = fused_op._inverse(routes, 4)
    lists = [[m[a:b].tolist() for a, b in pairwise(c.tolist())] for m, c in zip(members, bounds, strict=True)]
    assert lists == [[[0, 2], [1], [0, 1, 2], []], [[1], [0], [2], [0, 1, 2]]]


@triton.jit
def _divide_kernel(numerator_ptr, quotient_ptr, remainder_ptr, divisor, BLOCK: tl.constexpr):
    index = tl.arange(0, BLOCK)
    quotient, remainder = divide(tl.load(numerator_ptr + index), divisor)
    tl.store(quotient_ptr + index, quotient)
    tl.store(remainder_ptr + index, remainder)


@pytest.mark.parametrize("divisor", [1, 2, 3, 7, 64, 273, 641, 65535, 65536, 112896, 2**24 + 1, 2**31 - 1])
def test_division_is_exact(divisor):
    multiples = divisor * torch.tensor([0, 1, 2, 3, 1000, 2**31 // divisor])
    numerators = torch.cat([multiples - 1, multiples, multiples + 1, torch.randint(2**31, (46,)), torch.arange(0)])
    numerators = numerators.clamp(0, 2**31 - 1).int().to(DEVICE)
    quotient, remainder = torch.empty_like(numerators), torch.empty_like(numerators)
    _divide_kernel[(1,)](numerators, quotient, remainder, divisor, BLOCK=64)
    assert quotient.equal(numerators // divisor) and remainder.equal(numerators % divisor)


def test_tf32_follows_pytorchs_setting():
    before = torch.backends.cuda.matmul.allow_tf32
    try:
        for allowed, precision in ((False, "ieee"), (True, "tf32")):
            torch.backends.cuda.matmul.allow_tf32 = allowed
            assert fused_op._precision(torch.float32) == precision
            assert fused_op._precision(torch.bfloat16) == "ieee"
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def test_small_regions_go_through_the_whole_map_and_large_ones_by_list():
    def dense(side, topk, regions=7):
        grid = RegionGrid.fit(side, side, regions)
        return is_dense(grid, grid, topk)

    assert [dense(56, 1), dense(28, 4), dense(14, 16)] == [False, False, True]
    assert not dense(84, 16, regions=42), "1764 regions are more than the bits of an integer"


@pytest.mark.parametrize("name", ["even", "packed", "ragged", "several tiles of a ragged region", "one token"])
@pytest.mark.parametrize("inverse", [False, True])
def test_plans_are_even_only_where_no_place_is_empty(name, inverse):
    query_size, query_regions, key_size, key_regions, topk = SMALL[name]
    own, other = RegionGrid.fit(*query_size, query_regions), RegionGrid.fit(*key_size, key_regions)
    plan = make_plan(own, other, topk, inverse, False, 32, torch.bfloat16)
    assert plan.even_m == (own.padding == (0, 0) and own.tokens_per_region % plan.tile.block_m == 0)
    assert plan.tiles * plan.tile.block_m >= own.num_regions * own.tokens_per_region
    if plan.even_n:
        assert other.padding == (0, 0)
        listed = 1 if inverse or not plan.packed else topk  # any number of regions may have chosen a key region
        assert listed * other.tokens_per_region % plan.tile.block_n == 0


def test_tiles_of_biformers_stages():
    """Tokens of a region, or of the map, past those of all routes, or of the map: the fastest on an H100."""
    for inverse in (False, True):
        assert choose_tile(64, 64, 32, torch.bfloat16, inverse) == (64, 32, 4, 1 if inverse else 2)
        assert choose_tile(16, 64, 32, torch.bfloat16, inverse) == (16, 32, 1, 2)
        assert choose_tile(196, 196, 32, torch.bfloat16, inverse) == (64, 32, 4, 1 if inverse else 2)


def test_auto_takes_it_on_a_gpu_unless_attention_is_dense():
    grid = RegionGrid.fit(14, 14)
    query = torch.empty(1, 14, 14, 2, 32)
    routing, dense = (Routing(torch.empty(1, 49, topk), grid, grid) for topk in (16, 49))
    assert choose_impl(query, routing) == "masked"
    if DEVICE == "cuda":
        assert choose_impl(query.cuda(), routing) == "triton"
        assert choose_impl(query.cuda(), dense) == "masked"
        assert choose_impl(query.cuda().double(), routing) == "masked"


def test_what_it_cannot_do_is_explained(monkeypatch):
    inputs = make_inputs(SMALL["ragged"], torch.float64)
    with pytest.raises(ValueError, match=r"impl='triton' cannot run: .*not in torch.float64"):
        routed_attention(*inputs, impl="triton")
    assert "up to 128 numbers, got 129" in unsupported("triton", torch.empty(1, 1, 1, 1, 129, device=DEVICE))
    assert "on CUDA GPUs, the tensors are on meta" in unsupported("triton", torch.empty(1, 1, 1, 1, 8, device="meta"))
    assert unsupported("triton") is None
    monkeypatch.setattr("ops.support._TRITON_INTERPRETED", False)
    assert "on CUDA GPUs, the tensors are on cpu" in unsupported("triton", torch.empty(1, 1, 1, 1, 8))
    monkeypatch.setattr("ops.support._TRITON_VERSION", None)
    assert unsupported("triton") == "the package triton is not installed"


@pytest.mark.compile
@pytest.mark.skipif(is_too_old(triton.__version__), reason="this Triton does not compile kernels")
def test_kernels_compile_for_gpus_without_spilling():
    """Ahead of time, for compute capability 8.0 and 9.0; not in the interpreter, so in a process of its own."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "scripts/compile_kernels.py", "--dtype", "bf16", "--head_dim", "24", "32"]
    maps = ["--map", "56 x 56, top-1", "14 x 14, top-16"]
    result = subprocess.run([*command, *maps], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    names = ("| forward", "| query", "| key", "| one_pass")
    rows = [line for line in result.stdout.splitlines() if line.startswith(names)]
    assert len(rows) == 3 * 2 * 2 * 2 + 2 * 2 and all(row.endswith("| 0 |") for row in rows)


@pytest.mark.slow
def test_a_network_trains_alike_with_it():
    """biformer_nano on a small image, its logits and all gradients; routed otherwise, it must be told apart."""
    torch.manual_seed(1)
    images, weights = torch.randn(1, 3, 32, 64, device=DEVICE), torch.randn(1, 3, device=DEVICE)

    def results(impl, topk):
        torch.manual_seed(0)
        model = timm.create_model("biformer_nano", num_classes=3, num_regions=2, topk=topk, attn_impl=impl)
        for parameter in model.parameters():
            if parameter.ndim > 1:  # the usual initial weights are too small for attention to matter
                torch.nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
        with torch.backends.cudnn.flags(allow_tf32=False):
            # in training, batch norm over one image would leave a mean of zero for the head to see
            logits = model.to(DEVICE).eval()(images)
            return [logits, *torch.autograd.grad((logits * weights).sum(), list(model.parameters()))]

    def agree(ours, expected):
        return [(a - b).abs().max() <= 1e-3 * b.abs().max() for a, b in zip(ours, expected, strict=True)]

    published = results("gather", 2)
    assert all(agree(results("triton", 2), published))
    assert not all(agree(results("gather", 1), published))
