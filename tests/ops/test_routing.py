import pytest
import torch

from helpers.routed_reference import region_means as reference_means
from ops import RegionGrid, region_means, route_regions


@pytest.mark.parametrize("height,width", [(14, 14), (9, 13), (1, 1), (50, 61)])
def test_region_means_leave_padding_out(height, width):
    grid = RegionGrid.fit(height, width)
    x = torch.randn(2, height, width, 2, 3, dtype=torch.float64)
    torch.testing.assert_close(region_means(x, grid), reference_means(x, grid), rtol=1e-12, atol=1e-12)


def test_routes_are_the_most_similar_regions_first():
    query_grid, key_grid = RegionGrid.fit(6, 5, 3), RegionGrid.fit(11, 8, 4)
    query, key = torch.randn(2, 6, 5, 2, 4), torch.randn(2, 11, 8, 2, 4)
    routes, *grids, points = route_regions(query, key, query_grid, key_grid, 5)
    assert grids == [query_grid, key_grid] and points is None
    scores = reference_means(query, query_grid) @ reference_means(key, key_grid).transpose(1, 2)
    assert routes.dtype == torch.int64
    assert routes.equal(scores.topk(5, dim=-1).indices)


def test_topk_is_at_most_the_number_of_regions():
    grid = RegionGrid.fit(3, 3, 7)
    x = torch.randn(1, 3, 3, 1, 4)
    assert route_regions(x, x, grid, grid, 16).routes.shape == (1, 9, 9)


def test_routing_is_in_float32_under_autocast():
    grid = RegionGrid.fit(28, 28)
    query, key = torch.randn(1, 28, 28, 2, 16), torch.randn(1, 28, 28, 2, 16)
    outside = route_regions(query, key, grid, grid, 4).routes
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert route_regions(query, key, grid, grid, 4).routes.equal(outside)
    assert region_means(query.bfloat16(), grid).dtype == torch.float32


def test_routing_has_no_gradient():
    grid = RegionGrid.fit(7, 7)
    x = torch.randn(1, 7, 7, 1, 4, requires_grad=True)
    assert not route_regions(x, x, grid, grid, 2).routes.requires_grad


def test_mistakes_are_explained():
    grid = RegionGrid.fit(7, 7)
    x = torch.randn(1, 7, 7, 1, 4)
    with pytest.raises(ValueError, match="topk must be at least 1, got 0"):
        route_regions(x, x, grid, grid, 0)
    with pytest.raises(ValueError, match=r"key must be \(batch, 7, 7, heads, head_dim\)"):
        route_regions(x, x[:, :6], grid, grid, 1)
    with pytest.raises(ValueError, match="query and key must have one batch, heads and head_dim"):
        route_regions(x.expand(2, -1, -1, -1, -1), x, grid, grid, 1)
    with pytest.raises(ValueError, match="query and key must have one batch, heads and head_dim"):
        route_regions(x, x.expand(-1, -1, -1, 2, -1), grid, grid, 1)
