"""Maps as rows: the tokens of one region and head side by side in memory.

All regions of a head follow one another, so that copies of the rows that they are routed to read the keys of one head,
which the cache holds, and not of all heads.
"""
import torch

from .regions import RegionGrid


def _by_head_and_region(x_BHWND: torch.Tensor, grid: RegionGrid) -> torch.Tensor:
    """(B, H, W, N, D) -> (B, N, Y, X, h, w, D), a view where the map needs no padding."""
    return grid.split(x_BHWND).permute(0, 5, 1, 3, 2, 4, 6)


def to_rows(x_BHWND: torch.Tensor, grid: RegionGrid) -> torch.Tensor:
    """(B, H, W, N, D) -> (B * N * R, T, D), zeros where a region is padded, in memory of its own."""
    copy = _by_head_and_region(x_BHWND, grid).clone(memory_format=torch.contiguous_format)
    return copy.view(-1, grid.tokens_per_region, x_BHWND.shape[-1])


def to_rows_of_both(x_BHWND: torch.Tensor, y_BHWND: torch.Tensor, grid: RegionGrid) -> torch.Tensor:
    """`to_rows` of two maps, each token's numbers side by side, (B * N * R, T, 2 * D)."""
    views = [_by_head_and_region(z, grid) for z in (x_BHWND, y_BHWND)]
    return torch.cat(views, -1).view(-1, grid.tokens_per_region, 2 * x_BHWND.shape[-1])


def from_rows(rows: torch.Tensor, grid: RegionGrid, num_heads: int) -> torch.Tensor:
    """(B * N * R, T, D) -> (B, H, W, N, D), without the padding."""
    x_BNYXhwD = rows.unflatten(1, (grid.region_height, -1)).unflatten(0, (-1, num_heads, grid.rows, grid.cols))
    copy = x_BNYXhwD.permute(0, 2, 4, 3, 5, 1, 6).clone(memory_format=torch.contiguous_format)
    return grid.crop(copy.flatten(3, 4).flatten(1, 2))


def write_rows(rows: torch.Tensor, grid: RegionGrid, out_BHWND: torch.Tensor):
    """`from_rows` into a map that is there: without padding, one copy instead of two."""
    if grid.is_padded:
        out_BHWND.copy_(from_rows(rows, grid, out_BHWND.shape[-2]))
        return
    view = _by_head_and_region(out_BHWND, grid)
    view.copy_(rows.view(view.shape))


def padding_bias(grid: RegionGrid, like: torch.Tensor) -> torch.Tensor:
    """(R, T) of the type of `like`: minus infinity where a token is padding, zero elsewhere."""
    real_RT = grid.is_real(like.device)
    return like.new_zeros(real_RT.shape).masked_fill_(~real_RT, float("-inf"))


def row_index(
    routes_BRK: torch.Tensor, num_regions: int, num_heads: int, start: int = 0, stop: int | None = None
) -> torch.Tensor:
    """Which rows of keys each row of queries is routed to, (P, K), for the P rows of queries from `start` to `stop`.

    There are B * N * Rq rows of queries, and `num_regions` regions of keys.
    """
    batch, num_queries, _ = routes_BRK.shape
    rows_P = torch.arange(start, batch * num_heads * num_queries if stop is None else stop, device=routes_BRK.device)
    heads_P = rows_P // num_queries  # of all images
    routes_PK = routes_BRK[heads_P // num_heads, rows_P % num_queries]
    return heads_P[:, None] * num_regions + routes_PK
