"""The fused depthwise convolution as a function, and as custom operators for torch.compile and export.

    routed_layers::depthwise_conv            (x, weight, bias, residual, add_input) -> out
    routed_layers::depthwise_conv_backward   (grad, x, weight, ...) -> (grad_x, grad_weight, grad_bias)

A custom operator costs the host some 50 us more than an autograd function, forward and backward, which is as much as
all launches of the kernels together; where maps are small the GPU waits for the host. So ordinary calls go through an
autograd function. Both compute by `_forward` and `_backward`.
"""
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch

from ..launch import launch
from . import depthwise_kernels as kernels
from . import empty


class _Shape(NamedTuple):
    """What a program takes: columns of a strip, rows of a segment at most, and its warps.

    A thread has two channels of a strip, see `depthwise_kernels`. Rows next to a segment are read twice, and few
    segments leave a GPU idle. Measured on an H100, batch 128, maps of 56 x 56 x 64 to 7 x 7 x 512.
    """
    cols: int
    rows: int
    num_warps: int


_CONVOLUTION = {3: _Shape(4, 16, 4), 5: _Shape(4, 28, 8)}
_WEIGHT_GRADIENT = {3: _Shape(4, 28, 4), 5: _Shape(4, 28, 4)}
# Programs that add up gradients of the weights. It decides in which order they are added, so it is the same everywhere.
_PROGRAMS = 264


def _map_stride(shape: Sequence[int], strides: Sequence[int]) -> int | None:
    """How far apart the tokens of a (B, H, W, C) map lie if all distances are alike and channels lie side by side."""
    batch, height, width, channels = shape
    image, row, col, channel = strides
    if width == 1:
        col = row if height > 1 else image if batch > 1 else channels
    even = (channels == 1 or channel == 1) and (height == 1 or row == width * col)
    return col if even and col >= channels and (batch == 1 or image == height * width * col) else None


