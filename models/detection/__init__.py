"""Object detection and instance segmentation on any backbone of timm's: `mask_rcnn("biformer_small")`.

`load("best.pth")` gives the network of a run, and the transform of its images.
"""
from .._backbone import NoMapsError
from .._backbone_weights import load_backbone
from .._images import fit, resize
from .._trained import NoBackboneError
from ._load import DetectorRecipe, create_trained, load, to_tensor
from ._network import DETECTORS, Detector, cascade_mask_rcnn, mask_rcnn, retinanet
from ._weights import has_same_parts, is_detector, load_detector

__all__ = [
    "DETECTORS",
    "Detector",
    "DetectorRecipe",
    "NoBackboneError",
    "NoMapsError",
    "cascade_mask_rcnn",
    "create_trained",
    "fit",
    "has_same_parts",
    "is_detector",
    "load",
    "load_backbone",
    "load_detector",
    "mask_rcnn",
    "resize",
    "retinanet",
    "to_tensor",
]
