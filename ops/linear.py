"""A linear layer, alone or with its GELU: without copies where a CPU infers, with faster gradients where a GPU trains.

PyTorch first copies the bias to all rows of the output, adds the product to it, and writes the GELU of the result to
new memory. On a CPU those passes cost as much as the product itself where the layer is narrow.

On a GPU it sums the gradient of a bias by a reduction, at a fifth of the memory's speed where rows are many. A product
with ones reads as fast as any product, and neither it nor the product that is the gradient of the weight need round
to the type of the activations before the optimizer reads them.
"""
import torch
import torch.nn.functional as F
from torch import nn

from .onednn import is_plain, is_transformed, needs_grad, runs_on_onednn
from .support import LOW_PRECISION

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


def _product(a: torch.Tensor, b: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """a @ b of two matrices in low precision, in float32 where that is `dtype` and the library can write it."""
    writes_float32 = a.is_cuda and "dtype" in torch.ops.aten.mm.overloads()  # from PyTorch 2.8
    # Where second derivatives may follow autograd sees this call, and knows no type of it but that of the inputs.
    if dtype == torch.float32 and writes_float32 and not torch.is_grad_enabled():
        return torch.mm(a, b, out_dtype=dtype)
    return torch.mm(a, b)


class _LowPrecisionLinear(torch.autograd.Function):
    """`F.linear` of (..., C) activations in low precision, and parameters that are cast to it."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        cast = weight.to(x.dtype)
        ctx.save_for_backward(x, cast, weight)
        ctx.bias_dtype = bias.dtype
        return F.linear(x, cast, bias.to(x.dtype))

    @staticmethod
    def backward(ctx, grad):
        x, cast, weight = ctx.saved_tensors
        if torch.is_grad_enabled():  # second derivatives are taken through the parameter itself
            cast = weight.to(x.dtype)
        need_x, need_weight, need_bias = ctx.needs_input_grad
        grad_x = grad_weight = grad_bias = None
        if need_x:
            grad_x = grad @ cast
        rows, grad = x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1])
        if need_weight:
            grad_weight = _product(grad.t(), rows, weight.dtype)
        if need_bias:
            grad_bias = _product(grad.new_ones((1, len(grad))), grad, ctx.bias_dtype)[0]
        return grad_x, grad_weight, grad_bias


def _trains_on_gpu(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> bool:
    """Whether this is an ordinary eager call in low precision on a GPU, of a bias that is trained."""
    if type(x) is not torch.Tensor or not x.is_cuda or not needs_grad(bias) or x.numel() == 0:
        return False
    if not {type(weight), type(bias)} <= {torch.Tensor, nn.Parameter}:  # sharded or quantised
        return False
    dtype = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else weight.dtype
    return x.dtype in LOW_PRECISION and x.dtype == dtype and not is_transformed()


def apply_linear(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """layer(x), up to rounding, in the way that is fastest where a CPU infers or a GPU trains.

    Layers stay modules of PyTorch's own class, which quantisation and others look for.

    Args:
        layer: A linear layer of C inputs. What has hooks, or has taken a linear layer's place, is called.
        x: (..., C), of any strides.
    """
    if torch.compiler.is_compiling() or not is_plain(layer, nn.Linear) or layer.bias is None:
        return layer(x)
    # Last by its size, which exports would otherwise take for a constant.
    if reuses_memory(x, layer.weight, layer.bias) and _suits_onednn(x, layer.weight):
        return _onednn_linear(x, layer.weight, layer.bias, "none")
    if _trains_on_gpu(x, layer.weight, layer.bias):
        return _LowPrecisionLinear.apply(x, layer.weight, layer.bias)
    return layer(x)
