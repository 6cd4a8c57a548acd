"""Dense scaled_dot_product_attention over the whole map under a mask made from the routes.

It computes all pairs and keeps the routed ones. With regions of a few tokens this beats gathering by far, since
nothing is copied: queries, keys and values are read in map order, and the ragged edge needs no padding.
"""
import torch
import torch.nn.functional as F
from einops import rearrange, repeat

from ..regions import RegionGrid
from ..routing import Routing


def _route_mask(
    routes_BRK: torch.Tensor, query_grid: RegionGrid, key_grid: RegionGrid, dtype: torch.dtype
) -> torch.Tensor:
    """(B, 1, Hq * Wq, Hk * Wk): zero where a query's region is routed to a key's region, else minus infinity."""
    q, k = query_grid, key_grid
    shape_BRR = (routes_BRK.shape[0], q.num_regions, k.num_regions)
    mask_BRR = torch.full(shape_BRR, float("-inf"), dtype=dtype, device=routes_BRK.device).scatter(2, routes_BRK, 0.0)
    mask_BHWHW = repeat(
        mask_BRR,
        "b (qy qx) (ky kx) -> b (qy qh) (qx qw) (ky kh) (kx kw)",
        qy=q.rows,
        ky=k.rows,
        qh=q.region_height,
        qw=q.region_width,
        kh=k.region_height,
        kw=k.region_width,
    )
    mask_BHWHW = mask_BHWHW[:, : q.height, : q.width, : k.height, : k.width]
    return rearrange(mask_BHWHW, "b qh qw kh kw -> b 1 (qh qw) (kh kw)")


def routed_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    routing: Routing,
    scale: float,
) -> torch.Tensor:
    """See `ops.routed_attention`."""
    routes, query_grid, key_grid, _ = routing
    everything_routed = routes.shape[-1] == key_grid.num_regions
    mask = None if everything_routed else _route_mask(routes, query_grid, key_grid, query.dtype)
    query_BNLD, key_BNLD, value_BNLD = (x.flatten(1, 2).transpose(1, 2) for x in (query, key, value))
    if query.device.type == "cpu":
        # The CPU kernel reads all keys for every block of queries: worth one copy into rows side by side.
        key_BNLD = key_BNLD.contiguous()
    out_BNLD = F.scaled_dot_product_attention(query_BNLD, key_BNLD, value_BNLD, attn_mask=mask, scale=scale)
    return out_BNLD.transpose(1, 2).unflatten(1, (query_grid.height, query_grid.width))
