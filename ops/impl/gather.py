"""The paper's formulation: copy the keys and values that each query region is routed to, then attend densely.

Plain products, which every transform of PyTorch and every exporter knows, and the reference of the other
implementations. Its cost is memory: every key is copied once for each query region that chose it.
"""
import torch
from einops import rearrange

from ..regions import RegionGrid
from ..routing import Routing
from ..rows import from_rows, padding_bias, row_index, to_rows


def _gather(x_BHWND: torch.Tensor, grid: RegionGrid, rows_PK: torch.Tensor) -> torch.Tensor:
    """(B, H, W, N, D) -> (B * N * Rq, K * T, D): the tokens that each query region and head is routed to."""
    # Whole rows of T * D numbers: one copy of contiguous memory each.
    gathered = to_rows(x_BHWND, grid).flatten(1).index_select(0, rows_PK.flatten())
    return rearrange(gathered, "(r k) (t d) -> r (k t) d", k=rows_PK.shape[1], t=grid.tokens_per_region)


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
    rows_PK = row_index(routes, key_grid.num_regions, num_heads)
    query_rows = to_rows(query, query_grid) * scale
    key_rows = _gather(key, key_grid, rows_PK)
    value_rows = _gather(value, key_grid, rows_PK)

    logits = torch.bmm(query_rows, key_rows.transpose(1, 2))
    if key_grid.is_padded:
        logits_BNRTL = logits.view(routes.shape[0], num_heads, routes.shape[1], *logits.shape[1:])
        bias_BRL = padding_bias(key_grid, logits)[routes].flatten(2)
        logits = (logits_BNRTL + bias_BRL[:, None, :, None, :]).view_as(logits)
    attended = torch.bmm(logits.softmax(dim=-1), value_rows)
    return from_rows(attended, query_grid, num_heads)
