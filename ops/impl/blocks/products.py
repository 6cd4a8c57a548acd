"""Attention of one block of queries to one block of keys, and its gradients.

On the CPU these are PyTorch's own fused operators, which scaled_dot_product_attention and its backward pass call too;
elsewhere plain products. Queries are (P, N, Lq, D), keys and values (P, N, Lk, D); a bias of the logits is of the
queries' type and expands to (P, N, Lq, Lk).
"""
import torch

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def is_fused(x: torch.Tensor) -> bool:
    """Whether logits are kept out of memory."""
    return x.device.type == "cpu"


def bytes_of_logit(query: torch.Tensor) -> int:
    """Bytes that a pair of query and key takes: its logit in float32, and its weight beside it."""
    return 0 if is_fused(query) else 2 * max(4, query.element_size())


def _logits(query: torch.Tensor, key: torch.Tensor, scale: float, bias: torch.Tensor | None) -> torch.Tensor:
    """(P, N, Lq, Lk), in float32 at least."""
    logits = query * scale @ key.transpose(-2, -1)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return logits if bias is None else logits + bias


def attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, bias: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """softmax(scale * q k^T + bias) v, (P, N, Lq, D), and the log-sum-exp of the logits, (P, N, Lq)."""
    if is_fused(query):
        return _flash(query, key, value, attn_mask=bias, scale=scale)
    logits = _logits(query, key, scale, bias)
    lse = logits.logsumexp(-1)
    return logits.sub_(lse[..., None]).exp_().to(value.dtype) @ value, lse


def gradients(
    grad_out: torch.Tensor,
    inputs: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    out: torch.Tensor,
    lse: torch.Tensor,
    scale: float,
    bias: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients of query, key and value, which are `inputs`, from `out` and `lse` of `attend`.

    Fused, they are float32 at least: PyTorch's operator takes 2 to 20 times as long in 16 bits on a processor that has
    instructions for them.
    """
    if is_fused(inputs[0]):
        tensors = (x.to(lse.dtype) for x in (grad_out, *inputs, out))
        bias = None if bias is None else bias.to(lse.dtype)
        return _flash_backward(*tensors, lse, 0.0, False, attn_mask=bias, scale=scale)
    query, key, value = inputs
    weights = _logits(query, key, scale, bias).sub_(lse[..., None]).exp_()
    delta = (grad_out * out).sum(-1, keepdim=True, dtype=weights.dtype)
    grad_logits = ((grad_out @ value.transpose(-2, -1)).sub(delta) * weights).to(query.dtype) * scale
    grad_value = weights.to(query.dtype).transpose(-2, -1) @ grad_out
    return grad_logits @ key, grad_logits.transpose(-2, -1) @ query, grad_value
