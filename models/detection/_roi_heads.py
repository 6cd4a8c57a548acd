"""The heads of Mask R-CNN in the form of mmdetection 2.x: torchvision's, where it differs.

`Mask R-CNN` - https://arxiv.org/abs/1703.06870
"""
from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.roi_heads import RoIHeads as TorchvisionHeads
from torchvision.models.detection.roi_heads import maskrcnn_inference
from torchvision.ops import box_iou

from ._anchors import BACKGROUND, Matcher
from ._masks import cut_masks
from ._pool import RoIPool
from ._types import Detections, Targets, at_least_float32

BOX_SIZE, MASK_SIZE = 7, 14  # rows and columns that the heads see of a box
BOX_WEIGHTS = (10.0, 10.0, 5.0, 5.0)  # one over the standard deviations .1 .1 .2 .2


def init_predictor(predictor: FastRCNNPredictor):
    """Initialise the layers of classes and boxes as published."""
    for layer, std in ((predictor.cls_score, 0.01), (predictor.bbox_pred, 0.001)):
        nn.init.normal_(layer.weight, std=std)
        nn.init.zeros_(layer.bias)


def make_box_head(channels: int, width: int) -> TwoMLPHead:
    """Two linear layers on what the maps show in a box."""
    head = TwoMLPHead(channels * BOX_SIZE**2, width)
    for layer in (head.fc6, head.fc7):
        nn.init.xavier_uniform_(layer.weight)
        nn.init.zeros_(layer.bias)
    return head


