"""Region-to-region routing: which key regions each query region attends to (BiFormer, section 3.2)."""
from typing import NamedTuple

import torch

from .checks import check_whole
from .precision import without_autocast
from .regions import RegionGrid


class Routing(NamedTuple):
    """Which regions of the keys' map each region of the queries' map attends to.

    routes: (B, Rq, K) int64, the key regions of each query region, all different, the most similar first.
    query_grid: Regions of the queries' map.
    key_grid: Regions of the keys' map.
    points: Where the queries were read if they are not the map's own tokens, (B, groups, Hq, Wq, 2) as (y, x), from -1
        (the first row or column) to 1 (the last). For visualisation: attention does not look at it.
    """
    routes: torch.Tensor
    query_grid: RegionGrid
    key_grid: RegionGrid
    points: torch.Tensor | None = None


def region_means(x_BHWND: torch.Tensor, grid: RegionGrid) -> torch.Tensor:
    """Mean of each region's real tokens, in float32 at least.

    Args:
        x_BHWND: (B, H, W, heads, head_dim) map of any strides.
        grid: How the map is cut; padding does not count.

    Returns:
        (B, R, heads * head_dim) means.
    """
    dtype = torch.promote_types(x_BHWND.dtype, torch.float32)
    # Two sums over one axis each: a single sum over both takes three times as long on the CPU.
    sums_BYXND = grid.split(x_BHWND).sum(4, dtype=dtype).sum(2)
    if grid.is_padded:
        counts = grid.token_counts(x_BHWND.device).clamp(min=1)[:, :, None, None]
    else:
        counts = grid.tokens_per_region
    return (sums_BYXND / counts).flatten(3).flatten(1, 2)


def _leave_out_empty(scores_BRR: torch.Tensor, key_grid: RegionGrid) -> torch.Tensor:
    """The scores, with minus infinity for key regions without tokens, which a grid of open size may have."""
    if not key_grid.has_open_size:
        return scores_BRR
    return scores_BRR.masked_fill(key_grid.token_counts(scores_BRR.device).flatten() == 0, float("-inf"))


def route_regions(
    query: torch.Tensor, key: torch.Tensor, query_grid: RegionGrid, key_grid: RegionGrid, topk: int
) -> Routing:
    """The `topk` key regions whose mean key is the most similar to each query region's mean query.

    No gradient flows through the routing, and it is computed in float32 at least, whatever autocast says. The paper
    scales the scores by dim ** -0.5, which changes no order and is left out.

    Args:
        query: (B, Hq, Wq, heads, head_dim).
        key: (B, Hk, Wk, heads, head_dim).
        query_grid: Regions of the query map.
        key_grid: Regions of the key map.
        topk: Regions to keep for each query region; all are kept where there are fewer.

    Returns:
        The routes, (B, Rq, min(topk, Rk)), and the grids.

    Raises:
        ValueError: `topk` is no whole number from 1 up, a map is not of its grid's size, or the maps do not fit each
            other.
    """
    check_whole(topk=topk)
    for name, x, grid in (("query", query, query_grid), ("key", key, key_grid)):
        if x.ndim != 5 or x.shape[1:3] != (grid.height, grid.width):
            raise ValueError(
                f"{name} must be (batch, {grid.height}, {grid.width}, heads, head_dim) for its grid, "
                f"got {tuple(x.shape)}"
            )
    if (query.shape[0], *query.shape[3:]) != (key.shape[0], *key.shape[3:]):
        raise ValueError(
            f"query and key must have one batch, heads and head_dim, got {tuple(query.shape)} and {tuple(key.shape)}"
        )
    # Not by `torch.no_grad()`, which exporters keep as a graph within the graph; quantisation then refuses it.
    query, key = query.detach(), key.detach()
    with without_autocast(query):
        scores_BRR = region_means(query, query_grid) @ region_means(key, key_grid).transpose(1, 2)
    scores_BRR = _leave_out_empty(scores_BRR, key_grid)
    routes_BRK = scores_BRR.topk(min(topk, key_grid.num_regions), dim=-1).indices
    return Routing(routes_BRK, query_grid, key_grid)
