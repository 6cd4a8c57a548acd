"""Attention one block of queries at a time, so that what a block reads stays in the processor's cache.

`chunked` copies the keys and values that a block's queries are routed to; `masked` lets a block attend to the whole map
under a mask. Copies are never whole, nor is a mask that would be large: beside inputs and outputs a call holds maps of
the inputs' size, the routes, one block, and one float for each query and head; the backward pass reads the block again.
"""
import torch

from ...dense import dense_attention
from ...layout import flatten_map
from ...routing import Routing
from ...support import LOW_PRECISION
from ...transforms import cast_inputs, needs_plain_operators
from .masked import route_bias
from .op import forward

# The mask of an image is taken whole up to this size. On the CPU a smaller one stays in the cache, and is not worth the
# calls of an operator of ours; a GPU without our kernels is faster with PyTorch's than with plain products.
_WHOLE_MASK_BYTES = {"cpu": 2**20}
_WHOLE_MASK_BYTES_ELSEWHERE = 2**30


def _attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, routing: Routing, scale: float, masked: bool):
    routes, query_grid, key_grid, _ = routing
    grids = [query_grid.rows, query_grid.cols], [key_grid.rows, key_grid.cols]
    return forward(query, key, value, routes, *grids, scale, masked)[0]


def chunked_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, routing: Routing, scale: float
) -> torch.Tensor:
    """`ops.routed_attention` over copies of the routed keys and values."""
    return _attend(*cast_inputs(query, key, value), routing, scale, masked=False)


def _takes_mask_whole(query: torch.Tensor, routing: Routing) -> bool:
    """Whether PyTorch's attention and its backward pass under the mask of the whole map are faster than blocks."""
    device = query.device.type
    if device == "cpu" and query.dtype in LOW_PRECISION and torch.is_grad_enabled():
        return False  # see `products.gradients`
    queries, keys = (grid.height * grid.width for grid in (routing.query_grid, routing.key_grid))
    limit = _WHOLE_MASK_BYTES.get(device, _WHOLE_MASK_BYTES_ELSEWHERE)
    return queries * keys * query.element_size() <= limit


def masked_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, routing: Routing, scale: float
) -> torch.Tensor:
    """`ops.routed_attention` over all keys under a mask; PyTorch's dense attention where every region is routed."""
    query, key, value = cast_inputs(query, key, value)
    everything_routed = routing.routes.shape[-1] == routing.key_grid.num_regions
    if not (everything_routed or _takes_mask_whole(query, routing) or needs_plain_operators()):
        return _attend(query, key, value, routing, scale, masked=True)
    mask = None if everything_routed else route_bias(routing, query.dtype)
    map_size = query.shape[1:3]
    query, key, value = (flatten_map(x).transpose(1, 2) for x in (query, key, value))
    out = dense_attention(query, key, value, mask, scale)
    return out.transpose(1, 2).unflatten(1, map_size)
