"""Maps whose channels are the last axis."""
from collections.abc import Callable

import torch

from .transforms import is_exported


def settle(x: torch.Tensor) -> torch.Tensor:
    """The tensor, and in an export a contiguous copy.

    Where a tensor is not contiguous, PyTorch chooses by its sizes whether a reshape is a view, and how the output of a
    convolution lies in memory. An export would note these choices, and be for no other sizes. Other runtimes have a
    layout of their own, and leave such copies out.
    """
    return x.clone(memory_format=torch.contiguous_format) if is_exported() else x


def channels_first(x_BHWC: torch.Tensor) -> torch.Tensor:
    """(B, H, W, C) -> (B, C, H, W), a view but in exports."""
    return settle(x_BHWC.permute(0, 3, 1, 2))


def flatten_map(x_BHW: torch.Tensor) -> torch.Tensor:
    """(B, H, W, ...) -> (B, H * W, ...)."""
    return settle(x_BHW).flatten(1, 2)


def is_open(*sizes: int) -> bool:
    """Whether an export leaves one of these sizes of a map open."""
    return any(isinstance(size, torch.SymInt) for size in sizes)


def missing_to_multiple(size: int, multiple: int) -> int:
    """How much `size` lacks of the next multiple, in an expression that an export can simplify."""
    return (size + multiple - 1) // multiple * multiple - size


def fixed_if_traced(height: int, width: int) -> tuple[int, int]:
    """The size of a map in numbers: torch.jit.trace makes tensors of it, but a trace is for maps of one size."""
    return (int(height), int(width)) if torch.jit.is_tracing() else (height, width)


def crop_map(x_BHW: torch.Tensor, top: int, left: int, height: int, width: int) -> torch.Tensor:
    """(B, H, W, ...) -> (B, height, width, ...): the part of a map, a view but where an export leaves its size open."""
    if not is_open(height, width):
        return x_BHW[:, top : top + height, left : left + width]
    # Of a slice, an export cannot tell that it ends within the map.
    rows = torch.arange(height, device=x_BHW.device) + top
    cols = torch.arange(width, device=x_BHW.device) + left
    tokens = (rows[:, None] * x_BHW.shape[2] + cols).flatten()
    return flatten_map(x_BHW).index_select(1, tokens).unflatten(1, (height, width))


def conv_channels_last(conv: Callable[[torch.Tensor], torch.Tensor], x_BHWC: torch.Tensor) -> torch.Tensor:
    """Apply a convolution of (B, C, H, W) to a (B, H, W, C) map, without a copy on either side but in exports."""
    return settle(conv(channels_first(x_BHWC)).permute(0, 2, 3, 1))
