"""An exported file that was opened by its runtime."""
from collections.abc import Callable
from typing import NamedTuple

import torch

from .metadata import Metadata

Run = Callable[[torch.Tensor], torch.Tensor]


class Exported(NamedTuple):
    """What a file says of itself, and its network: (B, 3, H, W) float32, normalised -> (B, classes) logits."""

    metadata: Metadata
    run: Run
