"""Blocks of query regions, each with copies of the keys and values that it is routed to.

A region of one head is a problem of its own: Tq queries that attend to K * Tk keys.
"""
import math
from collections.abc import Iterator
from typing import NamedTuple

import torch

from ...rows import absolute_routes, padding_bias, to_rows, to_rows_of_both, write_rows
from .problem import Found, Problem, block_bytes
from .products import attend, bytes_of_logit, gradients


class _Block(NamedTuple):
    queries: slice  # of all rows of queries
    rows: torch.Tensor  # which rows of keys they are routed to, one after the other
    key: torch.Tensor  # copies of them, (P, 1, K * Tk, D), as `value`
    value: torch.Tensor
    bias: torch.Tensor | None  # (P, 1, 1, K * Tk), minus infinity where a key is padding


def _block_rows(problem: Problem) -> int:
    """How many rows of queries a block has."""
    queries, keys = problem.query_grid.tokens_per_region, problem.routes.shape[2] * problem.key_grid.tokens_per_region
    of_key = 2 * problem.query.shape[-1] * problem.query.element_size() + queries * bytes_of_logit(problem.query)
    return max(1, block_bytes(problem.query.device) // max(1, keys * of_key))


def _blocks(problem: Problem) -> Iterator[_Block]:
    """The blocks, one after the other in the same memory."""
    num_regions, num_heads = problem.key_grid.num_regions, problem.num_heads
    regions_RK = absolute_routes(problem.routes, num_regions)
    pair = to_rows_of_both(problem.key, problem.value, problem.key_grid).flatten(0, 1)
    bias_RT = padding_bias(problem.key_grid, problem.query) if problem.key_grid.is_padded else None
    total, step, topk = len(regions_RK) * num_heads, _block_rows(problem), regions_RK.shape[1]
    memory = pair.new_empty(2 * min(step, total) * topk, *pair.shape[1:])
    for start in range(0, total, step):
        part = torch.arange(start, min(start + step, total), device=pair.device)
        regions = regions_RK[part // num_heads]
        rows = (regions * num_heads + part[:, None] % num_heads).flatten()
        of_both = torch.cat((rows, rows + len(pair) // 2))  # one call copies keys and values
        copies = torch.index_select(pair, 0, of_both, out=memory[: len(of_both)])
        key, value = copies.view(2, len(part), 1, -1, pair.shape[-1])
        bias = None if bias_RT is None else bias_RT[regions % num_regions].view(len(part), 1, 1, -1)
        yield _Block(slice(start, start + len(part)), rows, key, value, bias)


def _queries(problem: Problem, x_BHWND: torch.Tensor) -> torch.Tensor:
    """(B * Rq * N, 1, Tq, D), from a map of the queries' size."""
    return to_rows(x_BHWND, problem.query_grid)[:, None].contiguous()


def images_at_once(problem: Problem) -> int:
    """How many images have keys and values that stay in the cache while blocks copy them, each several times."""
    one = 2 * math.prod(problem.key.shape[1:]) * problem.key.element_size()
    return 4 * block_bytes(problem.key.device) // max(1, one)


def forward(problem: Problem, out: torch.Tensor, lse: torch.Tensor):
    """Write attention, (B, H, W, N, D), and the log-sum-exp of the logits, (B, Rq * N * Tq)."""
    query = _queries(problem, problem.query)
    lse, found = lse.view(query.shape[:-1]), torch.empty_like(query)
    for block in _blocks(problem):
        part = block.queries
        found[part], lse[part] = attend(query[part], block.key, block.value, problem.scale, block.bias)
    write_rows(found[:, 0], problem.query_grid, out)


def backward(problem: Problem, found: Found, grads: tuple[torch.Tensor, torch.Tensor, torch.Tensor]):
    """Write the gradients of query, key and value, (B, H, W, N, D) each."""
    query_grid, key_grid = problem.query_grid, problem.key_grid
    query, out, grad_out = (_queries(problem, x) for x in (problem.query, found.out, found.grad_out))
    lse, grad_query = found.lse.view(query.shape[:-1]), torch.empty_like(query)
    rows = len(query) // query_grid.num_regions * key_grid.num_regions, key_grid.tokens_per_region, query.shape[-1]
    totals = [torch.zeros(rows, dtype=lse.dtype, device=lse.device) for _ in range(2)]
    for block in _blocks(problem):
        part = block.queries
        inputs = query[part], block.key, block.value
        grad_query[part], *of_keys = gradients(grad_out[part], inputs, out[part], lse[part], problem.scale, block.bias)
        # On the CPU one row after the other, in the order of the queries: the sums are the same in every run.
        for total, grad in zip(totals, of_keys, strict=True):
            total.index_add_(0, block.rows, grad.reshape(-1, *rows[1:]).to(total.dtype))
    write_rows(grad_query[:, 0], query_grid, grads[0])
    for total, grad in zip(totals, grads[1:], strict=True):
        write_rows(total, key_grid, grad)
