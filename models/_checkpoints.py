"""Published checkpoints under our names: every entry by a named rename, none by its order."""
import re

import torch
from torch import nn

from ._pretrained import stored


def rename_published(state_dict: dict[str, torch.Tensor], renames: list[tuple[str, str]]) -> dict[str, torch.Tensor]:
    """The entries of a published checkpoint under our names: each (pattern, replacement) is applied in order."""
    out = {}
    for name, value in state_dict.items():
        for pattern, replacement in renames:
            name = re.sub(pattern, replacement, name)
        out[name] = value
    return out


def fit_token_head(state_dict: dict[str, torch.Tensor], model: nn.Module) -> dict[str, torch.Tensor]:
    """The entries, with the token head that `model` needs.

    Entries of a token head that `model` does not have are left out; the model's own take the place of missing ones
    or of another shape.
    """
    own = {name: value for name, value in model.state_dict().items() if name.startswith("token_head.")}
    fits = {name: name in state_dict and state_dict[name].shape == value.shape for name, value in own.items()}
    if all(fits.values()) and not any(name.startswith("token_head.") and name not in own for name in state_dict):
        return state_dict
    out = {name: value for name, value in state_dict.items() if not name.startswith("token_head.")}
    return out | {name: state_dict[name] if fits[name] else value for name, value in own.items()}


# Published name -> ours, in what the BiFormer and DeBiFormer checkpoints have in common.
_COMMON_RENAMES = [
    (r"^downsample_layers\.0\.0\.", r"stem.conv1."),
    (r"^downsample_layers\.0\.1\.", r"stem.norm1."),
    (r"^downsample_layers\.0\.3\.", r"stem.conv2."),
    (r"^downsample_layers\.0\.4\.", r"stem.norm2."),
    (r"^stages\.(\d+)\.(\d+)\.", r"stages.\1.blocks.\2."),
    (r"^head\.(weight|bias)$", r"head.fc.\1"),
]


def _downsample_renames(state_dict: dict[str, torch.Tensor]) -> list[tuple[str, str]]:
    """Renames for the layers between stages: the conv layout has the convolution first, the stl layout the norm."""
    renames = []
    for i in range(1, 4):
        first = state_dict.get(f"downsample_layers.{i}.0.weight")
        parts = ("conv", "norm") if first is not None and first.ndim == 4 else ("norm", "conv")
        renames += [
            (rf"^downsample_layers\.{i}\.{j}\.", f"stages.{i}.downsample.{part}.") for j, part in enumerate(parts)
        ]
    return renames


def rename_biformer(
    state_dict: dict[str, torch.Tensor], model: nn.Module, renames: list[tuple[str, str]]
) -> dict[str, torch.Tensor]:
    """The entries of a checkpoint in BiFormer's published layout under our names; our own pass unchanged.

    Args:
        state_dict: The checkpoint, or what it holds as "model" or "state_dict".
        model: The network to load; 1 x 1 convolutions of the checkpoint that are linear layers in it are reshaped.
        renames: (pattern, replacement) of the family's own names, tried in this order after the common ones.
    """
    state_dict = fit_token_head(stored.unwrap(state_dict), model)
    if "stem.conv1.weight" in state_dict:
        return state_dict
    out = rename_published(state_dict, [*_COMMON_RENAMES, *_downsample_renames(state_dict), *renames])
    linear = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    return {name: value.flatten(1) if name in linear and value.ndim == 4 else value for name, value in out.items()}
