"""The heads of segmenters: Semantic FPN, UPerNet and the auxiliary head; modules named as published.

Semantic FPN: `Panoptic Feature Pyramid Networks` - https://arxiv.org/abs/1901.02446
UPerNet: `Unified Perceptual Parsing for Scene Understanding` - https://arxiv.org/abs/1807.10221
Both in the forms of mmsegmentation 0.x, which the published results of BiFormer, DeBiFormer and ViTAEv2 are of.
"""
from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

_resize = partial(F.interpolate, mode="bilinear", align_corners=False)


class ConvNorm(nn.Module):
    """Convolution, batch norm and ReLU; the map keeps its size."""

    def __init__(self, in_channels: int, channels: int, kernel_size: int = 1):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, channels, kernel_size, padding=kernel_size // 2, bias=False)
        self.bn = nn.BatchNorm2d(channels)
        nn.init.kaiming_normal_(self.conv.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) -> (B, channels, H, W)."""
        return F.relu(self.bn(self.conv(x)))


class Classifier(nn.Module):
    """Dropout of whole channels, and a 1 x 1 convolution to the classes; the end of every head."""

    def __init__(self, channels: int, num_classes: int, drop_rate: float = 0.1):
        super().__init__()
        self.dropout = nn.Dropout2d(drop_rate)
        self.conv_seg = nn.Conv2d(channels, num_classes, 1)
        nn.init.normal_(self.conv_seg.weight, std=0.01)
        nn.init.zeros_(self.conv_seg.bias)

    def classify(self, x: torch.Tensor) -> torch.Tensor:
        """(B, channels, H, W) -> (B, num_classes, H, W)."""
        return self.conv_seg(self.dropout(x))


class SemanticFPNHead(Classifier):
    """The maps of a pyramid, brought to its finest by convolutions and doublings, and summed.

    Args:
        in_channels: Of the maps at strides 4, 8, 16, 32.
        num_classes: Classes.
        channels: Width.
    """

    def __init__(self, in_channels: Sequence[int], num_classes: int, channels: int = 128):
        super().__init__(channels, num_classes)
        self.scale_heads = nn.ModuleList()
        for level, width in enumerate(in_channels):
            layers = []
            for i in range(max(1, level)):
                layers.append(ConvNorm(channels if i else width, channels, 3))
                if level:
                    layers.append(nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False))
            self.scale_heads.append(nn.Sequential(*layers))

    def forward(self, maps: list[torch.Tensor]) -> torch.Tensor:
        """Maps at strides 4, 8, 16, 32 -> (B, num_classes, H / 4, W / 4) logits."""
        total, *others = (head(x) for head, x in zip(self.scale_heads, maps, strict=True))
        for x in others:  # of a side that 32 does not divide, doubled maps are a little larger
            total = total + (x if x.shape == total.shape else _resize(x, size=total.shape[2:]))
        return self.classify(total)


class AveragePool(nn.Module):
    """A map averaged to so many rows and columns.

    As nn.AdaptiveAvgPool2d, whose gradient is not deterministic on GPUs.
    """

    def __init__(self, side: int):
        super().__init__()
        self.side = side

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) -> (B, C, side, side)."""
        for dim in (2, 3):
            length = x.shape[dim]
            starts = [i * length // self.side for i in range(self.side)]
            ends = [-(-(i + 1) * length // self.side) for i in range(self.side)]
            bins = [x.narrow(dim, start, end - start) for start, end in zip(starts, ends, strict=True)]
            x = torch.stack([part.mean(dim) for part in bins], dim)
        return x


class UPerHead(Classifier):
    """Pyramid pooling of the coarsest map, a top-down pyramid of all, and one convolution over their concatenation.

    Args:
        in_channels: Of the maps at strides 4, 8, 16, 32.
        num_classes: Classes.
        channels: Width.
        pool_scales: Sides that the coarsest map is pooled to.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        num_classes: int,
        channels: int = 512,
        pool_scales: Sequence[int] = (1, 2, 3, 6),
    ):
        super().__init__(channels, num_classes)
        *finer, coarsest = in_channels
        self.psp_modules = nn.ModuleList(
            nn.Sequential(AveragePool(scale), ConvNorm(coarsest, channels)) for scale in pool_scales
        )
        self.bottleneck = ConvNorm(coarsest + len(pool_scales) * channels, channels, 3)
        self.lateral_convs = nn.ModuleList(ConvNorm(c, channels) for c in finer)
        self.fpn_convs = nn.ModuleList(ConvNorm(channels, channels, 3) for _ in finer)
        self.fpn_bottleneck = ConvNorm(len(in_channels) * channels, channels, 3)

    def forward(self, maps: list[torch.Tensor]) -> torch.Tensor:
        """Maps at strides 4, 8, 16, 32 -> (B, num_classes, H / 4, W / 4) logits."""
        *finer, coarsest = maps
        pooled = [_resize(module(coarsest), size=coarsest.shape[2:]) for module in self.psp_modules]
        laterals = [conv(x) for conv, x in zip(self.lateral_convs, finer, strict=True)]
        laterals.append(self.bottleneck(torch.cat([coarsest, *pooled], dim=1)))
        for i in range(len(laterals) - 1, 0, -1):
            laterals[i - 1] = laterals[i - 1] + _resize(laterals[i], size=laterals[i - 1].shape[2:])
        smoothed = [conv(x) for conv, x in zip(self.fpn_convs, laterals[:-1], strict=True)]
        finest, *others = (*smoothed, laterals[-1])
        resized = [_resize(x, size=finest.shape[2:]) for x in others]
        return self.classify(self.fpn_bottleneck(torch.cat([finest, *resized], dim=1)))


class AuxiliaryHead(Classifier):
    """A convolution and a classifier on one map, for a second loss in training.

    Args:
        in_channels: Of the map.
        num_classes: Classes.
        channels: Width.
    """

    def __init__(self, in_channels: int, num_classes: int, channels: int = 256):
        super().__init__(channels, num_classes)
        self.convs = nn.Sequential(ConvNorm(in_channels, channels, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, in_channels, H, W) -> (B, num_classes, H, W) logits."""
        return self.classify(self.convs(x))
