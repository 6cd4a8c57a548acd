"""Bi-level routing attention on a packed projection: routing, attention and the local term (LePE) as one operator.

    routed_attention::packed            (qkv, weight, bias, grid, settings) -> (out, attended, lse, three tables)
    routed_attention::packed_backward   (grad_out, ..., grid, settings) -> (grad_qkv, grad_weight, grad_bias)

`grid` is [rows, columns] of regions, and what follows it the heads, top-k and the scale. Queries, keys and values are
read where the projection wrote them, and their gradients are written side by side for its backward pass: no kernels of
PyTorch's split, stack or add them. Four launches forward and four or five backward take the place of some thirty, for a
training step of many small layers waits for its launches.

The operators are for torch.compile and export. Dispatching one takes longer than launching its kernels, so that eager
calls go through a plain `torch.autograd.Function` around the same two functions.
"""
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch.autograd.function import once_differentiable

from ...fused import depthwise
from ...regions import RegionGrid
from .op import Problem, allocate, launch_forward, launch_gradients
from .routes import Tables, allocate_tables, fused_routes
from .tuning import MAX_BITS, MAX_HEAD_DIM, is_dense


class Settings(NamedTuple):
    """What a call is made with beside its tensors; `dense` as of `tuning.is_dense`."""
    grid: RegionGrid
    num_heads: int
    topk: int
    scale: float
    dense: bool

    @classmethod
    def of(cls, qkv: torch.Tensor, rows_cols: Sequence[int], *others) -> "Settings":
        return cls(RegionGrid(qkv.shape[1], qkv.shape[2], *rows_cols), *others)

    def maps(self, packed: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """(B, H, W, 3 * C) -> queries, keys and values, views of (B, H, W, heads, head_dim)."""
        return packed.unflatten(3, (3, self.num_heads, -1)).unbind(3)

    def problem(self, qkv: torch.Tensor, tables: Sequence[torch.Tensor]) -> Problem:
        bits = tables[1] if self.dense else None
        return Problem(*self.maps(qkv), tables[0], bits, (self.grid, self.grid), self.scale)


def settings_for(qkv: torch.Tensor, num_heads: int, num_regions: int, topk: int, scale: float) -> Settings | None:
    """The settings of a call with at most `num_regions` along each side, or None where the operator cannot compute it.

    What holds for all kernels is not checked here.
    """
    grid = RegionGrid.fit(*qkv.shape[1:3], num_regions)
    channels = qkv.shape[3] // 3
    fits = grid.num_regions <= MAX_BITS and channels % 8 == 0 and channels <= MAX_HEAD_DIM * num_heads
    if not fits or not qkv.is_contiguous():
        return None
    topk = min(topk, grid.num_regions)
    return Settings(grid, num_heads, topk, scale, is_dense(grid, grid, topk))


def _of_kernels(tables: Tables, dense: bool) -> tuple[torch.Tensor, ...]:
    """Those that attention's kernels read."""
    return (tables.query_bits, tables.key_bits) if dense else (tables.routes, tables.members, tables.bounds)


def _forward(qkv, weight, bias, settings: Settings) -> tuple[torch.Tensor, ...]:
    """The output, and for the backward pass what was attended to, its log-sum-exp, and the tables of routes."""
    query, key, value = settings.maps(qkv)
    dense = settings.dense
    tables = _of_kernels(fused_routes(query, key, settings.grid, settings.grid, settings.topk, dense), dense)
    attended, lse = allocate(query, dense)
    launch_forward(settings.problem(qkv, tables), attended, lse)
    attended = attended.flatten(3)
    out = torch.empty_like(attended)
    depthwise.convolve(value.flatten(3), weight, bias, attended, out)
    return out, attended, lse, *tables


def _backward(grad_out, qkv, weight, bias, attended, lse, tables, settings: Settings) -> tuple[torch.Tensor, ...]:
    """Gradients of qkv, weight and bias."""
    problem = settings.problem(qkv, tables)
    grad_out = grad_out.contiguous()
    grad_heads, attended = (x.view(problem.query.shape) for x in (grad_out, attended))
    grad_qkv = torch.empty_like(qkv)
    grad_query, grad_key, grad_value = settings.maps(grad_qkv)
    through_attention = torch.empty_like(attended)
    inverse = tuple(tables[:1]) * 2 if settings.dense else tuple(tables[1:])
    launch_gradients(problem, inverse, attended, grad_heads, lse, (grad_query, grad_key, through_attention))
    depthwise.convolve(grad_out, weight, None, through_attention.flatten(3), grad_value.flatten(3), flip=True)
    grad_weight, grad_bias = torch.empty_like(weight), torch.empty_like(bias)
    depthwise.weight_gradients(problem.value.flatten(3), grad_out, grad_weight, grad_bias)
    return grad_qkv, grad_weight, grad_bias


class _Packed(torch.autograd.Function):

    @staticmethod
    def forward(ctx, qkv, weight, bias, settings: Settings):
        out, *saved = _forward(qkv, weight, bias, settings)
        ctx.save_for_backward(qkv, weight, bias, *saved)
        ctx.settings = settings
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out):
        qkv, weight, bias, attended, lse, *tables = ctx.saved_tensors
        return *_backward(grad_out, qkv, weight, bias, attended, lse, tables, ctx.settings), None


