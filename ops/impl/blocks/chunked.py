"""Blocks of query regions, each with copies of the keys and values that it is routed to.

A region of one head is a problem of its own: Tq queries that attend to K * Tk keys.
"""
import math
from collections.abc import Iterator
from typing import NamedTuple

import torch

from ...rows import row_index, to_rows, to_rows_of_both, write_rows
from .problem import Found, Problem, block_bytes, join
from .products import attend, gradients, is_fused


class _Block(NamedTuple):
    queries: slice  # of all rows of queries
    rows: torch.Tensor  # which rows of keys they are routed to, one after the other
    key: torch.Tensor  # copies of them, (P, 1, K * Tk, D), as `value`
    value: torch.Tensor
    bias: torch.Tensor | None  # (P, 1, 1, K * Tk), minus infinity where a key is padding


def _block_rows(problem: Problem) -> int:
    """How many rows of queries a block has."""
    queries, keys = problem.query_grid.tokens_per_region, problem.routes.shape[2] * problem.key_grid.tokens_per_region
    numbers = keys * (2 * problem.query.shape[-1] + (0 if is_fused(problem.query) else queries))
    return max(1, block_bytes(problem.query.device) // (numbers * problem.query.element_size()))


def _padding_bias(problem: Problem) -> torch.Tensor | None:
    """(Rk, Tk): minus infinity where a key is padding, zero elsewhere; None where none is."""
    if not problem.key_grid.is_padded:
        return None
    real_RT = problem.key_grid.is_real(problem.query.device)
    return problem.query.new_zeros(real_RT.shape).masked_fill_(~real_RT, float("-inf"))


def _blocks(problem: Problem) -> Iterator[_Block]:
    """The blocks, one after the other in the same memory."""
    num_regions, num_heads = problem.key_grid.num_regions, problem.num_heads
    pair = to_rows_of_both(problem.key, problem.value, problem.key_grid).flatten(0, 1)
    blocks = row_index(problem.routes, num_regions, num_heads).split(_block_rows(problem))
    memory = pair.new_empty(2 * blocks[0].numel(), *pair.shape[1:])
    bias_RT = _padding_bias(problem)
    start = 0
    for block in blocks:
        rows = block.flatten()
        of_both = torch.cat((rows, rows + len(pair) // 2))  # one call copies keys and values
        copies = torch.index_select(pair, 0, of_both, out=memory[: len(of_both)])
        key, value = copies.view(2, len(block), 1, -1, pair.shape[-1])
        bias = None if bias_RT is None else bias_RT[rows // num_heads % num_regions].view(len(block), 1, 1, -1)
        yield _Block(slice(start, start + len(block)), rows, key, value, bias)
        start += len(block)


def _queries(problem: Problem, x_BHWND: torch.Tensor) -> torch.Tensor:
    """(B * Rq * N, 1, Tq, D), from a map of the queries' size."""
    return to_rows(x_BHWND, problem.query_grid)[:, None]


def images_at_once(problem: Problem) -> int:
    """How many images have keys and values that stay in the cache while blocks copy them, each several times."""
    one = 2 * math.prod(problem.key.shape[1:]) * problem.key.element_size()
    return 4 * block_bytes(problem.key.device) // one


def forward(problem: Problem, out: torch.Tensor, lse: torch.Tensor):
    """Write attention, (B, H, W, N, D), and the log-sum-exp of the logits, (B, Rq * N * Tq)."""
    query = _queries(problem, problem.query)
    results = [
        attend(query[block.queries], block.key, block.value, problem.scale, block.bias) for block in _blocks(problem)
    ]
    found = [join(parts) for parts in zip(*results, strict=True)]
    write_rows(found[0][:, 0], problem.query_grid, out)
    lse.view(found[1].shape).copy_(found[1])


def backward(problem: Problem, found: Found, grads: tuple[torch.Tensor, torch.Tensor, torch.Tensor]):
    """Write the gradients of query, key and value, (B, H, W, N, D) each."""
    query_grid, key_grid = problem.query_grid, problem.key_grid
    lse = found.lse.view(-1, 1, query_grid.tokens_per_region)
    query, out, grad_out = (_queries(problem, x) for x in (problem.query, found.out, found.grad_out))
    rows = len(query) // query_grid.num_regions * key_grid.num_regions, key_grid.tokens_per_region, query.shape[-1]
    totals = [torch.zeros(rows, dtype=lse.dtype, device=lse.device) for _ in range(2)]
    grad_queries = []
    for block in _blocks(problem):
        part = block.queries
        inputs = query[part], block.key, block.value
        grad_query, *of_keys = gradients(grad_out[part], inputs, out[part], lse[part], problem.scale, block.bias)
        grad_queries.append(grad_query[:, 0])
        # One row after the other, in the order of the queries: the sums are the same in every run.
        for total, grad in zip(totals, of_keys, strict=True):
            total.index_add_(0, block.rows, grad.reshape(-1, *rows[1:]).to(total.dtype))
    write_rows(join(grad_queries), query_grid, grads[0])
    for total, grad in zip(totals, grads[1:], strict=True):
        write_rows(total, key_grid, grad)
