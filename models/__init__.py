"""Vision transformers, registered with timm: `import models`, then `timm.create_model("biformer_small")`.

`models.load("best.pth")` gives the network of a run, and the transform of its images.
"""
from ._load import create_trained, family_filter, load
from ._pretrained import NoWeightsError
from ._recipe import NetworkRecipe, size_kwargs
from ._routing import collect_attention, collect_routing
from .biformer import BiFormer
from .bvit import BViT
from .debiformer import DeBiFormer
from .vitae import PlainViTAE, ViTAE
from .vitaev2 import ViTAEv2

__all__ = [
    "BViT",
    "BiFormer",
    "DeBiFormer",
    "NetworkRecipe",
    "NoWeightsError",
    "PlainViTAE",
    "ViTAE",
    "ViTAEv2",
    "collect_attention",
    "collect_routing",
    "create_trained",
    "family_filter",
    "load",
    "size_kwargs",
]
