"""Fused routing: all that attention has to know about the routes of two maps, in two launches.

`ops.route_regions` and the tables that attention makes of its routes are a dozen small launches a layer, and in a
training step the host cannot issue them as fast as a GPU runs them. Here one kernel takes the mean of each region, for
both maps, and a second one, with 16 or all query regions of an image a program, scores, selects and writes the tables.

Nothing is approximated: sums are in float32 and scores as exact as float32's, whatever the maps' type and PyTorch's
setting of tf32. They are added in another order than PyTorch's, so routes equal those of `route_regions` except where
scores are within rounding of one another. Equal scores go to the smaller region. Routes of an image are valid, and all
different, even where its scores are not numbers. There are no atomics: repeated runs agree to the bit.
"""
from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ...launch import launch
from ...regions import RegionGrid
from .kernels import MAX_BLOCK
from .tiles import divide

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_LOWEST = tl.constexpr(-(2**63))
# Each float32 as three bfloat16 and the six products that matter: as exact as float32's own, but on the matrix units.
# The plain units would read the keys' tile from shared memory with up to 32 lanes at one bank, ten times as slow.
# The interpreter knows no such products.
_HAS_BF16X6 = tuple(int(part) for part in triton.__version__.split(".")[:2]) >= (3, 6)
_PRECISION = tl.constexpr("bf16x6" if _HAS_BF16X6 and not triton.knobs.runtime.interpret else "ieee")
_TOKENS = tl.constexpr(16)  # tokens of a region whose bits are written at a time


class Tables(NamedTuple):
    """The routes, and the tables that one way of attention needs; those of the other are None.

    routes: (B, Rq, K) int64, the key regions of each query region, the most similar first.
    query_bits: Dense: (B, Lq) int64, for each query the regions that it is routed to as bits, in row-major order and
        with zeros up to a multiple of 128 tokens.
    key_bits: Dense: (1, Lk) int64, for each key the bit of its region, and zeros alike.
    members: By list: (B, Rq * K) int32, the query regions that chose each key region, in ascending order.
    bounds: By list: (B, Rk + 1) int32, where the members of each key region begin.
    """
    routes: torch.Tensor
    query_bits: torch.Tensor | None = None
    key_bits: torch.Tensor | None = None
    members: torch.Tensor | None = None
    bounds: torch.Tensor | None = None


# --- device functions -------------------------------------------------------------------------------------------------


@triton.jit
def _unpack(code):
    """(height, width, rows, cols) of a grid, of `_code_of`."""
    height = tl.cast(code >> 40, tl.int32)
    width = tl.cast((code >> 16) & 0xFFFFFF, tl.int32)
    return height, width, tl.cast((code >> 8) & 0xFF, tl.int32), tl.cast(code & 0xFF, tl.int32)


@triton.jit
def _region(region, code):
    """(first row, first column, rows, columns) of the real tokens of a region, or of many."""
    height, width, rows, cols = _unpack(code)
    region_height, region_width = tl.cdiv(height, rows), tl.cdiv(width, cols)
    y, x = divide(region, cols)
    row, col = y * region_height, x * region_width
    return row, col, tl.minimum(region_height, height - row), tl.minimum(region_width, width - col)


@triton.jit
def _mean_of_region(
    map_ptr, image_stride, row_stride, col_stride, image, region, code, channel, C: tl.constexpr, BLOCK_T: tl.constexpr
):
    """(channels,) float32. Strides are in units of 8 numbers, for which reason the compiler knows that they are."""
    first_row, first_col, rows, cols = _region(region, code)
    count = rows * cols
    corner = image.to(tl.int64) * image_stride + first_row.to(tl.int64) * row_stride + first_col * col_stride
    corner_ptr = map_ptr + corner * 8
    total = tl.zeros((BLOCK_T, channel.shape[0]), tl.float32)
    for start in range(0, count, BLOCK_T):
        token = start + tl.arange(0, BLOCK_T)
        row, col = divide(token, cols)
        offset = row.to(tl.int64) * row_stride + col.to(tl.int64) * col_stride
        mask = (token < count)[:, None] & (channel < C)[None, :]
        total += tl.load(corner_ptr + offset[:, None] * 8 + channel[None, :], mask=mask, other=0.0).to(tl.float32)
    return tl.div_rn(tl.sum(total, 0), count.to(tl.float32))


