"""BiFormer: a hierarchical vision transformer with bi-level routing attention.

Paper: `BiFormer: Vision Transformer with Bi-Level Routing Attention` - https://arxiv.org/abs/2303.08810 (CVPR 2023)
Published code and weights: https://github.com/rayleizhu/BiFormer
"""
import torch
from timm.layers import calculate_drop_path_rates, use_fused_attn
from timm.models import generate_default_cfgs, register_model
from torch import nn

from ._checkpoints import rename_biformer
from ._hierarchical import HierarchicalNetwork, Stage, build_hierarchical, dilation_of
from ._layers import (
    Block,
    Downsample,
    Mlp,
    Stem,
    attend,
    check_depths,
    check_divides,
    check_per_stage,
    resolve_impls,
    split_qkv,
)
from ._ops import (
    AttentionRecord,
    BiLevelRoutingAttention,
    DepthwiseConv,
    check_layer_impl,
    check_positive,
    check_rates,
    check_whole,
)
from ._pretrained import imagenet_cfg
from ._shipped import imagenette_cfg

__all__ = ["BiFormer"]


class LePEAttention(nn.Module):
    """Full self-attention with a 5 x 5 depthwise local term (LePE), as in the last stage.

    Args:
        dim: Channels.
        num_heads: Heads; must divide `dim`.
        lepe_on_value: Feed the local term the values, as one published checkpoint does, instead of the input.
        layer_impl: The implementation of `ops.depthwise_conv`, for the local term.
        dilation: Dilation of the local term.

    Raises:
        ValueError: `num_heads` does not divide `dim`.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        lepe_on_value: bool = False,
        layer_impl: str = "auto",
        dilation: int = 1,
        device=None,
        dtype=None,
    ):
        super().__init__()
        check_whole(dim=dim, num_heads=num_heads)
        check_divides("num_heads", num_heads, "dim", dim)
        dd = dict(device=device, dtype=dtype)
        self.num_heads = num_heads
        self.lepe_on_value = lepe_on_value
        self.fused_attn = use_fused_attn()
        self.qkv = nn.Linear(dim, 3 * dim, bias=False, **dd)
        self.lepe = DepthwiseConv(dim, 5, layer_impl, dilation, **dd)
        self.proj = nn.Linear(dim, dim, **dd)

    def records(self, x: torch.Tensor) -> dict[str, AttentionRecord]:
        """What the weights of its one attention, "map", to a (B, H, W, dim) map are computed from."""
        query, key, _ = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).unbind(3)
        return {"map": AttentionRecord(query, key, query.shape[-1] ** -0.5)}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, H, W, dim) -> (B, H, W, dim)."""
        qkv = self.qkv(x)
        query, key, value = split_qkv(qkv.flatten(1, 2), self.num_heads)
        attended = attend(query, key, value, self.fused_attn).transpose(1, 2).flatten(2).unflatten(1, x.shape[1:3])
        seen = qkv.chunk(3, dim=-1)[2] if self.lepe_on_value else x
        return self.proj(self.lepe(seen, residual=attended))