def _cdiv(a: int, b: int) -> int:
    """`triton.cdiv`, which takes microseconds."""
    return -(-a // b)


class _Tiles(NamedTuple):
    """How a map is cut into tiles, see `depthwise_kernels`; `places` is the number of tiles without their channels."""
    rows: int
    block_strips: int
    places: int
    block_channels: int
    channel_tiles: int


def _tiles(batch: int, height: int, width: int, channels: int, shape: _Shape) -> _Tiles:
    """Channels in tiles of what a warp has, or of half of it where fewer are left over; segments of like size."""
    block_channels = 64 if channels % 64 == 0 else 32
    block_strips = 2 * 32 * shape.num_warps // block_channels
    rows = _cdiv(height, _cdiv(height, shape.rows))
    places = _cdiv(batch * _cdiv(width, shape.cols), block_strips) * _cdiv(height, rows)
    return _Tiles(rows, block_strips, places, block_channels, _cdiv(channels, block_channels))


@lru_cache(maxsize=1024)
def _convolution(map_shape, x_strides, out_strides, kernel: int, add_input: bool, flip: bool) -> tuple | None:
    """(programs, the kernel's sizes, its constants), or None where the tokens of x do not lie equally far apart.

    All follow from shapes and strides, and finding them again in each call would take the host longer than the call.
    """
    stride = _map_stride(map_shape, x_strides)
    if stride is None:
        return None
    shape = _CONVOLUTION[kernel]
    tiles = _tiles(*map_shape, shape)
    constants = dict(
        **dict(C=map_shape[3], X_STRIDE=stride, OUT_STRIDE=_map_stride(map_shape, out_strides)),
        **dict(K=kernel, FLIP=flip, ADD_INPUT=add_input, COLS=shape.cols),
        **dict(BLOCK_S=tiles.block_strips, BLOCK_C=tiles.block_channels, num_warps=shape.num_warps),
    )
    return tiles.places * tiles.channel_tiles, (*map_shape[:3], tiles.rows), constants


def convolve(x, weight, bias, residual, out, add_input: bool = False, flip: bool = False):
    """out = conv(x, weight) + bias + residual, and + x with `add_input`. Tokens of `out` may lie apart, but evenly."""
    found = _convolution(x.shape, x.stride(), out.stride(), weight.shape[2], add_input, flip)
    if found is None:
        return convolve(x.contiguous(), weight, bias, residual, out, add_input, flip)
    programs, sizes, constants = found
    launch(kernels.depthwise_kernel, programs, (x, weight, bias, residual, out), sizes, constants)


@lru_cache(maxsize=1024)
def _weight_gradient(map_shape, x_strides, kernel: int) -> tuple | None:
    """(shares, numbers in each, programs, sizes, constants, those of the second kernel), or None, as `_convolution`."""
    stride = _map_stride(map_shape, x_strides)
    if stride is None:
        return None
    shape, channels = _WEIGHT_GRADIENT[kernel], map_shape[3]
    tiles = _tiles(*map_shape, shape)
    shares = min(tiles.places, max(1, _PROGRAMS // tiles.channel_tiles))
    constants = dict(
        **dict(C=channels, X_STRIDE=stride, K=kernel, COLS=shape.cols),
        **dict(BLOCK_S=tiles.block_strips, BLOCK_C=tiles.block_channels, num_warps=shape.num_warps),
    )
    of_sum = dict(C=channels, K=kernel, BLOCK_S=64, BLOCK_N=32, num_warps=4)
    numbers = channels * (16 if kernel == 3 else 32)
    return shares, numbers, shares * tiles.channel_tiles, (*map_shape[:3], tiles.rows), constants, of_sum


def weight_gradients(x, grad, grad_weight, grad_bias):
    """Fill the gradients of the weights, and of the bias unless it is None."""
    found = _weight_gradient(x.shape, x.stride(), grad_weight.shape[2])
    if found is None:
        return weight_gradients(x.contiguous(), grad, grad_weight, grad_bias)
    shares, numbers, programs, sizes, constants, of_sum = found
    share = torch.empty(shares * numbers, dtype=torch.float32, device=x.device)
    launch(kernels.depthwise_weight_gradient_kernel, programs, (x, grad, share), sizes, constants)
    tensors = (share, grad_weight, grad_bias)
    launch(kernels.depthwise_add_shares_kernel, _cdiv(numbers, 32), tensors, (shares,), of_sum)


def _result(x: torch.Tensor, residual: torch.Tensor | None) -> torch.Tensor:
    return empty(x, None if residual is None else torch.promote_types(x.dtype, residual.dtype))


def _forward(x, weight, bias, residual, add_input: bool) -> torch.Tensor:
    out = _result(x, residual)
    if out.numel():
        residual = None if residual is None else residual.contiguous()
        bias = None if bias is None else bias.contiguous()
        convolve(x, weight.contiguous(), bias, residual, out, add_input, flip=False)
    return out


def _backward(grad, x, weight, bias, add_input: bool, needed: Sequence[bool]) -> tuple[torch.Tensor | None, ...]:
    """Gradients of x, weight and bias, None where they are not `needed`."""
    grad, weight = grad.contiguous(), weight.contiguous()
    need_x, need_weight, need_bias = needed
    grad_x, grad_weight, grad_bias = _allocate_gradients(x, weight, bias, (need_x, need_weight or need_bias, need_bias))
    if x.numel() == 0:
        return grad_x, *(None if g is None else g.zero_() for g in (grad_weight, grad_bias))
    if need_x:
        convolve(grad, weight, None, None, grad_x, add_input, flip=True)
    if need_weight or need_bias:
        weight_gradients(x, grad, grad_weight, grad_bias)
    return grad_x, grad_weight if need_weight else None, grad_bias


def _allocate_gradients(x, weight, bias, needed: Sequence[bool]) -> tuple[torch.Tensor | None, ...]:
    need_x, need_weight, need_bias = needed
    return empty(x) if need_x else None, empty(weight) if need_weight else None, empty(bias) if need_bias else None


def _save_for_backward(ctx, inputs, output):
    x, weight, bias, residual, ctx.add_input = inputs
    ctx.residual_dtype = None if residual is None else residual.dtype
    ctx.save_for_backward(x, weight, bias)


def _gradients(ctx, grad, backward) -> tuple[torch.Tensor | None, ...]:
    """Gradients of all inputs; the residual's is the output's own."""
    *needed, need_residual, _ = ctx.needs_input_grad
    grads = (None, None, None)
    if any(needed):
        grads = backward(grad, *ctx.saved_tensors, ctx.add_input, needed)
    if not need_residual:
        return *grads, None, None
    return *grads, grad if grad.dtype == ctx.residual_dtype else grad.to(ctx.residual_dtype), None


class _DepthwiseConv(torch.autograd.Function):
    """The operator for ordinary calls, at a fraction of its time on the host.

    Without `setup_context`: for functions that have one, PyTorch looks up the signature in each call.
    """

    @staticmethod
    def forward(ctx, *args):
        out = _forward(*args)
        _save_for_backward(ctx, args, out)
        return out

    @staticmethod
    def backward(ctx, grad):
        # With grad mode on, second derivatives may follow, of which the operator says that there are none.
        return _gradients_by_operator(ctx, grad) if torch.is_grad_enabled() else _gradients(ctx, grad, _backward)


@torch.library.custom_op(
    "routed_layers::depthwise_conv",
    mutates_args=(),
    schema="(Tensor x, Tensor weight, Tensor? bias, Tensor? residual, bool add_input) -> Tensor",
)
def forward_op(x, weight, bias, residual, add_input):
    return _forward(x, weight, bias, residual, add_input)


@forward_op.register_fake
def _(x, weight, bias, residual, add_input):
    return _result(x, residual)


@torch.library.custom_op(
    "routed_layers::depthwise_conv_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor x, Tensor weight, Tensor? bias, bool add_input, bool[] needed)"
    " -> (Tensor, Tensor, Tensor)",
)
def backward_op(grad, x, weight, bias, add_input, needed):
    return _without_none(x, _backward(grad, x, weight, bias, add_input, needed))


@backward_op.register_fake
def _(grad, x, weight, bias, add_input, needed):
    return _without_none(x, _allocate_gradients(x, weight, bias, needed))


def _without_none(x: torch.Tensor, grads: tuple[torch.Tensor | None, ...]) -> tuple[torch.Tensor, ...]:
    """An operator returns tensors only: empty ones instead."""
    return tuple(x.new_empty(0) if grad is None else grad for grad in grads)


def _gradients_by_operator(ctx, grad):
    grads = _gradients(ctx, grad, backward_op)
    return tuple(g if need else None for g, need in zip(grads, ctx.needs_input_grad, strict=True))


forward_op.register_autograd(_gradients_by_operator, setup_context=_save_for_backward)


def depthwise_conv(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, residual: torch.Tensor | None
) -> torch.Tensor:
    """conv(x, weight) + bias + residual of (B, H, W, C) maps, products in the type of `x`; see `ops.depthwise_conv`."""
    add_input = residual is x
    args = (x, weight, bias, None if add_input else residual, add_input)
    # Compilers see an operator that they need not look into. So do tensors that are not ordinary ones, fake ones first.
    if torch.compiler.is_compiling() or type(x) is not torch.Tensor:
        return forward_op(*args)
    return _DepthwiseConv.apply(*args)