def of_their_class(boxes: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """(N, (classes + 1) * 4), (N,) -> (N, 4): what is said of each one's own class."""
    return boxes.unflatten(1, (-1, 4))[torch.arange(len(boxes), device=boxes.device), labels]


def mask_loss(
    logits: torch.Tensor, boxes: list[torch.Tensor], matched: list[torch.Tensor], targets: Targets
) -> torch.Tensor:
    """The mean cross-entropy of the pixels of each object's own class.

    Args:
        logits: (N, classes + 1, m, m) of all images' boxes.
        boxes: For each image (n, 4) corners in pixels.
        matched: For each image (n,) index of the box's object.
        targets: With labels and masks.
    """
    if len(logits) == 0:
        return logits.sum()  # zero, with gradients of zeros for every weight
    size = logits.shape[-1]
    wanted = torch.cat([cut_masks(t["masks"], b, i, size) for t, b, i in zip(targets, boxes, matched, strict=True)])
    labels = torch.cat([t["labels"][i] for t, i in zip(targets, matched, strict=True)])
    said = logits[torch.arange(len(logits), device=logits.device), labels]
    return F.binary_cross_entropy_with_logits(said, wanted.to(said.dtype))


class Samples(NamedTuple):
    """The boxes that a head has learnt from; everything but the outputs by image.

    Attributes:
        boxes: (n, 4) corners in pixels.
        matched: (n,) index of the box's object.
        labels: (n,), 0 for the background.
        logits: (N, classes + 1) of all boxes.
        deltas: (N, (classes + 1) * 4) of all boxes.
    """

    boxes: list[torch.Tensor]
    matched: list[torch.Tensor]
    labels: list[torch.Tensor]
    logits: torch.Tensor
    deltas: torch.Tensor


class RoIHeads(TorchvisionHeads):
    """Class and box of each proposal, and masks of what is found.

    Args:
        num_classes: Classes, without the background.
        channels: Of the maps and of the mask head.
        width: Of what the box head returns.
        box_head: (N, channels, 7, 7) -> (N, width); None for two linear layers.
        overlap: With an object, from which a proposal is taken for it in training.
        low_quality: Take an object's best proposals for it where they overlap another one more, if by `overlap`.
        weights: Of the differences of boxes.
        with_masks: Whether to have a mask head.
    """

    def __init__(
        self, num_classes: int, channels: int, width: int, box_head: nn.Module | None = None, overlap: float = 0.5,
        low_quality: bool = True, weights: Sequence[float] = BOX_WEIGHTS, with_masks: bool = True,
    ):
        masks = {}
        if with_masks:
            masks = dict(
                mask_roi_pool=RoIPool(MASK_SIZE),
                mask_head=MaskRCNNHeads(channels, (channels,) * 4, dilation=1),
                mask_predictor=MaskRCNNPredictor(channels, channels, num_classes + 1),
            )
        super().__init__(
            RoIPool(BOX_SIZE), make_box_head(channels, width) if box_head is None else box_head,
            FastRCNNPredictor(width, num_classes + 1), overlap, overlap, 512, 0.25, weights, 0.05, 0.5, 100, **masks,
        )
        self.proposal_matcher = Matcher(overlap, overlap, overlap if low_quality else None)
        init_predictor(self.box_predictor)

    def assign_targets_to_proposals(
        self, proposals: list[torch.Tensor], gt_boxes: list[torch.Tensor], gt_labels: list[torch.Tensor]
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """For each image the index of each proposal's object, and its label: 0 for none.

        The last proposals of each image are its objects themselves, each of which is its own.
        """
        matched, labels = [], []
        for boxes, objects, of_objects in zip(proposals, gt_boxes, gt_labels, strict=True):
            own = torch.arange(len(objects), device=boxes.device)
            others = boxes[: len(boxes) - len(objects)]
            found = torch.full((len(others),), BACKGROUND, device=boxes.device)
            if len(objects):
                found = self.proposal_matcher(box_iou(objects, others))
            index = torch.cat([found, own])
            with_none = torch.cat([of_objects, of_objects.new_zeros(1)])  # the last for the background's index, -1
            labels.append(with_none[index])
            matched.append(index.clamp(min=0))
        return matched, labels

    def predict(self, features, boxes: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """(N, classes + 1) logits and (N, (classes + 1) * 4) refinements of all images' boxes."""
        return tuple(at_least_float32(self.box_predictor(self.box_head(self.box_roi_pool(features, boxes)))))

    def predict_masks(self, features, boxes: list[torch.Tensor]) -> torch.Tensor:
        """(N, classes + 1, m, m) logits of all images' boxes."""
        return at_least_float32([self.mask_predictor(self.mask_head(self.mask_roi_pool(features, boxes)))])[0]

    def box_loss(self, deltas: torch.Tensor, wanted: torch.Tensor, boxes: torch.Tensor) -> torch.Tensor:
        """The sum over (n, 4) differences of matched boxes from their objects, said and wanted."""
        return F.l1_loss(deltas, wanted, reduction="sum")

    def learn(
        self, features: OrderedDict[str, torch.Tensor], proposals: list[torch.Tensor], targets: Targets
    ) -> tuple[dict[str, torch.Tensor], Samples]:
        """The losses of a sample of the proposals, and this sample."""
        boxes, matched, labels, wanted = self.select_training_samples(proposals, targets)
        samples = Samples(boxes, matched, labels, *self.predict(features, boxes))
        positive = [torch.where(x > 0)[0] for x in labels]
        of_all = torch.cat(labels)
        found = torch.where(of_all > 0)[0]
        said = of_their_class(samples.deltas, of_all)[found]
        loss = self.box_loss(said, torch.cat(wanted)[found], torch.cat(boxes)[found])
        count = max(1, len(of_all))
        score_loss = F.cross_entropy(samples.logits, of_all, reduction="sum")
        losses = dict(loss_classifier=score_loss / count, loss_box_reg=loss / count)
        if self.has_mask():
            boxes, matched = ([x[i] for x, i in zip(xs, positive, strict=True)] for xs in (boxes, matched))
            losses["loss_mask"] = mask_loss(self.predict_masks(features, boxes), boxes, matched, targets)
        return losses, samples

    def _detect(self, features, proposals: list[torch.Tensor], sizes: list[tuple[int, int]]) -> Detections:
        found = self.postprocess_detections(*self.predict(features, proposals), proposals, sizes)
        detections = [dict(boxes=b, scores=s, labels=i) for b, s, i in zip(*found, strict=True)]
        if self.has_mask():
            logits = self.predict_masks(features, [x["boxes"] for x in detections])
            masks = maskrcnn_inference(logits, [x["labels"] for x in detections])
            detections = [dict(x, masks=mask) for x, mask in zip(detections, masks, strict=True)]
        return detections

    def forward(
        self,
        features: OrderedDict[str, torch.Tensor],
        proposals: list[torch.Tensor],
        image_shapes: list[tuple[int, int]],
        targets: Targets | None = None,
    ) -> tuple[Detections, dict[str, torch.Tensor]]:
        """The losses in training mode; detections otherwise, whose masks (N, 1, m, m) are probabilities in the box."""
        if self.training:
            return [], self.learn(features, proposals, targets)[0]
        return self._detect(features, proposals, image_shapes), {}
