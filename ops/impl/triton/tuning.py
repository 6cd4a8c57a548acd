"""Which way and in which tiles the kernels go through a map."""
from typing import NamedTuple

import torch

from ...regions import RegionGrid

MAX_BITS = 64  # routes of one query as the bits of an int64


class Tile(NamedTuple):
    """Tokens that a program computes and tokens that it streams past them at a time, warps, and pipeline stages."""
    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


def _power_of_2(n: int, low: int, high: int) -> int:
    """The smallest power of two from `n` up, kept within `low` and `high`."""
    return min(max(1 << (n - 1).bit_length(), low), high)


def choose_tile(own: int, streamed: int, head_dim: int, dtype: torch.dtype) -> Tile:
    """The tile of a kernel whose program has `own` tokens to compute and `streamed` tokens to stream past them.

    16 tokens are the fewest that the matrix units take. 64 x 64 logits in float32 are 32 registers a thread of 4 warps,
    which leaves room for the accumulators of heads up to 64; wider ones, and float32 inputs, are spread over 8 warps or
    take fewer tokens, so that no kernel spills (`scripts/compile_kernels.py` reports it).
    """
    wide = head_dim > 64
    most = 32 if dtype == torch.float32 and wide else 64
    block_m, block_n = _power_of_2(own, 16, most), _power_of_2(streamed, 16, most)
    warps = max(1, block_m * block_n // 1024)
    return Tile(block_m, block_n, min(8, 2 * warps) if wide or dtype == torch.float32 else warps, 2)


def is_dense(query_grid: RegionGrid, key_grid: RegionGrid, topk: int) -> bool:
    """Whether to go through the whole map under a mask of the routes, instead of region by region.

    A tile of one query region computes at least 16 rows, though the region may hold one token; a tile of the whole map
    has no such waste, but attends to every key. The cheaper in logits computed is taken. The same count holds for the
    gradients of the keys, with the roles of queries and keys exchanged.
    """
    if key_grid.num_regions > MAX_BITS:
        return False

    def rows(grid: RegionGrid) -> int:
        return grid.num_regions * max(16, grid.tokens_per_region)

    tokens = query_grid.height * query_grid.width * key_grid.height * key_grid.width
    forward = rows(query_grid) * topk * key_grid.tokens_per_region
    chosen_by = topk * query_grid.num_regions / key_grid.num_regions
    backward = rows(key_grid) * chosen_by * query_grid.tokens_per_region
    return 2 * tokens < forward + backward
