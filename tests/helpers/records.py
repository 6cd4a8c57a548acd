"""Attention by the weights that are recorded of it."""
import torch

from ops import AttentionRecord


def every_weight(record: AttentionRecord) -> torch.Tensor:
    """(B, heads, Hq, Wq, Hk, Wk): the weights of every query."""
    rows, cols = record.query.shape[1:3]
    return torch.stack([torch.stack([record.weights(y, x) for x in range(cols)], 2) for y in range(rows)], 2)


def attend(record: AttentionRecord, value: torch.Tensor) -> torch.Tensor:
    """(B, Hq, Wq, heads, D) by the recorded weights."""
    return torch.einsum("bnyxhw,bhwnd->byxnd", every_weight(record), value)
