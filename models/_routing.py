"""The routing of a network's attentions, for visualisation and analysis."""
import torch
from torch import nn

from ._ops import Routing


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
        ValueError: The network has no routed attention; BViT and ViTAEv2 have none.
    """
    routed = [(name, module) for name, module in model.named_modules() if hasattr(module, "routing")]
    if not routed:
        raise ValueError(f"{type(model).__name__} has no routed attention")
    found = {}

    def hook_of(name: str):
        return lambda module, inputs: found.__setitem__(name, module.routing(*inputs))

    hooks = [module.register_forward_pre_hook(hook_of(name)) for name, module in routed]
    try:
        model(images)
    finally:
        for hook in hooks:
            hook.remove()
    return found
