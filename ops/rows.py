"""Maps as rows: the tokens of one region and head side by side in memory."""
import torch
from einops import rearrange

from .regions import RegionGrid


def _by_region_and_head(x_BHWND: torch.Tensor, grid: RegionGrid) -> torch.Tensor:
    """(B, H, W, N, D) -> (B, Y, X, N, h, w, D), a view where the map needs no padding."""
    return rearrange(grid.pad(x_BHWND), "b (y h) (x w) n d -> b y x n h w d", y=grid.rows, x=grid.cols)


def to_rows(x_BHWND: torch.Tensor, grid: RegionGrid) -> torch.Tensor:
    """(B, H, W, N, D) -> (B * R * N, T, D), zeros where a region is padded."""
    return _by_region_and_head(x_BHWND, grid).reshape(-1, grid.tokens_per_region, x_BHWND.shape[-1])


def to_rows_of_both(x_BHWND: torch.Tensor, y_BHWND: torch.Tensor, grid: RegionGrid) -> torch.Tensor:
    """`to_rows` of two maps, (2, B * R * N, T, D)."""
    views = [_by_region_and_head(z, grid) for z in (x_BHWND, y_BHWND)]
    return torch.stack(views).view(2, -1, grid.tokens_per_region, x_BHWND.shape[-1])


def from_rows(rows: torch.Tensor, grid: RegionGrid, num_heads: int) -> torch.Tensor:
    """(B * R * N, T, D) -> (B, H, W, N, D), without the padding."""
    sizes = dict(y=grid.rows, x=grid.cols, n=num_heads, h=grid.region_height)
    return grid.crop(rearrange(rows, "(b y x n) (h w) d -> b (y h) (x w) n d", **sizes))


def write_rows(rows: torch.Tensor, grid: RegionGrid, out_BHWND: torch.Tensor):
    """`from_rows` into a map that is there: without padding, one copy instead of two."""
    if grid.is_padded:
        out_BHWND.copy_(from_rows(rows, grid, out_BHWND.shape[-2]))
        return
    view = _by_region_and_head(out_BHWND, grid)
    view.copy_(rows.view(view.shape))


def padding_bias(grid: RegionGrid, like: torch.Tensor) -> torch.Tensor:
    """(R, T) of the type of `like`: minus infinity where a token is padding, zero elsewhere."""
    real_RT = grid.is_real(like.device)
    return like.new_zeros(real_RT.shape).masked_fill_(~real_RT, float("-inf"))


def absolute_routes(routes_BRK: torch.Tensor, num_regions: int) -> torch.Tensor:
    """(B * Rq, K): which of all B * `num_regions` key regions each query region is routed to."""
    images_B = torch.arange(routes_BRK.shape[0], device=routes_BRK.device)
    return (images_B[:, None, None] * num_regions + routes_BRK).flatten(0, 1)


def row_index(routes_BRK: torch.Tensor, num_regions: int, num_heads: int) -> torch.Tensor:
    """Which of the keys' rows each row of queries is routed to, (B * Rq * N, K); there are `num_regions` of keys."""
    heads_N = torch.arange(num_heads, device=routes_BRK.device)
    regions_RK = absolute_routes(routes_BRK, num_regions)
    return (regions_RK[:, None, :] * num_heads + heads_N[:, None]).flatten(0, 1)
