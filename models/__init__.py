"""Routed vision transformers, registered with timm: `import models`, then `timm.create_model("biformer_small")`."""
from .biformer import BiFormer

__all__ = ["BiFormer"]