class BiFormer(HierarchicalNetwork):
    """BiFormer image classifier and feature extractor. Takes (B, in_chans, H, W) images from 32 x 32 up.

    Args:
        in_chans: Image channels.
        depths: Blocks of each stage.
        dims: Channels of each stage.
        head_dim: Channels of a head in the routed stages.
        mlp_ratio: Hidden width of the MLPs in multiples of the stage's width.
        num_regions: Regions along each side of the map in the routed stages.
        topk: Key regions that each query region attends to, for each routed stage; one number stands for all.
        layout: "conv" (overlapping convolutions between stages and before each attention) or "stl" (the Swin-Tiny
            layout of the paper's ablation: patch embeddings, no convolution before the attention).
        lepe_on_value: Feed the last stage's local term the values instead of its input.
        drop_path_rate: Stochastic depth of the last block; grows linearly from 0 over all blocks.
        attn_impl: The implementation of `ops.routed_attention`.
        layer_impl: The implementation of layer norms and depthwise convolutions: "torch", "triton" (fused, for GPUs) or
            "auto", see `ops.layer_norm` and `ops.depthwise_conv`.
        padding: What the routed stages do on maps that `num_regions` does not divide: "masked" (padding has no effect)
            or "published" (it is attended to, as in the published code), for the published weights of detection and
            segmentation. See `ops.BiLevelRoutingAttention`; the last stage has no regions and pads nothing.
        output_stride: Stride of the last map, 32, 16 or 8, with the same weights: stages that would go beyond it keep
            the size of their maps, and their convolutions are dilated. Fused depthwise convolutions take no dilation.
        **kwargs: `num_classes`, `global_pool`, `drop_rate` and `token_head`, as of `HierarchicalNetwork`.

    Raises:
        ValueError: `layout` is unknown, there is not one entry for each stage, heads do not divide the channels, a
            number is out of range or no whole one, or there is no such padding.
    """

    output_strides = (8, 16, 32)
    built_first = ("blocks", "attn", "mlp")

    def __init__(
        self,
        in_chans: int = 3,
        depths: tuple[int, ...] = (2, 2, 8, 2),
        dims: tuple[int, ...] = (64, 128, 256, 512),
        head_dim: int = 32,
        mlp_ratio: float = 3.0,
        num_regions: int = 7,
        topk: int | tuple[int, ...] = (1, 4, 16),
        layout: str = "conv",
        lepe_on_value: bool = False,
        drop_path_rate: float = 0.0,
        attn_impl: str = "auto",
        layer_impl: str = "auto",
        padding: str = "masked",
        output_stride: int = 32,
        device=None,
        dtype=None,
        **kwargs,
    ):
        check_layer_impl(layer_impl)
        attn_impl, layer_impl = resolve_impls(attn_impl, layer_impl)
        if layout not in ("conv", "stl"):
            raise ValueError(f"layout must be 'conv' or 'stl', got {layout!r}")
        num_stages = len(dims) if isinstance(dims, (tuple, list)) and dims else 4
        check_per_stage(num_stages, dims=dims)
        check_per_stage(num_stages, check=check_depths, depths=depths)
        num_routed = num_stages - 1
        topk = (topk,) * num_routed if isinstance(topk, int) else topk
        check_per_stage(num_routed, "routed stages", topk=topk)
        check_whole(in_chans=in_chans, head_dim=head_dim)
        check_positive(mlp_ratio=mlp_ratio)
        check_rates(drop_path_rate=drop_path_rate)
        check_divides("head_dim", head_dim, "the routed stages' channels", dims[:num_routed])
        self.check_output_stride(output_stride)
        dd = dict(device=device, dtype=dtype)
        routed = dict(attn_impl=attn_impl, layer_impl=layer_impl, padding=padding, **dd)
        patchify = layout == "stl"
        stem = Stem(in_chans, dims[0], patchify, **dd)
        drop_path_rates = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)
        stages = []
        for i, dim in enumerate(dims):
            dilation = dilation_of(i, output_stride)
            blocks = []
            for drop_path in drop_path_rates[i]:
                if i < num_routed:
                    attn = BiLevelRoutingAttention(
                        dim, dim // head_dim, num_regions, topk[i], dilation=dilation, **routed
                    )
                else:
                    attn = LePEAttention(dim, 8, lepe_on_value, layer_impl, dilation, **dd)
                mlp = Mlp(dim, int(dim * mlp_ratio), **dd)
                blocks.append(Block(dim, attn, mlp, not patchify, drop_path, layer_impl, dilation, **dd))
            # A map that was not halved before this stage is read at the dilation of the stage before.
            sampling = dict(stride=2, dilation=1) if dilation == 1 else dict(stride=1, dilation=dilation // 2)
            downsample = Downsample(dims[i - 1], dim, patchify, **sampling, **dd) if i else nn.Identity()
            stages.append(Stage(downsample, blocks))
        norm = nn.BatchNorm2d(dims[-1], **dd)
        super().__init__(stem, stages, dims, norm, in_chans, output_stride=output_stride, **dd, **kwargs)


# Published name -> ours, tried in this order. The first two differ between the published checkpoints.
_RENAMES = [
    (r"\.attn\.(qkv\.qkv|qkv_linear)\.", r".attn.qkv."),
    (r"\.attn\.(wo|output_linear)\.", r".attn.proj."),
    (r"\.mlp\.0\.", r".mlp.fc1."),
    (r"\.mlp\.[23]\.", r".mlp.fc2."),
]


def checkpoint_filter_fn(state_dict: dict[str, torch.Tensor], model: nn.Module) -> dict[str, torch.Tensor]:
    """Rename the entries of a published BiFormer checkpoint; entries of our own checkpoints pass unchanged.

    Takes all published layouts: biformer_{tiny,small,base}, biformer_stl, and biformer_stl_nchw, whose linear layers
    are stored as 1 x 1 convolutions.
    """
    return rename_biformer(state_dict, model, _RENAMES)


def _create_biformer(variant: str, pretrained: bool = False, **kwargs) -> BiFormer:
    return build_hierarchical(BiFormer, variant, pretrained, checkpoint_filter_fn, **kwargs)


def _cfg(**kwargs) -> dict:
    common = dict(
        first_conv="stem.conv1",
        license="mit",
        paper_ids="arXiv:2303.08810",
        paper_name="BiFormer: Vision Transformer with Bi-Level Routing Attention",
        origin_url="https://github.com/rayleizhu/BiFormer",
    )
    return imagenet_cfg(**common | kwargs)


def _released(share: str) -> str:
    return f"https://api.onedrive.com/v1.0/shares/{share}/root/content"


default_cfgs = generate_default_cfgs({
    "biformer_nano.imagenette": _cfg(**imagenette_cfg("biformer_nano")),
    "biformer_tiny.in1k": _cfg(url=_released("s!AkBbczdRlZvChHEOoGkgwgQzEDlM")),
    "biformer_small.in1k": _cfg(url=_released("s!AkBbczdRlZvChHDyM-x9KWRBZ832")),
    "biformer_base.in1k": _cfg(url=_released("s!AkBbczdRlZvChHI_XPhoadjaNxtO")),
    "biformer_stl.in1k": _cfg(url=_released("s!AkBbczdRlZvChSf-m7ujkvx9lIQ1")),
    "biformer_stl_nchw.in1k": _cfg(url=_released("s!AkBbczdRlZvChWYrKbWbMgqd2Ai0")),
})


@register_model
def biformer_nano(pretrained: bool = False, **kwargs) -> BiFormer:
    """Under 2 M parameters, for quick starts and tests; not of the paper."""
    model_args = dict(depths=(1, 1, 3, 1), dims=(32, 64, 128, 256), mlp_ratio=2.0)
    return _create_biformer("biformer_nano", pretrained, **dict(model_args, **kwargs))


@register_model
def biformer_tiny(pretrained: bool = False, **kwargs) -> BiFormer:
    """BiFormer-T: 13.1 M parameters, 2.2 GMACs at 224."""
    model_args = dict(depths=(2, 2, 8, 2), dims=(64, 128, 256, 512))
    return _create_biformer("biformer_tiny", pretrained, **dict(model_args, **kwargs))


@register_model
def biformer_small(pretrained: bool = False, **kwargs) -> BiFormer:
    """BiFormer-S: 25.5 M parameters, 4.5 GMACs at 224."""
    model_args = dict(depths=(4, 4, 18, 4), dims=(64, 128, 256, 512))
    return _create_biformer("biformer_small", pretrained, **dict(model_args, **kwargs))


@register_model
def biformer_base(pretrained: bool = False, **kwargs) -> BiFormer:
    """BiFormer-B: 56.8 M parameters, 9.8 GMACs at 224."""
    model_args = dict(depths=(4, 4, 18, 4), dims=(96, 192, 384, 768))
    return _create_biformer("biformer_base", pretrained, **dict(model_args, **kwargs))


_STL_ARGS = dict(depths=(2, 2, 6, 2), dims=(96, 192, 384, 768), mlp_ratio=4.0, layout="stl")


@register_model
def biformer_stl(pretrained: bool = False, **kwargs) -> BiFormer:
    """BiFormer-STL, in the Swin-Tiny layout of the paper's ablation: 28.4 M parameters, 4.6 GMACs at 224."""
    return _create_biformer("biformer_stl", pretrained, **dict(_STL_ARGS, **kwargs))


@register_model
def biformer_stl_nchw(pretrained: bool = False, **kwargs) -> BiFormer:
    """BiFormer-STL as in its second published checkpoint: the last stage's local term reads the values."""
    return _create_biformer("biformer_stl_nchw", pretrained, **dict(_STL_ARGS, lepe_on_value=True, **kwargs))
