"""The maps of a backbone as a feature pyramid for a detector."""
from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from .._backbone import Backbone
from .._pyramid import FeaturePyramid


class TopConvs(nn.Module):
    """P6 and P7 of RetinaNet: convolutions of stride 2, the first on the backbone's last map, nothing in between."""

    def __init__(self, in_channels: int, channels: int):
        super().__init__()
        self.p6 = nn.Conv2d(in_channels, channels, 3, stride=2, padding=1)
        self.p7 = nn.Conv2d(channels, channels, 3, stride=2, padding=1)
        for conv in (self.p6, self.p7):
            nn.init.xavier_uniform_(conv.weight)
            nn.init.zeros_(conv.bias)

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        """(B, C, H, W) -> [(B, channels, H / 2, W / 2), (B, channels, H / 4, W / 4)], sides rounded up."""
        p6 = self.p6(x)
        return [p6, self.p7(p6)]


class PyramidBackbone(Backbone):
    """Five maps of one width, finest first, named "0" to "4".

    Args:
        body, extra_norms: As of `Backbone`.
        channels: Of each map.
        top_convs: Strides 8 to 128, the last two by convolutions (RetinaNet); otherwise 4 to 64, of which the last is
            every second pixel of the fourth (Mask R-CNN).
        freeze_batch_norm: Keep the running statistics of the body's batch norms as they are; scale and shift are
            trained, as published for BiFormer. With one or two images on a GPU there is little to estimate them from.

    Attributes:
        out_channels: Of each map.
    """

    def __init__(
        self, body: nn.Module, extra_norms: bool, channels: int, top_convs: bool = False, freeze_batch_norm: bool = True
    ):
        super().__init__(body, extra_norms)
        self.first = 1 if top_convs else 0
        if self.first and self.extra_norms is not None:
            self.extra_norms[0] = nn.Identity()  # a norm of a map that is not used would never get a gradient
        self.fpn = FeaturePyramid(self.channels[self.first :], channels)
        self.top = TopConvs(self.channels[-1], channels) if top_convs else None
        self.out_channels, self.freeze_batch_norm = channels, freeze_batch_norm

    def train(self, mode: bool = True) -> "PyramidBackbone":
        super().train(mode)
        if self.freeze_batch_norm:
            for module in self.body.modules():
                if isinstance(module, _BatchNorm):
                    module.eval()
        return self

    def forward(self, x: torch.Tensor) -> OrderedDict[str, torch.Tensor]:
        """(B, 3, H, W) -> {"0": (B, channels, H_0, W_0), ...}."""
        maps = super().forward(x)[self.first :]
        pyramid = self.fpn(maps)
        # A pooling of one pixel: every second row and column.
        pyramid += [F.max_pool2d(pyramid[-1], 1, stride=2)] if self.top is None else self.top(maps[-1])
        return OrderedDict((str(i), x) for i, x in enumerate(pyramid))
