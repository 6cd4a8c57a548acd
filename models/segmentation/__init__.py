"""Semantic segmentation on any backbone of timm's: `upernet("biformer_small", num_classes=150)`.

`load("best.pth")` gives the network of a run, and the transform of its images.
"""
from .._backbone import NoMapsError
from .._backbone_weights import load_backbone
from .._trained import NoBackboneError
from ._images import EvalSize, SegmentationTransform, fit, resize, round_up
from ._load import SegmenterRecipe, create_trained, load
from ._network import HEADS, Segmenter, semantic_fpn, upernet
from ._weights import has_same_heads, is_segmenter, load_segmenter

__all__ = [
    "HEADS",
    "EvalSize",
    "NoBackboneError",
    "NoMapsError",
    "SegmentationTransform",
    "Segmenter",
    "SegmenterRecipe",
    "create_trained",
    "fit",
    "has_same_heads",
    "is_segmenter",
    "load",
    "load_backbone",
    "load_segmenter",
    "resize",
    "round_up",
    "semantic_fpn",
    "upernet",
]
