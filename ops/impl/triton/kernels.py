"""The kernels of fused routed attention: forward, gradient of the queries, gradients of the keys and values, all three.

One program computes one tile of BLOCK_M tokens of one head and streams tiles of BLOCK_N tokens past it, with the
online softmax of FlashAttention (Dao et al., https://arxiv.org/abs/2205.14135). Tokens are read in place, by stride.
No program writes what another one writes: there are no atomics, and repeated runs agree to the bit.

There are two ways to say which tokens attend to which:

- by list: a tile holds tokens of one region, and streamed past it are the tokens of the regions routed to it, laid end
  to end. `routes_ptr` is (B, Rq, K), the chosen key regions. The gradients of the keys need the inverse: `members_ptr`
  (B, Rq * K) holds the query regions sorted by the key region that they chose, and those of key region r are entries
  `bounds_ptr[b, r]` to `bounds_ptr[b, r + 1]`, of (B, Rk + 1).
- DENSE: a tile holds consecutive tokens of the map, whatever their regions, and all tokens of the other map are
  streamed past it; pairs that are not routed get no weight. `routes_ptr` is (B, Hq * Wq) int64, for each query the
  regions that it is routed to as bits, and `bits_ptr` (Hk * Wk) int64, for each key the bit of its region: looking
  them up takes half the instructions of computing regions from positions. Both have zeros up to a multiple of MAX_BLOCK
  tokens, since loads under a mask are not vectorized.

Logits are in base 2: `scale` comes multiplied by log2(e). So is `lse`, the log-sum-exp of each query's logits,
(B, heads, Hq * Wq) float32; `delta`, of the same shape, is the sum of output times its gradient. DENSE: both go on up
to a multiple of MAX_BLOCK queries, with infinity and with zero, which the kernels write too: padding gets no weight.
"""
import triton
import triton.language as tl

from .tiles import (
    divide,
    head_of_map,
    known_strides,
    list_length,
    load_tokens,
    store_tokens,
    tokens_of_list,
    tokens_of_map,
    tokens_of_region,
)

LN_2 = tl.constexpr(0.6931471805599453)
MAX_BLOCK = tl.constexpr(128)  # tokens of a tile

# Triton specialises a kernel for integers that are 1 or multiples of 16; these take too many values for that.
_VARYING = [
    *("num_heads", "num_query_regions", "num_key_regions", "topk"),
    *(f"{side}_{name}" for side in "qk" for name in ("height", "width", "cols", "region_height", "region_width")),
]


@triton.jit
def _place(num_heads, num_regions, grid, BLOCK: tl.constexpr, DENSE: tl.constexpr):
    """The (image, region, first token, head) of this program. Heads side by side share lines of memory."""
    height, width, cols, region_height, region_width = grid
    tile, head = divide(tl.program_id(0), num_heads)
    if DENSE:
        image, block = divide(tile, tl.cdiv(height * width, BLOCK))
        region = 0
    else:
        image_region, block = divide(tile, tl.cdiv(region_height * region_width, BLOCK))
        image, region = divide(image_region, num_regions)
    return image, region, block * BLOCK, head


@triton.jit
def _own_tokens(region, first, grid, BLOCK: tl.constexpr, DENSE: tl.constexpr, EVEN: tl.constexpr):
    """(row, column, is real) of the tokens that a program computes."""
    index = first + tl.arange(0, BLOCK)
    if DENSE:
        return tokens_of_map(index, grid, EVEN)
    else:
        return tokens_of_region(region, index, grid, EVEN)


@triton.jit
def _bits_of_queries(routes_ptr, image, first, grid, BLOCK: tl.constexpr):
    """The routes of BLOCK queries from `first` on as bits, none where there is no query."""
    height, width, cols, region_height, region_width = grid
    row = routes_ptr + image.to(tl.int64) * (tl.cdiv(height * width, MAX_BLOCK) * MAX_BLOCK)
    return tl.load(row + first + tl.arange(0, BLOCK))


