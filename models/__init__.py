"""Routed vision transformers, registered with timm: `import models`, then `timm.create_model("biformer_small")`."""
from .biformer import BiFormer
from .vitaev2 import ViTAEv2

__all__ = ["BiFormer", "ViTAEv2"]
