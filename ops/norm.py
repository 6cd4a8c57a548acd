"""The public calls of layer norm: check the inputs, choose an implementation, dispatch."""
import torch
import torch.nn.functional as F

from .support import LAYER_IMPLS, LOW_PRECISION, triton_unsupported

_TRITON_CHANNELS = 4096  # a program holds whole rows


def _fused():
    from .fused import layer_norm  # imports Triton, which only its users need

    return layer_norm


def norm_unsupported(impl: str, *inputs: torch.Tensor) -> str | None:
    """Why `impl` cannot compute `layer_norm` of inputs such as these, or None where it can.

    Args:
        impl: A name of `LAYER_IMPLS`.
        inputs: All tensors of the call, on one device, the map first. Without them, only what holds for every input is
            checked.
    """
    if impl == "triton":
        if inputs and inputs[0].shape[-1] > _TRITON_CHANNELS:
            return f"its kernels take up to {_TRITON_CHANNELS} channels, got {inputs[0].shape[-1]}"
        return triton_unsupported(*inputs)
    if impl not in LAYER_IMPLS:
        return f"there is no such implementation; choose from {', '.join(LAYER_IMPLS)} or auto"
    return None


def _fused_dtype(x: torch.Tensor, branch: torch.Tensor | None = None) -> torch.dtype:
    """Of what the kernels write for x, or for the sum of x and `branch`: its own, or autocast's in place of float32.

    Under autocast `F.layer_norm` returns float32, which the linear layer behind it rounds to autocast's type in another
    pass over memory. The kernels round once, before they write.
    """
    dtype = x.dtype
    if branch is not None and branch.dtype != dtype:
        dtype = torch.promote_types(dtype, branch.dtype)
    if dtype == torch.float32 and torch.is_autocast_enabled(x.device.type):
        return torch.get_autocast_dtype(x.device.type)
    return dtype


def choose_norm_impl(*inputs: torch.Tensor) -> str:
    """The implementation that `impl="auto"` takes: `triton` on a GPU in low precision, `torch` everywhere else.

    In low precision means that the map is of bfloat16 or float16, or of float32 under an autocast to them. While
    torch.compile or an exporter traces it is `torch`, which compilers fuse with what surrounds it.

    Args:
        inputs: All tensors of the call, in its order; weight and bias are the last two.
    """
    return "torch" if _auto_dtype(*inputs) is None else "triton"


def _auto_dtype(*inputs: torch.Tensor) -> torch.dtype | None:
    """What `_resolve` returns for auto."""
    if not inputs[0].is_cuda or torch.compiler.is_compiling():
        return None
    dtype = _fused_dtype(*inputs[:-2])
    return dtype if dtype in LOW_PRECISION and norm_unsupported("triton", *inputs) is None else None


def _resolve(impl: str, *inputs: torch.Tensor) -> torch.dtype | None:
    """What the kernels are to write, or None where PyTorch is to compute; all inputs are checked."""
    *maps, weight, bias = inputs
    x = maps[0]
    if weight.shape != x.shape[-1:] or bias.shape != weight.shape:
        shapes = f"{tuple(weight.shape)} and {tuple(bias.shape)}"
        raise ValueError(f"weight and bias must have one number for each channel of {tuple(x.shape)}, got {shapes}")
    device = x.device
    for tensor in inputs:
        if tensor.device != device:
            raise ValueError(f"all tensors must be on one device, got {device} and {tensor.device}")
    if impl == "auto":
        return _auto_dtype(*inputs)
    reason = norm_unsupported(impl, *inputs)
    if reason is not None:
        raise ValueError(f"impl={impl!r} cannot run: {reason}")
    return _fused_dtype(*maps) if impl == "triton" else None


def layer_norm(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float, impl: str = "auto"
) -> torch.Tensor:
    """Layer norm over the last axis.

    Args:
        x: (..., C), of any strides.
        weight: (C,).
        bias: (C,).
        eps: What is added to the variance.
        impl: "torch" (`F.layer_norm`), "triton" (fused, for GPUs; derivatives of first order in reverse mode only), or
            "auto" (see `choose_norm_impl`).

    Returns:
        (..., C), of x's dtype. Under autocast `torch` returns float32, and `triton` x's dtype in low precision and
        autocast's for float32: what the next linear layer would round to.

    Raises:
        ValueError: Shapes or devices do not fit each other, or `impl` cannot run; the message says why.
    """
    dtype = _resolve(impl, x, weight, bias)
    if dtype is not None:
        return _fused().layer_norm(x, weight, bias, eps, dtype)
    return F.layer_norm(x, weight.shape, weight, bias, eps)


def add_layer_norm(
    x: torch.Tensor, branch: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float, impl: str = "auto"
) -> tuple[torch.Tensor, torch.Tensor]:
    """A residual path's next value, and its layer norm over the last axis: x + branch and layer_norm(x + branch).

    Args:
        x: (..., C), of any strides.
        branch: (..., C), of x's shape.
        weight: (C,).
        bias: (C,).
        eps: What is added to the variance.
        impl: As for `layer_norm`.

    Returns:
        The sum (..., C), of the dtype that PyTorch promotes to, and the layer norm (..., C) of the sum as it is rounded
        to that dtype; its own is as `layer_norm` says.

    Raises:
        ValueError: Shapes or devices do not fit each other, or `impl` cannot run; the message says why.
    """
    if branch.shape != x.shape:
        raise ValueError(f"x and branch must be of one shape, got {tuple(x.shape)} and {tuple(branch.shape)}")
    dtype = _resolve(impl, x, branch, weight, bias)
    if dtype is not None:
        return _fused().add_layer_norm(x, branch, weight, bias, eps, dtype)
    total = x + branch
    return total, F.layer_norm(total, weight.shape, weight, bias, eps)
