"""The kernels of the fused depthwise convolution: output or gradient of the input, and gradients of weight and bias.

A map is cut into strips of COLS columns, and a strip's rows into segments. A program takes BLOCK_S strips, and BLOCK_C
channels of each, of one segment. It walks down the rows: of each it loads the COLS + K - 1 columns that the strip sees,
once, and adds them to the K output rows that they belong to, whose unfinished sums stay in registers. So an output
costs (COLS + K - 1) / COLS loads and conversions instead of K * K. What is left are the K * K products: for an H100,
25 of them are about as much work as reading and writing the map, 9 are half as much. The next row is on its way while
one is computed.

The K * K weights of a channel stay in registers as well. For them to fit, a thread has two channels: its loads are of
four bytes, of which those of a warp lie side by side. Sixteen bytes would be eight channels, and 200 registers for the
weights of a 5 x 5 kernel.

Maps are (B, H, W, C). Tokens of the one that is convolved lie X_STRIDE numbers apart, those of the result OUT_STRIDE,
so that both may be views of a packed projection; the others are contiguous. All sums are float32. No program writes
what another one writes: there are no atomics, and repeated runs agree to the bit.
"""
import triton
import triton.language as tl

# Triton specialises a kernel for integers that are 1 or multiples of 16; these take too many values for that.
_VARYING = ["images", "height", "width", "rows"]


@triton.jit
def _place(index, images, height, width, rows, COLS: tl.constexpr, BLOCK_S: tl.constexpr):
    """What a program takes: the first row and the end of a segment, and (BLOCK_S, 1) strips of it.

    Returns:
        (first row, end, token of the strip in the map's first row, its first column, whether there is such a strip).
    """
    segments = tl.cdiv(height, rows)
    tile = index // segments
    first = (index - tile * segments) * rows
    strip = tile * BLOCK_S + tl.arange(0, BLOCK_S)[:, None]
    per_image = tl.cdiv(width, COLS)
    image = strip // per_image
    col = (strip - image * per_image) * COLS
    return first, tl.minimum(first + rows, height), image.to(tl.int64) * height * width + col, col, image < images


@triton.jit
def _row(y, width, STRIDE: tl.constexpr):
    """Where row `y` begins, of a map whose tokens lie STRIDE numbers apart."""
    return tl.cast(y, tl.int64) * width * STRIDE


@triton.jit
def _load_columns(ptr, col, real, width, STRIDE: tl.constexpr, NUM: tl.constexpr):
    """NUM neighbouring columns of a row from column `col` on, zero where they lie outside of the map."""
    columns = ()
    for i in tl.static_range(NUM):
        inside = real & (col + i >= 0) & (col + i < width)
        columns = columns + (tl.load(ptr + i * STRIDE, mask=inside, other=0.0),)
    return columns


@triton.jit
def _load_residual(ptr, offset, col, real, width, STRIDE: tl.constexpr, NUM: tl.constexpr):
    """NUM neighbouring columns of a row of the residual, nothing where there is none."""
    if ptr is None:
        return ()
    else:
        return _load_columns(ptr + offset, col, real, width, STRIDE, NUM)


@triton.jit
def _store_columns(ptr, offset, values, residual, col, real, width, STRIDE: tl.constexpr, NUM: tl.constexpr):
    """NUM neighbouring columns of a row, with the residual's added."""
    for i in tl.static_range(NUM):
        value = values[i]
        if len(residual) > 0:
            value += residual[i].to(tl.float32)
        value = value.to(ptr.dtype.element_ty)
        tl.store(ptr + offset + i * STRIDE, value, mask=real & (col + i < width))


@triton.jit
def _wide(tensors):
    """All of them in float32."""
    wide = ()
    for i in tl.static_range(len(tensors)):
        wide = wide + (tensors[i].to(tl.float32),)
    return wide


@triton.jit
def _halves(tensors):
    """Each tensor taken apart along its last axis, which has two entries: all the first ones, then all the second."""
    first, second = (), ()
    for i in tl.static_range(len(tensors)):
        a, b = tl.split(tensors[i])
        first = first + (a,)
        second = second + (b,)
    return first + second


@triton.jit
def _without_first(tensors, NUM: tl.constexpr):
    rest = ()
    for i in tl.static_range(len(tensors) - NUM):
        rest = rest + (tensors[i + NUM],)
    return rest


