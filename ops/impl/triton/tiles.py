"""Which tokens a tile holds and where they lie: device functions that the kernels share.

A kernel knows a map by `grid = (height, width, cols, region_height, region_width)`, int32 each. They are runtime values,
not constants: a network that sees images of many sizes compiles each kernel once.
"""
import triton
import triton.language as tl


@triton.jit
def divide(numerator, divisor):
    """Exact quotient and remainder of int32s, numerator >= 0 and divisor >= 1, without the slow division for each.

    A multiplication by the reciprocal rounded down is at most one short for numerators below 2 ** 31.
    """
    reciprocal = tl.full((), 0xFFFFFFFF, tl.uint32) // tl.cast(divisor, tl.uint32)
    quotient = tl.umulhi(numerator.to(tl.uint32), reciprocal).to(tl.int32)
    remainder = numerator - quotient * divisor
    short = (remainder >= divisor).to(tl.int32)
    return quotient + short, remainder - short * divisor


@triton.jit
def tokens_of_map(index, grid):
    """(row, column, is real) of the tokens of a whole map in row-major order."""
    height, width, cols, region_height, region_width = grid
    row, col = divide(index, width)
    return row, col, index < height * width


@triton.jit
def tokens_of_region(region, token, grid):
    """(row, column, is real) of tokens 0 .. T - 1 of a region; what lies in the padding or from T on is not real."""
    height, width, cols, region_height, region_width = grid
    region_row, region_col = divide(region, cols)
    row, col = divide(token, region_width)
    real = row < region_height
    row += region_row * region_height
    col += region_col * region_width
    return row, col, real & (row < height) & (col < width)


@triton.jit
def tokens_of_list(regions_ptr, count, index, grid):
    """(row, column, is real) of the tokens of `count` listed regions laid end to end, so that small ones share a tile."""
    height, width, cols, region_height, region_width = grid
    slot, token = divide(index, region_height * region_width)
    listed = slot < count
    region = tl.load(regions_ptr + slot, mask=listed, other=0).to(tl.int32)
    row, col, real = tokens_of_region(region, token, grid)
    return row, col, real & listed


@triton.jit
def region_at(row, col, grid):
    """The region that a token of the map lies in."""
    height, width, cols, region_height, region_width = grid
    region_row, _ = divide(row, region_height)
    region_col, _ = divide(col, region_width)
    return region_row * cols + region_col


@triton.jit
def is_routed(route_bits, key_region):
    """Whether the bit of the key's region is set in the query's routes."""
    return ((route_bits >> key_region.to(tl.int64)) & 1) != 0


@triton.jit
def head_of_map(ptr, strides, image, head):
    """Where one head of one image begins in a (B, H, W, heads, head_dim) map."""
    image_stride, row_stride, col_stride, head_stride = strides
    return ptr + image.to(tl.int64) * image_stride + head * head_stride


@triton.jit
def token_pointers(head_ptr, strides, row, col, BLOCK_D: tl.constexpr):
    """(tokens, BLOCK_D) pointers."""
    image_stride, row_stride, col_stride, head_stride = strides
    offset = row.to(tl.int64) * row_stride + col.to(tl.int64) * col_stride
    return head_ptr + offset[:, None] + tl.arange(0, BLOCK_D)[None, :]


@triton.jit
def token_mask(real, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """(tokens, BLOCK_D): real numbers, neither padding of the map nor of the head."""
    return real[:, None] & (tl.arange(0, BLOCK_D) < HEAD_DIM)[None, :]


@triton.jit
def load_tokens(head_ptr, strides, row, col, real, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """(tokens, BLOCK_D) of one head, zero where it is padding."""
    pointers = token_pointers(head_ptr, strides, row, col, BLOCK_D)
    return tl.load(pointers, mask=token_mask(real, HEAD_DIM, BLOCK_D), other=0.0)


@triton.jit
def store_tokens(head_ptr, strides, row, col, real, tile, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Write the real part of a (tokens, BLOCK_D) tile of one head."""
    pointers = token_pointers(head_ptr, strides, row, col, BLOCK_D)
    tl.store(pointers, tile.to(head_ptr.dtype.element_ty), mask=token_mask(real, HEAD_DIM, BLOCK_D))
