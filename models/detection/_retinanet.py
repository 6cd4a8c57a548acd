"""RetinaNet (https://arxiv.org/abs/1708.02002) in the form of mmdetection 2.x: torchvision's, where it differs."""
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models.detection.retinanet import RetinaNet, RetinaNetHead
from torchvision.ops import box_iou, sigmoid_focal_loss

from ._anchors import BACKGROUND, IGNORED, RATIOS, Anchors, Matcher, see_image
from ._images import DetectionTransform
from ._types import Targets, at_least_float32

STRIDES = (8, 16, 32, 64, 128)
SCALES = tuple(4 * 2 ** (i / 3) for i in range(3))


class Head(RetinaNetHead):
    """Logits and refinements of each anchor, and their losses over the anchors of a batch."""

    def forward(self, x: list[torch.Tensor]) -> dict[str, torch.Tensor]:
        """{"cls_logits": (B, anchors, classes), "bbox_regression": (B, anchors, 4)}."""
        outputs = super().forward(x)
        return dict(zip(outputs, at_least_float32(list(outputs.values())), strict=True))

    def compute_loss(
        self, targets: Targets, head_outputs: dict[str, torch.Tensor], anchors: list[torch.Tensor],
        matched_idxs: list[torch.Tensor],
    ) -> dict[str, torch.Tensor]:
        """Both divided by the number of matched anchors in the batch, where torchvision takes the mean over images."""
        matched = torch.stack(matched_idxs)
        logits, deltas = head_outputs["cls_logits"], head_outputs["bbox_regression"]
        wanted, coder = torch.zeros_like(logits), self.regression_head.box_coder
        box_loss = deltas.sum() * 0  # of a batch without objects
        for image, (target, of_image) in enumerate(zip(targets, anchors, strict=True)):
            found = torch.where(matched[image] >= 0)[0]
            objects = matched[image][found]
            wanted[image, found, target["labels"][objects] - 1] = 1
            boxes = coder.encode_single(target["boxes"][objects].to(of_image), of_image[found])
            box_loss = box_loss + F.l1_loss(deltas[image, found], boxes, reduction="sum")
        counts = matched != IGNORED
        score_loss = sigmoid_focal_loss(logits[counts], wanted[counts], reduction="sum")
        count = (matched >= 0).sum().clamp(min=1)
        return dict(classification=score_loss / count, bbox_regression=box_loss / count)


class RetinaNetDetector(RetinaNet):
    """Nine anchors at each cell of five maps; classes without one for the background inside, with it (0) outside."""

    def __init__(self, backbone: nn.Module, num_classes: int, transform: DetectionTransform):
        anchors = Anchors(STRIDES, SCALES)
        super().__init__(
            backbone, num_classes, anchor_generator=anchors,
            head=Head(backbone.out_channels, len(SCALES) * len(RATIOS), num_classes),
            proposal_matcher=Matcher(0.5, 0.4, low_quality=0.0),
            score_thresh=0.05, nms_thresh=0.5, detections_per_img=100, topk_candidates=1000,
        )
        self.transform = transform

    def compute_loss(self, targets: Targets, head_outputs, anchors: list[torch.Tensor]) -> dict[str, torch.Tensor]:
        matched = []
        for target, of_image in zip(targets, anchors, strict=True):
            boxes = target["boxes"].to(of_image)
            found = torch.full((len(of_image),), IGNORED, device=of_image.device)
            kept = torch.where(see_image(of_image, target["image_size"].tolist()))[0]
            found[kept] = self.proposal_matcher(box_iou(boxes, of_image[kept])) if len(boxes) else BACKGROUND
            matched.append(found)
        return self.head.compute_loss(targets, head_outputs, anchors, matched)

    def postprocess_detections(self, head_outputs, anchors, image_shapes):
        found = super().postprocess_detections(head_outputs, anchors, image_shapes)
        return [dict(detections, labels=detections["labels"] + 1) for detections in found]
