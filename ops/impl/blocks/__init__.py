"""Attention one block of queries at a time, so that what a block reads stays in the processor's cache.

`chunked` copies the keys and values that a block's queries are routed to; `masked` lets a block attend to the whole map
under a mask. Neither copies nor mask are ever whole: beside inputs and outputs a call holds maps of the inputs' size,
one block, and one float for each query and head; the backward pass reads the block again.
"""
import torch
import torch.nn.functional as F

from ...routing import Routing
from .. import gather
from ..autocast import cast_inputs
from .masked import route_bias
from .op import forward

# Of the mask of an image. A smaller one stays in the cache whole, and is not worth the calls of an operator of ours.
_SMALL_MASK_BYTES = 2**18


def _needs_plain_operators() -> bool:
    """Whether whoever calls knows PyTorch's operators alone: an export to ONNX, or a transform of torch.func."""
    tracing = torch.compiler.is_compiling() or torch.jit.is_tracing()  # to ask ONNX alone takes long
    return torch._C._are_functorch_transforms_active() or (tracing and torch.onnx.is_in_onnx_export())


def _attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, routing: Routing, scale: float, masked: bool):
    routes, query_grid, key_grid, _ = routing
    grids = [query_grid.rows, query_grid.cols], [key_grid.rows, key_grid.cols]
    return forward(*cast_inputs(query, key, value), routes, *grids, scale, masked)[0]


def chunked_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, routing: Routing, scale: float
) -> torch.Tensor:
    """`ops.routed_attention` over copies of the routed keys and values."""
    if _needs_plain_operators():
        return gather.routed_attention(query, key, value, routing, scale)
    return _attend(query, key, value, routing, scale, masked=False)


def masked_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, routing: Routing, scale: float
) -> torch.Tensor:
    """`ops.routed_attention` over all keys under a mask; PyTorch's dense attention where every region is routed."""
    routes, query_grid, key_grid, _ = routing
    everything_routed = routes.shape[-1] == key_grid.num_regions
    mask_bytes = query_grid.height * query_grid.width * key_grid.height * key_grid.width * query.element_size()
    if not (everything_routed or mask_bytes <= _SMALL_MASK_BYTES or _needs_plain_operators()):
        return _attend(query, key, value, routing, scale, masked=True)
    mask = None if everything_routed else route_bias(routing, query.dtype)
    query, key, value = (x.flatten(1, 2).transpose(1, 2) for x in (query, key, value))
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)
    return out.transpose(1, 2).unflatten(1, (query_grid.height, query_grid.width))
