"""Object detection and instance segmentation on any backbone of timm's.

    routedvit.detection.mask_rcnn("biformer_small", num_classes=80)    also cascade_mask_rcnn and retinanet
    routedvit.detection.load("best.pth")                               the network of a run, and its transform

Networks are called as torchvision's are, and take the place of those in code that trains them.
"""
from .models.detection import Detector, cascade_mask_rcnn, load, mask_rcnn, retinanet

__all__ = ["Detector", "cascade_mask_rcnn", "load", "mask_rcnn", "retinanet"]
