"""An attention as a page holds it: few bytes, from which a browser computes the weights of any token."""
import base64
import zlib
from typing import Any

import torch

from ops import AttentionRecord, PositionBias, RegionGrid

# The largest error of a weight that a page should have, in parts of the largest weight of the same token: as much as
# three of its 256 colours differ by. That of some tokens is measured, so it is to be half of that.
TOLERANCE = 0.01
# Steps of the numbers in a page, tried from the coarsest.
_STEPS = tuple(2.0**-power for power in range(3, 14))
# Tokens by which the error is measured, at most.
_SAMPLES = 48
_GOLDEN = (5**0.5 - 1) / 2
_LARGEST = 2**15 - 1


def _in_steps(values: torch.Tensor, step: float) -> torch.Tensor:
    """Numbers in whole multiples of `step`; those beyond 16 bits become the largest."""
    return (values / step).round().clamp(-_LARGEST, _LARGEST)


def pack(values: torch.Tensor, step: float) -> str:
    """Numbers `_in_steps`: 16-bit integers, all low bytes before all high ones, deflated, in base64."""
    whole = _in_steps(values, step).flatten().to(torch.int16)
    low_and_high = whole.contiguous().view(torch.uint8).unflatten(0, (-1, 2)).T.contiguous()
    return base64.b64encode(zlib.compress(low_and_high.numpy().tobytes(), 9)).decode()


def factors(record: AttentionRecord) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries and keys of the first image, (heads, D, Hq * Wq) and (heads, D, Hk * Wk), whose products are the logits.

    They are rotated so that the first numbers say the most and the last next to nothing, which `pack` makes use of.
    What the logits of a token have in common is left out: its softmax does not change.
    """
    query, key = (x[0].flatten(0, 1).transpose(0, 1).float() for x in (record.query, record.key))
    query = query * record.scale
    key = key - key.mean(1, keepdim=True)
    (query_basis, query_rest), (key_basis, key_rest) = torch.linalg.qr(query), torch.linalg.qr(key)
    left, strength, right = torch.linalg.svd(query_rest @ key_rest.mT, full_matrices=False)
    root = strength.sqrt()[:, None]
    return (query_basis @ left * root).mT, (key_basis @ right.mT * root).mT


def _weights_of(query: torch.Tensor, key: torch.Tensor, bias: torch.Tensor, routed: torch.Tensor) -> torch.Tensor:
    """(heads, Hk * Wk) weights of one token by its factors, (heads, D) and (heads, D, Hk * Wk)."""
    logits = torch.einsum("nd,ndk->nk", query, key) + bias
    return logits.masked_fill(~routed, -torch.inf).softmax(-1)


def spread_tokens(height: int, width: int) -> list[tuple[int, int]]:
    """(row, column) of tokens all over a map: a Fibonacci lattice, which is even in rows, in columns and in between."""
    count = min(_SAMPLES, height * width)
    tokens = ((int((i + 0.5) / count * height), int(i * _GOLDEN % 1 * width)) for i in range(count))
    return list(dict.fromkeys(tokens))


class _Samples:
    """Tokens spread over the map, with their weights, to compare those of numbers in steps with."""

    def __init__(self, record: AttentionRecord):
        height, self.width = record.query.shape[1:3]
        self.tokens = spread_tokens(height, self.width)
        self.weights = [record.weights(*token)[0].flatten(1) for token in self.tokens]
        self.routed = [record.is_routed(*token)[0].flatten() for token in self.tokens]
        self.biases = [_bias_of(record, *token) for token in self.tokens]

    def error(self, query: torch.Tensor, key: torch.Tensor) -> float:
        """The largest error of a weight, in parts of the largest weight of the same token and head."""
        found = 0.0
        for (row, col), weights, routed, bias in zip(self.tokens, self.weights, self.routed, self.biases, strict=True):
            ours = _weights_of(query[..., row * self.width + col], key, bias, routed)
            found = max(found, ((ours - weights).abs().amax(-1) / weights.amax(-1)).max().item())
        return found


def _bias_of(record: AttentionRecord, row: int, col: int) -> torch.Tensor:
    """(heads, Hk * Wk), or a 0 where the attention has no bias."""
    return torch.zeros(1) if record.bias is None else record.bias_of(row, col)[0].flatten(1)


def encode_factors(record: AttentionRecord) -> dict[str, Any]:
    """`factors` in the coarsest steps with errors within the tolerance: of each head, `rank` planes of both maps.

    Where attention is so sharp that no step is fine and wide enough, it is the one with the least error.
    """
    query, key = factors(record)
    samples = _Samples(record)
    error, step = torch.inf, 1.0
    for finer in _STEPS:
        found = samples.error(*(_in_steps(x, finer) * finer for x in (query, key)))
        if found < error:
            error, step = found, finer
        if error <= TOLERANCE / 2:
            break
    whole = [_in_steps(x, step) for x in (query, key)]
    used = (whole[0].abs().amax((0, 2)) * whole[1].abs().amax((0, 2))).nonzero()
    rank = int(used.max()) + 1 if len(used) else 0
    both = torch.cat([x[:, :rank] for x in (query, key)], dim=2)
    return dict(rank=rank, step=step, error=round(error, 5), data=pack(both, step))


def encode_bias(bias: PositionBias) -> dict[str, Any]:
    """DeBiFormer's table of biases."""
    step = 2.0**-10
    return dict(side=bias.table.shape[-1], step=step, data=pack(bias.table.detach().float(), step))


def encode_points(points: torch.Tensor) -> list[list[list[float]]]:
    """(B, groups, Ha, Wa, 2) points of the first image -> for each group, (y, x) of its agents in rows."""
    return [[[round(y, 4), round(x, 4)] for y, x in group.flatten(0, 1).tolist()] for group in points[0].float()]


def encode_grid(height: int, width: int, grid: RegionGrid | None, stride: int) -> dict[str, Any]:
    """A map and its regions; without a grid every token is one. `stride` is a token's side in pixels of the image."""
    grid = grid or RegionGrid(height, width, height, width)
    return dict(
        height=height, width=width, rows=grid.rows, cols=grid.cols,
        region_height=grid.region_height, region_width=grid.region_width, stride=stride,
    )


def encode_attention(
    record: AttentionRecord, query_stride: int, key_stride: int, with_weights: bool = True
) -> dict[str, Any]:
    """All that a page knows of one attention of the first image.

    Args:
        record: The attention.
        query_stride: Side of a token of the queries' map, in pixels of the image.
        key_stride: Of the keys' map.
        with_weights: Whether the factors of its weights are in it, beside maps, routes and points.
    """
    routing, bias = record.routing, record.bias
    grids = (None, None) if routing is None else (routing.query_grid, routing.key_grid)
    points = bias.points if bias is not None else routing.points if routing is not None else None
    return dict(
        queries=encode_grid(*record.query.shape[1:3], grids[0], query_stride),
        keys=encode_grid(*record.key.shape[1:3], grids[1], key_stride),
        routes=None if routing is None else routing.routes[0].tolist(),
        points=None if points is None else encode_points(points),
        bias=None if bias is None else encode_bias(bias),
        heads=record.query.shape[3],
        **(encode_factors(record) if with_weights else dict(data=None)),
    )