@triton.jit
def _load_means(ptr, region, num_regions, start, C: tl.constexpr, BLOCK_C: tl.constexpr):
    """(regions, BLOCK_C) channels from `start` on, zeros where there is no region or channel."""
    channel = start + tl.arange(0, BLOCK_C)
    mask = (region < num_regions)[:, None] & (channel < C)[None, :]
    return tl.load(ptr + region[:, None] * C + channel[None, :], mask=mask, other=0.0)


@triton.jit
def _sortable(scores, is_key):
    """int64 keys in the order of the scores, all different: of equal scores the smaller column's is the larger.

    Columns of no region get the lowest of all, which no score has, be it NaN or infinite.
    """
    bits = scores.to(tl.int32, bitcast=True)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # as integers, negative floats count down
    from_end = scores.shape[1] - tl.arange(0, scores.shape[1])  # at least 1
    keys = (ordered.to(tl.int64) << 32) | from_end[None, :].to(tl.int64)
    return tl.where(is_key[None, :], keys, _LOWEST)


@triton.jit
def _write_bits(row_ptr, bits, region, num_regions, code):
    """Each region's bits to all of its tokens."""
    height, width, grid_rows, grid_cols = _unpack(code)
    first_row, first_col, rows, cols = _region(region, code)
    region_width = tl.cdiv(width, grid_cols)
    for start in range(0, tl.cdiv(height, grid_rows) * region_width, _TOKENS):
        row, col = divide(start + tl.arange(0, _TOKENS), region_width)
        real = (region < num_regions)[:, None] & (row[None, :] < rows[:, None]) & (col[None, :] < cols[:, None])
        token = (first_row[:, None] + row[None, :]) * width + first_col[:, None] + col[None, :]
        tl.store(row_ptr + token, tl.broadcast_to(bits[:, None], token.shape), mask=real)


@triton.jit
def _padded_length(code):
    """(tokens, tokens up to a multiple of MAX_BLOCK)"""
    height, width, rows, cols = _unpack(code)
    return height * width, tl.cdiv(height * width, MAX_BLOCK) * MAX_BLOCK


@triton.jit
def _write_zeros(row_ptr, code):
    """Behind the tokens of a map, where the tables are padded."""
    length, padded = _padded_length(code)
    token = length + tl.arange(0, MAX_BLOCK)
    tl.store(row_ptr + token, tl.zeros((MAX_BLOCK,), tl.int64), mask=token < padded)


@triton.jit
def _write_inverse(members_ptr, bounds_ptr, chosen, query_region, num_keys):
    """The rows that chose each column, and where each column's begin.

    chosen: (query regions, key regions) int32, 0 or 1.
    """
    counts = tl.sum(chosen, 0)
    ends = tl.cumsum(counts, 0)
    place = tl.cumsum(chosen, 0) - chosen + (ends - counts)[None, :]
    tl.store(members_ptr + place, tl.broadcast_to(query_region[:, None], place.shape), mask=chosen != 0)
    column = tl.arange(0, chosen.shape[1])
    tl.store(bounds_ptr, 0)
    tl.store(bounds_ptr + 1 + column, ends, mask=column < num_keys)


