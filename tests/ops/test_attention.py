import itertools

import pytest
import torch

from helpers.routed_inputs import CASES, make_inputs
from helpers.routed_reference import eager_attention
from helpers.routed_reference import routed_attention as reference
from ops import IMPLS, RegionGrid, Routing, choose_impl, route_regions, routed_attention

# `triton` has tests of its own, in test_triton.py
UNFUSED = tuple(impl for impl in IMPLS if impl != "triton")


@pytest.mark.parametrize("impl", [*UNFUSED, "auto"])
@pytest.mark.parametrize("case", CASES)
def test_agrees_with_the_formula(case, impl):
    inputs = make_inputs(case)
    out = routed_attention(*inputs, scale=0.3, impl=impl)
    torch.testing.assert_close(out, reference(*inputs, scale=0.3), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("impl", UNFUSED)
@pytest.mark.parametrize("case", CASES)
def test_gradients_agree_with_the_formula(case, impl):
    inputs = make_inputs(case, requires_grad=True)
    upstream = torch.randn(inputs[0].shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    grads = torch.autograd.grad(routed_attention(*inputs, scale=0.3, impl=impl), inputs[:3], upstream)
    expected = torch.autograd.grad(reference(*inputs, scale=0.3), inputs[:3], upstream)
    for grad, expect in zip(grads, expected, strict=True):
        torch.testing.assert_close(grad, expect, rtol=1e-11, atol=1e-11)


@pytest.mark.slow
@pytest.mark.parametrize("impl", UNFUSED)
@pytest.mark.parametrize("case", ["ragged", "small queries on a large map"])
def test_gradcheck(case, impl):
    query, key, value, routing = make_inputs(case, heads=1, head_dim=2, batch=1, requires_grad=True)
    assert torch.autograd.gradcheck(lambda q, k, v: routed_attention(q, k, v, routing, impl=impl), (query, key, value))


@pytest.mark.parametrize("impl", UNFUSED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", CASES)
def test_error_is_at_most_twice_that_of_eager_in_low_precision(case, dtype, impl):
    inputs = make_inputs(case, dtype, head_dim=32)
    exact = reference(*inputs, scale=32**-0.5)
    out = routed_attention(*inputs, impl=impl)
    assert out.dtype == dtype
    allowed = 2 * (eager_attention(*inputs, scale=32**-0.5).double() - exact).abs().max()
    # Where eager happens to be exact, half a unit in the last place of the largest output is still rounding.
    allowed = max(allowed.item(), torch.finfo(dtype).eps * exact.abs().max().item() / 2)
    assert (out.double() - exact).abs().max().item() <= allowed


@pytest.mark.parametrize("impl", UNFUSED)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", ["even", "ragged", "small queries on a large map"])
def test_gradients_in_low_precision_are_as_good_as_eagers(case, dtype, impl):
    inputs = make_inputs(case, dtype, head_dim=32, requires_grad=True)
    upstream = torch.randn(inputs[0].shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def gradients(attention, dtype):
        return torch.autograd.grad(attention, inputs[:3], upstream.to(dtype))

    exact = gradients(reference(*inputs, scale=32**-0.5), torch.float64)
    eager = gradients(eager_attention(*inputs, scale=32**-0.5), dtype)
    for ours, theirs, true in zip(gradients(routed_attention(*inputs, impl=impl), dtype), eager, exact, strict=True):
        # autograd returns the exact gradient in the inputs' precision: half a unit of it is nobody's error
        rounding = torch.finfo(dtype).eps * true.double().abs().max() / 2
        assert (ours.double() - true).abs().max() <= 2 * (theirs.double() - true).abs().max() + rounding


@pytest.mark.parametrize("impl", UNFUSED)
def test_what_surrounds_the_map_in_memory_does_not_matter(impl):
    grid = RegionGrid.fit(50, 61, 7)
    assert grid.is_padded
    maps = [torch.randn(1, 50, 61, 2, 4, dtype=torch.float64) for _ in range(3)]
    embedded = []
    for x in maps:
        larger = torch.full((1, 70, 80, 2, 4), float("nan"), dtype=torch.float64)
        larger[:, :50, :61] = x
        embedded.append(larger[:, :50, :61])
    routing = route_regions(*maps[:2], grid, grid, 4)
    assert routing.routes.equal(route_regions(*embedded[:2], grid, grid, 4).routes)
    out = routed_attention(*maps, routing, impl=impl)
    torch.testing.assert_close(routed_attention(*embedded, routing, impl=impl), out, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(out, reference(*maps, routing, 4**-0.5), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("impl", UNFUSED)
@pytest.mark.parametrize("rows,cols", [(2, 2), (3, 4), (4, 3), (5, 6), (10, 11)])
def test_amount_of_padding_does_not_matter(rows, cols, impl):
    """With every region routed the result is dense attention, however many padding tokens the grid adds."""
    query, key, value = (torch.randn(1, 10, 11, 2, 4, dtype=torch.float64) for _ in range(3))
    grid = RegionGrid(10, 11, rows, cols)
    routes = torch.arange(grid.num_regions).expand(1, grid.num_regions, -1)
    out = routed_attention(query, key, value, Routing(routes, grid, grid), impl=impl)
    whole = RegionGrid(10, 11, 1, 1)
    to_itself = Routing(torch.zeros(1, 1, 1, dtype=torch.long), whole, whole)
    dense = routed_attention(query, key, value, to_itself, impl="gather")
    torch.testing.assert_close(out, dense, rtol=1e-12, atol=1e-12)


def test_views_of_one_packed_projection():
    grid = RegionGrid.fit(9, 13, 4)
    qkv = torch.randn(2, 9, 13, 3, 2, 8, dtype=torch.float64)
    query, key, value = qkv.unbind(3)
    routing = route_regions(query, key, grid, grid, 3)
    for impl in UNFUSED:
        strided = routed_attention(query, key, value, routing, impl=impl)
        packed = routed_attention(*(x.contiguous() for x in (query, key, value)), routing, impl=impl)
        torch.testing.assert_close(strided, packed, rtol=1e-12, atol=1e-12)


def test_ties_are_broken_once_for_all_impls():
    grid = RegionGrid.fit(14, 14)
    query, value = torch.ones(1, 14, 14, 1, 4), torch.randn(1, 14, 14, 1, 4)
    routing = route_regions(query, query, grid, grid, 4)
    assert all(len(set(region)) == 4 for region in routing.routes[0].tolist())
    outs = [routed_attention(query, query, value, routing, impl=impl) for impl in UNFUSED]
    for a, b in itertools.pairwise(outs):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("impl", UNFUSED)
def test_autocast_runs_in_low_precision(impl):
    inputs = make_inputs("ragged", torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = routed_attention(*inputs, impl=impl)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.double(), reference(*inputs, scale=8**-0.5), rtol=0.05, atol=0.05)


@pytest.mark.parametrize("impl", UNFUSED)
def test_empty_batch(impl):
    inputs = make_inputs("ragged", batch=0)
    assert routed_attention(*inputs, impl=impl).shape == inputs[0].shape


@pytest.mark.parametrize("batch,export", [(1, False), (2, False), pytest.param(2, True, marks=pytest.mark.compile)])
@pytest.mark.parametrize("case", ["even", "ragged"])
@pytest.mark.parametrize("impl", UNFUSED)
def test_traces_and_exports_for_any_batch(impl, case, batch, export):
    inputs = make_inputs(case, torch.float32, batch=3)
    *settings, points = inputs[3][1:]

    def attend(query, key, value, routes):
        return routed_attention(query, key, value, Routing(routes, *settings, points), impl=impl)

    class Attend(torch.nn.Module):
        forward = staticmethod(attend)

    tensors = (*inputs[:3], inputs[3].routes)
    few = tuple(x[:batch] for x in tensors)
    if export:
        dynamic = {name: {0: torch.export.Dim("batch")} for name in ("query", "key", "value", "routes")}
        recorded = torch.export.export(Attend(), few, dynamic_shapes=dynamic).module()
    else:
        recorded = torch.jit.trace(attend, few, check_trace=False)
    torch.testing.assert_close(recorded(*tensors), attend(*tensors))


def chosen_for(size, regions, topk, batch=1, device="meta", dtype=torch.float32):
    grid = RegionGrid.fit(*size, regions)
    query = torch.empty(batch, *size, 4, 32, dtype=dtype, device=device)
    routes = torch.empty(batch, grid.num_regions, min(topk, grid.num_regions), device=device)
    return choose_impl(query, Routing(routes, grid, grid))


@pytest.mark.parametrize("size,regions,topk,impl", [
    ((56, 56), 7, 1, "chunked"), ((28, 28), 7, 4, "chunked"), ((14, 14), 7, 16, "masked"),  # BiFormer at 224
    ((112, 112), 7, 1, "chunked"), ((56, 56), 7, 4, "chunked"), ((28, 28), 7, 16, "chunked"),  # at 448
    ((28, 28), 14, 16, "chunked"), ((56, 56), 28, 16, "chunked"),  # with regions of 4 tokens at 448 and 896
    ((200, 334), 16, 1, "chunked"), ((100, 167), 7, 4, "chunked"), ((50, 84), 7, 16, "chunked"),
    ((7, 7), 7, 1, "masked"), ((10, 10), 4, 1, "masked"),  # so small that calls cost more than products
    ((20, 20), 4, 1, "gather"), ((28, 28), 14, 1, "gather"),  # copies no larger than the map
    ((100, 167), 7, 49, "masked"), ((28, 28), 7, 49, "masked"), ((3, 3), 1, 1, "masked"),
])  # fmt: skip
def test_auto_takes_the_faster_by_the_shape_alone(size, regions, topk, impl):
    """A model computes alike on one image and on many, and is exported for any number."""
    for batch in (1, 4096):
        for dtype in (torch.float32, torch.bfloat16):
            assert chosen_for(size, regions, topk, batch, dtype=dtype) == impl


def test_mistakes_are_explained():
    query, key, value, routing = make_inputs("small queries on a large map")
    routes = routing.routes

    def call(q=query, k=key, v=value, r=routes, impl="auto"):
        return routed_attention(q, k, v, routing._replace(routes=r), impl=impl)

    with pytest.raises(ValueError, match="no such implementation; choose from triton, chunked, masked, gather or auto"):
        call(impl="fused")
    with pytest.raises(ValueError, match=r"query must be .*, got \(2, 2, 3, 2, 8\)"):
        call(q=query[:, :2])
    with pytest.raises(ValueError, match="value must be"):
        call(v=value[:, :, :-1])
    with pytest.raises(ValueError, match="must be alike"):
        call(k=key.float())
    with pytest.raises(ValueError, match="floating-point"):
        call(query.long(), key.long(), value.long())
    with pytest.raises(ValueError, match="routes must be int64"):
        call(r=routes.int())
    with pytest.raises(ValueError, match="topk"):
        call(r=routes[:, :-1])
    with pytest.raises(ValueError, match="1 to 20 key regions, got 0"):
        call(r=routes[:, :, :0])
    with pytest.raises(ValueError, match="height, width, heads, head_dim"):
        call(q=query.flatten(3))
