"""The operators, opaque to torch.compile, export and autograd.

    routed_attention::blocks           (query, key, value, routes, grids, scale, masked) -> (out, lse)
    routed_attention::blocks_backward  (..., out, grad_out, lse, ...) -> (grad_query, grad_key, grad_value)

A grid is passed as its [rows, cols]; the map's shape says the rest.
"""
import math
from collections.abc import Iterator, Sequence

import torch
from torch.utils.flop_counter import register_flop_formula

from ...autograd import allocate_gradients, register_gradients
from ...regions import RegionGrid
from . import chunked
from . import masked as masked_blocks
from .problem import Found, Problem

_SETTINGS = "int[] query_regions, int[] key_regions, float scale, bool masked"
_INPUTS = "Tensor query, Tensor key, Tensor value, Tensor routes"


def _problems(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    routes: torch.Tensor,
    query_regions: Sequence[int],
    key_regions: Sequence[int],
    scale: float,
    masked: bool,
) -> Iterator[tuple[slice, Problem]]:
    """As many images at once as `images_at_once` says."""
    grids = (RegionGrid(*x.shape[1:3], *regions) for x, regions in ((query, query_regions), (key, key_regions)))
    whole = Problem(query, key, value, routes, *grids, scale)
    step = max(1, (masked_blocks if masked else chunked).images_at_once(whole))
    for start in range(0, len(query), step):
        images = slice(start, start + step)
        yield images, whole.of(images)


def _allocate(query: torch.Tensor, query_regions: Sequence[int], masked: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """The output, and a number for each query and head, in the order in which the blocks compute them."""
    batch, height, width, heads, _ = query.shape
    tokens = height * width
    if not masked:
        grid = RegionGrid(height, width, *query_regions)
        tokens = grid.num_regions * grid.tokens_per_region
    lse = query.new_empty((batch, tokens * heads), dtype=torch.promote_types(query.dtype, torch.float32))
    return torch.empty_like(query, memory_format=torch.contiguous_format), lse


@torch.library.custom_op(
    "routed_attention::blocks", mutates_args=(), schema=f"({_INPUTS}, {_SETTINGS}) -> (Tensor out, Tensor lse)"
)
def forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    routes: torch.Tensor,
    query_regions: Sequence[int],
    key_regions: Sequence[int],
    scale: float,
    masked: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    out, lse = _allocate(query, query_regions, masked)
    attend = masked_blocks.forward if masked else chunked.forward
    for images, problem in _problems(query, key, value, routes, query_regions, key_regions, scale, masked):
        attend(problem, out[images], lse[images])
    return out, lse


@forward.register_fake
def _(query, key, value, routes, query_regions, key_regions, scale, masked):
    return _allocate(query, query_regions, masked)


@torch.library.custom_op(
    "routed_attention::blocks_backward",
    mutates_args=(),
    schema=f"({_INPUTS}, Tensor out, Tensor grad_out, Tensor lse, {_SETTINGS}) -> (Tensor, Tensor, Tensor)",
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
    masked: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    grads = allocate_gradients(query, key, value)
    gradients = masked_blocks.backward if masked else chunked.backward
    for images, problem in _problems(query, key, value, routes, query_regions, key_regions, scale, masked):
        found = Found(out[images], grad_out[images], lse[images])
        gradients(problem, found, tuple(grad[images] for grad in grads))
    return grads


@backward.register_fake
def _(query, key, value, routes, out, grad_out, lse, query_regions, key_regions, scale, masked):
    return allocate_gradients(query, key, value)


def _no_second_derivatives(ctx, *_grads):
    raise RuntimeError('attention by blocks has no second derivatives; attn_impl="gather" has')


register_gradients(forward, backward, num_tensors=4)
backward.register_autograd(_no_second_derivatives)


def _operations(query, key, routes, key_regions: Sequence[int], masked: bool) -> int:
    """Of one product of queries and keys, two for a multiply-add; tensors are given by their shapes."""
    keys = key[1] * key[2] if masked else routes[2] * RegionGrid(*key[1:3], *key_regions).tokens_per_region
    return 2 * math.prod(query) * keys


@register_flop_formula(torch.ops.routed_attention.blocks)
def _(query, key, value, routes, query_regions, key_regions, scale, masked, **_kwargs) -> int:
    return 2 * _operations(query, key, routes, key_regions, masked)


@register_flop_formula(torch.ops.routed_attention.blocks_backward)
def _(query, key, value, routes, out, grad_out, lse, query_regions, key_regions, scale, masked, **_kwargs) -> int:
    return 5 * _operations(query, key, routes, key_regions, masked)