# --- kernels ----------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["query_code", "key_code"])
def routing_means_kernel(
    query_ptr, key_ptr, means_ptr,
    q_image_stride, q_row_stride, q_col_stride, k_image_stride, k_row_stride, k_col_stride,
    query_code, key_code,
    C: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """BLOCK_C channels of the mean of one region of one map of one image: means (B, Rq + Rk, C), the queries' first."""
    _, _, q_rows, q_cols = _unpack(query_code)
    _, _, k_rows, k_cols = _unpack(key_code)
    num_queries = q_rows * q_cols
    place, block = divide(tl.program_id(0), tl.cdiv(C, BLOCK_C))
    image, region = divide(place, num_queries + k_rows * k_cols)
    channel = block * BLOCK_C + tl.arange(0, BLOCK_C)
    if region < num_queries:
        mean = _mean_of_region(
            query_ptr, q_image_stride, q_row_stride, q_col_stride, image, region, query_code, channel, C, BLOCK_T
        )
    else:
        mean = _mean_of_region(
            key_ptr, k_image_stride, k_row_stride, k_col_stride, image, region - num_queries, key_code, channel, C,
            BLOCK_T,
        )  # fmt: skip
    tl.store(means_ptr + place.to(tl.int64) * C + channel, mean, mask=channel < C)


@triton.jit(do_not_specialize=["topk", "query_code", "key_code"])
def routing_tables_kernel(
    means_ptr, routes_ptr, queries_ptr, keys_ptr,
    topk, query_code, key_code,
    C: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, DENSE: tl.constexpr,
):  # fmt: skip
    """The routes of BLOCK_Q query regions of an image, and their tables.

    DENSE: queries_ptr is query_bits and keys_ptr is key_bits. Otherwise BLOCK_Q holds all query regions, and these are
    members and bounds.
    """
    _, _, q_rows, q_cols = _unpack(query_code)
    _, _, k_rows, k_cols = _unpack(key_code)
    num_queries, num_keys = q_rows * q_cols, k_rows * k_cols
    image, tile = divide(tl.program_id(0), tl.cdiv(num_queries, BLOCK_Q))
    query_region, key_region = tile * BLOCK_Q + tl.arange(0, BLOCK_Q), tl.arange(0, BLOCK_K)
    is_query, is_key = query_region < num_queries, key_region < num_keys
    query_means = means_ptr + image.to(tl.int64) * (num_queries + num_keys) * C
    scores = tl.zeros((BLOCK_Q, BLOCK_K), tl.float32)
    for start in range(0, C, BLOCK_C):
        q = _load_means(query_means, query_region, num_queries, start, C, BLOCK_C)
        k = _load_means(query_means + num_queries * C, key_region, num_keys, start, C, BLOCK_C)
        scores = tl.dot(q, tl.trans(k), scores, input_precision=_PRECISION)

    left = _sortable(scores, is_key)
    bits = tl.zeros((BLOCK_Q,), tl.int64)
    route_ptrs = routes_ptr + (image * num_queries + query_region).to(tl.int64) * topk
    for slot in range(0, topk):
        best = tl.max(left, 1)
        route = BLOCK_K - (best & 0xFF)
        tl.store(route_ptrs + slot, route, mask=is_query)
        bits |= tl.full((BLOCK_Q,), 1, tl.int64) << route
        left = tl.where(left == best[:, None], _LOWEST, left)

    if DENSE:
        _, padded = _padded_length(query_code)
        row_ptr = queries_ptr + image.to(tl.int64) * padded
        _write_bits(row_ptr, bits, query_region, num_queries, query_code)
        if tile == 0:
            _write_zeros(row_ptr, query_code)
            if image == 0:
                key_bits = tl.full((BLOCK_K,), 1, tl.int64) << key_region.to(tl.int64)
                _write_bits(keys_ptr, key_bits, key_region, num_keys, key_code)
                _write_zeros(keys_ptr, key_code)
    else:
        chosen = ((left == _LOWEST) & is_query[:, None] & is_key[None, :]).to(tl.int32)
        members_ptr = queries_ptr + (image * num_queries).to(tl.int64) * topk
        _write_inverse(members_ptr, keys_ptr + image * (num_keys + 1), chosen, query_region, num_keys)


# --- launches ---------------------------------------------------------------------------------------------------------


class _Plan(NamedTuple):
    """How both kernels are launched: programs an image, constants that they are compiled for, and the grids' codes."""
    means_programs: int
    means: dict[str, int]
    tables_programs: int
    tables: dict[str, int | bool]
    codes: tuple[int, int]


def _code_of(grid: RegionGrid) -> int:
    """A grid as one int64, since each argument of a launch costs the host time. Never so small as to be an int32."""
    return grid.height << 40 | grid.width << 16 | grid.rows << 8 | grid.cols


def _padded_tokens(grid: RegionGrid) -> int:
    tokens = grid.height * grid.width
    return tokens + -tokens % MAX_BLOCK.value


def _blocks(regions: int) -> int:
    return max(16, triton.next_power_of_2(regions))


@lru_cache(maxsize=1024)
def _make_plan(query_grid: RegionGrid, key_grid: RegionGrid, channels: int, dense: bool) -> _Plan:
    """Blocks of both kernels.

    Means: a thread loads 32 numbers at once, which is enough to keep the memory busy, along channels as far as whole
    blocks go. Tables: a program of 16 query regions where programs are independent, so that few images fill a GPU;
    members of key regions are counted over all query regions.
    """
    whole = channels & -channels
    block_c = min(whole, 256) if whole >= 64 else min(triton.next_power_of_2(channels), 128)
    tokens = max(query_grid.tokens_per_region, key_grid.tokens_per_region)
    block_t = min(triton.next_power_of_2(tokens), max(1, 4096 // block_c))
    means_warps = min(4, max(1, block_t * block_c // 1024))
    block_q, block_k = 16 if dense else _blocks(query_grid.num_regions), _blocks(key_grid.num_regions)
    return _Plan(
        means_programs=(query_grid.num_regions + key_grid.num_regions) * triton.cdiv(channels, block_c),
        means=dict(C=channels, BLOCK_C=block_c, BLOCK_T=block_t, num_warps=means_warps),
        tables_programs=triton.cdiv(query_grid.num_regions, block_q),
        tables=dict(
            **dict(C=channels, BLOCK_C=32, BLOCK_Q=block_q, BLOCK_K=block_k, DENSE=dense),
            **dict(num_warps=4, num_stages=3),
        ),
        codes=(_code_of(query_grid), _code_of(key_grid)),
    )


def allocate_tables(like: torch.Tensor, query_grid: RegionGrid, key_grid: RegionGrid, topk: int, dense: bool) -> Tables:
    batch, device = like.shape[0], like.device
    routes = torch.empty((batch, query_grid.num_regions, topk), dtype=torch.int64, device=device)
    if dense:
        query_bits = torch.empty((batch, _padded_tokens(query_grid)), dtype=torch.int64, device=device)
        key_bits = torch.empty((1, _padded_tokens(key_grid)), dtype=torch.int64, device=device)
        return Tables(routes, query_bits=query_bits, key_bits=key_bits)
    members = torch.empty((batch, query_grid.num_regions * topk), dtype=torch.int32, device=device)
    bounds = torch.empty((batch, key_grid.num_regions + 1), dtype=torch.int32, device=device)
    return Tables(routes, members=members, bounds=bounds)


def fused_routes(
    query: torch.Tensor, key: torch.Tensor, query_grid: RegionGrid, key_grid: RegionGrid, topk: int, dense: bool
) -> Tables:
    """The routes of `ops.route_regions` and their tables, in two launches. No gradient flows through them.

    Args:
        query: (B, Hq, Wq, heads, head_dim) of at most 64 regions, all channels of a token side by side, and tokens a
            multiple of 8 numbers apart, as those of a packed projection are. This is not checked.
        key: (B, Hk, Wk, heads, head_dim), likewise.
        query_grid: Regions of the query map.
        key_grid: Regions of the key map.
        topk: Regions to keep for each query region, at least 1; all are kept where there are fewer.
        dense: Make the tables for attention that streams whole maps, instead of those for lists of regions.
    """
    num_queries, num_keys = query_grid.num_regions, key_grid.num_regions
    topk = min(topk, num_keys)
    batch, _, _, heads, head_dim = query.shape
    plan = _make_plan(query_grid, key_grid, heads * head_dim, dense)
    means = torch.empty((batch, num_queries + num_keys, heads * head_dim), dtype=torch.float32, device=query.device)
    tables = allocate_tables(query, query_grid, key_grid, topk, dense)
    strides = [stride // 8 for stride in (*query.stride()[:3], *key.stride()[:3])]
    of_queries, of_keys = tables[1:3] if dense else tables[3:5]
    launch(routing_means_kernel, batch * plan.means_programs, (query, key, means), (*strides, *plan.codes), plan.means)
    pointers = (means, tables.routes, of_queries, of_keys)
    launch(routing_tables_kernel, batch * plan.tables_programs, pointers, (topk, *plan.codes), plan.tables)
    return tables
