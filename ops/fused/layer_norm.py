"""Layer norm, and the sum of two maps normalised, in one pass over memory each way.

    routed_layers::layer_norm           (x, weight, bias, eps, dtype) -> (out, stats)
    routed_layers::add_layer_norm       (x, branch, weight, bias, eps, dtype) -> (total, out, stats)
    routed_layers::layer_norm_backward  (grad_out, grad_total, x, weight, stats) -> (grad_x, grad_parameters)

Tensors are read and written in their own types; statistics, parameters' gradients and arithmetic are float32. A row is
all C numbers of the last axis. `stats` (2, ...) holds each row's mean and reciprocal standard deviation, and
`grad_parameters` (2, C) the gradients of weight and bias. There are no atomics: repeated runs agree to the bit.

The operators are for torch.compile, export and fake tensors. Dispatching one takes longer than launching its kernel, so
that eager calls go through a plain `torch.autograd.Function` around the same two functions.
"""
from functools import lru_cache

import torch
import triton
import triton.language as tl

from ..launch import launch
from . import empty

# Numbers of a tile, and programs that sum the parameters' gradients, measured on an H100 for 64 to 512 channels. Their
# number decides in which order gradients are summed, so it is the same everywhere.
_FORWARD_TILE, _BACKWARD_TILE = 4096, 4096
_BACKWARD_PROGRAMS = 2 * 132


# --- kernels ----------------------------------------------------------------------------------------------------------


@triton.jit
def _place(block, rows, STRIDE: tl.constexpr, C: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_C: tl.constexpr):
    """Offsets of a tile's numbers where rows lie STRIDE numbers apart, and which of them there are."""
    row, channel = tl.arange(0, BLOCK_ROWS)[:, None], tl.arange(0, BLOCK_C)[None, :]
    first = tl.cast(block, tl.int64) * BLOCK_ROWS  # as an index of a number it may pass 2**31
    inside = row < rows - first
    if BLOCK_C != C:
        inside = inside & (channel < C)
    return first * STRIDE + (row * STRIDE + channel), inside


@triton.jit
def _load_channels(ptr, C: tl.constexpr, BLOCK_C: tl.constexpr):
    """(1, BLOCK_C) float32 of (C,), with zeros behind."""
    channel = tl.arange(0, BLOCK_C)
    return tl.load(ptr + channel, mask=channel < C, other=0.0).to(tl.float32)[None, :]


