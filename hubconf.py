"""Entry points for torch.hub: `torch.hub.load("OWNER/REPOSITORY", "biformer_small")`, keywords as in timm."""
dependencies = ["torch", "timm", "einops"]

from models.biformer import (  # noqa: E402, F401
    biformer_base,
    biformer_nano,
    biformer_small,
    biformer_stl,
    biformer_stl_nchw,
    biformer_tiny,
)
from models.bvit import bvit_5m, bvit_22m  # noqa: E402, F401
