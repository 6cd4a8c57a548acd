"""Routed vision transformers, registered with timm: `import models`, then `timm.create_model("biformer_small")`."""
from ._routing import collect_routing
from .biformer import BiFormer
from .debiformer import DeBiFormer

__all__ = ["BiFormer", "DeBiFormer", "collect_routing"]
