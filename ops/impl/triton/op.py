"""Fused routed attention as custom operators, opaque to torch.compile, export and autograd.

    routed_attention::forward   (query, key, value, routes, bits, grids, scale) -> (out, lse)
    routed_attention::backward  (..., out, grad_out, lse, ...) -> (grad_query, grad_key, grad_value)

A grid is passed as its [rows, cols]; the map's shape says the rest. Without `bits` the routes are lists of regions;
with them, routes and bits are what `route_bits` returns, and whole maps are streamed under their mask.
"""
import math
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton

from ...autograd import allocate_gradients, register_gradients
from ...launch import launch
from ...regions import RegionGrid
from ...routing import Routing
from . import kernels
from .tuning import MAX_BITS, Plan, Tile, choose_one_pass_tile, fits_one_pass, make_plan


def _grid_of(x_BHWND: torch.Tensor, rows_cols: Sequence[int]) -> RegionGrid:
    return RegionGrid(x_BHWND.shape[1], x_BHWND.shape[2], *rows_cols)


class Kind(NamedTuple):
    """What problems have in common whose kernels are alike, but for strides."""
    query_grid: RegionGrid
    key_grid: RegionGrid
    topk: int
    dense: bool
    head_dim: int
    dtype: torch.dtype

    def plan(self, inverse: bool, tile: Tile | None = None) -> Plan:
        """The plan of a kernel on the queries' side, or on the keys' (`inverse`); `tile` overrules its tile."""
        kind = (self.dense, self.head_dim, self.dtype, tile)
        if inverse:
            chosen_by = max(1, self.topk * self.query_grid.num_regions // self.key_grid.num_regions)
            return make_plan(self.key_grid, self.query_grid, chosen_by, True, *kind)
        return make_plan(self.query_grid, self.key_grid, self.topk, False, *kind)

    def plan_of_one_pass(self, tile: Tile | None = None) -> Plan:
        """The plan of the kernel of all gradients; `tile` overrules its tile.

        Raises:
            ValueError: A tile does not hold the whole map of queries.
        """
        tokens = self.query_grid.height * self.query_grid.width
        plan = self.plan(False, tile or choose_one_pass_tile(tokens, self.head_dim))
        if plan.tiles != 1 or not plan.dense:
            raise ValueError(f"one tile must hold all queries of a map that is streamed whole, got {plan}")
        return plan


class Problem(NamedTuple):
    """What all kernels are launched on: maps whose heads lie side by side in memory, and who attends to whom."""
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    routes: torch.Tensor
    bits: torch.Tensor | None
    grids: tuple[RegionGrid, RegionGrid]
    scale: float

    @property
    def topk(self) -> int:
        return 0 if self.bits is not None else self.routes.shape[2]

    @property
    def kind(self) -> Kind:
        return Kind(*self.grids, self.topk, self.bits is not None, self.query.shape[-1], self.query.dtype)


def make_problem(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    routes: torch.Tensor,
    bits: torch.Tensor | None,
    query_regions: Sequence[int],
    key_regions: Sequence[int],
    scale: float,
) -> Problem:
    """A problem from the operators' arguments."""
    grids = _grid_of(query, query_regions), _grid_of(key, key_regions)
    maps = (_rows_side_by_side(x) for x in (query, key, value))
    return Problem(*maps, routes.contiguous(), bits, grids, scale)


def _precision(dtype: torch.dtype) -> str:
    """tf32 products of float32 only where PyTorch's own matrix products use them."""
    if dtype != torch.float32:
        return "ieee"
    matmul = torch.backends.cuda.matmul
    # PyTorch 2.9 has a new setting beside the old one, which cannot be read any more once the new one is written.
    allowed = matmul.fp32_precision == "tf32" if hasattr(matmul, "fp32_precision") else matmul.allow_tf32
    return "tf32" if allowed else "ieee"


def _strides_of_8(strides: tuple[tuple[int, ...], ...]) -> bool:
    """Whether every head of every token begins a multiple of 8 numbers behind the first one of its map."""
    return all(stride % 8 == 0 for strides_of_map in strides for stride in strides_of_map)


QUERIES, KEYS, ONE_PASS = "queries", "keys", "one pass"  # what a program of a kernel has a tile of


class _Prepared(NamedTuple):
    """What a launch needs to know beside its tensors: tiles of an image's head, the grids, and the constants."""
    tiles: int
    sizes: tuple[int, ...]
    constants: dict[str, int | bool | str]


@lru_cache(maxsize=1024)
def _prepare(side: str, kind: Kind, strides: tuple[tuple[int, ...], ...], precision: str, tile: Tile | None):
    """Prepared once: a training step that launches many small kernels waits for the host."""
    plan = kind.plan_of_one_pass(tile) if side == ONE_PASS else kind.plan(side == KEYS, tile)
    constants = dict(
        HEAD_DIM=kind.head_dim,
        BLOCK_D=max(16, triton.next_power_of_2(kind.head_dim)),
        PRECISION=precision,
        STRIDES_OF_8=_strides_of_8(strides),
        **plan.constants(),
    )
    grids = (kind.query_grid, kind.key_grid)
    sizes = tuple(n for g in grids for n in (g.height, g.width, g.cols, g.region_height, g.region_width))
    return _Prepared(plan.tiles, sizes, constants)


def _launch(kernel, side: str, problem: Problem, tile: Tile | None, pointers, strides, *counts: int):
    """One program for each tile, image and head."""
    kind = problem.kind
    prepared = _prepare(side, kind, strides, _precision(kind.dtype), tile)
    batch, _, _, num_heads, _ = problem.query.shape
    numbers = (*strides, problem.scale / math.log(2), num_heads, *counts, *prepared.sizes)
    launch(kernel, batch * num_heads * prepared.tiles, pointers, numbers, prepared.constants)


def _of_tokens(x_BR: torch.Tensor, grid: RegionGrid) -> torch.Tensor:
    """(B, H * W), what every token's region has, with zeros behind as the kernels expect them."""
    x_BYhXw = x_BR.view(-1, grid.rows, 1, grid.cols, 1).expand(-1, -1, grid.region_height, -1, grid.region_width)
    x_BL = grid.crop(x_BYhXw.flatten(3).flatten(1, 2)).flatten(1)
    return F.pad(x_BL, (0, -x_BL.shape[1] % kernels.MAX_BLOCK.value))


def route_bits(routing: Routing) -> tuple[torch.Tensor, torch.Tensor]:
    """For each query the regions that it is routed to as bits, and for each key the bit of its region.

    Returns:
        (B, Lq) and (1, Lk) int64, over the tokens of the maps in row-major order and zeros behind them.

    Raises:
        ValueError: There are more key regions than bits.
    """
    routes_BRK, query_grid, key_grid, _ = routing
    if key_grid.num_regions > MAX_BITS:
        raise ValueError(f"routes as bits have room for {MAX_BITS} key regions, got {key_grid.num_regions}")
    query_bits_BR = torch.bitwise_left_shift(1, routes_BRK).sum(-1)
    key_bits_BR = torch.bitwise_left_shift(1, torch.arange(key_grid.num_regions, device=routes_BRK.device))[None]
    return _of_tokens(query_bits_BR, query_grid), _of_tokens(key_bits_BR, key_grid)


def _inverse(routes_BRK: torch.Tensor, num_key_regions: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Which query regions chose each key region: (B, Rq * K) members, and (B, Rk + 1) where each region's begin."""
    chosen, order = routes_BRK.flatten(1).sort(dim=1, stable=True)
    regions = torch.arange(num_key_regions + 1, device=routes_BRK.device).repeat(routes_BRK.shape[0], 1)
    return (order // routes_BRK.shape[2]).int(), torch.searchsorted(chosen, regions, out_int32=True)


def _rows_side_by_side(x_BHWND: torch.Tensor) -> torch.Tensor:
    """The tensor itself, unless the numbers of one head are apart in memory."""
    return x_BHWND if x_BHWND.stride(-1) == 1 else x_BHWND.contiguous()


def _strides(*maps_BHWND: torch.Tensor) -> tuple[tuple[int, ...], ...]:
    return tuple([x.stride()[:4] for x in maps_BHWND])


def launch_forward(problem: Problem, out: torch.Tensor, lse: torch.Tensor, tile: Tile | None = None):
    """Write the output and `lse`, with `tile` instead of the chosen one."""
    query, key, value, routes, bits, (query_grid, _), _ = problem
    pointers = (query, key, value, routes, bits, out, lse)
    strides = _strides(query, key, value, out)
    counts = (query_grid.num_regions, problem.topk)
    _launch(kernels.forward_kernel, QUERIES, problem, tile, pointers, strides, *counts)


def launch_query_gradient(
    problem: Problem,
    out: torch.Tensor,
    grad_out: torch.Tensor,
    lse: torch.Tensor,
    delta: torch.Tensor,
    grad_query: torch.Tensor,
    tile: Tile | None = None,
):
    """Write `delta` and the gradient of the queries."""
    query, key, value, routes, bits, (query_grid, _), _ = problem
    pointers = (query, key, value, routes, bits, out, grad_out, lse, delta, grad_query)
    strides = _strides(query, key, value, out, grad_out, grad_query)
    counts = (query_grid.num_regions, problem.topk)
    _launch(kernels.query_gradient_kernel, QUERIES, problem, tile, pointers, strides, *counts)


def launch_key_value_gradient(
    problem: Problem,
    inverse: tuple[torch.Tensor, torch.Tensor],
    grad_out: torch.Tensor,
    lse: torch.Tensor,
    delta: torch.Tensor,
    grads: tuple[torch.Tensor, torch.Tensor],
    tile: Tile | None = None,
):
    """Write the gradients of keys and values; `inverse` is of `inverse_of`, `delta` of the queries' kernel."""
    query, key, value, routes, bits, (query_grid, key_grid), _ = problem
    pointers = (query, key, value, routes, bits, *inverse, grad_out, lse, delta, *grads)
    strides = _strides(query, key, value, grad_out, *grads)
    counts = (query_grid.num_regions, key_grid.num_regions, problem.topk)
    _launch(kernels.key_value_gradient_kernel, KEYS, problem, tile, pointers, strides, *counts)


def launch_one_pass_gradients(
    problem: Problem,
    out: torch.Tensor,
    grad_out: torch.Tensor,
    lse: torch.Tensor,
    grads: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    tile: Tile | None = None,
):
    """Write the gradients of queries, keys and values in one pass over a whole map, where it `fits_one_pass`."""
    query, key, value, routes, bits, _, _ = problem
    pointers = (query, key, value, routes, bits, out, grad_out, lse, *grads)
    strides = _strides(query, key, value, out, grad_out, *grads)
    _launch(kernels.one_pass_gradients_kernel, ONE_PASS, problem, tile, pointers, strides)


def launch_gradients(
    problem: Problem,
    inverse: tuple[torch.Tensor, torch.Tensor],
    out: torch.Tensor,
    grad_out: torch.Tensor,
    lse: torch.Tensor,
    grads: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
):
    """Write the gradients of queries, keys and values; `inverse` is of `inverse_of`."""
    if problem.bits is not None and fits_one_pass(*problem.grids, problem.query.shape[-1], problem.query.dtype):
        launch_one_pass_gradients(problem, out, grad_out, lse, grads)
        return
    delta = torch.empty_like(lse)
    launch_query_gradient(problem, out, grad_out, lse, delta, grads[0])
    launch_key_value_gradient(problem, inverse, grad_out, lse, delta, grads[1:])


def inverse_of(problem: Problem) -> tuple[torch.Tensor, torch.Tensor]:
    """The inverse of the routes as the kernel reads it; where it streams whole maps it reads none."""
    routes = problem.routes
    return (routes, routes) if problem.bits is not None else _inverse(routes, problem.grids[1].num_regions)


_MAPS = "Tensor query, Tensor key, Tensor value, Tensor routes, Tensor? bits"
_SETTINGS = "int[] query_regions, int[] key_regions, float scale"


@torch.library.custom_op(
    "routed_attention::forward", mutates_args=(), schema=f"({_MAPS}, {_SETTINGS}) -> (Tensor out, Tensor lse)"
)
def forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    routes: torch.Tensor,
    bits: torch.Tensor | None,
    query_regions: Sequence[int],
    key_regions: Sequence[int],
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    out, lse = allocate(query, bits is not None)
    if out.numel() == 0:
        return out, lse
    problem = make_problem(query, key, value, routes, bits, query_regions, key_regions, scale)
    launch_forward(problem, out, lse)
    return out, lse


def allocate(query: torch.Tensor, dense: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """The output, and one float for each query and head, with room behind them as the dense kernels expect it."""
    batch, height, width, heads, _ = query.shape
    length = height * width
    if dense:
        length += -length % kernels.MAX_BLOCK.value
    lse = query.new_empty((batch, heads, length), dtype=torch.float32)
    return torch.empty_like(query, memory_format=torch.contiguous_format), lse


@forward.register_fake
def _(query, key, value, routes, bits, query_regions, key_regions, scale):
    return allocate(query, bits is not None)


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
    bits: torch.Tensor | None,
    out: torch.Tensor,
    grad_out: torch.Tensor,
    lse: torch.Tensor,
    query_regions: Sequence[int],
    key_regions: Sequence[int],
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    grads = allocate_gradients(query, key, value)
    if out.numel() == 0:
        return grads
    problem = make_problem(query, key, value, routes, bits, query_regions, key_regions, scale)
    launch_gradients(problem, inverse_of(problem), out, _rows_side_by_side(grad_out), lse, grads)
    return grads


@backward.register_fake
def _(query, key, value, routes, bits, out, grad_out, lse, query_regions, key_regions, scale):
    return allocate_gradients(query, key, value)


register_gradients(forward, backward, num_tensors=5)
