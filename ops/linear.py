"""A linear layer, alone or with its GELU, without copies where a CPU infers.

PyTorch first copies the bias to all rows of the output, adds the product to it, and writes the GELU of the result to
new memory. On a CPU those passes cost as much as the product itself where the layer is narrow.
"""
import torch
import torch.nn.functional as F
from torch import nn

from .onednn import is_plain, needs_grad, runs_on_onednn

# Where oneDNN's product is the faster one, and as exact as MKL's: it adds up more inputs in longer chains, and those of
# few rows too, for which MKL has other kernels. Measured with AVX2 and AVX-512.
_ONEDNN_INPUTS, _ONEDNN_ROWS = 192, 1024


def reuses_memory(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> bool:
    """Whether a layer of these is inference that `onednn.runs_on_onednn`, of which `linear_gelu` makes no copies."""
    if not runs_on_onednn(x, weight, bias) or needs_grad(x, weight, bias):
        return False
    if bias is not None and (bias.shape != weight.shape[:1] or not bias.is_contiguous()):
        return False  # oneDNN's operator reads a bias as if it were contiguous
    return x.ndim > 1 and weight.shape[1:] == x.shape[-1:] and x.numel() > 0  # F.linear refuses what does not fit


def _suits_onednn(x: torch.Tensor, weight: torch.Tensor) -> bool:
    inputs = weight.shape[-1]
    return inputs <= _ONEDNN_INPUTS and x.numel() >= _ONEDNN_ROWS * inputs


def _onednn_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, then: str) -> torch.Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, then, [], "none")


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
    if _suits_onednn(x, weight):
        return _onednn_linear(x, weight, bias, "gelu")
    return torch.ops.aten.gelu_(F.linear(x, weight, bias))


def apply_linear(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """layer(x), up to rounding, without copying the bias of a narrow layer to many rows where a CPU infers.

    Layers stay modules of PyTorch's own class, which quantisation and others look for.

    Args:
        layer: A linear layer of C inputs. What has hooks, or has taken a linear layer's place, is called.
        x: (..., C), of any strides.
    """
    copies_bias = is_plain(layer, nn.Linear) and layer.bias is not None
    # Last by its size, which compilers and exports would otherwise take for a constant.
    if copies_bias and reuses_memory(x, layer.weight, layer.bias) and _suits_onednn(x, layer.weight):
        return _onednn_linear(x, layer.weight, layer.bias, "none")
    return layer(x)
