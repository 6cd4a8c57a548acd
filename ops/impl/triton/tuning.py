"""The tiles of a kernel, and whether it streams lists of regions or whole maps.

Chosen by measurements (`scripts/tune_kernels.py`), the compiler's reports (`scripts/compile_kernels.py`), and counts of
what a tile computes.
"""
import math
from functools import lru_cache
from typing import NamedTuple

import torch

from ...regions import RegionGrid

MAX_HEAD_DIM = 128
MAX_ONE_PASS = 256  # tokens of the map that one program holds
MAX_BITS = 64  # routes of one query as the bits of an int64


class Tile(NamedTuple):
    """Tokens that a program computes, tokens that it streams past them at a time, warps, and stages of the pipeline."""
    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


class Plan(NamedTuple):
    """How one kernel is launched: tiles for each image and head, and the constants that it is compiled for."""
    tiles: int
    tile: Tile
    dense: bool
    packed: bool
    even_m: bool
    even_n: bool

    def constants(self) -> dict[str, int | bool]:
        return dict(
            BLOCK_M=self.tile.block_m,
            BLOCK_N=self.tile.block_n,
            DENSE=self.dense,
            PACKED=self.packed,
            EVEN_M=self.even_m,
            EVEN_N=self.even_n,
            num_warps=self.tile.num_warps,
            num_stages=self.tile.num_stages,
        )


def _power_of_2(n: int, low: int, high: int) -> int:
    """The smallest power of two from `n` up, kept within `low` and `high`."""
    return min(max(1 << (n - 1).bit_length(), low), high)


def choose_tile(own: int, streamed: int, head_dim: int, dtype: torch.dtype, inverse: bool) -> Tile:
    """The tile for programs that have `own` tokens to compute and `streamed` tokens to stream past them.

    In low precision, for heads of 32, measured on an H100 with Triton 3.6 (`scripts/tune_kernels.py`); for the others,
    by counts of instructions and of spilled registers.

    16 tokens are the fewest that the matrix units take, and one warp's work: more warps would share the columns, and
    each compute all that is said about the rows. 32 streamed tokens leave registers free, so that more programs run
    at once, and waste less of the last tile. Heads of more than 64 get twice the warps; so does float32, whose products
    run on the plain units from registers, and smaller tiles.
    """
    if dtype == torch.float32:
        block_m = _power_of_2(own, 16, 32 if head_dim <= 64 else 16)
        warps = 8 if block_m == 32 or head_dim > 64 else 4
        stages = 1 if inverse else 2 if head_dim <= 64 else 3
        return Tile(block_m, 16, warps, stages)
    block_m = _power_of_2(own, 16, 64)
    if head_dim > 64:
        return Tile(block_m, _power_of_2(streamed, 16, 32 if inverse else 64), max(4, block_m // 8), 2)
    # 32 rows are no map's of the networks at 224, so they were not measured: two warps have room for 64 tokens.
    block_n = _power_of_2(streamed, 16, 64 if block_m == 32 and not (inverse and head_dim > 32) else 32)
    # Keys hold two accumulators: more rows of them, or wider ones, leave no registers to a second stage.
    return Tile(block_m, block_n, block_m // 16, 1 if inverse and (block_m > 16 or head_dim > 32) else 2)


def fits_one_pass(query_grid: RegionGrid, key_grid: RegionGrid, head_dim: int, dtype: torch.dtype) -> bool:
    """Whether, streaming whole maps, one program can compute all gradients of a head.

    It holds all queries, their gradients and a tile of logits in registers: float32 is too large for that, and so are
    wide heads. As it is alone with a head, there must not be many keys either.
    """
    tokens = max(grid.height * grid.width for grid in (query_grid, key_grid))
    return tokens <= MAX_ONE_PASS and head_dim <= 64 and dtype.itemsize == 2


def choose_one_pass_tile(queries: int, head_dim: int) -> Tile:
    """The tile for programs that compute all gradients of a head of `queries` tokens, in 16 bits.

    4 warps and 16 keys for 256 queries: no registers are spilled, from compute capability 8.0 to 12.0, and two programs
    run side by side on a multiprocessor, one of which computes while the other waits. On 9.0, 8 warps and 64 keys take
    8 % fewer instructions, but there is room for one program only; before 9.0 they spill.
    """
    block_m = _power_of_2(queries, 16, MAX_ONE_PASS)
    if block_m <= 64:
        return Tile(block_m, 64 if head_dim <= 32 else 32, block_m // 16, 1)
    if head_dim <= 32:
        return Tile(block_m, 16, block_m // 64, 1)
    return Tile(block_m, 32, block_m // 32, 1)


@lru_cache(maxsize=1024)
def make_plan(
    own: RegionGrid,
    other: RegionGrid,
    listed: int,
    inverse: bool,
    dense: bool,
    head_dim: int,
    dtype: torch.dtype,
    tile: Tile | None = None,
) -> Plan:
    """The plan of a kernel that computes tokens of `own` and streams tokens of `other` past them.

    Args:
        own: Grid of the map whose tokens are computed.
        other: Grid of the map whose tokens are streamed.
        listed: Regions of `other` that a region of `own` is routed to.
        inverse: The keys' side: it computes two gradients, and `listed` is only the mean.
        dense: Stream whole maps under a mask instead of lists of regions.
        head_dim: Numbers of a head.
        dtype: Type of the tokens.
        tile: The tile to take, for measurements; `choose_tile` chooses it otherwise.
    """
    own_tokens, other_tokens = (g.height * g.width if dense else g.tokens_per_region for g in (own, other))
    streamed = other_tokens if dense else listed * other_tokens
    tile = tile or choose_tile(own_tokens, streamed, head_dim, dtype, inverse)
    whole_tiles = math.ceil(other_tokens / tile.block_n) * tile.block_n
    # A tile for each region leaves places empty; packing regions costs arithmetic for each token.
    packed = not dense and whole_tiles > 1.25 * other_tokens
    length = streamed if packed and not inverse else other_tokens
    return Plan(
        tiles=math.ceil(own_tokens / tile.block_m) * (1 if dense else own.num_regions),
        tile=tile,
        dense=dense,
        packed=packed,
        even_m=own_tokens % tile.block_m == 0 and (dense or not own.is_padded),
        even_n=length % tile.block_n == 0 and (dense or not other.is_padded),
    )


def is_dense(query_grid: RegionGrid, key_grid: RegionGrid, topk: int) -> bool:
    """Whether to stream whole maps under a mask of the routes, instead of lists of regions.

    A tile of one region computes at least 16 rows, though the region may hold one token. A tile of the whole map has no
    such waste, but is multiplied with every token of the other map. The way with fewer logits, forward and backward, is
    taken.
    """
    if key_grid.num_regions > MAX_BITS:
        return False

    def rows(grid: RegionGrid) -> int:
        return grid.num_regions * max(16, grid.tokens_per_region)

    pairs = query_grid.height * query_grid.width * key_grid.height * key_grid.width
    by_query = rows(query_grid) * topk * key_grid.tokens_per_region
    by_key = rows(key_grid) * topk * query_grid.num_regions * query_grid.tokens_per_region / key_grid.num_regions
    return 2 * pairs < by_query + by_key