@triton.jit
def _bits_of_keys(bits_ptr, first, BLOCK: tl.constexpr):
    """The bit of the region of each of BLOCK keys from `first` on, none where there is no key."""
    return tl.load(bits_ptr + first + tl.arange(0, BLOCK))


@triton.jit
def _routes_of_tile(
    routes_ptr, image, region, first, num_regions, topk, grid, BLOCK: tl.constexpr, DENSE: tl.constexpr
):
    """DENSE: the route bits of each query. Otherwise: where the list of the region's routes begins."""
    if DENSE:
        return _bits_of_queries(routes_ptr, image, first, grid, BLOCK)
    else:
        return routes_ptr + (image * num_regions + region).to(tl.int64) * topk


@triton.jit
def _streamed_length(count, grid, BLOCK: tl.constexpr, DENSE: tl.constexpr, PACKED: tl.constexpr):
    """How many tokens are streamed past a tile that `count` regions are routed to."""
    height, width, cols, region_height, region_width = grid
    if DENSE:
        return height * width
    else:
        return list_length(count, grid, BLOCK, PACKED)


@triton.jit
def _streamed_keys(
    routes, bits_ptr, topk, start, grid,
    BLOCK: tl.constexpr, DENSE: tl.constexpr, PACKED: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """(row, column, is real) of a tile of keys, and which (query, key) pairs of it meet."""
    if DENSE:
        row, col, real = tokens_of_map(start + tl.arange(0, BLOCK), grid, EVEN)
        bits = _bits_of_keys(bits_ptr, start, BLOCK)
        return row, col, real, (routes[:, None] & bits[None, :]) != 0
    else:
        row, col, real = tokens_of_list(routes, topk, start, grid, BLOCK, PACKED, EVEN)
        return row, col, real, real[None, :]


@triton.jit
def _floats_of_head(ptr, image, head, num_heads, grid, DENSE: tl.constexpr):
    """Where one head of one image begins in lse or delta."""
    height, width, cols, region_height, region_width = grid
    length = height * width
    if DENSE:
        length = tl.cdiv(length, MAX_BLOCK) * MAX_BLOCK
    return ptr + (image * num_heads + head).to(tl.int64) * length


@triton.jit
def _load_floats(head_ptr, first, row, col, real, grid, padding, BLOCK: tl.constexpr, DENSE: tl.constexpr):
    """lse or delta of BLOCK queries. DENSE: of those from `first` on, as whole vectors, since nothing is masked."""
    height, width, cols, region_height, region_width = grid
    if DENSE:
        return tl.load(head_ptr + first + tl.arange(0, BLOCK))
    else:
        return tl.load(head_ptr + row * width + col, mask=real, other=padding)


@triton.jit
def _store_floats(head_ptr, floats, first, row, col, real, grid, padding, BLOCK: tl.constexpr, DENSE: tl.constexpr):
    """Write lse or delta of a tile of queries. DENSE: the map's last tile also writes the padding behind it."""
    height, width, cols, region_height, region_width = grid
    if DENSE:
        length = height * width
        tl.store(head_ptr + first + tl.arange(0, BLOCK), tl.where(real, floats, padding))
        if BLOCK < MAX_BLOCK:
            behind = first + BLOCK + tl.arange(0, MAX_BLOCK)
            is_padding = (first + BLOCK >= length) & (behind < tl.cdiv(length, MAX_BLOCK) * MAX_BLOCK)
            tl.store(head_ptr + behind, tl.full((MAX_BLOCK,), padding, tl.float32), mask=is_padding)
    else:
        tl.store(head_ptr + row * width + col, floats, mask=real)


@triton.jit(do_not_specialize=_VARYING)
def forward_kernel(
    query_ptr, key_ptr, value_ptr, routes_ptr, bits_ptr, out_ptr, lse_ptr,
    query_strides, key_strides, value_strides, out_strides,
    scale, num_heads, num_query_regions, topk,
    q_height, q_width, q_cols, q_region_height, q_region_width,
    k_height, k_width, k_cols, k_region_height, k_region_width,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    DENSE: tl.constexpr, PACKED: tl.constexpr, EVEN_M: tl.constexpr, EVEN_N: tl.constexpr, PRECISION: tl.constexpr,
    STRIDES_OF_8: tl.constexpr,
):  # fmt: skip
    """A tile of queries: out = softmax(scale * q k^T) v over the keys that it is routed to, and lse."""
    q_grid = (q_height, q_width, q_cols, q_region_height, q_region_width)
    k_grid = (k_height, k_width, k_cols, k_region_height, k_region_width)
    image, region, first, head = _place(num_heads, num_query_regions, q_grid, BLOCK_M, DENSE)
    q_row, q_col, q_real = _own_tokens(region, first, q_grid, BLOCK_M, DENSE, EVEN_M)
    routes = _routes_of_tile(routes_ptr, image, region, first, num_query_regions, topk, q_grid, BLOCK_M, DENSE)
    query_strides = known_strides(query_strides, STRIDES_OF_8)
    key_strides = known_strides(key_strides, STRIDES_OF_8)
    value_strides = known_strides(value_strides, STRIDES_OF_8)
    out_strides = known_strides(out_strides, STRIDES_OF_8)
    query_head = head_of_map(query_ptr, query_strides, image, head)
    key_head = head_of_map(key_ptr, key_strides, image, head)
    value_head = head_of_map(value_ptr, value_strides, image, head)
    out_head = head_of_map(out_ptr, out_strides, image, head)
    query = load_tokens(query_head, query_strides, q_row, q_col, q_real, HEAD_DIM, BLOCK_D)

    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    out = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    num_keys = _streamed_length(topk, k_grid, BLOCK_N, DENSE, PACKED)
    for start in range(0, num_keys, BLOCK_N):
        k_row, k_col, k_real, meet = _streamed_keys(
            routes, bits_ptr, topk, start, k_grid, BLOCK_N, DENSE, PACKED, EVEN_N
        )
        key = load_tokens(key_head, key_strides, k_row, k_col, k_real, HEAD_DIM, BLOCK_D)
        logits = tl.dot(query, tl.trans(key), input_precision=PRECISION) * scale
        logits = tl.where(meet, logits, float("-inf"))
        new_top = tl.maximum(top, tl.max(logits, 1))
        # A tile may hold no key of a query at all; minus infinity less minus infinity would be NaN.
        shift = tl.where(new_top == float("-inf"), 0.0, new_top)
        weight = tl.exp2(logits - shift[:, None])
        decay = tl.exp2(top - shift)
        total = total * decay + tl.sum(weight, 1)
        value = load_tokens(value_head, value_strides, k_row, k_col, k_real, HEAD_DIM, BLOCK_D)
        out = out * decay[:, None]
        out = tl.dot(weight.to(value.dtype), value, out, input_precision=PRECISION)
        top = new_top

    total = tl.where(q_real, total, 1.0)
    store_tokens(out_head, out_strides, q_row, q_col, q_real, out / total[:, None], HEAD_DIM, BLOCK_D)
    lse_head = _floats_of_head(lse_ptr, image, head, num_heads, q_grid, DENSE)
    lse = top + tl.log2(total)
    _store_floats(lse_head, lse, first, q_row, q_col, q_real, q_grid, float("inf"), BLOCK_M, DENSE)


@triton.jit(do_not_specialize=_VARYING)
def query_gradient_kernel(
    query_ptr, key_ptr, value_ptr, routes_ptr, bits_ptr, out_ptr, grad_out_ptr, lse_ptr, delta_ptr, grad_query_ptr,
    query_strides, key_strides, value_strides, out_strides, grad_out_strides, grad_query_strides,
    scale, num_heads, num_query_regions, topk,
    q_height, q_width, q_cols, q_region_height, q_region_width,
    k_height, k_width, k_cols, k_region_height, k_region_width,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    DENSE: tl.constexpr, PACKED: tl.constexpr, EVEN_M: tl.constexpr, EVEN_N: tl.constexpr, PRECISION: tl.constexpr,
    STRIDES_OF_8: tl.constexpr,
):  # fmt: skip
    """A tile of queries: its gradient, and delta for the kernel of the keys and values."""
    q_grid = (q_height, q_width, q_cols, q_region_height, q_region_width)
    k_grid = (k_height, k_width, k_cols, k_region_height, k_region_width)
    image, region, first, head = _place(num_heads, num_query_regions, q_grid, BLOCK_M, DENSE)
    q_row, q_col, q_real = _own_tokens(region, first, q_grid, BLOCK_M, DENSE, EVEN_M)
    routes = _routes_of_tile(routes_ptr, image, region, first, num_query_regions, topk, q_grid, BLOCK_M, DENSE)
    query_strides = known_strides(query_strides, STRIDES_OF_8)
    key_strides = known_strides(key_strides, STRIDES_OF_8)
    value_strides = known_strides(value_strides, STRIDES_OF_8)
    out_strides = known_strides(out_strides, STRIDES_OF_8)
    grad_out_strides = known_strides(grad_out_strides, STRIDES_OF_8)
    grad_query_strides = known_strides(grad_query_strides, STRIDES_OF_8)
    query_head = head_of_map(query_ptr, query_strides, image, head)
    key_head = head_of_map(key_ptr, key_strides, image, head)
    value_head = head_of_map(value_ptr, value_strides, image, head)
    out_head = head_of_map(out_ptr, out_strides, image, head)
    grad_out_head = head_of_map(grad_out_ptr, grad_out_strides, image, head)
    grad_query_head = head_of_map(grad_query_ptr, grad_query_strides, image, head)

    out = load_tokens(out_head, out_strides, q_row, q_col, q_real, HEAD_DIM, BLOCK_D)
    grad_out = load_tokens(grad_out_head, grad_out_strides, q_row, q_col, q_real, HEAD_DIM, BLOCK_D)
    delta = tl.sum(out.to(tl.float32) * grad_out.to(tl.float32), 1)
    delta_head = _floats_of_head(delta_ptr, image, head, num_heads, q_grid, DENSE)
    _store_floats(delta_head, delta, first, q_row, q_col, q_real, q_grid, 0.0, BLOCK_M, DENSE)
    lse_head = _floats_of_head(lse_ptr, image, head, num_heads, q_grid, DENSE)
    lse = _load_floats(lse_head, first, q_row, q_col, q_real, q_grid, float("inf"), BLOCK_M, DENSE)
    query = load_tokens(query_head, query_strides, q_row, q_col, q_real, HEAD_DIM, BLOCK_D)

    grad_query = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    num_keys = _streamed_length(topk, k_grid, BLOCK_N, DENSE, PACKED)
    for start in range(0, num_keys, BLOCK_N):
        k_row, k_col, k_real, meet = _streamed_keys(
            routes, bits_ptr, topk, start, k_grid, BLOCK_N, DENSE, PACKED, EVEN_N
        )
        key = load_tokens(key_head, key_strides, k_row, k_col, k_real, HEAD_DIM, BLOCK_D)
        value = load_tokens(value_head, value_strides, k_row, k_col, k_real, HEAD_DIM, BLOCK_D)
        logits = tl.dot(query, tl.trans(key), input_precision=PRECISION) * scale
        weight = tl.where(meet, tl.exp2(logits - lse[:, None]), 0.0)
        grad_weight = tl.dot(grad_out, tl.trans(value), input_precision=PRECISION)
        grad_logits = (weight * (grad_weight - delta[:, None])).to(key.dtype)
        grad_query = tl.dot(grad_logits, key, grad_query, input_precision=PRECISION)

    grad_query *= scale * LN_2
    store_tokens(grad_query_head, grad_query_strides, q_row, q_col, q_real, grad_query, HEAD_DIM, BLOCK_D)


@triton.jit
def _streamed_queries(
    list_ptr, count, routes_ptr, image, start, grid,
    BLOCK: tl.constexpr, DENSE: tl.constexpr, PACKED: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """(row, column, is real) of a tile of queries, and the route bits of each in the dense way."""
    if DENSE:
        row, col, real = tokens_of_map(start + tl.arange(0, BLOCK), grid, EVEN)
        return row, col, real, _bits_of_queries(routes_ptr, image, start, grid, BLOCK)
    else:
        row, col, real = tokens_of_list(list_ptr, count, start, grid, BLOCK, PACKED, EVEN)
        return row, col, real, 0


@triton.jit(do_not_specialize=_VARYING)
def key_value_gradient_kernel(
    query_ptr, key_ptr, value_ptr, routes_ptr, bits_ptr, members_ptr, bounds_ptr, grad_out_ptr, lse_ptr, delta_ptr,
    grad_key_ptr, grad_value_ptr,
    query_strides, key_strides, value_strides, grad_out_strides, grad_key_strides, grad_value_strides,
    scale, num_heads, num_query_regions, num_key_regions, topk,
    q_height, q_width, q_cols, q_region_height, q_region_width,
    k_height, k_width, k_cols, k_region_height, k_region_width,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    DENSE: tl.constexpr, PACKED: tl.constexpr, EVEN_M: tl.constexpr, EVEN_N: tl.constexpr, PRECISION: tl.constexpr,
    STRIDES_OF_8: tl.constexpr,
):  # fmt: skip
    """A tile of keys and values: their gradients from the queries that are routed to them."""
    q_grid = (q_height, q_width, q_cols, q_region_height, q_region_width)
    k_grid = (k_height, k_width, k_cols, k_region_height, k_region_width)
    image, region, first, head = _place(num_heads, num_key_regions, k_grid, BLOCK_M, DENSE)
    k_row, k_col, k_real = _own_tokens(region, first, k_grid, BLOCK_M, DENSE, EVEN_M)
    query_strides = known_strides(query_strides, STRIDES_OF_8)
    key_strides = known_strides(key_strides, STRIDES_OF_8)
    value_strides = known_strides(value_strides, STRIDES_OF_8)
    grad_out_strides = known_strides(grad_out_strides, STRIDES_OF_8)
    grad_key_strides = known_strides(grad_key_strides, STRIDES_OF_8)
    grad_value_strides = known_strides(grad_value_strides, STRIDES_OF_8)
    query_head = head_of_map(query_ptr, query_strides, image, head)
    key_head = head_of_map(key_ptr, key_strides, image, head)
    value_head = head_of_map(value_ptr, value_strides, image, head)
    grad_out_head = head_of_map(grad_out_ptr, grad_out_strides, image, head)
    grad_key_head = head_of_map(grad_key_ptr, grad_key_strides, image, head)
    grad_value_head = head_of_map(grad_value_ptr, grad_value_strides, image, head)
    lse_head = _floats_of_head(lse_ptr, image, head, num_heads, q_grid, DENSE)
    delta_head = _floats_of_head(delta_ptr, image, head, num_heads, q_grid, DENSE)
    key = load_tokens(key_head, key_strides, k_row, k_col, k_real, HEAD_DIM, BLOCK_D)
    value = load_tokens(value_head, value_strides, k_row, k_col, k_real, HEAD_DIM, BLOCK_D)

    if DENSE:
        key_bits = _bits_of_keys(bits_ptr, first, BLOCK_M)
        list_ptr = members_ptr
        count = 0
    else:
        bound = bounds_ptr + image * (num_key_regions + 1) + region
        begin = tl.load(bound)
        count = tl.load(bound + 1) - begin
        list_ptr = members_ptr + image.to(tl.int64) * num_query_regions * topk + begin

    grad_key = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    grad_value = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    num_queries = _streamed_length(count, q_grid, BLOCK_N, DENSE, PACKED)
    for start in range(0, num_queries, BLOCK_N):
        q_row, q_col, q_real, route_bits = _streamed_queries(
            list_ptr, count, routes_ptr, image, start, q_grid, BLOCK_N, DENSE, PACKED, EVEN_N
        )
        query = load_tokens(query_head, query_strides, q_row, q_col, q_real, HEAD_DIM, BLOCK_D)
        grad_out = load_tokens(grad_out_head, grad_out_strides, q_row, q_col, q_real, HEAD_DIM, BLOCK_D)
        # An infinite log-sum-exp gives padding no weight.
        lse = _load_floats(lse_head, start, q_row, q_col, q_real, q_grid, float("inf"), BLOCK_N, DENSE)
        delta = _load_floats(delta_head, start, q_row, q_col, q_real, q_grid, 0.0, BLOCK_N, DENSE)
        logits = tl.dot(key, tl.trans(query), input_precision=PRECISION) * scale
        weight = tl.exp2(logits - lse[None, :])
        if DENSE:
            weight = tl.where((key_bits[:, None] & route_bits[None, :]) != 0, weight, 0.0)
        grad_value = tl.dot(weight.to(grad_out.dtype), grad_out, grad_value, input_precision=PRECISION)
        grad_weight = tl.dot(value, tl.trans(grad_out), input_precision=PRECISION)
        grad_logits = (weight * (grad_weight - delta[None, :])).to(query.dtype)
        grad_key = tl.dot(grad_logits, query, grad_key, input_precision=PRECISION)

    grad_key *= scale * LN_2
    store_tokens(grad_key_head, grad_key_strides, k_row, k_col, k_real, grad_key, HEAD_DIM, BLOCK_D)
    store_tokens(grad_value_head, grad_value_strides, k_row, k_col, k_real, grad_value, HEAD_DIM, BLOCK_D)


@triton.jit(do_not_specialize=_VARYING)
def one_pass_gradients_kernel(
    query_ptr, key_ptr, value_ptr, routes_ptr, bits_ptr, out_ptr, grad_out_ptr, lse_ptr,
    grad_query_ptr, grad_key_ptr, grad_value_ptr,
    query_strides, key_strides, value_strides, out_strides, grad_out_strides,
    grad_query_strides, grad_key_strides, grad_value_strides,
    scale, num_heads,
    q_height, q_width, q_cols, q_region_height, q_region_width,
    k_height, k_width, k_cols, k_region_height, k_region_width,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    DENSE: tl.constexpr, PACKED: tl.constexpr, EVEN_M: tl.constexpr, EVEN_N: tl.constexpr, PRECISION: tl.constexpr,
    STRIDES_OF_8: tl.constexpr,
):  # fmt: skip
    """All gradients of one head in one pass: BLOCK_M holds the whole map of queries, past which all keys are streamed.

    DENSE only. What a tile of keys and values gets is complete once it has met all queries, so that sums for the
    queries alone are carried along; all sums are in a fixed order. Logits are computed once for both sides.
    """
    q_grid = (q_height, q_width, q_cols, q_region_height, q_region_width)
    k_grid = (k_height, k_width, k_cols, k_region_height, k_region_width)
    image, head = divide(tl.program_id(0), num_heads)
    q_row, q_col, q_real = tokens_of_map(tl.arange(0, BLOCK_M), q_grid, EVEN_M)
    route_bits = _bits_of_queries(routes_ptr, image, 0, q_grid, BLOCK_M)
    query_strides = known_strides(query_strides, STRIDES_OF_8)
    key_strides = known_strides(key_strides, STRIDES_OF_8)
    value_strides = known_strides(value_strides, STRIDES_OF_8)
    out_strides = known_strides(out_strides, STRIDES_OF_8)
    grad_out_strides = known_strides(grad_out_strides, STRIDES_OF_8)
    grad_query_strides = known_strides(grad_query_strides, STRIDES_OF_8)
    grad_key_strides = known_strides(grad_key_strides, STRIDES_OF_8)
    grad_value_strides = known_strides(grad_value_strides, STRIDES_OF_8)
    query_head = head_of_map(query_ptr, query_strides, image, head)
    key_head = head_of_map(key_ptr, key_strides, image, head)
    value_head = head_of_map(value_ptr, value_strides, image, head)
    out_head = head_of_map(out_ptr, out_strides, image, head)
    grad_out_head = head_of_map(grad_out_ptr, grad_out_strides, image, head)
    grad_query_head = head_of_map(grad_query_ptr, grad_query_strides, image, head)
    grad_key_head = head_of_map(grad_key_ptr, grad_key_strides, image, head)
    grad_value_head = head_of_map(grad_value_ptr, grad_value_strides, image, head)

    out = load_tokens(out_head, out_strides, q_row, q_col, q_real, HEAD_DIM, BLOCK_D)
    grad_out = load_tokens(grad_out_head, grad_out_strides, q_row, q_col, q_real, HEAD_DIM, BLOCK_D)
    delta = tl.sum(out.to(tl.float32) * grad_out.to(tl.float32), 1)
    lse_head = _floats_of_head(lse_ptr, image, head, num_heads, q_grid, DENSE)
    lse = _load_floats(lse_head, 0, q_row, q_col, q_real, q_grid, float("inf"), BLOCK_M, DENSE)
    query = load_tokens(query_head, query_strides, q_row, q_col, q_real, HEAD_DIM, BLOCK_D)

    k_row, k_col, k_real = tokens_of_map(tl.arange(0, BLOCK_N), k_grid, False)
    key = load_tokens(key_head, key_strides, k_row, k_col, k_real, HEAD_DIM, BLOCK_D)
    value = load_tokens(value_head, value_strides, k_row, k_col, k_real, HEAD_DIM, BLOCK_D)
    grad_query = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for start in range(0, k_height * k_width, BLOCK_N):
        # The next tile is on its way while this one is computed; behind the last there is none, and nothing is read.
        next_row, next_col, next_real = tokens_of_map(start + BLOCK_N + tl.arange(0, BLOCK_N), k_grid, False)
        next_key = load_tokens(key_head, key_strides, next_row, next_col, next_real, HEAD_DIM, BLOCK_D)
        next_value = load_tokens(value_head, value_strides, next_row, next_col, next_real, HEAD_DIM, BLOCK_D)
        k_row, k_col, k_real, meet = _streamed_keys(
            route_bits, bits_ptr, 0, start, k_grid, BLOCK_N, DENSE, PACKED, EVEN_N
        )
        logits = tl.dot(query, tl.trans(key), input_precision=PRECISION) * scale
        weight = tl.where(meet, tl.exp2(logits - lse[:, None]), 0.0)
        grad_value = tl.dot(tl.trans(weight.to(grad_out.dtype)), grad_out, input_precision=PRECISION)
        store_tokens(grad_value_head, grad_value_strides, k_row, k_col, k_real, grad_value, HEAD_DIM, BLOCK_D)
        grad_weight = tl.dot(grad_out, tl.trans(value), input_precision=PRECISION)
        grad_logits = (weight * (grad_weight - delta[:, None])).to(key.dtype)
        grad_query = tl.dot(grad_logits, key, grad_query, input_precision=PRECISION)
        grad_key = tl.dot(tl.trans(grad_logits), query, input_precision=PRECISION) * (scale * LN_2)
        store_tokens(grad_key_head, grad_key_strides, k_row, k_col, k_real, grad_key, HEAD_DIM, BLOCK_D)
        key = next_key
        value = next_value

    grad_query *= scale * LN_2
    store_tokens(grad_query_head, grad_query_strides, q_row, q_col, q_real, grad_query, HEAD_DIM, BLOCK_D)
