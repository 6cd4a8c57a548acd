"""The paper's formulation: copy the keys and values that each query region is routed to, then attend densely.

Written as plain products. It is the reference of the other implementations, and the fastest on the CPU where regions
hold many tokens. Its cost is memory: every key is copied once for each query region that chose it.
"""
import torch

from ..regions import RegionGrid


def _region_rows(x_BHWND: torch.Tensor, grid: RegionGrid) -> torch.Tensor:
    """(B, H, W, N, D) -> (B * R * N, T * D): one contiguous row for each region and head."""
    x_BYXNhwD = grid.cut(x_BHWND).permute(0, 1, 3, 5, 2, 4, 6)
    return x_BYXNhwD.reshape(-1, grid.tokens_per_region * x_BHWND.shape[-1])


def _row_index(routes_BRK: torch.Tensor, num_regions: int, num_heads: int) -> torch.Tensor:
    """Rows of `_region_rows` in the order in which queries read them, flat over (B, Rq, N, K)."""
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
    routes: torch.Tensor,
    query_grid: RegionGrid,
    key_grid: RegionGrid,
    scale: float,
) -> torch.Tensor:
    """See `ops.routed_attention`."""
    num_heads, head_dim = query.shape[-2:]
    rows = _row_index(routes, key_grid.num_regions, num_heads)
    keys_per_query = routes.shape[-1] * key_grid.tokens_per_region

    query_rows = _region_rows(query, query_grid).unflatten(1, (query_grid.tokens_per_region, head_dim)) * scale
    key_rows = _region_rows(key, key_grid).index_select(0, rows).view(-1, keys_per_query, head_dim)
    value_rows = _region_rows(value, key_grid).index_select(0, rows).view(-1, keys_per_query, head_dim)

    logits = torch.bmm(query_rows, key_rows.transpose(1, 2))
    if key_grid.is_padded:
        logits_BRNTL = logits.view(*routes.shape[:2], num_heads, *logits.shape[1:])
        logits = (logits_BRNTL + _padding_bias(routes, key_grid, logits)).view_as(logits)
    attended = torch.bmm(logits.softmax(dim=-1), value_rows)

    grid = query_grid
    out_BYXNhwD = attended.view(-1, grid.rows, grid.cols, num_heads, grid.region_height, grid.region_width, head_dim)
    return grid.join(out_BYXNhwD.permute(0, 1, 4, 2, 5, 3, 6))
