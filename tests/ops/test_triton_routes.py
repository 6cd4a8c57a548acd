"""Fused routing. Without a GPU its kernels run, slowly, in Triton's interpreter: small maps then."""
import pytest
import torch

from ops import RegionGrid, Routing, route_regions

pytest.importorskip("triton")

from helpers.interpreter import DEVICE, needs_working_device
from ops.impl.triton import op as fused_op
from ops.impl.triton.routes import fused_routes

DTYPES = [torch.float32, torch.bfloat16, torch.float16]

# (query map, query regions, key map, key regions)
SMALL = {
    "14": ((14, 14), 7, (14, 14), 7),
    "28": ((28, 28), 7, (28, 28), 7),
    "ragged": ((19, 21), 2, (19, 21), 2),
    "ragged, many regions": ((19, 21), 7, (19, 21), 7),
    "one token": ((1, 1), 7, (1, 1), 7),
    "one row": ((1, 17), 7, (1, 17), 7),
    "as many regions as bits": ((8, 17), 8, (16, 8), 8),
    "small queries on a large map": ((3, 3), 3, (12, 10), 2),
    "large queries on a small map": ((19, 8), 7, (3, 4), 2),
}
LARGE = {
    **{f"{side}, batch 32": ((side, side), 7, (side, side), 7) for side in (56, 28, 14)},
    "50 x 84": ((50, 84), 7, (50, 84), 7),
    "agents": ((7, 7), 7, (56, 56), 7),
}


def make_maps(case, dtype=torch.float32, batch=3, heads=2, head_dim=16):
    """Views of packed projections, and their grids."""
    query_size, query_regions, key_size, key_regions = case
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(*shape, heads, head_dim, generator=generator).to(DEVICE, dtype)

    if query_size == key_size:
        query, key, _ = random(batch, *query_size, 3).unbind(3)
    else:
        query, (key, _) = random(batch, *query_size), random(batch, *key_size, 2).unbind(3)
    return query, key, RegionGrid.fit(*query_size, query_regions), RegionGrid.fit(*key_size, key_regions)


def check(maps, topk, dense):
    """Routes and tables are those of PyTorch."""
    expected = route_regions(*maps, topk)
    ours = fused_routes(*maps, topk, dense)
    assert ours.routes.dtype == torch.int64 and ours.routes.equal(expected.routes)
    if dense:
        expected_tables, tables, others = fused_op.route_bits(expected), ours[1:3], ours[3:]
    else:
        expected_tables = fused_op._inverse(expected.routes, maps[3].num_regions)
        tables, others = ours[3:], ours[1:3]
    assert others == (None, None)
    for table, expected_table in zip(tables, expected_tables, strict=True):
        assert table.dtype == expected_table.dtype and table.is_contiguous() and table.equal(expected_table)


@needs_working_device
@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("topk", [1, 4, 64])
@pytest.mark.parametrize("name", ["ragged", "one token", "small queries on a large map"])
def test_equals_pytorch(name, topk, dense):
    check(make_maps(SMALL[name]), topk, dense)


@needs_working_device
@pytest.mark.slow
@pytest.mark.parametrize("topk,dense", [(16, False), (4, True)])
@pytest.mark.parametrize("name", SMALL)
def test_equals_pytorch_on_every_kind_of_map(name, topk, dense):
    check(make_maps(SMALL[name], torch.bfloat16, batch=2), topk, dense)


@needs_working_device
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [4, 12, 24, 40, 96])
def test_any_type_and_width(dtype, head_dim):
    """Channels as whole blocks, as one that is not filled, and as several of which the last is not."""
    check(make_maps(SMALL["ragged"], dtype, batch=2, head_dim=head_dim), 2, False)


@pytest.mark.gpu
@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("heads", [2, 4, 8, 12, 16])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", LARGE)
def test_equals_pytorch_on_the_networks_maps(name, dtype, heads, dense):
    """But for routes whose scores are within rounding of one another."""
    maps = make_maps(LARGE[name], dtype, batch=32, heads=heads, head_dim=32)
    for topk in (1, 4, 16, 49):
        tables = fused_routes(*maps, topk, dense)
        expected = route_regions(*maps, topk).routes
        assert (tables.routes == expected).float().mean() > 0.999
        assert tables.routes.sort(-1).values.diff(dim=-1).gt(0).all()
        routing = Routing(tables.routes, *maps[2:])
        if dense:
            expected_tables = fused_op.route_bits(routing)
        else:
            expected_tables = fused_op._inverse(tables.routes, maps[3].num_regions)
        assert all(a.equal(b) for a, b in zip(tables[1:3] if dense else tables[3:], expected_tables, strict=True))
        again = fused_routes(*maps, topk, dense)
        assert all(a is b is None or a.equal(b) for a, b in zip(tables, again, strict=True))


@needs_working_device
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_equal_scores_go_to_the_smaller_region(value):
    """Routes are valid even where scores are not numbers."""
    query, key, *grids = make_maps(SMALL["ragged, many regions"], batch=1)
    num_regions = grids[0].num_regions
    routes = fused_routes(torch.full_like(query, value), key * 0 + 1, *grids, 4, False).routes
    assert routes.equal(torch.arange(4, device=DEVICE).expand(1, num_regions, 4))


@needs_working_device
def test_what_is_not_a_number_is_routed_to_first():
    """As PyTorch's top-k sorts it; the rest keeps its order."""
    query, key, *grids = make_maps(SMALL["ragged"], batch=1)
    key[0, -1, -1] = float("nan")
    routes = fused_routes(query, key, *grids, 4, False).routes
    assert routes.equal(route_regions(query, key, *grids, 4).routes) and (routes[..., 0] == 3).all()


@needs_working_device
@pytest.mark.parametrize("dense", [False, True])
def test_what_surrounds_the_maps_in_memory_is_not_read(dense):
    maps = make_maps(SMALL["ragged"])
    around = []
    for x in maps[:2]:
        batch, height, width, heads, head_dim = x.shape
        larger = x.new_full((batch, height + 2, width + 2, heads + 2, head_dim), float("nan"))
        larger[:, 1:-1, 1:-1, 1:-1] = x
        around.append(larger[:, 1:-1, 1:-1, 1:-1])
    check((*around, *maps[2:]), 2, dense)


@needs_working_device
def test_empty_batch():
    tables = fused_routes(*make_maps(SMALL["ragged"], batch=0), 2, False)
    assert tables.routes.shape == (0, 4, 2) and tables.members.shape == (0, 8) and tables.bounds.shape == (0, 5)


@needs_working_device
def test_no_gradient_flows():
    query, key, *grids = make_maps(SMALL["ragged"], batch=1)
    routes = fused_routes(query.requires_grad_(), key.requires_grad_(), *grids, 2, False).routes
    assert not routes.requires_grad


@pytest.mark.gpu
def test_cuda_graphs():
    query, key, *grids = make_maps(LARGE["14, batch 32"], torch.bfloat16, head_dim=32)
    for dense in (False, True):
        fused_routes(query, key, *grids, 4, dense)  # compiles
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            tables = fused_routes(query, key, *grids, 4, dense)
        query.copy_(torch.randn_like(query))
        graph.replay()
        expected = fused_routes(query, key, *grids, 4, dense)
        assert all(a is b is None or a.equal(b) for a, b in zip(tables, expected, strict=True))
