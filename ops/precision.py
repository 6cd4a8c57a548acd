"""The type that a call computes in, and training steps whose gradients PyTorch computes faster in float32."""
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch

from .onednn import needs_grad
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


def without_autocast(x: torch.Tensor) -> AbstractContextManager:
    """A context without autocast on the device of `x`; an empty one where there is none anyway.

    Exporters keep a context of autocast as a graph within the graph, which quantisation then refuses.
    """
    device = x.device.type
    has_autocast = device != "meta" and torch.is_autocast_enabled(device)
    return torch.autocast(device, enabled=False) if has_autocast else nullcontext()


def trained_in_float32(compute: Callable[..., torch.Tensor], *inputs: torch.Tensor | None) -> torch.Tensor:
    """compute(*inputs), in a training step in low precision on a CPU from float32, rounded to the type asked for."""
    first = inputs[0]
    if not (first.is_cpu and needs_grad(*inputs) and (dtype := computed_in(first)) in LOW_PRECISION):
        return compute(*inputs)
    with torch.autocast("cpu", enabled=False):
        return compute(*(None if x is None else x.float() for x in inputs)).to(dtype)
