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
from .tuning import Tile, choose_tile


def _grid_of(x_BHWND: torch.Tensor, rows_cols: Sequence[int]) -> RegionGrid:
    return RegionGrid(x_BHWND.shape[1], x_BHWND.shape[2], *rows_cols)


def _grid_args(query_grid: RegionGrid, key_grid: RegionGrid) -> dict[str, int]:
    names = ("height", "width", "cols", "region_height", "region_width")
    return {f"{side}_{n}": getattr(grid, n) for side, grid in (("q", query_grid), ("k", key_grid)) for n in names}


def _precision(dtype: torch.dtype) -> str:
    """tf32 products of float32 only where PyTorch's own matrix products use them."""
    return "tf32" if dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32 else "ieee"


def _tokens(grid: RegionGrid, dense: bool) -> tuple[int, int]:
    """How many sets of tokens are cut into tiles, and the tokens of each."""
    return (1, grid.height * grid.width) if dense else (grid.num_regions, grid.tokens_per_region)


def _launch(kernel, tile: Tile, sets: int, tokens: int, like: torch.Tensor, dense: bool, scale: float, *args, **sizes):
    """One program for each tile of each set of tokens, image and head."""
    batch, _, _, num_heads, head_dim = like.shape
    programs = batch * num_heads * sets * triton.cdiv(tokens, tile.block_m)
    # Triton launches on the current device, which need not be the tensors'.
    with torch.cuda.device_of(like):
        kernel[(programs,)](
            *args,
            scale=scale / math.log(2),
            num_heads=num_heads,
            HEAD_DIM=head_dim,
            BLOCK_D=max(16, triton.next_power_of_2(head_dim)),
            BLOCK_M=tile.block_m,
            BLOCK_N=tile.block_n,
            DENSE=dense,
            PRECISION=_precision(like.dtype),
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
            **sizes,
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


@torch.library.custom_op("routed_attention::forward", mutates_args=())
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
    query, key, value = (_rows_side_by_side(x) for x in (query, key, value))
    topk = routes.shape[2]
    sets, tokens = _tokens(query_grid, dense)
    keys = key_grid.height * key_grid.width if dense else topk * key_grid.tokens_per_region
    _launch(
        kernels.forward_kernel,
        choose_tile(tokens, keys, query.shape[-1], query.dtype),
        *(sets, tokens, query, dense, scale),
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


@torch.library.custom_op("routed_attention::backward", mutates_args=())
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
    query_sets, queries = _tokens(query_grid, dense)
    key_sets, keys = _tokens(key_grid, dense)

    _launch(
        kernels.query_gradient_kernel,
        choose_tile(queries, keys if dense else topk * keys, head_dim, dtype),
        *(query_sets, queries, query, dense, scale),
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
        choose_tile(keys, queries if dense else chosen_by * queries, head_dim, dtype),
        *(key_sets, keys, query, dense, scale),
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
