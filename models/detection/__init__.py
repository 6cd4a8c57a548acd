"""Object detection and instance segmentation on any backbone of timm's: `mask_rcnn("biformer_small")`."""
from .._backbone import NoMapsError
from .._backbone_weights import load_backbone
from .._images import fit, resize
from ._network import DETECTORS, cascade_mask_rcnn, mask_rcnn, retinanet
from ._weights import has_same_parts, is_detector, load_detector

__all__ = [
    "DETECTORS",
    "NoMapsError",
    "cascade_mask_rcnn",
    "fit",
    "has_same_parts",
    "is_detector",
    "load_backbone",
    "load_detector",
    "mask_rcnn",
    "resize",
    "retinanet",
]
