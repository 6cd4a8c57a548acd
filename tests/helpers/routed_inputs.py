"""Inputs of routed attention: maps and regions of many shapes."""
import torch

from ops import RegionGrid, route_regions

# (query map, query regions, key map, key regions, top-k)
CASES = {
    "even": ((14, 14), 7, (14, 14), 7, 4),
    "ragged": ((9, 13), 4, (9, 13), 4, 3),
    "more ragged": ((10, 11), 7, (10, 11), 7, 5),
    "small queries on a large map": ((3, 3), 3, (12, 10), 5, 2),
    "large queries on a small map": ((11, 8), 2, (3, 4), 2, 1),
    "all regions": ((8, 9), 3, (8, 9), 3, 9),
    "one region": ((5, 7), 1, (5, 7), 1, 1),
    "one token": ((1, 1), 7, (1, 1), 7, 1),
    "one row": ((1, 17), 7, (1, 17), 7, 3),
}


def make_inputs(case, dtype=torch.float64, heads=2, head_dim=8, batch=2, requires_grad=False):
    query_size, query_regions, key_size, key_regions, topk = CASES[case]
    generator = torch.Generator().manual_seed(0)
    query_grid = RegionGrid.fit(*query_size, query_regions)
    key_grid = RegionGrid.fit(*key_size, key_regions)
    maps = [
        torch.randn(batch, *size, heads, head_dim, generator=generator, dtype=torch.float64).to(dtype)
        for size in (query_size, key_size, key_size)
    ]
    routing = route_regions(maps[0], maps[1], query_grid, key_grid, topk)
    return *(x.requires_grad_(requires_grad) for x in maps), routing
