"""Semantic segmentation with Semantic FPN and UPerNet."""
