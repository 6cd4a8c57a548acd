"""Object detection and instance segmentation on any backbone of timm's: `mask_rcnn("biformer_small")`."""
from .._backbone import NoMapsError
from ._network import DETECTORS, cascade_mask_rcnn, mask_rcnn, retinanet

__all__ = ["DETECTORS", "NoMapsError", "cascade_mask_rcnn", "mask_rcnn", "retinanet"]
