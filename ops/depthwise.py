"""The public call of depthwise convolution: check the inputs, choose an implementation, dispatch."""
import torch
import torch.nn.functional as F

from .layout import conv_channels_last
from .support import triton_unsupported

_TRITON_KERNELS = (3, 5)


def _computed_in(x: torch.Tensor) -> torch.dtype:
    """The type that a convolution of `x` computes in here: under autocast another one than its own."""
    device = x.device.type
    if torch.is_autocast_enabled(device) and x.is_floating_point() and x.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return x.dtype


def _triton_unsupported(x, weight, bias, residual) -> str | None:
    """Why the fused kernels cannot compute this, or None where they can."""
    kernel = weight.shape[2]
    if kernel not in _TRITON_KERNELS:
        return f"its kernels take 3 x 3 and 5 x 5 weights, got {kernel} x {kernel}"
    dtype = _computed_in(x)
    for tensor in (x, weight, bias, residual):
        reason = None if tensor is None else triton_unsupported(tensor)
        if reason is not None:
            return reason
    if dtype == x.dtype and not torch.is_autocast_enabled(x.device.type):
        for name, tensor in (("weight", weight), ("bias", bias)):
            if tensor is not None and tensor.dtype != dtype:
                return f"outside of autocast {name} must be of the input's {dtype}, got {tensor.dtype}"
    return None


def choose(x: torch.Tensor, weight: torch.Tensor, bias=None, residual=None) -> str:
    """The implementation that `impl="auto"` takes.

    "triton" for low precision on a GPU that can run it. In float32 PyTorch's own kernels are as fast, and off a GPU
    there is nothing to fuse.
    """
    low_precision = x.device.type == "cuda" and _computed_in(x) in (torch.bfloat16, torch.float16)
    return "triton" if low_precision and _triton_unsupported(x, weight, bias, residual) is None else "torch"


def _check(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, residual: torch.Tensor | None):
    if x.ndim != 4:
        raise ValueError(f"input must be (batch, height, width, channels), got {tuple(x.shape)}")
    channels = x.shape[3]
    is_square = weight.ndim == 4 and weight.shape[2] == weight.shape[3] and weight.shape[2] % 2 == 1
    if not is_square or weight.shape[:2] != (channels, 1):
        raise ValueError(f"weight must be ({channels}, 1, k, k) for an odd k, got {tuple(weight.shape)}")
    if bias is not None and bias.shape != (channels,):
        raise ValueError(f"bias must be ({channels},), got {tuple(bias.shape)}")
    if residual is not None and residual.shape != x.shape:
        raise ValueError(f"residual must be {tuple(x.shape)} as the input, got {tuple(residual.shape)}")
    for name, tensor in (("weight", weight), ("bias", bias), ("residual", residual)):
        if tensor is not None and tensor.device != x.device:
            raise ValueError(f"{name} is on {tensor.device}, the input on {x.device}")


def _torch(x, weight, bias, residual) -> torch.Tensor:
    out = conv_channels_last(
        lambda x_BCHW: F.conv2d(x_BCHW, weight, bias, padding=weight.shape[2] // 2, groups=weight.shape[0]), x
    )
    return out if residual is None else residual + out


def _triton(x, weight, bias, residual) -> torch.Tensor:
    from .fused import depthwise  # imports Triton, which only its users need

    is_input = residual is x
    low = x.to(_computed_in(x))
    return depthwise.depthwise_conv(low, weight, bias, low if is_input and low.dtype == x.dtype else residual)


def depthwise_conv(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    impl: str = "auto",
) -> torch.Tensor:
    """residual + conv(x, weight) + bias: a depthwise convolution of stride 1 that keeps the map's size.

    The result has the type that PyTorch gives residual + conv2d(x), under autocast too. Triton adds up all of it in
    float32 and rounds once, where eager PyTorch rounds the convolution and then its sum with the residual.

    Args:
        x: (B, H, W, C), of any strides. Maps whose tokens lie equally far apart, such as the views of one packed
            projection, are read as they are.
        weight: (C, 1, k, k), k odd. "triton" rounds weight and bias to the type that it computes in, as autocast does.
        bias: (C,), or None.
        residual: (B, H, W, C), or None. It may be `x` itself, which then is read once.
        impl: "triton" (fused, for GPUs), "torch" (PyTorch's convolution and addition), or "auto" (see `choose`).

    Returns:
        (B, H, W, C).

    Raises:
        ValueError: Shapes or devices do not fit each other, or `impl` cannot run; the message says why.
    """
    _check(x, weight, bias, residual)
    if impl == "auto":
        impl = choose(x, weight, bias, residual)
    if impl == "torch":
        return _torch(x, weight, bias, residual)
    if impl != "triton":
        raise ValueError(f"impl={impl!r} cannot run: there is no such implementation; choose triton, torch or auto")
    reason = _triton_unsupported(x, weight, bias, residual)
    if reason is not None:
        raise ValueError(f"impl='triton' cannot run: {reason}")
    return _triton(x, weight, bias, residual)
