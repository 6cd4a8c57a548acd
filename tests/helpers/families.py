"""One network of each kind, and how to make any of them shallow: tests of what all families do build on both."""
from typing import Any

import timm
import torch

import models

# The smallest of each family, and of ViTAE's plain networks.
FAMILIES = ["biformer_nano", "bvit_5m", "debiformer_nano", "vitae_tiny", "vitae_b", "vitaev2_s"]
SMALLEST = FAMILIES[0]
# What leaves the least that each kind can do, by the beginning of names; compilers and exporters take their time.
_SHALLOW = {
    "bvit_": dict(depth=2),
    "vitae_b": dict(depth=2, embed_dim=96, num_heads=3, groups=24),
    "vitae_": dict(depth=1),
    "": dict(depths=(1, 1, 1, 1)),
}


def is_plain(model: torch.nn.Module) -> bool:
    """Whether a network has tokens of one stride, with a class token, instead of maps."""
    return isinstance(model, (models.BViT, models.PlainViTAE))


def are_channels_last(model: torch.nn.Module, images: torch.Tensor) -> list[bool]:
    """Whether each convolution's input, and its output, is channels last; two of each convolution's call."""
    seen = []

    def look(module, inputs, output):
        seen.extend(x.is_contiguous(memory_format=torch.channels_last) for x in (*inputs, output))

    for module in model.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.register_forward_hook(look)
    model(images)
    return seen


def shallow(name: str, **kwargs: Any) -> torch.nn.Module:
    """A network of one block in each stage, or of two where that is all that it has."""
    smaller = next(value for start, value in _SHALLOW.items() if name.startswith(start))
    torch.manual_seed(0)
    return timm.create_model(name, **smaller | kwargs)
