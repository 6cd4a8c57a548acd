"""Region proposals by the published losses and samples: torchvision's network, where mmdetection 2.x differs."""
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead, concat_box_prediction_layers
from torchvision.ops import box_iou

from ._anchors import BACKGROUND, RATIOS, Anchors, Matcher, see_image
from ._types import Targets, at_least_float32

STRIDES = (4, 8, 16, 32, 64)


class RPN(RegionProposalNetwork):
    """Scores and boxes of three anchors at each cell of five maps, and the best thousand boxes that they become.

    Args:
        channels: Of the maps.
        num_proposals: Boxes of an image that are kept in training; in evaluation they are 1000.
        beta: Below which difference the loss of boxes is quadratic; 0 for L1.
        inside: Learn from anchors that lie within the image alone.
    """

    def __init__(self, channels: int, num_proposals: int = 1000, beta: float = 0.0, inside: bool = False):
        super().__init__(
            Anchors(STRIDES, scales=(8,)), RPNHead(channels, len(RATIOS)), 0.7, 0.3, 256, 0.5,
            dict(training=2000, testing=1000), dict(training=num_proposals, testing=1000), 0.7,
        )
        self.proposal_matcher = Matcher(0.7, 0.3, low_quality=0.3)
        self.beta, self.inside = beta, inside

    def _label(self, anchors: torch.Tensor, boxes: torch.Tensor, size: Sequence[int]) -> tuple[torch.Tensor, ...]:
        """For each anchor 1 for an object, 0 for none, -1 for neither; and the box that it is to become."""
        labels, matched = anchors.new_full((len(anchors),), -1), torch.zeros_like(anchors)
        kept = see_image(anchors, size)
        if self.inside:
            height, width = size
            left, top, right, bottom = anchors.unbind(1)
            kept = (left >= 0) & (top >= 0) & (right < width) & (bottom < height)
        kept = torch.where(kept)[0]
        if len(boxes) == 0:
            labels[kept] = 0
            return labels, matched
        found = self.proposal_matcher(box_iou(boxes, anchors[kept]))
        labels[kept] = torch.where(found >= 0, 1.0, torch.where(found == BACKGROUND, 0.0, -1.0)).to(labels)
        matched[kept] = boxes[found.clamp(min=0)].to(matched)
        return labels, matched

    def _losses(self, logits, deltas, anchors: list[torch.Tensor], targets: Targets, sizes) -> dict[str, torch.Tensor]:
        found = [self._label(x, target["boxes"], size) for x, target, size in zip(anchors, targets, sizes, strict=True)]
        labels, boxes = (list(parts) for parts in zip(*found, strict=True))
        positive, negative = (torch.where(torch.cat(masks))[0] for masks in self.fg_bg_sampler(labels))
        sampled = torch.cat([positive, negative])
        wanted = torch.cat(self.box_coder.encode(boxes, anchors))[positive]
        box_loss = F.smooth_l1_loss(deltas[positive], wanted, reduction="sum", beta=self.beta)
        score_loss = F.binary_cross_entropy_with_logits(
            logits.flatten()[sampled], torch.cat(labels)[sampled], reduction="sum"
        )
        count = max(1, len(sampled))
        return dict(loss_objectness=score_loss / count, loss_rpn_box_reg=box_loss / count)

    def forward(
        self, images: ImageList, features: dict[str, torch.Tensor], targets: Targets | None = None
    ) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
        """For each image (proposals, 4) corners in pixels; and in training mode the losses."""
        maps = list(features.values())
        logits, deltas = (at_least_float32(outputs) for outputs in self.head(maps))
        anchors = self.anchor_generator(images, maps)
        per_map = [x[0].numel() for x in logits]
        logits, deltas = concat_box_prediction_layers(logits, deltas)
        proposals = self.box_coder.decode(deltas.detach(), anchors).view(len(anchors), -1, 4)
        boxes, _ = self.filter_proposals(proposals, logits, images.image_sizes, per_map)
        losses = self._losses(logits, deltas, anchors, targets, images.image_sizes) if self.training else {}
        return boxes, losses
