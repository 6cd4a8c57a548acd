"""The type that a call computes in, and training steps whose gradients PyTorch computes faster in float32."""
from collections.abc import Callable

import torch

from .support import LOW_PRECISION

_AUTOCAST_FROM = (*LOW_PRECISION, torch.float32)


def autocast_dtype(x: torch.Tensor) -> torch.dtype | None:
    """The type that autocast computes in on the device of `x`, None where it is off."""
    device = "cuda" if x.is_cuda else x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


def computed_in(x: torch.Tensor) -> torch.dtype:
    """The type that products of `x` are computed in here: under autocast another one than its own."""
    dtype = x.dtype
    return autocast_dtype(x) or dtype if dtype in _AUTOCAST_FROM else dtype


def trains_on_cpu_in_low_precision(*inputs: torch.Tensor | None) -> bool:
    """Whether gradients of what is computed from `inputs`, in 16 bits on a CPU, can be asked for."""
    trains = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)
    return trains and inputs[0].is_cpu and computed_in(inputs[0]) in LOW_PRECISION


def in_float32(compute: Callable[..., torch.Tensor], *inputs: torch.Tensor | None) -> torch.Tensor:
    """compute(*inputs) in float32 on a CPU, rounded to the type that it would have had."""
    dtype = computed_in(inputs[0])
    with torch.autocast("cpu", enabled=False):
        return compute(*(None if x is None else x.float() for x in inputs)).to(dtype)