@triton.jit
def _load_weights(
    ptr, first, C: tl.constexpr, K: tl.constexpr, BLOCK_C: tl.constexpr, FLIP: tl.constexpr, ADD_INPUT: tl.constexpr,
    dtype: tl.constexpr,
):  # fmt: skip
    """(1, BLOCK_C) float32 for each tap of the kernel, and for some that are zero behind them.

    They are rounded to `dtype`, as a convolution in that type would get them. One load of all, taken apart: what a
    tap has for neighbouring channels lies K * K numbers apart, and a load of that would touch a line for each.
    """
    channel = first + tl.arange(0, BLOCK_C)[:, None]
    place = tl.arange(0, 16 if K == 3 else 32)[None, :]
    tap = K * K - 1 - place if FLIP else place
    real = (channel < C) & (tap >= 0) & (tap < K * K)
    block = tl.load(ptr + channel * (K * K) + tap, mask=real, other=0.0).to(dtype).to(tl.float32)
    if ADD_INPUT:
        block += (place == K * K // 2).to(tl.float32)
    if K == 3:
        weights = (tl.reshape(block, (1, BLOCK_C, 2, 2, 2, 2)),)
    else:
        weights = _halves((tl.reshape(block, (1, BLOCK_C, 2, 2, 2, 2, 2)),))
    for _ in tl.static_range(4):
        weights = _halves(weights)
    return weights


@triton.jit(do_not_specialize=_VARYING)
def depthwise_kernel(
    x_ptr, weight_ptr, bias_ptr, residual_ptr, out_ptr, images, height, width, rows,
    C: tl.constexpr, X_STRIDE: tl.constexpr, OUT_STRIDE: tl.constexpr, K: tl.constexpr, FLIP: tl.constexpr,
    ADD_INPUT: tl.constexpr, COLS: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """out = conv(x, weight) + bias + residual, the last two where given, in segments of `rows` rows.

    FLIP: with the kernel turned around, for the gradient of the input. ADD_INPUT: with x added, by a middle weight
    that is larger by one.
    """
    PAD: tl.constexpr = K // 2
    WIDE: tl.constexpr = COLS + K - 1
    CHANNEL_TILES: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    place = tl.program_id(0) // CHANNEL_TILES
    first_channel = (tl.program_id(0) - place * CHANNEL_TILES) * BLOCK_C
    channel = first_channel + tl.arange(0, BLOCK_C)[None, :]
    first, stop, token, col, real = _place(place, images, height, width, rows, COLS, BLOCK_S)
    real = real & (channel < C)
    x_map = x_ptr + (token - PAD) * X_STRIDE + channel

    low = out_ptr.dtype.element_ty if FLIP else x_ptr.dtype.element_ty
    weights = _load_weights(weight_ptr, first_channel, C, K, BLOCK_C, FLIP, ADD_INPUT, low)
    nothing = tl.zeros((BLOCK_S, BLOCK_C), tl.float32)
    if bias_ptr is not None:
        nothing += tl.load(bias_ptr + channel, mask=channel < C, other=0.0).to(low).to(tl.float32)
    sums = ()
    for _ in tl.static_range((K - 1) * COLS):
        sums = sums + (nothing,)
    begin = tl.maximum(first - PAD, 0)
    ahead = _load_columns(x_map + _row(begin, width, X_STRIDE), col - PAD, real, width, X_STRIDE, WIDE)
    end = tl.minimum(stop + PAD, height)
    out_map, residual_map = token * OUT_STRIDE + channel, token * C + channel
    for y in range(begin, end):
        columns = _wide(ahead)
        inside = real & (y + 1 < height)
        ahead = _load_columns(x_map + _row(y + 1, width, X_STRIDE), col - PAD, inside, width, X_STRIDE, WIDE)
        # The row that this one completes; at first it is one of the segment above.
        is_own = real & (y - PAD >= first)
        seen = residual_map + _row(y - PAD, width, C)
        residual = _load_residual(residual_ptr, seen, col, is_own, width, C, COLS)
        done = out_map + _row(y - PAD, width, OUT_STRIDE)
        finished, unfinished = (), ()
        for j in tl.static_range(K):
            for i in tl.static_range(COLS):
                total = sums[j * COLS + i] if j < K - 1 else nothing
                for k in tl.static_range(K):
                    total += columns[i + k] * weights[(K - 1 - j) * K + k]
                if j == 0:
                    finished = finished + (total,)
                else:
                    unfinished = unfinished + (total,)
            if j == 0:
                _store_columns(out_ptr, done, finished, residual, col, is_own, width, OUT_STRIDE, COLS)
        sums = unfinished
    # Rows that none below completes, because the map ends.
    for j in tl.static_range(PAD):
        y = end - PAD + j
        is_own = real & (y >= first) & (y < stop)
        residual = _load_residual(residual_ptr, residual_map + _row(y, width, C), col, is_own, width, C, COLS)
        done = out_map + _row(y, width, OUT_STRIDE)
        _store_columns(out_ptr, done, sums, residual, col, is_own, width, OUT_STRIDE, COLS)
        sums = _without_first(sums, COLS)


@triton.jit
def _side_by_side(tensors):
    """What `_halves` takes apart, of a power of two of tensors."""
    for _ in tl.static_range(5 if len(tensors) == 32 else 4):
        pairs = ()
        for i in tl.static_range(len(tensors) // 2):
            pairs = pairs + (tl.join(tensors[i], tensors[i + len(tensors) // 2]),)
        tensors = pairs
    return tensors[0]


@triton.jit
def _with_row(sums, columns, grads, K: tl.constexpr, COLS: tl.constexpr):
    """The sums of each tap and of the bias after a row of x has met the K rows of the gradient around it.

    The bias adds up the middle one, which over all rows of x is every row once.
    """
    added = ()
    for tap in tl.static_range(K * K):
        total = sums[tap]
        for i in tl.static_range(COLS):
            total += columns[i + tap % K] * grads[(K - 1 - tap // K) * COLS + i]
        added = added + (total,)
    total = sums[K * K]
    for i in tl.static_range(COLS):
        total += grads[K // 2 * COLS + i]
    return added + (total,)


@triton.jit(do_not_specialize=_VARYING)
def depthwise_weight_gradient_kernel(
    x_ptr, grad_ptr, share_ptr, images, height, width, rows,
    C: tl.constexpr, X_STRIDE: tl.constexpr, K: tl.constexpr,
    COLS: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """A share of the gradients of the weights and the bias: (programs, C, SLOTS) float32, the bias behind the weights.

    A program takes every so many places. The last K rows of the gradient stay in registers, where each row of x meets
    them. K rows are one step of the loop: after so many, every row is in the register again where the loop expects it.
    """
    PAD: tl.constexpr = K // 2
    WIDE: tl.constexpr = COLS + K - 1
    SLOTS: tl.constexpr = 16 if K == 3 else 32
    CHANNEL_TILES: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    share = tl.program_id(0) // CHANNEL_TILES
    first_channel = (tl.program_id(0) - share * CHANNEL_TILES) * BLOCK_C
    channel = first_channel + tl.arange(0, BLOCK_C)[None, :]
    zero = tl.zeros((BLOCK_S, BLOCK_C), tl.float32)
    sums = ()
    for _ in tl.static_range(K * K + 1):
        sums = sums + (zero,)
    places = tl.cdiv(images * tl.cdiv(width, COLS), BLOCK_S) * tl.cdiv(height, rows)
    for place in range(share, places, tl.num_programs(0) // CHANNEL_TILES):
        first, stop, token, col, real = _place(place, images, height, width, rows, COLS, BLOCK_S)
        real = real & (channel < C)
        x_map = x_ptr + (token - PAD) * X_STRIDE + channel
        grad_map = grad_ptr + token * C + channel
        # Rows of x outside of the map meet nothing; those of the gradient that are another program's count as zero.
        begin = tl.maximum(first - PAD, 0)
        grads = ()
        for i in tl.static_range(K - 1):
            y = begin - PAD + i
            row = _load_columns(grad_map + _row(y, width, C), col, real & (y >= first) & (y < stop), width, C, COLS)
            grads = grads + _wide(row)
        x_ahead = _load_columns(x_map + _row(begin, width, X_STRIDE), col - PAD, real, width, X_STRIDE, WIDE)
        y = begin + PAD
        is_own = real & (y >= first) & (y < stop)
        grad_ahead = _load_columns(grad_map + _row(y, width, C), col, is_own, width, C, COLS)
        for start in range(begin, tl.minimum(stop + PAD, height), K):
            for step in tl.static_range(K):
                columns = _wide(x_ahead)
                grads = grads + _wide(grad_ahead)
                y = start + step + 1
                inside = real & (y < height)
                x_ahead = _load_columns(x_map + _row(y, width, X_STRIDE), col - PAD, inside, width, X_STRIDE, WIDE)
                y += PAD
                is_own = real & (y >= first) & (y < stop)
                grad_ahead = _load_columns(grad_map + _row(y, width, C), col, is_own, width, C, COLS)
                sums = _with_row(sums, columns, grads, K, COLS)
                grads = _without_first(grads, COLS)
    for _ in tl.static_range(SLOTS - K * K - 1):
        sums = sums + (zero,)
    # One sum of all taps at once: each one is several barriers.
    total = tl.sum(tl.reshape(_side_by_side(sums), (BLOCK_S, BLOCK_C, SLOTS)), 0)
    at = (first_channel + tl.arange(0, BLOCK_C))[:, None]
    slot = tl.arange(0, SLOTS)[None, :]
    tl.store(share_ptr + (share * C + at) * SLOTS + slot, total, mask=at < C)


@triton.jit(do_not_specialize=["shares"])
def depthwise_add_shares_kernel(
    share_ptr, grad_weight_ptr, grad_bias_ptr, shares,
    C: tl.constexpr, K: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The shares added up: gradients of the (C, K * K) weights and, where there is one, of the (C,) bias."""
    SLOTS: tl.constexpr = 16 if K == 3 else 32
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    share = tl.arange(0, BLOCK_S)[:, None]
    total = tl.zeros((BLOCK_S, BLOCK_N), tl.float32)
    for begin in range(0, shares, BLOCK_S):
        inside = (begin + share < shares) & (n < C * SLOTS)[None, :]
        total += tl.load(share_ptr + (begin + share) * (C * SLOTS) + n[None, :], mask=inside, other=0.0)
    total = tl.sum(total, 0)
    channel, slot = n // SLOTS, n % SLOTS
    grad_weight = total.to(grad_weight_ptr.dtype.element_ty)
    tl.store(grad_weight_ptr + channel * (K * K) + slot, grad_weight, mask=(channel < C) & (slot < K * K))
    if grad_bias_ptr is not None:
        grad_bias = total.to(grad_bias_ptr.dtype.element_ty)
        tl.store(grad_bias_ptr + channel, grad_bias, mask=(channel < C) & (slot == K * K))
