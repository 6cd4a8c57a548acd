"""A linear layer, alone or with its GELU, without copies where a CPU infers.

PyTorch first copies the bias to all rows of the output, adds the product to it, and writes the GELU of the result to
new memory. On a CPU those passes cost as much as the product itself where the layer is narrow.
"""
import torch
import torch.nn.functional as F
from torch import nn

from .onednn import is_plain, needs_grad, runs_on_onednn

# Inputs to which oneDNN's product is the faster one, and as exact as MKL's: it adds up wider ones in longer chains.
# Measured with AVX2 and AVX-512.
_ONEDNN_INPUTS = 192


def reuses_memory(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> bool:
    """Whether functions of this file make no copies of these: inference that `onednn.runs_on_onednn`."""
    if not runs_on_onednn(x, weight, bias) or needs_grad(x, weight, bias):
        return False
    fit = x.ndim > 1 and weight.shape[1:] == x.shape[-1:] and (bias is None or bias.shape == weight.shape[:1])
    return fit and x.numel() > 0  # what does not fit is for F.linear to refuse


def linear_gelu(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """gelu(x @ weight.T + bias).

    Args:
        x: (..., C), of any strides.
        weight: (D, C).
        bias: (D,), or None.

    Returns:
        (..., D), as `F.gelu` and `F.linear` compute it, up to rounding.

    Raises:
        RuntimeError: Shapes, types or devices do not fit each other, as in `F.linear`.
    """
    if not reuses_memory(x, weight, bias):
        return F.gelu(F.linear(x, weight, bias))
    if weight.shape[-1] <= _ONEDNN_INPUTS:
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "gelu", [], "none")
    return torch.ops.aten.gelu_(F.linear(x, weight, bias))


def apply_linear(layer: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    """layer(x), up to rounding.

    Layers stay modules of PyTorch's own class, which quantisation and others look for.

    Args:
        layer: Of C inputs. Where it has hooks, or is of a subclass, it is called.
        x: (..., C), of any strides.
    """
    saves_copy = layer.bias is not None and layer.in_features <= _ONEDNN_INPUTS and is_plain(layer, nn.Linear)
    if not saves_copy or not reuses_memory(x, layer.weight, layer.bias):
        return layer(x)
    return torch.ops.mkldnn._linear_pointwise(x, layer.weight, layer.bias, "none", [], "")
