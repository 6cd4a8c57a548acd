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
from functools import lru_cache
from typing import NamedTuple

import torch

from ...autograd import allocate_gradients
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
        return packed.view(*packed.shape[:3], 3, self.num_heads, -1).unbind(3)

    def problem(self, maps: Sequence[torch.Tensor], tables: Sequence[torch.Tensor]) -> Problem:
        return Problem(*maps, tables[0], tables[1] if self.dense else None, (self.grid, self.grid), self.scale)


def _value(packed: torch.Tensor) -> torch.Tensor:
    """(B, H, W, 3 * C) -> (B, H, W, C), a view of the values."""
    channels = packed.shape[3] // 3
    return packed.narrow(3, 2 * channels, channels)


def make_settings(
    height: int, width: int, channels: int, num_heads: int, num_regions: int, topk: int, scale: float
) -> Settings | None:
    """The settings of a call on such a map, or None where the operator cannot compute it.

    What holds for all kernels is not checked here.
    """
    grid = RegionGrid.fit(height, width, num_regions)
    if grid.num_regions > MAX_BITS or channels % 8 or channels > MAX_HEAD_DIM * num_heads:
        return None
    topk = min(topk, grid.num_regions)
    return Settings(grid, num_heads, topk, scale, is_dense(grid, grid, topk))


_settings = lru_cache(maxsize=1024)(make_settings)


def settings_for(qkv: torch.Tensor, num_heads: int, num_regions: int, topk: int, scale: float) -> Settings | None:
    """`make_settings` for a (B, H, W, 3 * C) projection."""
    _, height, width, channels = qkv.shape
    make = make_settings if torch.compiler.is_compiling() else _settings  # compilers see through no cache
    return make(height, width, channels // 3, num_heads, num_regions, topk, scale) if qkv.is_contiguous() else None


def _of_kernels(tables: Tables, dense: bool) -> tuple[torch.Tensor, ...]:
    """The tables that the kernels of attention read."""
    return (tables.query_bits, tables.key_bits) if dense else (tables.routes, tables.members, tables.bounds)


def _forward(qkv, weight, bias, settings: Settings) -> tuple[torch.Tensor, ...]:
    """The output, and for the backward pass what was attended to, its log-sum-exp, and the tables of routes."""
    maps = query, key, _ = settings.maps(qkv)
    grid, dense = settings.grid, settings.dense
    tables = _of_kernels(fused_routes(query, key, grid, grid, settings.topk, dense), dense)
    attended, lse = allocate(query, dense)
    launch_forward(settings.problem(maps, tables), attended, lse)
    value = _value(qkv)
    attended = attended.view(value.shape)
    out = torch.empty_like(attended)
    depthwise.convolve(value, weight.contiguous(), bias.contiguous(), attended, out)
    return out, attended, lse, *tables


def _backward(grad_out, qkv, weight, bias, attended, lse, tables, settings: Settings) -> tuple[torch.Tensor, ...]:
    """Gradients of qkv, weight and bias."""
    maps = settings.maps(qkv)
    problem = settings.problem(maps, tables)
    grad_out = grad_out.contiguous()
    grad_qkv, through_attention = torch.empty_like(qkv), torch.empty_like(attended)
    of_heads = maps[0].shape
    grads = *settings.maps(grad_qkv)[:2], through_attention.view(of_heads)
    inverse = (tables[0], tables[0]) if settings.dense else tuple(tables[1:])
    launch_gradients(problem, inverse, attended.view(of_heads), grad_out.view(of_heads), lse, grads)
    depthwise.convolve(grad_out, weight.contiguous(), None, through_attention, _value(grad_qkv), flip=True)
    grad_weight, grad_bias = allocate_gradients(weight, bias)
    depthwise.weight_gradients(_value(qkv), grad_out, grad_weight, grad_bias)
    return grad_qkv, grad_weight, grad_bias


class _Packed(torch.autograd.Function):

    @staticmethod
    def forward(ctx, qkv, weight, bias, settings: Settings):
        out, *saved = _forward(qkv, weight, bias, settings)
        ctx.save_for_backward(qkv, weight, bias, *saved)
        ctx.settings = settings
        return out

    @staticmethod
    def backward(ctx, grad_out):
        qkv, weight, bias, attended, lse, *tables = ctx.saved_tensors
        if torch.is_grad_enabled():
            # Second derivatives may follow, of which the operator says that there are none.
            grid, *others = ctx.settings
            grads = packed_backward(
                grad_out, qkv, weight, bias, attended, lse, tables, [grid.rows, grid.cols], *others
            )
            return *grads, None
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
    return allocate_gradients(qkv, weight, bias)


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
