"""The paper's formulation: copy the keys and values that each query region is routed to, then attend densely.

Written as plain products. It is the reference of the other implementations, and the fastest on the CPU where regions
hold many tokens. Its cost is memory: every key is copied once for each query region that chose it.
"""
import torch
from einops import rearrange

from ..regions import RegionGrid
from ..routing import Routing


def _region_rows(x_BHWND: torch.Tensor, grid: RegionGrid) -> torch.Tensor:
    """(B, H, W, N, D) -> (B * R * N, T, D): the tokens of each region and head side by side."""
    x_BHWND = grid.pad(x_BHWND)
    return rearrange(x_BHWND, "b (y h) (x w) n d -> (b y x n) (h w) d", y=grid.rows, x=grid.cols)


def _gather(x_BHWND: torch.Tensor, grid: RegionGrid, rows: torch.Tensor, topk: int) -> torch.Tensor:
    """(B, H, W, N, D) -> (B * Rq * N, K * T, D): the tokens that each query region and head is routed to."""
    # Whole rows of T * D numbers: one copy of contiguous memory each.
    gathered = _region_rows(x_BHWND, grid).flatten(1).index_select(0, rows)
    return rearrange(gathered, "(r k) (t d) -> r (k t) d", k=topk, t=grid.tokens_per_region)


def _row_index(routes_BRK: torch.Tensor, num_regions: int, num_heads: int) -> torch.Tensor:
    """Which of `_region_rows` the query regions and heads read, flat over (B, Rq, N, K)."""
    images_B = torch.arange(routes_BRK.shape[0], device=routes_BRK.device)
    heads_N = torch.arange(num_heads, device=routes_BRK.device)
    region_BRK = images_B[:, None, None] * num_regions + routes_BRK
    return (region_BRK[:, :, None, :] * num_heads + heads_N[:, None]).flatten()


def _padding_bias(routes_BRK: torch.Tensor, key_grid: RegionGrid, like: torch.Tensor) -> torch.Tensor:
    """(B, Rq, 1, 1, K * Tk): minus infinity where a gathered key is padding, zero elsewhere."""
    real_RT = key_grid.is_real(like.device)
    bias_RT = torch.zeros_like(real_RT, dtype=like.dtype).masked_fill_(~real_RT, float("-inf"))
    return bias_RT[routes_BRK].flatten(2)[:, :, None, None, :]


def routed_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    routing: Routing,
    scale: float,
) -> torch.Tensor:
    """See `ops.routed_attention`."""
    routes, query_grid, key_grid, _ = routing
    num_heads = query.shape[-2]
    topk = routes.shape[-1]
    rows = _row_index(routes, key_grid.num_regions, num_heads)
    query_rows = _region_rows(query, query_grid) * scale
    key_rows = _gather(key, key_grid, rows, topk)
    value_rows = _gather(value, key_grid, rows, topk)

    logits = torch.bmm(query_rows, key_rows.transpose(1, 2))
    if key_grid.is_padded:
        logits_BRNTL = logits.view(*routes.shape[:2], num_heads, *logits.shape[1:])
        logits = (logits_BRNTL + _padding_bias(routes, key_grid, logits)).view_as(logits)
    attended = torch.bmm(logits.softmax(dim=-1), value_rows)

    out_BHWND = rearrange(
        attended,
        "(b y x n) (h w) d -> b (y h) (x w) n d",
        y=query_grid.rows,
        x=query_grid.cols,
        n=num_heads,
        h=query_grid.region_height,
    )
    return query_grid.crop(out_BHWND)
