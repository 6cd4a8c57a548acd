"""Attention one block at a time: how maps are cut into blocks does not matter, nor which transform calls them."""
import pytest
import torch
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from helpers.routed_inputs import CASES, make_inputs
from helpers.routed_reference import routed_attention as reference
from ops import BiLevelRoutingAttention, RegionGrid, route_regions, routed_attention
from ops.impl.blocks import chunked, masked, op, products
from ops.impl.blocks.problem import block_bytes
from scripts.bench.timing import peak_memory

IMPLS = ("chunked", "masked")
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def no_mask_is_small(monkeypatch):
    """The maps of these tests are: PyTorch's attention would take their masks whole."""
    monkeypatch.setattr("ops.impl.blocks._WHOLE_MASK_BYTES", {"cpu": 0})


def results(inputs, impl, scale=0.3):
    """The output and the gradients of query, key and value."""
    upstream = torch.randn(inputs[0].shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    out = routed_attention(*inputs, scale=scale, impl=impl)
    return out, *torch.autograd.grad(out, inputs[:3], upstream.to(out.dtype))


def limit_blocks(monkeypatch, size):
    for module in (chunked, masked):
        monkeypatch.setattr(module, "block_bytes", lambda device: size)
    monkeypatch.setattr(masked, "_LEAST_QUERIES", 1)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("case", CASES)
def test_agrees_with_the_formula(case, impl, fused, monkeypatch):
    """Plain products are for other devices than the CPU, but can be tried there."""
    monkeypatch.setattr(products, "is_fused", lambda x: fused)
    inputs = make_inputs(case, requires_grad=True)
    expected = reference(*inputs, scale=0.3)
    upstream = torch.randn(inputs[0].shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    expected = expected, *torch.autograd.grad(expected, inputs[:3], upstream)
    for result, expect in zip(results(inputs, impl), expected, strict=True):
        torch.testing.assert_close(result, expect, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("case", ["ragged", "all regions", "small queries on a large map", "one row"])
def test_small_blocks_add_up(case, impl, monkeypatch):
    inputs = make_inputs(case, torch.float32, batch=3, requires_grad=True)
    whole = results(inputs, impl)
    for size in (1, 1000, 4000):
        limit_blocks(monkeypatch, size)
        for result, expect in zip(results(inputs, impl), whole, strict=True):
            torch.testing.assert_close(result, expect)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("impl", IMPLS)
def test_gradients_of_small_blocks_in_16_bits(impl, dtype, monkeypatch):
    limit_blocks(monkeypatch, 1500)
    inputs = make_inputs("ragged", dtype, head_dim=32, requires_grad=True)
    expected = reference(*inputs, scale=0.3)
    upstream = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    expected = expected, *torch.autograd.grad(expected, inputs[:3], upstream)
    for result, expect in zip(results(inputs, impl), expected, strict=True):
        error = (result.double() - expect.double()).abs().max() / expect.double().abs().max()
        assert error <= 4 * torch.finfo(dtype).eps


@pytest.mark.parametrize("impl", IMPLS)
def test_one_image_is_computed_as_many_are(impl, monkeypatch):
    limit_blocks(monkeypatch, 3000)
    inputs = make_inputs("ragged", torch.float32, batch=4, requires_grad=True)
    together = results(inputs, impl)[0]
    *maps, routing = inputs
    for i in range(4):
        alone = routed_attention(*(x[i : i + 1] for x in maps), routing._replace(routes=routing.routes[i : i + 1]),
                                 scale=0.3, impl=impl)
        torch.testing.assert_close(alone, together[i : i + 1])


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("impl", IMPLS)
def test_repeats_bit_for_bit(impl, threads, monkeypatch):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        monkeypatch.setattr(masked, "_LEAST_QUERIES", 32)
        monkeypatch.setattr(masked, "block_bytes", lambda device: 1)
        inputs = make_inputs("more ragged", torch.float32, batch=9, head_dim=32, requires_grad=True)
        first = results(inputs, impl)
        for _ in range(3):
            assert all(map(torch.equal, results(inputs, impl), first))
    finally:
        torch.set_num_threads(before)


def peak(impl, side, regions, topk, train):
    """MiB beyond the inputs, and MiB of a map."""
    grid = RegionGrid.fit(side, side, regions)
    maps = [torch.randn(1, side, side, 2, 32, requires_grad=train) for _ in range(3)]
    routing = route_regions(*maps[:2], grid, grid, topk)

    def run():
        out = routed_attention(*maps, routing, impl=impl)
        if train:
            torch.autograd.grad(out, maps, torch.ones_like(out))

    run()
    return peak_memory(run, CPU), maps[0].numel() * 4 / 2**20


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("side,regions,topk", [(112, 14, 20), (56, 28, 100), (48, 48, 200)])
def test_memory_is_of_maps_and_one_block(side, regions, topk, impl, train):
    """Regions of 64 tokens, 4 and 1: `gather` holds keys and values `topk` times, a whole mask is dozens of maps."""
    megabytes, one_map = peak(impl, side, regions, topk, train)
    block = block_bytes(CPU) / 2**20 + (256 * side**2 * 4 / 2**20 if impl == "masked" else 0)
    routes = regions**2 * (8 * topk if impl == "chunked" else 8 * regions**2) / 2**20
    assert megabytes < (16 if train else 7) * one_map + 2 * (block + routes)
    assert side != 112 or peak("gather", side, regions, topk, False)[0] > 40 * one_map


def module(impl, regions=4):
    return BiLevelRoutingAttention(dim=16, num_heads=2, num_regions=regions, topk=3, attn_impl=impl)


@pytest.mark.compile
@pytest.mark.parametrize("impl", IMPLS)
def test_exports_as_plain_operators(impl):
    """What is exported runs where this repository is not installed."""
    attention = module(impl)
    x = torch.randn(2, 9, 7, 16)
    program = torch.export.export(attention, (x,), dynamic_shapes=({0: torch.export.Dim("batch", max=64)},))
    calls = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert "aten.bmm.default" in calls or "aten.scaled_dot_product_attention.default" in calls
    assert not any("routed_attention" in target for target in calls)
    torch.testing.assert_close(program.module()(x[:1]), attention(x[:1]))


@pytest.mark.parametrize("impl", IMPLS)
def test_operator_is_registered_as_pytorch_expects(impl):
    query, key, value, routing = make_inputs("ragged", torch.float32, requires_grad=True)
    grids = [[grid.rows, grid.cols] for grid in routing[1:3]]
    torch.library.opcheck(op.forward, (query, key, value, routing.routes, *grids, 0.3, impl == "masked"))


@pytest.mark.parametrize("impl", IMPLS)
def test_activation_checkpointing(impl):
    attention, x = module(impl), torch.randn(1, 5, 7, 16, requires_grad=True)
    (expected,) = torch.autograd.grad(attention(x).square().sum(), x)
    (again,) = torch.autograd.grad(checkpoint(attention, x, use_reentrant=False).square().sum(), x)
    assert again.equal(expected)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_transforms_of_torch_func(impl):
    """They know no operators of ours, and get plain ones."""
    attention, x = module(impl).double(), torch.randn(3, 5, 7, 16, dtype=torch.float64)

    def loss(image):
        return attention(image[None]).square().sum()

    torch.testing.assert_close(torch.func.vmap(loss)(x), torch.stack([loss(image) for image in x]))
    images = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(sum(map(loss, images)), images)
    torch.testing.assert_close(torch.func.vmap(torch.func.grad(loss))(x), expected)


@pytest.mark.parametrize("impl", IMPLS)
def test_forward_mode_and_tracers_get_plain_operators(impl):
    attention, x = module("gather" if impl == "masked" else impl), torch.randn(1, 5, 7, 16)
    with torch.autograd.forward_ad.dual_level():
        out = attention(torch.autograd.forward_ad.make_dual(x, torch.ones_like(x)))
        assert torch.autograd.forward_ad.unpack_dual(out).tangent is not None
    traced = torch.jit.trace(module(impl), x, check_trace=False)
    assert "routed_attention" not in str(traced.inlined_graph)


@pytest.mark.parametrize("impl", ["chunked", "masked"])
def test_operations_are_counted(impl):
    """Those of all keys under a mask, of the routed ones elsewhere, and of keys that pad a region."""
    query, key, value, routing = make_inputs("even", torch.float32, requires_grad=True)
    keys = 14 * 14 if impl == "masked" else 4 * 4
    with FlopCounterMode(display=False) as counter:
        out = routed_attention(query, key, value, routing, impl=impl)
    assert counter.get_total_flops() == 2 * 2 * query.numel() * keys
    with FlopCounterMode(display=False) as counter:
        torch.autograd.grad(out.sum(), (query, key, value))
    assert counter.get_total_flops() == 5 * 2 * query.numel() * keys


@pytest.mark.parametrize("impl", IMPLS)
def test_autocast_leaves_float64_alone(impl):
    inputs = make_inputs("ragged")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = routed_attention(*inputs, scale=0.3, impl=impl)
    torch.testing.assert_close(out, reference(*inputs, scale=0.3), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("impl", [*IMPLS, "gather"])
@pytest.mark.parametrize("size,regions", [((1, 40), 4), ((7, 12), 7)])
def test_channels_that_do_not_lie_side_by_side(size, regions, impl):
    """One head and regions of one row: rows of queries are then views, whose channels are far apart."""
    grid = RegionGrid.fit(*size, regions)
    maps = [torch.randn(1, 8, *size, dtype=torch.float64).permute(0, 2, 3, 1).unflatten(-1, (1, 8)) for _ in range(3)]
    maps = [x.requires_grad_() for x in maps]
    inputs = *maps, route_regions(*maps[:2], grid, grid, 2)
    expected = reference(*inputs, scale=0.3)
    upstream = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for result, expect in zip(results(inputs, impl), (expected, *torch.autograd.grad(expected, maps, upstream)),
                              strict=True):
        torch.testing.assert_close(result, expect, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("impl", IMPLS)
def test_second_derivatives_are_refused(impl):
    x = torch.randn(1, 5, 7, 16, requires_grad=True)
    (grad,) = torch.autograd.grad(module(impl)(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r'second derivatives; attn_impl="gather" has'):
        torch.autograd.grad(grad.sum(), x)


@pytest.mark.parametrize("impl", IMPLS)
def test_without_gradients_of_some_inputs(impl):
    query, key, value, routing = make_inputs("ragged", requires_grad=True)
    out = routed_attention(query.detach(), key, value.detach(), routing, impl=impl)
    expected = torch.autograd.grad(reference(query, key, value, routing, 8**-0.5).sum(), key)[0]
    torch.testing.assert_close(torch.autograd.grad(out.sum(), key)[0], expected, rtol=1e-11, atol=1e-11)
