"""What an attention's weights are computed from, so that they can be looked at."""
from typing import NamedTuple

import torch
import torch.nn.functional as F

from .routing import Routing


class PositionBias(NamedTuple):
    """DeBiFormer's bias by position: a table, sampled at half the offset from each key's point to each query.

    table: (heads, S, S), made for offsets from -1 to 1 along each side.
    points: (B, groups, Hk, Wk, 2) where the keys were read, (y, x) from -1 to 1; a group's heads share its points.
    """
    table: torch.Tensor
    points: torch.Tensor

    def of(self, row: float, col: float) -> torch.Tensor:
        """(B, heads, Hk, Wk): the bias of a query at (row, col) of [-1, 1]."""
        at = torch.tensor([row, col], device=self.points.device, dtype=self.points.dtype)
        grid = ((at - self.points) / 2).flip(-1)
        batch, groups = grid.shape[:2]
        table = self.table.to(grid.dtype).unflatten(0, (groups, -1)).expand(batch, -1, -1, -1, -1)
        bias = F.grid_sample(table.flatten(0, 1), grid.flatten(0, 1), align_corners=True)
        return bias.unflatten(0, (batch, groups)).flatten(1, 2)


class AttentionRecord(NamedTuple):
    """Queries, keys, and what else decides an attention's weights: softmax(scale * q k^T + bias) over the routed keys.

    query: (B, Hq, Wq, heads, head_dim). With published padding, the map is the padded one; so it is with the keys.
    key: (B, Hk, Wk, heads, head_dim).
    scale: Factor of the products.
    routing: Which regions attend to which; None where every query attends to every key.
    bias: By position; None where there is none.
    """
    query: torch.Tensor
    key: torch.Tensor
    scale: float
    routing: Routing | None = None
    bias: PositionBias | None = None

    def is_routed(self, row: int, col: int) -> torch.Tensor:
        """(B, Hk, Wk) bool: the keys that the query in this row and column of its map attends to."""
        if self.routing is None:
            return torch.ones(self.key.shape[:3], dtype=torch.bool, device=self.key.device)
        routes, queries, keys, _ = self.routing
        region = queries.region_of(row, col)
        regions = torch.arange(keys.num_regions, device=routes.device).unflatten(0, (keys.rows, keys.cols))
        regions = regions.repeat_interleave(keys.region_height, 0).repeat_interleave(keys.region_width, 1)
        regions = regions[: keys.height, : keys.width]
        return (regions[None, ..., None] == routes[:, None, None, region]).any(-1)

    def bias_of(self, row: int, col: int) -> torch.Tensor:
        """(B, heads, Hk, Wk): the bias of the query in this row and column, where there is a `bias`."""
        return self.bias.of(*map(_position, (row, col), self.query.shape[1:3]))

    def weights(self, row: int, col: int) -> torch.Tensor:
        """(B, heads, Hk, Wk): the attention of the query in this row and column; 0 for keys that it is not routed to.

        Raises:
            ValueError: The map has no such row or column.
        """
        height, width = self.query.shape[1:3]
        if not (0 <= row < height and 0 <= col < width):
            raise ValueError(f"there is no query in row {row}, column {col} of a map of {height} x {width}")
        dtype = torch.promote_types(self.query.dtype, torch.float32)
        query, key = self.query[:, row, col].to(dtype), self.key.to(dtype)
        logits = self.scale * torch.einsum("bnd,bhwnd->bnhw", query, key)
        if self.bias is not None:
            logits = logits + self.bias_of(row, col)
        logits = logits.masked_fill(~self.is_routed(row, col)[:, None], -torch.inf)
        return logits.flatten(2).softmax(-1).view_as(logits)


def _position(index: int, count: int) -> float:
    """Of one of `count` tokens in a row: from -1 to 1; a single one lies at 0."""
    return 2 * index / (count - 1) - 1 if count > 1 else 0.0
