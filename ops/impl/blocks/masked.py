"""Blocks of queries that attend to the whole map under a mask made of the routes.

It computes all pairs and keeps the routed ones. Where regions have few tokens this beats copies of keys by far.
"""
from collections.abc import Iterator
from typing import NamedTuple

import torch

from ...regions import RegionGrid
from ...routing import Routing
from .problem import Found, Problem, block_bytes, join
from .products import attend, gradients, is_fused

# PyTorch's fused attention multiplies up to this many queries at once.
_LEAST_QUERIES = 256


class _Block(NamedTuple):
    queries: slice  # of all of an image
    bias: torch.Tensor  # (B, 1, Lq, Lk), minus infinity where a query's region is not routed to a key's


def _region_of_token(grid: RegionGrid, device: torch.device) -> torch.Tensor:
    """(H * W,) in row-major order."""
    rows = torch.arange(grid.height, device=device) // grid.region_height
    cols = torch.arange(grid.width, device=device) // grid.region_width
    return (rows[:, None] * grid.cols + cols).flatten()


def _bias_of_regions(routes_BRK: torch.Tensor, key_grid: RegionGrid, dtype: torch.dtype) -> torch.Tensor:
    """(B, Rq, Lk): zero where a query region is routed to a key's region, else minus infinity."""
    shape = (*routes_BRK.shape[:2], key_grid.num_regions)
    bias_BRR = torch.full(shape, float("-inf"), dtype=dtype, device=routes_BRK.device).scatter(2, routes_BRK, 0.0)
    return bias_BRR.index_select(2, _region_of_token(key_grid, routes_BRK.device))


def route_bias(routing: Routing, dtype: torch.dtype) -> torch.Tensor:
    """(B, 1, Lq, Lk): zero where a query's region is routed to a key's region, else minus infinity."""
    bias_BRL = _bias_of_regions(routing.routes, routing.key_grid, dtype)
    return bias_BRL.index_select(1, _region_of_token(routing.query_grid, bias_BRL.device))[:, None]


def _bytes_of_query(problem: Problem) -> int:
    """What a query adds to a block: its line of the mask, and its logits where they are in memory."""
    lines = 1 if is_fused(problem.query) else 1 + problem.num_heads
    return lines * problem.key_grid.height * problem.key_grid.width * problem.query.element_size()


def images_at_once(problem: Problem) -> int:
    """How many images a block may have."""
    queries = problem.query_grid.height * problem.query_grid.width
    return block_bytes(problem.query.device) // (queries * _bytes_of_query(problem))


def _blocks(problem: Problem) -> Iterator[_Block]:
    """The blocks, one after the other in the same memory."""
    bias_BRL = _bias_of_regions(problem.routes, problem.key_grid, problem.query.dtype)
    queries = max(_LEAST_QUERIES, block_bytes(bias_BRL.device) // _bytes_of_query(problem))
    regions = _region_of_token(problem.query_grid, bias_BRL.device).split(queries)
    memory = bias_BRL.new_empty(len(bias_BRL) * len(regions[0]) * bias_BRL.shape[2])
    start = 0
    for region_L in regions:
        shape = (len(bias_BRL), len(region_L), bias_BRL.shape[2])
        bias_BLL = memory[: shape[0] * shape[1] * shape[2]].view(shape)
        torch.index_select(bias_BRL, 1, region_L, out=bias_BLL)
        yield _Block(slice(start, start + len(region_L)), bias_BLL[:, None])
        start += len(region_L)


def _heads(x_BHWND: torch.Tensor) -> torch.Tensor:
    """(B, N, H * W, D), each head's tokens side by side: they are read once for every block of queries."""
    return x_BHWND.flatten(1, 2).transpose(1, 2).contiguous()


def _write(x_BNLD: torch.Tensor, out_BHWND: torch.Tensor):
    out_BHWND.copy_(x_BNLD.transpose(1, 2).unflatten(1, out_BHWND.shape[1:3]))


def forward(problem: Problem, out: torch.Tensor, lse: torch.Tensor):
    """Write attention, (B, H, W, N, D), and the log-sum-exp of the logits, (B, N * H * W)."""
    query, key, value = (_heads(x) for x in problem[:3])
    results = [attend(query[:, :, part], key, value, problem.scale, bias) for part, bias in _blocks(problem)]
    found = [join(parts, dim=2) for parts in zip(*results, strict=True)]
    _write(found[0], out)
    lse.view(found[1].shape).copy_(found[1])


def backward(problem: Problem, found: Found, grads: tuple[torch.Tensor, torch.Tensor, torch.Tensor]):
    """Write the gradients of query, key and value, (B, H, W, N, D) each."""
    query, key, value, out, grad_out = (_heads(x) for x in (*problem[:3], found.out, found.grad_out))
    lse = found.lse.view(query.shape[:-1])
    totals = [torch.zeros_like(x, dtype=lse.dtype) for x in (key, value)]
    grad_queries = []
    for part, bias in _blocks(problem):
        inputs, of_part = (query[:, :, part], key, value), (out[:, :, part], lse[:, :, part])
        grad_query, *of_keys = gradients(grad_out[:, :, part], inputs, *of_part, problem.scale, bias)
        grad_queries.append(grad_query)
        for total, grad in zip(totals, of_keys, strict=True):
            total += grad
    for result, grad in zip((join(grad_queries, dim=2), *totals), grads, strict=True):
        _write(result, grad)
