"""The public call of depthwise convolution: check the inputs, choose an implementation, dispatch.

Training steps of small layers wait for the host. So the checks look up little more than once what takes long: a shape
0.1 us, a device's type 0.3 us.
"""
import torch
import torch.nn.functional as F
from torch import nn

from .layout import conv_channels_last
from .precision import autocast_dtype, computed_in, trained_in_float32
from .support import LOW_PRECISION, triton_unsupported
from .transforms import fx_leaf

_TRITON_KERNELS = (3, 5)
_TRITON_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def _triton_unsupported(x, weight, bias, residual, dilation) -> str | None:
    if dilation != 1:
        return f"its kernels take no dilation, got {dilation}"
    kernel = weight.shape[2]
    if kernel not in _TRITON_KERNELS:
        return f"its kernels take 3 x 3 and 5 x 5 weights, got {kernel} x {kernel}"
    any_type = _TRITON_DTYPES
    alike = (x.dtype,) if autocast_dtype(x) is None else any_type
    for name, tensor, dtypes in (("weight", weight, alike), ("bias", bias, alike), ("residual", residual, any_type)):
        if tensor is None:
            continue
        dtype = tensor.dtype
        if dtype not in _TRITON_DTYPES:
            return f"its kernels read bfloat16, float16 and float32, {name} is {dtype}"
        if dtype not in dtypes:
            return f"outside of autocast {name} must be of the input's {x.dtype}, got {dtype}"
    return triton_unsupported(x)


def depthwise_unsupported(
    impl: str, x: torch.Tensor, weight: torch.Tensor, bias=None, residual=None, dilation: int = 1
) -> str | None:
    """Why `impl` cannot compute `depthwise_conv` of these, or None where it can."""
    if impl not in _BACKENDS:
        return f"there is no such implementation; choose from {', '.join(_BACKENDS)} or auto"
    return _triton_unsupported(x, weight, bias, residual, dilation) if impl == "triton" else None


def choose_depthwise_impl(x: torch.Tensor, weight: torch.Tensor, bias=None, residual=None, dilation: int = 1) -> str:
    """The implementation that `impl="auto"` takes.

    "triton" in low precision on a GPU that can run it. Off a GPU, and in float32, all stays as PyTorch computes it.
    """
    if not x.is_cuda or computed_in(x) not in LOW_PRECISION:
        return "torch"
    return "torch" if depthwise_unsupported("triton", x, weight, bias, residual, dilation) else "triton"


def _check(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, residual: torch.Tensor | None):
    shape, device = x.shape, x.device
    if len(shape) != 4:
        raise ValueError(f"input must be (batch, height, width, channels), got {tuple(shape)}")
    channels = shape[3]
    taps = weight.shape
    kernel = taps[-1] if taps else 0
    if taps != (channels, 1, kernel, kernel) or kernel % 2 == 0:
        raise ValueError(f"weight must be ({channels}, 1, k, k) for an odd k, got {tuple(taps)}")
    if bias is not None and bias.shape != (channels,):
        raise ValueError(f"bias must be ({channels},), got {tuple(bias.shape)}")
    if residual is not None and residual is not x and residual.shape != shape:
        raise ValueError(f"residual must be {tuple(shape)} as the input, got {tuple(residual.shape)}")
    for name, tensor in (("weight", weight), ("bias", bias), ("residual", residual)):
        if tensor is not None and tensor.device != device:
            raise ValueError(f"{name} is on {tensor.device}, the input on {device}")


def depthwise_conv2d(
    x_BCHW: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, stride: int = 1, padding: int = 0,
    dilation: int = 1,
) -> torch.Tensor:
    """`F.conv2d` with a kernel for each channel; (B, C, H, W) -> (B, C, H', W').

    On a CPU, a training step in low precision computes it in float32, and rounds the result: oneDNN's gradients of
    depthwise convolutions in bfloat16 take three to forty times as long as those in float32.
    """
    settings = dict(stride=stride, padding=padding, dilation=dilation, groups=weight.shape[0])

    def convolve(x_BCHW, weight, bias):
        return F.conv2d(x_BCHW, weight, bias, **settings)

    return trained_in_float32(convolve, x_BCHW, weight, bias)


def _torch(x, weight, bias, residual, dilation) -> torch.Tensor:
    padding = dilation * (weight.shape[2] // 2)
    out = conv_channels_last(
        lambda x_BCHW: depthwise_conv2d(x_BCHW, weight, bias, padding=padding, dilation=dilation), x
    )
    return out if residual is None else residual + out


def _triton(x, weight, bias, residual, _dilation) -> torch.Tensor:
    from .fused import depthwise  # imports Triton, which only its users need

    dtype = computed_in(x)
    if dtype != x.dtype:  # then a residual that is x is not what is convolved
        x = x.to(dtype)
    return depthwise.depthwise_conv(x, weight, bias, residual)


_BACKENDS = {"triton": _triton, "torch": _torch}


def depthwise_conv(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    impl: str = "auto",
    dilation: int = 1,
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
        impl: "triton" (fused, for GPUs), "torch" (PyTorch's convolution and addition), or "auto" (see
            `choose_depthwise_impl`).
        dilation: Tokens from one number of the kernel to the next; "triton" takes 1 alone.

    Returns:
        (B, H, W, C).

    Raises:
        ValueError: Shapes or devices do not fit each other, or `impl` cannot run; the message says why.
    """
    _check(x, weight, bias, residual)
    if impl == "auto":
        impl = choose_depthwise_impl(x, weight, bias, residual, dilation)
    else:
        reason = depthwise_unsupported(impl, x, weight, bias, residual, dilation)
        if reason is not None:
            raise ValueError(f"impl={impl!r} cannot run: {reason}")
    return _BACKENDS[impl](x, weight, bias, residual, dilation)


@fx_leaf  # what it computes depends on the device
class DepthwiseConv2d(nn.Conv2d):
    """`nn.Conv2d` with a kernel for each channel, by `depthwise_conv2d`.

    Args:
        dim: Channels.
        kernel_size: Rows and columns of the kernel, odd; it is padded by half of it.
        stride: Pixels from one place of the kernel to the next.
    """

    def __init__(self, dim: int, kernel_size: int, stride: int = 1, bias: bool = True, device=None, dtype=None):
        dd = dict(device=device, dtype=dtype)
        super().__init__(dim, dim, kernel_size, stride, kernel_size // 2, groups=dim, bias=bias, **dd)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, dim, H, W) -> (B, dim, H', W')."""
        return depthwise_conv2d(x, self.weight, self.bias, self.stride, self.padding)


@fx_leaf  # its implementation depends on the device
class DepthwiseConv(nn.Conv2d):
    """residual + conv(x): a depthwise convolution of channels-last maps by `depthwise_conv`.

    Args:
        dim: Channels.
        kernel_size: Rows and columns of the kernel, odd.
        layer_impl: The implementation of `depthwise_conv`.
        dilation: Tokens from one number of the kernel to the next.
    """

    def __init__(
        self, dim: int, kernel_size: int, layer_impl: str = "auto", dilation: int = 1, device=None, dtype=None
    ):
        settings = dict(padding=dilation * (kernel_size // 2), dilation=dilation, groups=dim)
        super().__init__(dim, dim, kernel_size, **settings, device=device, dtype=dtype)
        self.layer_impl = layer_impl

    def forward(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        """(B, H, W, dim), (B, H, W, dim) -> (B, H, W, dim)."""
        return depthwise_conv(x, self.weight, self.bias, residual, self.layer_impl, self.dilation[0])
