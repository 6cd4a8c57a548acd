"""The paper's formulation: copy the keys and values that each query region is routed to, then attend densely.

Plain products, which every transform of PyTorch and every exporter knows, and the reference of the other
implementations. Its cost is memory: every key is copied once for each query region that chose it.
"""
import torch

from ..regions import RegionGrid
from ..routing import Routing
from ..rows import from_rows, padding_bias, to_rows


def _row_index(routes_BRK: torch.Tensor, num_regions: int, num_heads: int) -> torch.Tensor:
    """(B * N * Rq, K): `rows.row_index` of all rows, without a number that depends on the batch.

    The images are counted, for the older of the exporters to ONNX takes a batch that is read for a constant.
    """
    images_B11 = (routes_BRK[:, :1, :1] * 0 + 1).cumsum(0) - 1
    heads_N11 = torch.arange(num_heads, device=routes_BRK.device)[:, None, None]
    heads_BN11 = images_B11[:, None] * num_heads + heads_N11  # of all images
    return (heads_BN11 * num_regions + routes_BRK[:, None]).flatten(0, 2)


def _gather(x_BHWND: torch.Tensor, grid: RegionGrid, rows_PK: torch.Tensor) -> torch.Tensor:
    """(B, H, W, N, D) -> (B * N * Rq, K * T, D): the tokens that each query region and head is routed to."""
    # Whole rows of T * D numbers: one copy of contiguous memory each.
    gathered = to_rows(x_BHWND, grid).flatten(1).index_select(0, rows_PK.flatten())
    return gathered.view(-1, rows_PK.shape[1] * grid.tokens_per_region, x_BHWND.shape[-1])


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
    rows_PK = _row_index(routes, key_grid.num_regions, num_heads)
    query_rows = to_rows(query, query_grid) * scale
    key_rows = _gather(key, key_grid, rows_PK)
    value_rows = _gather(value, key_grid, rows_PK)

    logits = torch.bmm(query_rows, key_rows.transpose(1, 2))
    if key_grid.is_padded:
        logits_BNRTL = logits.unflatten(0, (-1, num_heads, query_grid.num_regions))
        bias_BRL = padding_bias(key_grid, logits)[routes].flatten(2)
        logits = (logits_BNRTL + bias_BRL[:, None, :, None, :]).view_as(logits)
    attended = torch.bmm(logits.softmax(dim=-1), value_rows)
    return from_rows(attended, query_grid, num_heads)
