"""Maps whose channels are the last axis."""
from collections.abc import Callable

import torch


def conv_channels_last(conv: Callable[[torch.Tensor], torch.Tensor], x_BHWC: torch.Tensor) -> torch.Tensor:
    """Apply a convolution of (B, C, H, W) to a (B, H, W, C) map, without a copy on either side."""
    return conv(x_BHWC.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
