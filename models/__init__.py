"""Vision transformers, registered with timm: `import models`, then `timm.create_model("biformer_small")`."""
from .biformer import BiFormer
from .bvit import BViT

__all__ = ["BViT", "BiFormer"]
