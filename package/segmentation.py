"""Semantic segmentation on any backbone of timm's.

    routedvit.segmentation.upernet("biformer_small", num_classes=150)    also semantic_fpn
    routedvit.segmentation.load("best.pth")                              the network of a run, and its transform
"""
from .models.segmentation import Segmenter, load, semantic_fpn, upernet

__all__ = ["Segmenter", "load", "semantic_fpn", "upernet"]
