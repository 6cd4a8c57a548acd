"""Fused routed attention as operators that torch.compile, export and autograd treat whole.

    routed_attention::forward   (query, key, value, routes, grids, scale, dense) -> (out, lse)
    routed_attention::backward  (..., out, grad_out, lse, ...) -> (grad_query, grad_key, grad_value)

A grid crosses as its [rows, cols]; the rest of it is the map's shape.
"""
import math
from collections.abc import Sequence

import torch
import triton

from ...regions import RegionGrid
from . import kernels
from .tuning import MAX_BITS, Plan, make_plan


def _grid_of(x_BHWND: torch.Tensor, rows_cols: Sequence[int]) -> RegionGrid:
    return RegionGrid(x_BHWND.shape[1], x_BHWND.shape[2], *rows_cols)


def _grid_args(query_grid: RegionGrid, key_grid: RegionGrid) -> dict[str, int]:
    names = ("height", "width", "cols", "region_height", "region_width")
    return {f"{side}_{n}": getattr(grid, n) for side, grid in (("q", query_grid), ("k", key_grid)) for n in names}


def _precision(dtype: torch.dtype) -> str:
    """tf32 products of float32 only where PyTorch's own matrix products use them."""
    matmul = torch.backends.cuda.matmul
    # PyTorch 2.9 has a new setting beside the old one, which cannot be read any more once the new one is written.
    allowed = matmul.fp32_precision == "tf32" if hasattr(matmul, "fp32_precision") else matmul.allow_tf32
    return "tf32" if dtype == torch.float32 and allowed else "ieee"


def _launch(kernel, plan: Plan, like: torch.Tensor, scale: float, *args, **sizes):
    """One program for each tile, image and head."""
    batch, _, _, num_heads, head_dim = like.shape
    # Triton launches on the current device, which need not be the tensors'.
    with torch.cuda.device_of(like):
        kernel[(batch * num_heads * plan.tiles,)](
            *args,
            scale=scale / math.log(2),
            num_heads=num_heads,
            HEAD_DIM=head_dim,
            BLOCK_D=max(16, triton.next_power_of_2(head_dim)),
            PRECISION=_precision(like.dtype),
            **sizes,
            **plan.constants(),
        )


def _kernel_routes(routes: torch.Tensor, dense: bool) -> torch.Tensor:
    """Routes as the kernels read them: the list, or (B, Rq) sets of bits."""
    return torch.bitwise_left_shift(1, routes).sum(-1) if dense else routes.contiguous()