@triton.jit(do_not_specialize=["rows"])
def layer_norm_kernel(
    x_ptr,
    branch_ptr,  # or None
    weight_ptr,
    bias_ptr,
    total_ptr,  # or None, as branch_ptr is
    out_ptr,
    stats_ptr,
    rows,
    EPS: tl.constexpr,
    X_STRIDE: tl.constexpr,
    BRANCH_STRIDE: tl.constexpr,
    C: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):
    """One tile of rows for each program."""
    block = tl.program_id(0)
    offsets, inside = _place(block, rows, X_STRIDE, C, BLOCK_ROWS, BLOCK_C)
    own_offsets, _ = _place(block, rows, C, C, BLOCK_ROWS, BLOCK_C)
    x = tl.load(x_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    if branch_ptr is not None:
        offsets, _ = _place(block, rows, BRANCH_STRIDE, C, BLOCK_ROWS, BLOCK_C)
        total = x + tl.load(branch_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
        total = total.to(total_ptr.dtype.element_ty)
        tl.store(total_ptr + own_offsets, total, mask=inside)
        x = total.to(tl.float32)  # what later layers see is what is normalised
    mean = tl.sum(x, 1) / C
    # the mean first: the difference of the mean square and the squared mean has no digits left where the mean is large
    centred = tl.where(inside, x - mean[:, None], 0.0)
    rstd = tl.rsqrt(tl.sum(centred * centred, 1) / C + EPS)
    weight, bias = _load_channels(weight_ptr, C, BLOCK_C), _load_channels(bias_ptr, C, BLOCK_C)
    out = centred * rstd[:, None] * weight + bias
    tl.store(out_ptr + own_offsets, out.to(out_ptr.dtype.element_ty), mask=inside)
    row = block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    tl.store(stats_ptr + row, mean, mask=row < rows)
    tl.store(stats_ptr + rows + row, rstd, mask=row < rows)


@triton.jit(do_not_specialize=["rows"])
def layer_norm_gradient_kernel(
    grad_out_ptr,
    grad_total_ptr,  # or None
    x_ptr,
    weight_ptr,
    stats_ptr,
    grad_x_ptr,
    partial_ptr,
    rows,
    GRAD_OUT_STRIDE: tl.constexpr,
    GRAD_TOTAL_STRIDE: tl.constexpr,
    X_STRIDE: tl.constexpr,
    C: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):
    """Tiles of rows in turn for each program, which sums what they give the parameters into partial[program] (2, C)."""
    program = tl.program_id(0)
    weight = _load_channels(weight_ptr, C, BLOCK_C)
    grad_weight = tl.zeros((BLOCK_ROWS, BLOCK_C), tl.float32)
    grad_bias = tl.zeros((BLOCK_ROWS, BLOCK_C), tl.float32)
    for block in range(program, tl.cdiv(rows, BLOCK_ROWS), tl.num_programs(0)):
        offsets, inside = _place(block, rows, X_STRIDE, C, BLOCK_ROWS, BLOCK_C)
        x = tl.load(x_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
        offsets, _ = _place(block, rows, GRAD_OUT_STRIDE, C, BLOCK_ROWS, BLOCK_C)
        grad = tl.load(grad_out_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
        if grad_total_ptr is not None:  # loaded here, since no load is moved up across the barriers of a sum
            offsets, _ = _place(block, rows, GRAD_TOTAL_STRIDE, C, BLOCK_ROWS, BLOCK_C)
            grad_total = tl.load(grad_total_ptr + offsets, mask=inside, other=0.0)
        row = block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
        mean = tl.load(stats_ptr + row, mask=row < rows, other=0.0)[:, None]
        rstd = tl.load(stats_ptr + rows + row, mask=row < rows, other=0.0)[:, None]
        normal = (x - mean) * rstd
        grad_weight += grad * normal
        grad_bias += grad
        grad *= weight
        along_normal = tl.sum(grad * normal, 1)[:, None] / C
        grad = (grad - tl.sum(grad, 1)[:, None] / C - normal * along_normal) * rstd
        if grad_total_ptr is not None:
            grad += grad_total.to(tl.float32)
        offsets, _ = _place(block, rows, C, C, BLOCK_ROWS, BLOCK_C)
        tl.store(grad_x_ptr + offsets, grad.to(grad_x_ptr.dtype.element_ty), mask=inside)
    channel = tl.arange(0, BLOCK_C)
    partial_ptr += program * (2 * C) + channel
    tl.store(partial_ptr, tl.sum(grad_weight, 0), mask=channel < C)
    tl.store(partial_ptr + C, tl.sum(grad_bias, 0), mask=channel < C)


# --- what launches them -----------------------------------------------------------------------------------------------


def _tile(channels: int, numbers: int) -> dict:
    """Constants of a tile of whole rows, powers of two, of about so many `numbers`."""
    block_c = triton.next_power_of_2(channels)
    num_warps = 4 if block_c <= 1024 else 8
    return dict(C=channels, BLOCK_C=block_c, BLOCK_ROWS=max(1, numbers // block_c), num_warps=num_warps)


@lru_cache(maxsize=1024)
def _forward_constants(channels: int, eps: float, x_stride: int, branch_stride: int) -> dict:
    return dict(EPS=eps, X_STRIDE=x_stride, BRANCH_STRIDE=branch_stride, **_tile(channels, _FORWARD_TILE))


@lru_cache(maxsize=1024)
def _backward_constants(channels: int, grad_out_stride: int, grad_total_stride: int, x_stride: int) -> dict:
    strides = dict(GRAD_OUT_STRIDE=grad_out_stride, GRAD_TOTAL_STRIDE=grad_total_stride, X_STRIDE=x_stride)
    return strides | _tile(channels, _BACKWARD_TILE)


def _rows_of(x: torch.Tensor) -> tuple[torch.Tensor, int]:
    """The tensor, or a copy where its rows do not lie evenly, and how far apart in memory they begin."""
    if x.is_contiguous():
        return x, x.shape[-1]
    x = x.reshape(-1, x.shape[-1])
    x = x if x.stride(1) == 1 else x.contiguous()
    return x, x.stride(0)


def _allocate(x, branch, dtype: torch.dtype):
    """Space for (total, out, stats); total is None where `branch` is."""
    total = None if branch is None else empty(x, torch.promote_types(x.dtype, branch.dtype))
    return total, empty(x, dtype), torch.empty((2, *x.shape[:-1]), dtype=torch.float32, device=x.device)


def _forward(x, branch, weight, bias, eps: float, dtype: torch.dtype):
    total, out, stats = _allocate(x, branch, dtype)
    if out.numel() == 0:
        return total, out, stats
    x, x_stride = _rows_of(x)
    branch, branch_stride = (None, 0) if branch is None else _rows_of(branch)
    constants = _forward_constants(out.shape[-1], eps, x_stride, branch_stride)
    rows = stats.numel() // 2
    tensors = x, branch, weight.contiguous(), bias.contiguous(), total, out, stats
    launch(layer_norm_kernel, -(-rows // constants["BLOCK_ROWS"]), tensors, (rows,), constants)
    return total, out, stats


def _backward(grad_out, grad_total, x, weight, stats) -> tuple[torch.Tensor, torch.Tensor]:
    """(grad_x, grad_parameters)."""
    grad_x, channels, rows = empty(x, x.dtype), x.shape[-1], stats.numel() // 2
    if grad_x.numel() == 0:
        return grad_x, stats.new_zeros((2, channels))
    x, x_stride = _rows_of(x)
    grad_out, grad_out_stride = _rows_of(grad_out)
    grad_total, grad_total_stride = (None, 0) if grad_total is None else _rows_of(grad_total)
    constants = _backward_constants(channels, grad_out_stride, grad_total_stride, x_stride)
    programs = min(-(-rows // constants["BLOCK_ROWS"]), _BACKWARD_PROGRAMS)
    partial = stats.new_empty((programs, 2, channels))
    tensors = grad_out, grad_total, x, weight.contiguous(), stats, grad_x, partial
    launch(layer_norm_gradient_kernel, programs, tensors, (rows,), constants)
    return grad_x, partial.sum(0)


# --- autograd ---------------------------------------------------------------------------------------------------------


# Autograd itself converts gradients to the types of what they are of.


def _save(ctx, normalised, weight, stats):
    ctx.save_for_backward(normalised, weight, stats)
    ctx.set_materialize_grads(False)


def _gradients(ctx, backward, grad_total, grad_out):
    """Of the sum (of x and of branch alike), weight and bias."""
    if grad_out is None:
        return grad_total, None, None
    normalised, weight, stats = ctx.saved_tensors
    grad_x, grad_parameters = backward(grad_out, grad_total, normalised, weight, stats)
    return grad_x, *grad_parameters.unbind()


class _Eager(torch.autograd.Function):
    """What both operators compute; `branch` is None for layer norm alone."""

    @staticmethod
    def forward(ctx, x, branch, weight, bias, eps, dtype):
        total, out, stats = _forward(x, branch, weight, bias, eps, dtype)
        _save(ctx, x if total is None else total, weight, stats)
        return out if total is None else (total, out)

    @staticmethod
    def backward(ctx, *grads):
        grad_total, grad_out = grads if len(grads) == 2 else (None, *grads)
        # With grad mode on, second derivatives may follow, of which the operator says that there are none.
        backward = backward_op if torch.is_grad_enabled() else _backward
        grad_x, grad_weight, grad_bias = _gradients(ctx, backward, grad_total, grad_out)
        return grad_x, grad_x if ctx.needs_input_grad[1] else None, grad_weight, grad_bias, None, None


# --- operators --------------------------------------------------------------------------------------------------------

_SETTINGS = "Tensor weight, Tensor bias, float eps, ScalarType dtype"


@torch.library.custom_op(
    "routed_layers::layer_norm", mutates_args=(), schema=f"(Tensor x, {_SETTINGS}) -> (Tensor out, Tensor stats)"
)
def layer_norm_op(x, weight, bias, eps, dtype):
    return _forward(x, None, weight, bias, eps, dtype)[1:]


@torch.library.custom_op(
    "routed_layers::add_layer_norm",
    mutates_args=(),
    schema=f"(Tensor x, Tensor branch, {_SETTINGS}) -> (Tensor total, Tensor out, Tensor stats)",
)
def add_layer_norm_op(x, branch, weight, bias, eps, dtype):
    return _forward(x, branch, weight, bias, eps, dtype)


@torch.library.custom_op(
    "routed_layers::layer_norm_backward",
    mutates_args=(),
    schema="(Tensor grad_out, Tensor? grad_total, Tensor x, Tensor weight, Tensor stats) -> (Tensor, Tensor)",
)
def backward_op(grad_out, grad_total, x, weight, stats):
    return _backward(grad_out, grad_total, x, weight, stats)


@layer_norm_op.register_fake
def _(x, weight, bias, eps, dtype):
    return _allocate(x, None, dtype)[1:]


@add_layer_norm_op.register_fake
def _(x, branch, weight, bias, eps, dtype):
    return _allocate(x, branch, dtype)


@backward_op.register_fake
def _(grad_out, grad_total, x, weight, stats):
    return empty(x, x.dtype), stats.new_empty((2, x.shape[-1]))


def _save_for_layer_norm(ctx, inputs, output):
    x, weight, _, _, _ = inputs
    _, stats = output
    ctx.mark_non_differentiable(stats)
    _save(ctx, x, weight, stats)


def _layer_norm_gradients(ctx, grad_out, _grad_stats):
    return *_gradients(ctx, backward_op, None, grad_out), None, None


def _save_for_add_layer_norm(ctx, inputs, output):
    _, _, weight, _, _, _ = inputs
    total, _, stats = output
    ctx.mark_non_differentiable(stats)
    _save(ctx, total, weight, stats)


def _add_layer_norm_gradients(ctx, grad_total, grad_out, _grad_stats):
    grad_x, grad_weight, grad_bias = _gradients(ctx, backward_op, grad_total, grad_out)
    return grad_x, grad_x, grad_weight, grad_bias, None, None


layer_norm_op.register_autograd(_layer_norm_gradients, setup_context=_save_for_layer_norm)
add_layer_norm_op.register_autograd(_add_layer_norm_gradients, setup_context=_save_for_add_layer_norm)


# --- calls ------------------------------------------------------------------------------------------------------------


def _through_operators(x: torch.Tensor) -> bool:
    return torch.compiler.is_compiling() or type(x) not in (torch.Tensor, torch.nn.Parameter)


def layer_norm(x, weight, bias, eps: float, dtype: torch.dtype) -> torch.Tensor:
    """(..., C), (C,), (C,) -> (..., C) of `dtype`; see `ops.layer_norm`. First derivatives in reverse mode only."""
    if _through_operators(x):
        return layer_norm_op(x, weight, bias, eps, dtype)[0]
    return _Eager.apply(x, None, weight, bias, eps, dtype)


def add_layer_norm(x, branch, weight, bias, eps: float, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """The sum, and its layer norm of `dtype`; see `ops.add_layer_norm`. First derivatives in reverse mode only."""
    if _through_operators(x):
        return add_layer_norm_op(x, branch, weight, bias, eps, dtype)[:2]
    return _Eager.apply(x, branch, weight, bias, eps, dtype)
