"""Blocks of query regions, each with copies of the keys and values that it is routed to.

A region of one head is a problem of its own: Tq queries that attend to K * Tk keys.
"""
import math
from collections.abc import Iterator
from typing import NamedTuple

import torch

from ...rows import padding_bias, row_index, to_rows, to_rows_of_both, write_rows
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
    grid = problem.key_grid
    pairs = to_rows_of_both(problem.key, problem.value, grid)  # one call copies keys and values
    bias_RT = padding_bias(grid, problem.query) if grid.is_padded else None
    batch, num_queries, topk = problem.routes.shape
    total, step = batch * problem.num_heads * num_queries, _block_rows(problem)
    memory = pairs.new_empty(min(step, total) * topk, *pairs.shape[1:])
    for start in range(0, total, step):
        stop = min(start + step, total)
        part = row_index(problem.routes, grid.num_regions, problem.num_heads, start, stop)
        rows = part.flatten()
        copies = torch.index_select(pairs, 0, rows, out=memory[: len(rows)])
        key, value = copies.view(len(part), 1, -1, pairs.shape[-1]).chunk(2, -1)
        bias = None if bias_RT is None else bias_RT[part % grid.num_regions].view(len(part), 1, 1, -1)
        yield _Block(slice(start, stop), rows, key, value, bias)


def _queries(problem: Problem, x_BHWND: torch.Tensor) -> torch.Tensor:
    """(B * N * Rq, 1, Tq, D), from a map of the queries' size."""
    return to_rows(x_BHWND, problem.query_grid)[:, None]


def images_at_once(problem: Problem) -> int:
    """How many images have keys and values whose rows take little memory beside the maps."""
    one = 2 * math.prod(problem.key.shape[1:]) * problem.key.element_size()
    return 2 * block_bytes(problem.key.device) // max(1, one)


def forward(problem: Problem, out: torch.Tensor, lse: torch.Tensor):
    """Write attention, (B, H, W, N, D), and the log-sum-exp of the logits, (B, N * Rq * Tq)."""
    query = _queries(problem, problem.query)
    lse = lse.view(query.shape[:-1])
    for block in _blocks(problem):
        part = block.queries
        # What was found takes the place of the queries, which nothing reads again.
        query[part], lse[part] = attend(query[part], block.key, block.value, problem.scale, block.bias)
    write_rows(query[:, 0], problem.query_grid, out)


def backward(problem: Problem, found: Found, grads: tuple[torch.Tensor, torch.Tensor, torch.Tensor]):
    """Write the gradients of query, key and value, (B, H, W, N, D) each."""
    query_grid, key_grid = problem.query_grid, problem.key_grid
    query, out, grad_out = (_queries(problem, x) for x in (problem.query, found.out, found.grad_out))
    lse, grad_query = found.lse.view(query.shape[:-1]), query  # in their place too
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
