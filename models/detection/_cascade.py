"""Cascade R-CNN in the form of mmdetection 2.x, as Swin and ViTAEv2 were published with it.

In evaluation the logits of the classes are averaged, and the probabilities of masks.

`Cascade R-CNN: High Quality Object Detection and Instance Segmentation` - https://arxiv.org/abs/1906.09756
"""
from collections import OrderedDict
from collections.abc import Sequence
from functools import partial

import torch
from torch import nn
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead
from torchvision.ops import clip_boxes_to_image, generalized_box_iou_loss

from ._roi_heads import BOX_SIZE, RoIHeads, Samples, of_their_class
from ._types import Detections, Targets

OVERLAPS = (0.5, 0.6, 0.7)
# One over the standard deviations of the differences of boxes.
WEIGHTS = tuple((1 / xy, 1 / xy, 1 / wh, 1 / wh) for xy, wh in ((0.1, 0.2), (0.05, 0.1), (0.033, 0.067)))
LOSS_WEIGHTS = (1.0, 0.5, 0.25)
_BOX_LOSS_WEIGHT = 10.0


class Stage(RoIHeads):
    """One of the heads: four convolutions and a linear layer, and a loss of the boxes themselves."""

    def __init__(self, num_classes: int, channels: int, width: int, overlap: float, weights: Sequence[float]):
        size = (channels, BOX_SIZE, BOX_SIZE)
        box_head = FastRCNNConvFCHead(size, [channels] * 4, [width], norm_layer=nn.BatchNorm2d)
        nn.init.xavier_uniform_(box_head[-2].weight)
        nn.init.zeros_(box_head[-2].bias)
        super().__init__(num_classes, channels, width, box_head, overlap, low_quality=False, weights=weights)

    def box_loss(self, deltas: torch.Tensor, wanted: torch.Tensor, boxes: torch.Tensor) -> torch.Tensor:
        """Ten times the sum of 1 - GIoU (https://arxiv.org/abs/1902.09630)."""
        decode = partial(self.box_coder.decode_single, boxes=boxes)
        return _BOX_LOSS_WEIGHT * generalized_box_iou_loss(decode(deltas), decode(wanted), reduction="sum")

    def refine(
        self, boxes: list[torch.Tensor], deltas: torch.Tensor, labels: torch.Tensor, sizes: Sequence[tuple[int, int]]
    ) -> list[torch.Tensor]:
        """The boxes as the head corrects them for these classes, within their images of these `sizes`."""
        refined = self.box_coder.decode_single(of_their_class(deltas, labels), torch.cat(boxes))
        of_images = refined.split([len(x) for x in boxes])
        return [clip_boxes_to_image(x, size) for x, size in zip(of_images, sizes, strict=True)]


class CascadeHeads(nn.Module):
    """Three heads, each of which looks at the boxes that the one before it has corrected.

    Args:
        num_classes: Classes, without the background.
        channels: Of the maps and all convolutions.
        width: Of the linear layers.
    """

    def __init__(self, num_classes: int, channels: int, width: int):
        super().__init__()
        self.stages = nn.ModuleList(
            Stage(num_classes, channels, width, *of_stage) for of_stage in zip(OVERLAPS, WEIGHTS, strict=True)
        )

    def has_mask(self) -> bool:
        return True

    @torch.no_grad()
    def _corrected(self, stage: Stage, samples: Samples, targets: Targets, sizes) -> list[torch.Tensor]:
        """What the next head learns from: a sample without the objects' own boxes, which were added to it."""
        labels = torch.cat(samples.labels)
        labels = torch.where(labels > 0, labels, _most_likely(samples.logits))
        refined = stage.refine(samples.boxes, samples.deltas, labels, sizes)
        kept = []
        for boxes, new, matched, label, target in zip(*samples[:1], refined, *samples[1:3], targets, strict=True):
            if len(target["boxes"]):
                is_object = (boxes == target["boxes"][matched].to(boxes)).all(dim=1) & (label > 0)
                new = new[~is_object]
            kept.append(new)
        return kept

    def _losses(self, features, boxes: list[torch.Tensor], sizes, targets: Targets) -> dict[str, torch.Tensor]:
        losses = {}
        for index, (stage, weight) in enumerate(zip(self.stages, LOSS_WEIGHTS, strict=True)):
            found, samples = stage.learn(features, boxes, targets)
            losses |= {f"{name}_{index}": weight * loss for name, loss in found.items()}
            if stage is not self.stages[-1]:
                boxes = self._corrected(stage, samples, targets, sizes)
        return losses

    def _detect(self, features, boxes: list[torch.Tensor], sizes) -> Detections:
        of_stages = []
        for stage in self.stages:
            logits, deltas = stage.predict(features, boxes)
            of_stages.append(logits)
            if stage is not self.stages[-1]:
                boxes = stage.refine(boxes, deltas, _most_likely(logits), sizes)
        found = stage.postprocess_detections(torch.stack(of_stages).mean(dim=0), deltas, boxes, sizes)
        detections = [dict(boxes=b, scores=s, labels=i) for b, s, i in zip(*found, strict=True)]
        of_images = [x["boxes"] for x in detections]
        masks = torch.stack([stage.predict_masks(features, of_images).sigmoid() for stage in self.stages]).mean(dim=0)
        labels = torch.cat([x["labels"] for x in detections])
        masks = masks[torch.arange(len(masks), device=masks.device), labels][:, None].split([len(x) for x in of_images])
        return [dict(x, masks=mask) for x, mask in zip(detections, masks, strict=True)]

    def forward(
        self,
        features: OrderedDict[str, torch.Tensor],
        proposals: list[torch.Tensor],
        image_shapes: list[tuple[int, int]],
        targets: Targets | None = None,
    ) -> tuple[Detections, dict[str, torch.Tensor]]:
        """The losses in training mode; detections otherwise, whose masks (N, 1, m, m) are probabilities in the box."""
        if self.training:
            return [], self._losses(features, proposals, image_shapes, targets)
        return self._detect(features, proposals, image_shapes), {}


def _most_likely(logits: torch.Tensor) -> torch.Tensor:
    """(N, classes + 1) -> (N,): of the classes without the background."""
    return logits[:, 1:].argmax(dim=1) + 1
