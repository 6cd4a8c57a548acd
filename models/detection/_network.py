"""Detectors: Mask R-CNN, Cascade Mask R-CNN and RetinaNet on the backbones of timm."""
from functools import partial
from typing import Any

import timm
import torch
from timm.data import resolve_data_config
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN

from .._backbone import OnBackbone, create_backbone
from ._backbone import PyramidBackbone
from ._cascade import CascadeHeads
from ._images import DetectionTransform
from ._retinanet import RetinaNetDetector
from ._roi_heads import RoIHeads
from ._rpn import RPN
from ._types import Detections, Targets, check_targets

# Regions along a side of the maps, as published for detection; for all other models 16.
NUM_REGIONS, _OF_MODEL = 16, dict(debiformer_tiny=8, debiformer_base=32)
SHORT, LONG = 800, 1333


class Detector(OnBackbone):
    """What all detectors have in common.

    Attributes:
        num_classes: Classes, without the background.
    """

    kind = "a detector"
    num_classes: int
    has_masks: bool

    def forward(
        self, images: list[torch.Tensor], targets: Targets | None = None
    ) -> dict[str, torch.Tensor] | Detections:
        """The losses in training mode, detections in evaluation mode.

        Args:
            images: (3, H, W) each, of any sizes, values 0 to 1.
            targets: For training, see `Targets`.

        Returns:
            Losses by name, whose sum is trained; or for each image boxes (N, 4), labels (N,) from 1, scores (N,) and,
            of a network with a mask head, masks (N, H, W) bool, best first.

        Raises:
            ValueError: There are no images, or targets are missing or cannot be right; the message says of which image.
        """
        if len(images) == 0:
            raise ValueError("a detector takes at least one image, got none")
        if self.training:
            check_targets(targets, images, self.num_classes, self.has_masks)
        return super().forward(images, targets)

    def find_above(self, score: float):
        """Have it find objects above a score, which at first is 0.05.

        What it finds is the same as without those of lower scores, whose masks, each as large as the image, are not
        made.
        """
        for module in self.modules():
            if isinstance(module, (RoIHeads, RetinaNetDetector)):
                module.score_thresh = score


class RCNN(Detector, GeneralizedRCNN):
    """Mask R-CNN, and what is built like it: proposals, and heads that look at them."""

    def __init__(self, backbone: PyramidBackbone, rpn: RPN, roi_heads: torch.nn.Module, transform: DetectionTransform,
                 num_classes: int):
        super().__init__(backbone, rpn, roi_heads, transform)
        self.num_classes, self.has_masks = num_classes, roi_heads.has_mask()


class Retina(Detector, RetinaNetDetector):
    """RetinaNet."""

    def __init__(self, backbone: PyramidBackbone, num_classes: int, transform: DetectionTransform):
        super().__init__(backbone, num_classes, transform)
        self.num_classes, self.has_masks = num_classes, False


def _create(
    name: str, pretrained: bool, channels: int, short: int, long: int, freeze_batch_norm: bool = True,
    top_convs: bool = False, **kwargs: Any,
) -> tuple[PyramidBackbone, DetectionTransform]:
    """The pyramid on a model, and the transform of the images that it takes."""
    pyramid = partial(PyramidBackbone, channels=channels, top_convs=top_convs, freeze_batch_norm=freeze_batch_norm)
    kwargs = dict(num_regions=_OF_MODEL.get(name, NUM_REGIONS)) | kwargs
    backbone = create_backbone(name, pretrained, make=pyramid, **kwargs)
    config = resolve_data_config(pretrained_cfg=timm.get_pretrained_cfg(name).to_dict())
    return backbone, DetectionTransform(short, long, config["mean"], config["std"])


def mask_rcnn(
    backbone: str, num_classes: int = 80, pretrained: bool = False, channels: int = 256, head_channels: int = 1024,
    short: int = SHORT, long: int = LONG, **kwargs: Any,
) -> RCNN:
    """Mask R-CNN (https://arxiv.org/abs/1703.06870) on a timm model.

    >>> network = mask_rcnn("biformer_nano", num_classes=3, channels=32, head_channels=64, short=64, long=96).eval()
    >>> sorted(network([torch.zeros(3, 50, 70)])[0])
    ['boxes', 'labels', 'masks', 'scores']

    Args:
        backbone: Name of a timm model with maps at strides 4, 8, 16 and 32.
        num_classes: Classes, without the background.
        pretrained: Start from the backbone's published weights.
        channels: Of the feature pyramid, the proposals' head and the mask head.
        head_channels: Width of the box head.
        short, long: The sides that images are fitted with.
        kwargs: `extra_norms` of `Backbone`, `freeze_batch_norm` of `PyramidBackbone`, and arguments of the model;
            `num_regions` is 16 for BiFormer and DeBiFormer, but 8 for debiformer_tiny and 32 for debiformer_base.

    Raises:
        ValueError: The model has no such maps.
    """
    body, transform = _create(backbone, pretrained, channels, short, long, **kwargs)
    return RCNN(body, RPN(channels), RoIHeads(num_classes, channels, head_channels), transform, num_classes)


def retinanet(
    backbone: str, num_classes: int = 80, pretrained: bool = False, channels: int = 256, short: int = SHORT,
    long: int = LONG, **kwargs: Any,
) -> Retina:
    """RetinaNet (https://arxiv.org/abs/1708.02002) on a timm model; as `mask_rcnn`."""
    body, transform = _create(backbone, pretrained, channels, short, long, top_convs=True, **kwargs)
    return Retina(body, num_classes, transform)


def cascade_mask_rcnn(
    backbone: str, num_classes: int = 80, pretrained: bool = False, channels: int = 256, head_channels: int = 1024,
    short: int = SHORT, long: int = LONG, **kwargs: Any,
) -> RCNN:
    """Cascade Mask R-CNN (https://arxiv.org/abs/1906.09756) on a timm model; as `mask_rcnn`.

    Batch norms of the box heads are for several GPUs to be synchronised (`torch.nn.SyncBatchNorm`).
    """
    body, transform = _create(backbone, pretrained, channels, short, long, **kwargs)
    rpn = RPN(channels, num_proposals=2000, beta=1 / 9, inside=True)
    return RCNN(body, rpn, CascadeHeads(num_classes, channels, head_channels), transform, num_classes)


DETECTORS = dict(mask_rcnn=mask_rcnn, cascade_mask_rcnn=cascade_mask_rcnn, retinanet=retinanet)
