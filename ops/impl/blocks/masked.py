"""Blocks of queries that attend to the whole map under a mask made of the routes.

It computes all pairs and keeps the routed ones. Where regions have few tokens this beats copies of keys by far.
"""
import math
from collections.abc import Iterator
from typing import NamedTuple

import torch

from ...regions import RegionGrid
from ...routing import Routing
from .problem import Found, Problem, block_bytes
from .products import attend, bytes_of_logit, gradients

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
    """(B, Rq, Rk): zero where a query region is routed to a key region, else minus infinity."""
    # Made of the routes: the older of the exporters to ONNX takes a batch that is read for a constant.
    nothing_BR1 = (routes_BRK[..., :1] * 0).to(dtype) - float("inf")
    return nothing_BR1.expand(-1, -1, key_grid.num_regions).scatter(2, routes_BRK, 0.0)


def route_bias(routing: Routing, dtype: torch.dtype) -> torch.Tensor:
    """(B, 1, Lq, Lk): zero where a query's region is routed to a key's region, else minus infinity."""
    bias_BRR = _bias_of_regions(routing.routes, routing.key_grid, dtype)
    queries, keys = (_region_of_token(grid, bias_BRR.device) for grid in (routing.query_grid, routing.key_grid))
    return bias_BRR.index_select(2, keys).index_select(1, queries)[:, None]


def _bytes_of_query(problem: Problem) -> int:
    """What a query adds to a block: its line of the mask, and its logits where they are in memory."""
    of_key = problem.query.element_size() + problem.num_heads * bytes_of_logit(problem.query)
    return of_key * problem.key_grid.height * problem.key_grid.width


def images_at_once(problem: Problem) -> int:
    """How many images a block may have."""
    queries = problem.query_grid.height * problem.query_grid.width
    return block_bytes(problem.query.device) // (queries * _bytes_of_query(problem))


def _blocks(problem: Problem) -> Iterator[_Block]:
    """The blocks, one after the other in the same memory."""
    bias_BRR = _bias_of_regions(problem.routes, problem.key_grid, problem.query.dtype)
    grid, device = problem.query_grid, bias_BRR.device
    of_query, of_key = (_region_of_token(g, device) for g in (grid, problem.key_grid))
    step = max(_LEAST_QUERIES, block_bytes(device) // _bytes_of_query(problem))
    memory = bias_BRR.new_empty(len(bias_BRR) * min(step, len(of_query)) * len(of_key))
    in_band = grid.region_height * grid.width  # tokens of a row of regions
    for start in range(0, len(of_query), step):
        regions_L = of_query[start : start + step]
        first = start // in_band * grid.cols
        last = ((start + len(regions_L) - 1) // in_band + 1) * grid.cols
        bias_BRL = bias_BRR[:, first:last].index_select(2, of_key)
        shape = (len(bias_BRR), len(regions_L), len(of_key))
        bias_BLL = memory[: math.prod(shape)].view(shape)
        torch.index_select(bias_BRL, 1, regions_L - first, out=bias_BLL)
        yield _Block(slice(start, start + len(regions_L)), bias_BLL[:, None])


def _heads(x_BHWND: torch.Tensor) -> torch.Tensor:
    """(B, N, H * W, D), each head's tokens side by side: they are read once for every block of queries."""
    return x_BHWND.flatten(1, 2).transpose(1, 2).contiguous()


def _write(x_BNLD: torch.Tensor, out_BHWND: torch.Tensor):
    out_BHWND.copy_(x_BNLD.transpose(1, 2).unflatten(1, out_BHWND.shape[1:3]))


def forward(problem: Problem, out: torch.Tensor, lse: torch.Tensor):
    """Write attention, (B, H, W, N, D), and the log-sum-exp of the logits, (B, N * H * W)."""
    query, key, value = (_heads(x) for x in problem[:3])
    lse, found = lse.view(query.shape[:-1]), torch.empty_like(query)
    for part, bias in _blocks(problem):
        found[:, :, part], lse[:, :, part] = attend(query[:, :, part], key, value, problem.scale, bias)
    _write(found, out)


def backward(problem: Problem, found: Found, grads: tuple[torch.Tensor, torch.Tensor, torch.Tensor]):
    """Write the gradients of query, key and value, (B, H, W, N, D) each."""
    query, key, value, out, grad_out = (_heads(x) for x in (*problem[:3], found.out, found.grad_out))
    lse = found.lse.view(query.shape[:-1])
    totals = [torch.zeros_like(x, dtype=lse.dtype) for x in (key, value)]
    grad_query = torch.empty_like(query)
    for part, bias in _blocks(problem):
        inputs, of_part = (query[:, :, part], key, value), (out[:, :, part], lse[:, :, part])
        grad_query[:, :, part], *of_keys = gradients(grad_out[:, :, part], inputs, *of_part, problem.scale, bias)
        for total, grad in zip(totals, of_keys, strict=True):
            total += grad
    for result, grad in zip((grad_query, *totals), grads, strict=True):
        _write(result, grad)
