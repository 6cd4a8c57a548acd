"""BiFormer: a hierarchical vision transformer with bi-level routing attention.

Paper: `BiFormer: Vision Transformer with Bi-Level Routing Attention` - https://arxiv.org/abs/2303.08810 (CVPR 2023)
Published code and weights: https://github.com/rayleizhu/BiFormer

Every map is held channels last, so that linear layers, layer norms, routing and depthwise convolutions all read the
same memory and nothing is transposed between them.
"""
import re

import torch
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import ClassifierHead, DropPath, Mlp, calculate_drop_path_rates, register_notrace_module, trunc_normal_
from timm.models import checkpoint_seq, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from torch import nn

from ops import BiLevelRoutingAttention, conv_channels_last

from ._layers import split_qkv
from ._released import build_with_released_weights

__all__ = ["BiFormer"]

# Its regions follow from the map's size, which torch.fx does not know while it traces.
register_notrace_module(BiLevelRoutingAttention)


class LePEAttention(nn.Module):
    """Full self-attention with a 5 x 5 depthwise local term (LePE), as in the last stage.

    Args:
        dim: Channels.
        num_heads: Heads; must divide `dim`.
        lepe_on_value: Feed the local term the values, as one published checkpoint does, instead of the input.
    """

    def __init__(self, dim: int, num_heads: int = 8, lepe_on_value: bool = False, device=None, dtype=None):
        super().__init__()
        dd = dict(device=device, dtype=dtype)
        self.num_heads = num_heads
        self.lepe_on_value = lepe_on_value
        self.qkv = nn.Linear(dim, 3 * dim, bias=False, **dd)
        self.lepe = nn.Conv2d(dim, dim, kernel_size=5, padding=2, groups=dim, **dd)
        self.proj = nn.Linear(dim, dim, **dd)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, H, W, dim) -> (B, H, W, dim)."""
        qkv = self.qkv(x)
        query, key, value = split_qkv(qkv.flatten(1, 2), self.num_heads)
        attended = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).reshape(x.shape)
        lepe = conv_channels_last(self.lepe, qkv.chunk(3, dim=-1)[2] if self.lepe_on_value else x)
        return self.proj(attended + lepe)


class BiFormerBlock(nn.Module):
    """Depthwise position encoding, attention and MLP, each on a residual path."""

    def __init__(
        self,
        dim: int,
        attn: nn.Module,
        mlp_ratio: float = 3.0,
        pos_conv: bool = True,
        drop_path: float = 0.0,
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd = dict(device=device, dtype=dtype)
        self.pos_embed = nn.Conv2d(dim, dim, kernel_size=3, padding=1, groups=dim, **dd) if pos_conv else None
        self.norm1 = nn.LayerNorm(dim, eps=1e-6, **dd)
        self.attn = attn
        self.drop_path1 = DropPath(drop_path)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6, **dd)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), **dd)
        self.drop_path2 = DropPath(drop_path)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, H, W, dim) -> (B, H, W, dim)."""
        if self.pos_embed is not None:
            x = x + conv_channels_last(self.pos_embed, x)
        x = x + self.drop_path1(self.attn(self.norm1(x)))
        return x + self.drop_path2(self.mlp(self.norm2(x)))


