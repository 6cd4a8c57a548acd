"""A network of timm's as the backbone of a segmenter or detector: its maps at strides 4, 8, 16 and 32."""
from collections.abc import Callable
from typing import Any

import timm
import torch
from timm.layers import LayerNorm2d
from torch import nn

from ._network import NotScriptable
from ._recipe import ImageSize, size_kwargs

STRIDES = (4, 8, 16, 32)
# Families whose windows shift as published if they are built for an image of which no map is a single window.
_SHIFTED, _LARGE = ("swin_transformer", "swin_transformer_v2"), 1024
# Families whose published backbones norm each map, and take a number of regions that suits large images.
_ROUTED = ("biformer", "debiformer")


class NoMapsError(ValueError):
    """A model without maps at strides 4, 8, 16 and 32, such as a plain vision transformer."""


class Backbone(nn.Module):
    """The maps of a network at strides 4, 8, 16 and 32.

    Args:
        body: A classifier of timm's; what no map needs is removed from it: the last norm and the head.
        extra_norms: Norm each map over its channels, as published for BiFormer and DeBiFormer; the normed maps are not
            fed to the next stage.

    Attributes:
        channels: Of each map.

    Raises:
        NoMapsError: The network has no such maps.
    """

    def __init__(self, body: nn.Module, extra_norms: bool = False):
        super().__init__()
        of_stride = {info["reduction"]: i for i, info in enumerate(getattr(body, "feature_info", ()))}
        name = (getattr(body, "default_cfg", None) or {}).get("architecture") or type(body).__name__
        if not of_stride.keys() >= set(STRIDES) or not hasattr(body, "forward_intermediates"):
            strides = of_stride if hasattr(body, "forward_intermediates") else ()
            found = f"has maps at strides {', '.join(map(str, strides))}" if strides else "gives no maps"
            raise NoMapsError(f"{name} {found}, and a backbone needs those at 4, 8, 16 and 32")
        self.indices = [of_stride[stride] for stride in STRIDES]
        self.channels = tuple(body.feature_info[i]["num_chs"] for i in self.indices)
        body.prune_intermediate_layers(self.indices, prune_norm=True, prune_head=True)
        self.body = body
        self.extra_norms = nn.ModuleList(LayerNorm2d(c, eps=1e-6) for c in self.channels) if extra_norms else None

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        """(B, 3, H, W) -> [(B, C_i, ceil(H / s), ceil(W / s)) for s in 4, 8, 16, 32].

        Of a network that rounds sides down, maps may be smaller; of one that pads the image (ViTAEv2), what shows the
        padding alone is left out, lest the map be taken for one of the image.
        """
        maps = self.body.forward_intermediates(x, indices=self.indices, output_fmt="NCHW", intermediates_only=True)
        height, width = x.shape[2:]
        maps = [y[..., : -(-height // s), : -(-width // s)] for y, s in zip(maps, STRIDES, strict=True)]
        if self.extra_norms is None:
            return maps
        return [norm(x) for norm, x in zip(self.extra_norms, maps, strict=True)]


class OnBackbone(NotScriptable):
    """What a network built on a `Backbone`, its `backbone`, says of it where timm's models speak for themselves.

    Attributes:
        kind: What it is called in messages, with an article.
    """

    kind: str
    backbone: Backbone

    @property
    def default_cfg(self) -> dict[str, str]:
        """What it is called in messages, where timm's models have it."""
        body = getattr(self.backbone.body, "default_cfg", None) or {}
        return dict(architecture=f"{self.kind} on {body.get('architecture') or type(self.backbone.body).__name__}")

    def no_weight_decay(self) -> set[str]:
        return {f"backbone.body.{name}" for name in getattr(self.backbone.body, "no_weight_decay", set)()}

    def set_grad_checkpointing(self, enable: bool = True):
        self.backbone.body.set_grad_checkpointing(enable)


def _family(name: str) -> str:
    """The file that registers a model."""
    return timm.model_entrypoint(name).__module__.rpartition(".")[2]


def _create_body(name: str, pretrained: bool, img_size: ImageSize | None, **kwargs: Any) -> nn.Module:
    """A model of timm's without its classifier; for any image size where it can be."""
    if timm.models.get_pretrained_cfg_value(name, "fixed_input_size"):
        try:  # windows are of any map; positions of some other models are of one
            of_any = dict(img_size=_LARGE) | kwargs if _family(name) in _SHIFTED else kwargs
            body = timm.create_model(name, pretrained=pretrained, num_classes=0, strict_img_size=False, **of_any)
            body.patch_embed.dynamic_img_pad = True
            return body
        except TypeError:
            kwargs = ({} if img_size is None else size_kwargs(name, img_size)) | kwargs
    return timm.create_model(name, pretrained=pretrained, num_classes=0, **kwargs)


def create_backbone(
    name: str,
    pretrained: bool = False,
    extra_norms: bool | None = None,
    num_regions: int = 7,
    img_size: ImageSize | None = None,
    make: Callable[[nn.Module, bool], Backbone] = Backbone,
    **kwargs: Any,
) -> Backbone:
    """The backbone of a timm model.

    Args:
        name: Any model with maps at strides 4, 8, 16 and 32.
        pretrained: Load the published weights.
        extra_norms: See `Backbone`; None for what was published: with BiFormer and DeBiFormer.
        num_regions: Regions along a side, for BiFormer and DeBiFormer.
        img_size: Side, or (height, width), for models that are built for one size.
        make: The class of what is returned, from a model and `extra_norms`.
        kwargs: Arguments of the model; they stand above `num_regions`.

    Raises:
        NoMapsError: It has no such maps.
    """
    is_routed = _family(name) in _ROUTED
    if is_routed:
        kwargs = dict(num_regions=num_regions) | kwargs
    body = _create_body(name, pretrained, img_size, **kwargs)
    return make(body, is_routed if extra_norms is None else extra_norms)
