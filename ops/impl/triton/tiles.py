"""Which tokens a tile holds and where they lie: device functions that the kernels share.

A kernel knows a map by `grid = (height, width, cols, region_height, region_width)`, int32 each. They are values of the
run and not constants, so that a network that sees images of many sizes does not compile its kernels for each.
"""
import triton
import triton.language as tl


@triton.jit
def divide(numerator, divisor):
    """Exact quotient and remainder of int32s, numerator >= 0 and divisor >= 1, without the slow division for each.

    A multiplication by the reciprocal rounded down is at most one short for numerators below 2 ** 31.
    """
    reciprocal = tl.full((), 0xFFFFFFFF, tl.uint32) // tl.cast(divisor, tl.uint32)
    quotient = tl.umulhi(tl.cast(numerator, tl.uint32), reciprocal).to(tl.int32)
    remainder = numerator - quotient * divisor
    short = (remainder >= divisor).to(tl.int32)
    return quotient + short, remainder - short * divisor


@triton.jit
def tokens_of_map(index, grid, EVEN: tl.constexpr):
    """(row, column, is real) of the tokens of a whole map in row-major order. EVEN: none lies beyond its end."""
    height, width, cols, region_height, region_width = grid
    row, col = divide(index, width)
    real = tl.full(index.shape, True, tl.int1) if EVEN else index < height * width
    return row, col, real


@triton.jit
def tokens_of_region(region, token, grid, EVEN: tl.constexpr):
    """(row, column, is real) of tokens of a region. EVEN: none lies in the padding, nor beyond the region's last."""
    height, width, cols, region_height, region_width = grid
    region_row, region_col = divide(region, cols)
    row, col = divide(token, region_width)
    real = tl.full(token.shape, True, tl.int1) if EVEN else row < region_height
    row += region_row * region_height
    col += region_col * region_width
    if not EVEN:
        real = real & (row < height) & (col < width)
    return row, col, real


@triton.jit
def list_length(count, grid, BLOCK: tl.constexpr, PACKED: tl.constexpr):
    """Where the tokens of `count` listed regions end, for `tokens_of_list`."""
    height, width, cols, region_height, region_width = grid
    tokens = region_height * region_width
    return count * tokens if PACKED else count * tl.cdiv(tokens, BLOCK) * BLOCK


@triton.jit
def tokens_of_list(regions_ptr, count, start, grid, BLOCK: tl.constexpr, PACKED: tl.constexpr, EVEN: tl.constexpr):
    """(row, column, is real) of the BLOCK tokens from `start` on of the listed regions.

    PACKED: regions are laid end to end, so that small ones share a tile. Otherwise each begins a tile of its own, which
    leaves fewer numbers to compute for each token.
    """
    height, width, cols, region_height, region_width = grid
    tokens = region_height * region_width
    if PACKED:
        slot, token = divide(start + tl.arange(0, BLOCK), tokens)
        listed = slot < count
        region = tl.load(regions_ptr + slot, mask=listed, other=0).to(tl.int32)
        row, col, real = tokens_of_region(region, token, grid, EVEN)
        if not EVEN:
            real = real & listed
    else:
        slot, first = divide(start, tl.cdiv(tokens, BLOCK) * BLOCK)
        region = tl.load(regions_ptr + slot).to(tl.int32)
        row, col, real = tokens_of_region(region, first + tl.arange(0, BLOCK), grid, EVEN)
    return row, col, real


@triton.jit
def known_strides(strides, OF_8: tl.constexpr):
    """Strides of a map, which the compiler is told are multiples of 8 where they are.

    By itself it knows multiples of 16 only. The heads of a map lie 24 or 40 numbers apart where they have so many, and
    it would load one number at a time.
    """
    image_stride, row_stride, col_stride, head_stride = strides
    if OF_8:
        image_stride = tl.multiple_of(tl.cast(image_stride, tl.int64), 8)
        row_stride = tl.multiple_of(tl.cast(row_stride, tl.int64), 8)
        col_stride = tl.multiple_of(tl.cast(col_stride, tl.int64), 8)
        head_stride = tl.multiple_of(tl.cast(head_stride, tl.int64), 8)
    return image_stride, row_stride, col_stride, head_stride


@triton.jit
def head_of_map(ptr, strides, image, head):
    """Where one head of one image begins in a (B, H, W, heads, head_dim) map."""
    image_stride, row_stride, col_stride, head_stride = strides
    return ptr + image.to(tl.int64) * image_stride + head.to(tl.int64) * head_stride


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