class Stem(nn.Sequential):
    """Image to a map of a quarter of its size: two overlapping convolutions, or one patch embedding ("stl" layout)."""

    def __init__(self, in_chans: int, dim: int, patchify: bool = False, device=None, dtype=None):
        dd = dict(device=device, dtype=dtype)
        super().__init__()
        if patchify:
            self.conv1 = nn.Conv2d(in_chans, dim, kernel_size=4, stride=4, **dd)
            self.norm1 = nn.BatchNorm2d(dim, **dd)
        else:
            self.conv1 = nn.Conv2d(in_chans, dim // 2, kernel_size=3, stride=2, padding=1, **dd)
            self.norm1 = nn.BatchNorm2d(dim // 2, **dd)
            self.act1 = nn.GELU()
            self.conv2 = nn.Conv2d(dim // 2, dim, kernel_size=3, stride=2, padding=1, **dd)
            self.norm2 = nn.BatchNorm2d(dim, **dd)


class Downsample(nn.Sequential):
    """Halve a map between stages: convolution and norm, or norm and convolution ("stl" layout)."""

    def __init__(self, dim: int, out_dim: int, patchify: bool = False, device=None, dtype=None):
        dd = dict(device=device, dtype=dtype)
        super().__init__()
        if patchify:
            self.norm = nn.BatchNorm2d(dim, **dd)
            self.conv = nn.Conv2d(dim, out_dim, kernel_size=2, stride=2, **dd)
        else:
            self.conv = nn.Conv2d(dim, out_dim, kernel_size=3, stride=2, padding=1, **dd)
            self.norm = nn.BatchNorm2d(out_dim, **dd)


class BiFormerStage(nn.Module):
    """Optional downsampling, then blocks. NCHW in and out, channels last in memory."""

    def __init__(self, downsample: nn.Module, blocks: list[nn.Module]):
        super().__init__()
        self.grad_checkpointing = False
        self.downsample = downsample
        self.blocks = nn.Sequential(*blocks)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) -> (B, C', H', W')."""
        x = self.downsample(x).permute(0, 2, 3, 1)
        if self.grad_checkpointing and not torch.jit.is_scripting():
            x = checkpoint_seq(self.blocks, x)
        else:
            x = self.blocks(x)
        return x.permute(0, 3, 1, 2)


class BiFormer(nn.Module):
    """BiFormer image classifier and feature extractor. Takes (B, in_chans, H, W) images from 32 x 32 up.

    Args:
        in_chans: Image channels.
        num_classes: Classes; 0 leaves the head out.
        global_pool: Pooling of the head, "avg", "max", ..., or "" for none.
        depths: Blocks of each stage.
        dims: Channels of each stage.
        head_dim: Channels of a head in the routed stages.
        mlp_ratio: Hidden width of the MLPs in multiples of the stage's width.
        num_regions: Regions along each side of the map in the routed stages.
        topk: Key regions that each query region attends to, for each routed stage; one number stands for all.
        layout: "conv" (overlapping convolutions between stages and before each attention) or "stl" (the Swin-Tiny
            layout of the paper's ablation: patch embeddings, no convolution before the attention).
        lepe_on_value: Feed the last stage's local term the values instead of its input.
        drop_rate: Dropout before the classifier.
        drop_path_rate: Stochastic depth of the last block; grows linearly from 0 over all blocks.
        attn_impl: The implementation of `ops.routed_attention`.

    Raises:
        ValueError: `layout` is unknown, or `num_regions` or `topk` is out of range.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        depths: tuple[int, ...] = (2, 2, 8, 2),
        dims: tuple[int, ...] = (64, 128, 256, 512),
        head_dim: int = 32,
        mlp_ratio: float = 3.0,
        num_regions: int = 7,
        topk: int | tuple[int, ...] = (1, 4, 16),
        layout: str = "conv",
        lepe_on_value: bool = False,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        attn_impl: str = "auto",
        device=None,
        dtype=None,
    ):
        super().__init__()
        num_routed = len(dims) - 1
        topk = (topk,) * num_routed if isinstance(topk, int) else tuple(topk)
        if layout not in ("conv", "stl"):
            raise ValueError(f"layout must be 'conv' or 'stl', got {layout!r}")
        if len(topk) != num_routed:
            raise ValueError(f"topk must be one number or {num_routed}, one for each routed stage, got {topk}")
        dd = dict(device=device, dtype=dtype)
        patchify = layout == "stl"
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.num_features = dims[-1]
        self.feature_info = [
            dict(num_chs=dim, reduction=2 ** (i + 2), module=f"stages.{i}") for i, dim in enumerate(dims)
        ]

        self.stem = Stem(in_chans, dims[0], patchify, **dd)
        drop_path_rates = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)
        stages = []
        for i, dim in enumerate(dims):
            blocks = []
            for drop_path in drop_path_rates[i]:
                if i < num_routed:
                    attn = BiLevelRoutingAttention(
                        dim, dim // head_dim, num_regions, topk[i], attn_impl=attn_impl, **dd
                    )
                else:
                    attn = LePEAttention(dim, lepe_on_value=lepe_on_value, **dd)
                blocks.append(BiFormerBlock(dim, attn, mlp_ratio, not patchify, drop_path, **dd))
            downsample = Downsample(dims[i - 1], dim, patchify, **dd) if i else nn.Identity()
            stages.append(BiFormerStage(downsample, blocks))
        self.stages = nn.Sequential(*stages)
        self.norm = nn.BatchNorm2d(self.num_features, **dd)
        self.head = ClassifierHead(self.num_features, num_classes, global_pool, drop_rate, **dd)
        self.head_hidden_size = self._pooled_features()
        self.apply(self._init_weights)

    @staticmethod
    def _init_weights(module: nn.Module):
        if isinstance(module, nn.Linear):
            trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)

    def _pooled_features(self) -> int:
        return self.num_features * self.head.global_pool.feat_mult()

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        return set()

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict:
        return dict(
            stem=r"^stem",
            blocks=r"^stages\.(\d+)" if coarse else [
                (r"^stages\.(\d+)\.downsample", (0,)),
                (r"^stages\.(\d+)\.blocks\.(\d+)", None),
                (r"^norm", (99999,)),
            ],
        )

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True):
        for stage in self.stages:
            stage.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None):
        """Replace the classifier by one of `num_classes` classes (0: none), and the pooling if one is given."""
        self.num_classes = num_classes
        self.head.reset(num_classes, pool_type=global_pool)
        self.head_hidden_size = self._pooled_features()

    def forward_intermediates(
        self,
        x: torch.Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[torch.Tensor] | tuple[torch.Tensor, list[torch.Tensor]]:
        """The maps after the chosen stages, and the final features.

        Args:
            x: (B, in_chans, H, W) images.
            indices: The last n stages if a number, all if None, else the stages listed.
            norm: Apply the final norm to the last stage's map.
            stop_early: Stop after the last stage asked for; the final features are then that stage's map.
            output_fmt: "NCHW", the one format there is.
            intermediates_only: Return the maps alone.

        Returns:
            [(B, C_i, H_i, W_i), ...], or ((B, C, H / 32, W / 32) features, that list).
        """
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt must be 'NCHW', got {output_fmt!r}")
        take_indices, max_index = feature_take_indices(len(self.stages), indices)
        last_index = len(self.stages) - 1
        stages = self.stages[: max_index + 1] if stop_early else self.stages
        intermediates = []
        x = self.stem(x.contiguous(memory_format=torch.channels_last))
        for i, stage in enumerate(stages):
            x = stage(x)
            if i in take_indices:
                intermediates.append(self.norm(x) if norm and i == last_index else x)
        if intermediates_only:
            return intermediates
        if i == last_index:
            x = self.norm(x)
        return x, intermediates

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop the layers that the stages in `indices` do not need; returns those stages' indices."""
        take_indices, max_index = feature_take_indices(len(self.stages), indices)
        truncated = max_index < len(self.stages) - 1
        self.stages = self.stages[: max_index + 1]
        if prune_norm or truncated:
            self.norm = nn.Identity()
        if truncated:
            self.num_features = self.head.in_features = self.feature_info[max_index]["num_chs"]
        if prune_head or truncated:
            self.reset_classifier(0, "")
        return take_indices

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """(B, in_chans, H, W) -> (B, num_features, H / 32, W / 32), normed and not pooled."""
        x = self.stem(x.contiguous(memory_format=torch.channels_last))
        return self.norm(self.stages(x))

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """(B, num_features, h, w) -> (B, num_classes) logits, or (B, num_features) before the classifier."""
        return self.head(x, pre_logits=pre_logits)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, in_chans, H, W) -> (B, num_classes) logits."""
        return self.forward_head(self.forward_features(x))


# Published name -> ours, tried in this order. The names of the third line differ between the published checkpoints.
_RENAMES = [
    (r"^downsample_layers\.0\.0\.", r"stem.conv1."),
    (r"^downsample_layers\.0\.1\.", r"stem.norm1."),
    (r"^downsample_layers\.0\.3\.", r"stem.conv2."),
    (r"^downsample_layers\.0\.4\.", r"stem.norm2."),
    (r"^stages\.(\d+)\.(\d+)\.", r"stages.\1.blocks.\2."),
    (r"\.attn\.(qkv\.qkv|qkv_linear)\.", r".attn.qkv."),
    (r"\.attn\.(wo|output_linear)\.", r".attn.proj."),
    (r"\.mlp\.0\.", r".mlp.fc1."),
    (r"\.mlp\.[23]\.", r".mlp.fc2."),
    (r"^head\.(weight|bias)$", r"head.fc.\1"),
]


def checkpoint_filter_fn(state_dict: dict[str, torch.Tensor], model: nn.Module) -> dict[str, torch.Tensor]:
    """Rename the entries of a published BiFormer checkpoint; entries of our own checkpoints pass unchanged.

    Takes all published layouts: biformer_{tiny,small,base}, biformer_stl, and biformer_stl_nchw, whose linear layers
    are stored as 1 x 1 convolutions.
    """
    state_dict = state_dict.get("model", state_dict)
    if "stem.conv1.weight" in state_dict:
        return state_dict
    out = {}
    for name, value in state_dict.items():
        downsample = re.match(r"downsample_layers\.([1-3])\.([01])\.(.+)", name)
        if downsample:
            # The conv layout has the convolution first, the stl layout the norm.
            i, j, leaf = downsample.groups()
            weight = state_dict.get(f"downsample_layers.{i}.{j}.weight")
            is_conv = weight is not None and weight.ndim == 4
            name = f"stages.{i}.downsample.{'conv' if is_conv else 'norm'}.{leaf}"
        for pattern, replacement in _RENAMES:
            name = re.sub(pattern, replacement, name)
        if re.search(r"\.(qkv|proj|fc1|fc2)\.weight$", name) and value.ndim == 4:
            value = value.flatten(1)
        out[name] = value
    return out


def _create_biformer(variant: str, pretrained: bool = False, **kwargs) -> BiFormer:
    return build_with_released_weights(
        BiFormer,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg=dict(out_indices=(0, 1, 2, 3), flatten_sequential=True),
        **kwargs,
    )


def _cfg(url: str = "", **kwargs) -> dict:
    return {
        "url": url,
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "min_input_size": (3, 32, 32),
        "pool_size": (7, 7),
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "stem.conv1",
        "classifier": "head.fc",
        "license": "mit",
        "paper_ids": "arXiv:2303.08810",
        "paper_name": "BiFormer: Vision Transformer with Bi-Level Routing Attention",
        "origin_url": "https://github.com/rayleizhu/BiFormer",
        **kwargs,
    }


def _released(share: str) -> str:
    return f"https://api.onedrive.com/v1.0/shares/{share}/root/content"


default_cfgs = generate_default_cfgs({
    "biformer_nano.untrained": _cfg(),
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
