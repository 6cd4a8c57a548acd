"""Routed vision transformers for timm: `import routedvit`, then `timm.create_model("biformer_small")`.

    routedvit.load("best.pth")          the network of a run, and the transform of its images
    routedvit.models                    the networks; `collect_routing` and `collect_attention`: what attends to what
    routedvit.ops                       routed attention as functions, and `BiLevelRoutingAttention` as a module
    python -m routedvit --help          train and evaluate, as main.py of the repository does
    routedvit view, routedvit predict   look at photographs, and name them: scripts/visualize.py, scripts/predict.py
    routedvit export                    write a network to a file for other runtimes: scripts/export.py
    routedvit knn                       compare frozen networks on a data set: scripts/knn.py

The folders are named in pyproject.toml, [tool.setuptools.package-dir].
"""
from . import models, ops
from .models import (
    BiFormer,
    BViT,
    DeBiFormer,
    PlainViTAE,
    ViTAE,
    ViTAEv2,
    collect_attention,
    collect_routing,
    load,
)
from .ops import BiLevelRoutingAttention

__all__ = [
    "BViT",
    "BiFormer",
    "BiLevelRoutingAttention",
    "DeBiFormer",
    "PlainViTAE",
    "ViTAE",
    "ViTAEv2",
    "collect_attention",
    "collect_routing",
    "load",
    "models",
    "ops",
]
