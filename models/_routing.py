"""What a network's attentions attend to, for visualisation and analysis."""
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ._ops import AttentionRecord, Routing


def _collect(model: nn.Module, images: Any, method: str) -> dict[str, Any]:
    """What the method of that name says of each module that has it, for the input that it gets; by the modules' names.

    Raises:
        ValueError: The network has no routed attention.
    """
    modules = list(model.named_modules())
    if not any(hasattr(module, "routing") for _, module in modules):
        raise ValueError(f"{type(model).__name__} has no routed attention")
    found = {}

    def hook_of(name: str) -> Callable:
        return lambda module, inputs: found.__setitem__(name, getattr(module, method)(*inputs))

    hooks = [module.register_forward_pre_hook(hook_of(name)) for name, module in modules if hasattr(module, method)]
    try:
        model(images)
    finally:
        for hook in hooks:
            hook.remove()
    return found


@torch.inference_mode()
def collect_routing(model: nn.Module, images: torch.Tensor) -> dict[str, Routing]:
    """The routes of every routed attention of a network, and the points of deformable ones, for given images.

    >>> routing = collect_routing(timm.create_model("debiformer_tiny").eval(), images)
    >>> routing["stages.0.blocks.0.second.attn"].points.shape
    torch.Size([1, 1, 7, 7, 2])

    Args:
        model: A network of this repository, in the mode that it should run in.
        images: (B, in_chans, H, W).

    Returns:
        The `Routing` of each attention by the module's name, in the order of the forward pass.

    Raises:
        ValueError: The network has no routed attention; BViT, ViTAE and ViTAEv2 have none.
    """
    return _collect(model, images, "routing")


@torch.inference_mode()
def collect_attention(model: nn.Module, images: torch.Tensor) -> dict[str, dict[str, AttentionRecord]]:
    """What the weights of every attention of a network are computed from, routed or not, for given images.

    >>> records = collect_attention(timm.create_model("biformer_tiny").eval(), images)
    >>> records["stages.1.blocks.0.attn"]["map"].weights(row=5, col=9).shape
    torch.Size([1, 4, 28, 28])

    Args:
        model: A BiFormer or DeBiFormer, in the mode that it should run in.
        images: (B, in_chans, H, W).

    Returns:
        By the module's name, in the order of the forward pass, its attentions: "map", that of the tokens, and of
        DeBiFormer's agents before it "agents", theirs.

    Raises:
        ValueError: The network has no routed attention; BViT, ViTAE and ViTAEv2 have none.
    """
    return _collect(model, images, "records")