# --- operators --------------------------------------------------------------------------------------------------------

_SETTINGS = "int[] grid, int num_heads, int topk, float scale, bool dense"


@torch.library.custom_op(
    "routed_attention::packed",
    mutates_args=(),
    schema=f"(Tensor qkv, Tensor weight, Tensor bias, {_SETTINGS})"
    " -> (Tensor out, Tensor attended, Tensor lse, Tensor, Tensor, Tensor)",
)
def packed(qkv, weight, bias, grid, *settings):
    out, attended, lse, *tables = _forward(qkv, weight, bias, Settings.of(qkv, grid, *settings))
    return out, attended, lse, *_three(tables)


def _three(tables: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """The tables, and an empty one where whole maps need two: an operator always returns as many."""
    return *tables, *(tables[0].new_empty(0) for _ in range(3 - len(tables)))


@packed.register_fake
def _(qkv, weight, bias, grid, *settings):
    settings = Settings.of(qkv, grid, *settings)
    query, key, _ = settings.maps(qkv)
    attended, lse = allocate(query, settings.dense)
    tables = allocate_tables(qkv, settings.grid, settings.grid, settings.topk, settings.dense)
    out = torch.empty_like(attended.flatten(3))
    return out, attended.flatten(3), lse, *_three(_of_kernels(tables, settings.dense))


@torch.library.custom_op(
    "routed_attention::packed_backward",
    mutates_args=(),
    schema="(Tensor grad_out, Tensor qkv, Tensor weight, Tensor bias, Tensor attended, Tensor lse, Tensor[] tables,"
    f" {_SETTINGS}) -> (Tensor, Tensor, Tensor)",
)
def packed_backward(grad_out, qkv, weight, bias, attended, lse, tables, grid, *settings):
    settings = Settings.of(qkv, grid, *settings)
    return _backward(grad_out, qkv, weight, bias, attended, lse, tables, settings)


@packed_backward.register_fake
def _(grad_out, qkv, weight, bias, attended, lse, tables, grid, *settings):
    return tuple(torch.empty_like(x) for x in (qkv, weight, bias))


def _save_for_backward(ctx, inputs, output):
    qkv, weight, bias, *ctx.settings = inputs
    _, attended, lse, *tables = output
    ctx.mark_non_differentiable(attended, lse, *tables)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(qkv, weight, bias, attended, lse, *tables)


def _gradients(ctx, grad_out, *_):
    nones = (None,) * len(ctx.settings)
    if grad_out is None:
        return None, None, None, *nones
    qkv, weight, bias, attended, lse, *tables = ctx.saved_tensors
    return *packed_backward(grad_out, qkv, weight, bias, attended, lse, tables, *ctx.settings), *nones


packed.register_autograd(_gradients, setup_context=_save_for_backward)


def packed_attention(
    qkv: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, settings: Settings
) -> torch.Tensor:
    """softmax(scale * q k^T) v along the routes of q and k, plus the depthwise convolution of v.

    The convolution is added in float32, before the sum is rounded.

    Args:
        qkv: (B, H, W, 3 * C) projection: queries, keys and values of all heads, one behind the other.
        weight: (C, 1, k, k) of the local term, k = 3 or 5.
        bias: (C,) of the local term.
        settings: Regions, heads, top-k and scale.

    Returns:
        (B, H, W, C), of qkv's dtype.
    """
    if torch.compiler.is_compiling() or type(qkv) is not torch.Tensor:
        grid, *others = settings
        return packed(qkv, weight, bias, [grid.rows, grid.cols], *others)[0]
    return _Packed.apply(qkv, weight, bias, settings)
