"""Attention and its gradients fused into kernels that read queries, keys and values in place.

Nothing is gathered: beside its inputs and outputs a call holds one float for each query and head, and in the backward
pass at most one more and the inverse of the routes. Where it streams whole maps it holds, instead of the routes and
their inverse, 64 bits for each query of an image. Imported when it is first called, since it imports Triton.
"""
import torch

from ...routing import Routing
from ...transforms import cast_inputs
from .op import forward, route_bits
from .tuning import is_dense


def routed_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    routing: Routing,
    scale: float,
    dense: bool | None = None,
) -> torch.Tensor:
    """See `ops.routed_attention`. `dense` overrules `tuning.is_dense`, for measurements."""
    query, key, value = cast_inputs(query, key, value)
    routes, query_grid, key_grid, _ = routing
    if dense is None:
        dense = is_dense(query_grid, key_grid, routes.shape[2])
    routes, bits = route_bits(routing) if dense else (routes, None)
    grids = [query_grid.rows, query_grid.cols], [key_grid.rows, key_grid.cols]
    return forward(query, key, value, routes, bits, *grids, scale)[0]
