"""Segmenters: Semantic FPN and UPerNet on the backbones of timm."""
from typing import Any

import torch
from torch import nn

from .._backbone import Backbone, OnBackbone, create_backbone
from .._pyramid import FeaturePyramid
from ._heads import AuxiliaryHead, SemanticFPNHead, UPerHead

# Regions along a side of the maps, as published for segmentation.
NUM_REGIONS = 8


class Segmenter(OnBackbone, nn.Module):
    """A backbone, a neck where the head needs one, a head and, for training, an auxiliary head on the third map.

    Args:
        backbone: Maps at strides 4, 8, 16 and 32.
        neck: Their pyramid, or None.
        decode_head: Maps -> logits.
        auxiliary_head: The map at stride 16 -> logits; or None.

    Attributes:
        num_classes: Classes of the logits.
    """

    kind = "a segmenter"

    def __init__(
        self,
        backbone: Backbone,
        neck: nn.Module | None,
        decode_head: nn.Module,
        auxiliary_head: nn.Module | None = None,
    ):
        super().__init__()
        self.backbone, self.neck = backbone, neck
        self.decode_head, self.auxiliary_head = decode_head, auxiliary_head

    @property
    def num_classes(self) -> int:
        return self.decode_head.conv_seg.out_channels

    def forward(self, x: torch.Tensor) -> torch.Tensor | dict[str, torch.Tensor]:
        """(B, 3, H, W) -> (B, num_classes, H / 4, W / 4) logits; sides are rounded up, by some backbones down.

        In training mode a dictionary: "decode", these logits, and with an auxiliary head "aux", those at stride 16.
        """
        maps = self.backbone(x)
        logits = self.decode_head(maps if self.neck is None else self.neck(maps))
        if not self.training:
            return logits
        found = dict(decode=logits)
        if self.auxiliary_head is not None:
            found["aux"] = self.auxiliary_head(maps[2])
        return found


def _create(backbone: str, pretrained: bool, **kwargs: Any) -> Backbone:
    return create_backbone(backbone, pretrained, **dict(dict(num_regions=NUM_REGIONS), **kwargs))


def semantic_fpn(
    backbone: str, num_classes: int = 150, pretrained: bool = False, head_channels: int | None = None,
    **kwargs: Any,
) -> Segmenter:
    """Semantic FPN (https://arxiv.org/abs/1901.02446) on a timm model.

    >>> semantic_fpn("biformer_tiny", num_classes=11).eval()(torch.zeros(1, 3, 64, 96)).shape
    torch.Size([1, 11, 16, 24])

    Args:
        backbone: Name of a timm model with maps at strides 4, 8, 16 and 32.
        num_classes: Classes.
        pretrained: Start from the backbone's published weights.
        head_channels: Width of the head; None for what was published: 128, and 512 in UPerNet.
        kwargs: `extra_norms` of `Backbone`, and arguments of the model; `num_regions` is 8 for BiFormer and DeBiFormer.

    Raises:
        ValueError: The model has no such maps.
    """
    body = _create(backbone, pretrained, **kwargs)
    neck = FeaturePyramid(body.channels)
    width = 128 if head_channels is None else head_channels
    return Segmenter(body, neck, SemanticFPNHead([256] * len(body.channels), num_classes, width))


def upernet(
    backbone: str, num_classes: int = 150, pretrained: bool = False, head_channels: int | None = None,
    **kwargs: Any,
) -> Segmenter:
    """UPerNet (https://arxiv.org/abs/1807.10221) on a timm model, with an auxiliary head of half the width; as
    `semantic_fpn`.
    """
    body = _create(backbone, pretrained, **kwargs)
    width = 512 if head_channels is None else head_channels
    head = UPerHead(body.channels, num_classes, width)
    return Segmenter(body, None, head, AuxiliaryHead(body.channels[2], num_classes, width // 2))


HEADS = dict(semantic_fpn=semantic_fpn, upernet=upernet)
