"""Object detection and instance segmentation on any backbone of timm's.

    routedvit.detection.mask_rcnn("biformer_small", num_classes=80)    also cascade_mask_rcnn and retinanet

Networks are called as torchvision's are, and take the place of those in code that trains them.
"""
from .models.detection import cascade_mask_rcnn, mask_rcnn, retinanet

__all__ = ["cascade_mask_rcnn", "mask_rcnn", "retinanet"]
