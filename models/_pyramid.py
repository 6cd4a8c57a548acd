"""A feature pyramid: maps of one width at all strides, for segmenters and detectors.

`Feature Pyramid Networks for Object Detection` - https://arxiv.org/abs/1612.03144, in the form of mmdetection 2.x:
convolutions with biases, without norms and activations, and nearest upsampling.
"""
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn


class Conv(nn.Module):
    """A convolution alone, with a bias."""

    def __init__(self, in_channels: int, channels: int, kernel_size: int = 1):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, channels, kernel_size, padding=kernel_size // 2)
        nn.init.xavier_uniform_(self.conv.weight)
        nn.init.zeros_(self.conv.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) -> (B, channels, H, W)."""
        return self.conv(x)


class FeaturePyramid(nn.Module):
    """Maps of one width: each lateral, with what is below it added, and smoothed.

    Args:
        in_channels: Of the backbone's maps, finest first.
        channels: Of each map that is returned.
    """

    def __init__(self, in_channels: Sequence[int], channels: int = 256):
        super().__init__()
        self.lateral_convs = nn.ModuleList(Conv(c, channels) for c in in_channels)
        self.fpn_convs = nn.ModuleList(Conv(channels, channels, 3) for _ in in_channels)

    def forward(self, maps: list[torch.Tensor]) -> list[torch.Tensor]:
        """[(B, C_i, H_i, W_i), ...] -> [(B, channels, H_i, W_i), ...]."""
        maps = [conv(x) for conv, x in zip(self.lateral_convs, maps, strict=True)]
        for i in range(len(maps) - 1, 0, -1):
            maps[i - 1] = maps[i - 1] + F.interpolate(maps[i], size=maps[i - 1].shape[2:], mode="nearest")
        return [conv(x) for conv, x in zip(self.fpn_convs, maps, strict=True)]