def _inverse(routes_BRK: torch.Tensor, num_key_regions: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Which query regions chose each key region: (B, Rq * K) members, and (B, Rk + 1) where each region's begin."""
    chosen, order = routes_BRK.flatten(1).sort(dim=1, stable=True)
    regions = torch.arange(num_key_regions + 1, device=routes_BRK.device).repeat(routes_BRK.shape[0], 1)
    return (order // routes_BRK.shape[2]).int(), torch.searchsorted(chosen, regions, out_int32=True)


def _rows_side_by_side(x_BHWND: torch.Tensor) -> torch.Tensor:
    """The tensor itself, unless the numbers of one head are apart in memory."""
    return x_BHWND if x_BHWND.stride(-1) == 1 else x_BHWND.contiguous()


def _strides(*maps_BHWND: torch.Tensor) -> list[tuple[int, ...]]:
    return [x.stride()[:4] for x in maps_BHWND]


_MAPS = "Tensor query, Tensor key, Tensor value, Tensor routes"
_SETTINGS = "int[] query_regions, int[] key_regions, float scale, bool dense"


@torch.library.custom_op(
    "routed_attention::forward", mutates_args=(), schema=f"({_MAPS}, {_SETTINGS}) -> (Tensor out, Tensor lse)"
)
def forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    routes: torch.Tensor,
    query_regions: Sequence[int],
    key_regions: Sequence[int],
    scale: float,
    dense: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    out, lse = _allocate(query)
    if out.numel() == 0:
        return out, lse
    query_grid, key_grid = _grid_of(query, query_regions), _grid_of(key, key_regions)
    if dense and key_grid.num_regions > MAX_BITS:
        raise ValueError(f"routes as bits have room for {MAX_BITS} key regions, got {key_grid.num_regions}")
    query, key, value = (_rows_side_by_side(x) for x in (query, key, value))
    topk = routes.shape[2]
    _launch(
        kernels.forward_kernel,
        make_plan(query_grid, key_grid, topk, False, dense, query.shape[-1], query.dtype),
        *(query, scale),
        *(query, key, value, _kernel_routes(routes, dense), out, lse),
        *_strides(query, key, value, out),
        num_query_regions=query_grid.num_regions,
        topk=topk,
        **_grid_args(query_grid, key_grid),
    )
    return out, lse


def _allocate(query: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The output, and one float for each query and head."""
    batch, height, width, heads, _ = query.shape
    lse = query.new_empty((batch, heads, height, width), dtype=torch.float32)
    return torch.empty_like(query, memory_format=torch.contiguous_format), lse


@forward.register_fake
def _(query, key, value, routes, query_regions, key_regions, scale, dense):
    return _allocate(query)


@torch.library.custom_op(
    "routed_attention::backward",
    mutates_args=(),
    schema=f"({_MAPS}, Tensor out, Tensor grad_out, Tensor lse, {_SETTINGS}) -> (Tensor, Tensor, Tensor)",
)
def backward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    routes: torch.Tensor,
    out: torch.Tensor,
    grad_out: torch.Tensor,
    lse: torch.Tensor,
    query_regions: Sequence[int],
    key_regions: Sequence[int],
    scale: float,
    dense: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    grads = grad_query, grad_key, grad_value = _allocate_gradients(query, key, value)
    if out.numel() == 0:
        return grads
    query_grid, key_grid = _grid_of(query, query_regions), _grid_of(key, key_regions)
    query, key, value, grad_out = (_rows_side_by_side(x) for x in (query, key, value, grad_out))
    head_dim, dtype = query.shape[-1], query.dtype
    topk = routes.shape[2]
    kernel_routes = _kernel_routes(routes, dense)
    delta = torch.empty_like(lse)
    grids = _grid_args(query_grid, key_grid)

    _launch(
        kernels.query_gradient_kernel,
        make_plan(query_grid, key_grid, topk, False, dense, head_dim, dtype),
        *(query, scale),
        *(query, key, value, kernel_routes, out, grad_out, lse, delta, grad_query),
        *_strides(query, key, value, out, grad_out, grad_query),
        num_query_regions=query_grid.num_regions,
        topk=topk,
        **grids,
    )
    members, bounds = (kernel_routes, kernel_routes) if dense else _inverse(routes, key_grid.num_regions)
    chosen_by = max(1, topk * query_grid.num_regions // key_grid.num_regions)
    _launch(
        kernels.key_value_gradient_kernel,
        make_plan(key_grid, query_grid, chosen_by, True, dense, head_dim, dtype),
        *(query, scale),
        *(query, key, value, kernel_routes, members, bounds, grad_out, lse, delta, grad_key, grad_value),
        *_strides(query, key, value, grad_out, grad_key, grad_value),
        num_query_regions=query_grid.num_regions,
        num_key_regions=key_grid.num_regions,
        topk=topk,
        **grids,
    )
    return grads


def _allocate_gradients(*inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in inputs)


@backward.register_fake
def _(query, key, value, routes, out, grad_out, lse, query_regions, key_regions, scale, dense):
    return _allocate_gradients(query, key, value)


def _save_for_backward(ctx, inputs, output):
    query, key, value, routes, *ctx.settings = inputs
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(query, key, value, routes, out, lse)


def _gradients(ctx, grad_out, _grad_lse):
    nones = (None,) * (1 + len(ctx.settings))
    if grad_out is None:
        return None, None, None, *nones
    query, key, value, routes, out, lse = ctx.saved_tensors
    return *backward(query, key, value, routes, out, grad_out, lse, *ctx.settings), *nones


forward.register_autograd(_gradients, setup_context=_save_for_backward)
