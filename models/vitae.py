"""ViTAE: vision transformers whose cells hold attention and convolutions side by side; the first version.

Papers: `ViTAE: Vision Transformer Advanced by Exploring Intrinsic Inductive Bias` -
https://arxiv.org/abs/2106.03348 (NeurIPS 2021), for T, 6M, 13M and S; and
`ViTAEv2: Vision Transformer Advanced by Exploring Inductive Bias for Image Recognition and Beyond` -
https://arxiv.org/abs/2202.10108 (IJCV 2023), for the plain B, L and H
Published code and weights: https://github.com/ViTAE-Transformer/ViTAE-Transformer
"""
import math
from functools import partial

import torch
from timm.layers import calculate_drop_path_rates
from timm.models import generate_default_cfgs, register_model
from torch import nn

from ._cells import (
    CELL_RENAMES,
    FIRST_CONVS,
    Attention,
    BaseNormalCell,
    BaseReductionCell,
    CellNetwork,
    PadToMultiple,
    ParallelConv,
    PyramidReduction,
)
from ._checkpoints import rename_published
from ._hierarchical import Stage, build_hierarchical
from ._layers import Mlp, check_divides, check_per_stage
from ._ops import check_positive, check_rates, check_whole, conv_channels_last, without_autocast
from ._plain import PlainNetwork, build_plain, embed_patches, fit_positions
from ._pretrained import imagenet_cfg, stored

__all__ = ["PlainViTAE", "ViTAE"]

DILATIONS = ((1, 2, 3, 4), (1, 2, 3), (1, 2))  # of each stage's pyramid reduction
REDUCTION_DROP = 0.1  # dropout in reduction cells, in training, whatever `drop_rate` says
KERNEL_EPS = 1e-8


def _kernel_features(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """exp(w x - |x|^2 / 2) / sqrt(m) of each token; (B, N, dim), (m, dim) -> (B, N, m)."""
    return (x @ w.t() - x.square().sum(dim=-1, keepdim=True) / 2).exp() / math.sqrt(len(w))


@torch.fx.wrap
def kernel_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """Attention by random features, whose cost grows linearly with the tokens; of one head.

    With phi(x) = exp(w x - |x|^2 / 2) / sqrt(m), the mean of phi(q) * phi(k) over random w is exp(q k): softmax
    attention without a scale (`Rethinking Attention with Performers` - https://arxiv.org/abs/2009.14794). All tokens'
    keys and values are summed up once, for all queries:

        out = phi(q) (sum_t phi(k_t) v_t^T) / (phi(q) (sum_t phi(k_t)) + 1e-8)

    It is computed in float32 at least, whatever autocast says: in half precision 1e-8 is zero, and long queries and
    keys, whose features vanish, would give 0 / 0.

    Args:
        query: (B, N, dim).
        key: (B, M, dim).
        value: (B, M, dim).
        w: (m, dim).

    Returns:
        (B, N, dim), of the type of `value`.
    """
    dtype = torch.promote_types(value.dtype, torch.float32)
    with without_autocast(value):
        w = w.to(dtype)
        queries, keys = _kernel_features(query.to(dtype), w), _kernel_features(key.to(dtype), w)
        weighted = queries @ (keys.transpose(1, 2) @ value.to(dtype))
        total = queries @ keys.sum(dim=1).unsqueeze(-1)
        return (weighted / (total + KERNEL_EPS)).to(value.dtype)


class KernelAttention(nn.Module):
    """Self-attention of one head by random features, with a skip from the values.

    The random features `w` are as wide as the queries, and half as many. They are drawn when the network is built, not
    trained, and saved: with others it is another network.

    Args:
        dim: Channels of the input.
        out_dim: Channels of the output, queries, keys and values.
        drop: Dropout of the output, before the values are added.
    """

    def __init__(self, dim: int, out_dim: int, drop: float = 0.0, device=None, dtype=None):
        super().__init__()
        dd = dict(device=device, dtype=dtype)
        self.kqv = nn.Linear(dim, 3 * out_dim, **dd)
        self.proj = nn.Linear(out_dim, out_dim, **dd)
        self.drop = nn.Dropout(drop)
        self.register_buffer("w", torch.empty(out_dim // 2, out_dim, **dd))
        self.reset_parameters()

    def reset_parameters(self):
        """Draw `w`: orthogonal rows, all as long as the square root of their number."""
        # PyTorch cannot draw them in low precision.
        w = torch.empty_like(self.w, dtype=torch.promote_types(self.w.dtype, torch.float32))
        nn.init.orthogonal_(w, gain=math.sqrt(len(w)))
        self.w.copy_(w)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, H, W, dim) -> (B, H, W, out_dim)."""
        key, query, value = self.kqv(x.flatten(1, 2)).chunk(3, dim=-1)
        out = value + self.drop(self.proj(kernel_attention(query, key, value, self.w)))
        return out.unflatten(1, x.shape[1:3])


class ReductionConv(nn.Sequential):
    """The convolutions beside the attention of a reduction cell ("PCM"): three of 3 x 3, a norm after the second alone.

    Args:
        dim: Channels of the input.
        embed_dim: Channels between the convolutions.
        out_dim: Channels of the output.
        strides: Stride of each convolution.
    """

    def __init__(
        self, dim: int, embed_dim: int, out_dim: int, strides: tuple[int, int, int], device=None, dtype=None
    ):
        dd = dict(device=device, dtype=dtype)
        conv = dict(kernel_size=3, padding=1, **dd)
        super().__init__()
        self.conv1 = nn.Conv2d(dim, embed_dim, stride=strides[0], **conv)
        self.act1 = nn.SiLU(inplace=True)
        self.conv2 = nn.Conv2d(embed_dim, embed_dim, stride=strides[1], **conv)
        self.norm2 = nn.BatchNorm2d(embed_dim, **dd)
        self.act2 = nn.SiLU(inplace=True)
        self.conv3 = nn.Conv2d(embed_dim, out_dim, stride=strides[2], **conv)
        self.act3 = nn.SiLU(inplace=True)


class ReductionCell(BaseReductionCell):
    """A reduction cell. Sides of the image must be multiples of 4, those of other maps are rounded up.

    Args:
        dim: Channels of the input.
        embed_dim: Channels of each dilation, and between the convolutions.
        out_dim: Channels of the output.
        dilations: Dilations of the pyramid reduction.
        is_first: Whether it reduces the image to a quarter of its sides; others halve a map.
    """

    def __init__(
        self,
        dim: int,
        embed_dim: int,
        out_dim: int,
        dilations: tuple[int, ...],
        is_first: bool = False,
        device=None,
        dtype=None,
    ):
        dd = dict(device=device, dtype=dtype)
        reduced_dim = embed_dim * len(dilations)
        kernel_size, stride, strides = (7, 4, (2, 2, 1)) if is_first else (3, 2, (2, 1, 1))
        prm = PyramidReduction(dim, embed_dim, kernel_size, stride, dilations, **dd)
        pcm = ReductionConv(dim, embed_dim, out_dim, strides, **dd)
        attn = KernelAttention(reduced_dim, out_dim, REDUCTION_DROP, **dd)
        mlp = Mlp(out_dim, out_dim, drop=(0.0, REDUCTION_DROP), **dd)
        super().__init__(prm, pcm, attn, mlp, reduced_dim, out_dim, **dd)


class NormalConv(ParallelConv):
    """The convolutions beside the attention of a normal cell ("PCM"): three of 3 x 3, a SiLU after each."""

    def __init__(self, dim: int, hidden_dim: int, groups: int, device=None, dtype=None):
        super().__init__((dim, hidden_dim, dim, dim), groups=groups, device=device, dtype=dtype)
        self.act3 = nn.SiLU(inplace=True)


class PlainConv(nn.Sequential):
    """The convolutions beside the attention of a plain network ("PCM"): two of 3 x 3, norm and SiLU between them."""

    def __init__(self, dim: int, hidden_dim: int, groups: int, device=None, dtype=None):
        dd = dict(device=device, dtype=dtype)
        conv = dict(kernel_size=3, padding=1, groups=groups, **dd)
        super().__init__()
        self.conv1 = nn.Conv2d(dim, hidden_dim, **conv)
        self.norm1 = nn.BatchNorm2d(hidden_dim, **dd)
        self.act1 = nn.SiLU(inplace=True)
        self.conv2 = nn.Conv2d(hidden_dim, dim, **conv)


class NormalCell(BaseNormalCell):
    """A normal cell.

    Args:
        dim: Channels.
        num_heads: Heads; must divide `dim`.
        groups: Groups of the convolutions.
        mlp_ratio: Hidden width of the MLP, and of the convolutions, in multiples of `dim`.
        drop_path: Stochastic depth, drawn separately for attention, convolutions and MLP.
    """

    pcm_cls: type[nn.Module] = NormalConv

    def __init__(
        self,
        dim: int,
        num_heads: int,
        groups: int,
        mlp_ratio: float,
        drop_path: float = 0.0,
        device=None,
        dtype=None,
    ):
        dd = dict(device=device, dtype=dtype)
        hidden_dim = int(mlp_ratio * dim)
        attn = Attention(dim, dim, num_heads, **dd)
        pcm = self.pcm_cls(dim, hidden_dim, groups, **dd)
        super().__init__(dim, attn, pcm, Mlp(dim, hidden_dim, **dd), drop_path, **dd)


class PlainCell(NormalCell):
    """A normal cell of tokens: the patches, which the convolutions see, behind a class token, which they do not.

    All published networks have an `mlp_ratio` of 4, so that nothing tells whether their convolutions would follow it.
    """

    pcm_cls = PlainConv

    def forward(self, x: torch.Tensor, grid_size: tuple[int, int]) -> torch.Tensor:
        """(B, 1 + h * w, dim), (h, w) -> (B, 1 + h * w, dim)."""
        patches = x[:, 1:].unflatten(1, grid_size)
        local = self.drop_path2(conv_channels_last(self.pcm, patches)).flatten(1, 2)
        x = x + self.drop_path1(self.attn(self.norm1(x)))
        x = torch.cat([x[:, :1], x[:, 1:] + local], dim=1)
        return x + self.drop_path3(self.mlp(self.norm2(x)))


def make_cells(
    cell_cls: type[NormalCell], depth: int, drop_path_rate: float, dim: int, num_heads: int, groups: int,
    mlp_ratio: float, **dd,
) -> list[NormalCell]:
    """`depth` normal cells, with stochastic depth that grows linearly from 0 to `drop_path_rate`.

    Raises:
        ValueError: Heads or groups do not divide the channels, or a number is out of range or no whole one.
    """
    check_whole(0, depth=depth)
    check_rates(drop_path_rate=drop_path_rate)
    check_whole(num_heads=num_heads, groups=groups)
    check_positive(mlp_ratio=mlp_ratio)
    check_divides("num_heads", num_heads, "the cells' channels", dim)
    check_divides("groups", groups, "the cells' channels", dim)
    check_divides("groups", groups, "the convolutions' hidden channels", int(mlp_ratio * dim))
    rates = calculate_drop_path_rates(drop_path_rate, depth)
    return [cell_cls(dim, num_heads, groups, mlp_ratio, drop_path, **dd) for drop_path in rates]


class ViTAE(CellNetwork):
    """ViTAE image classifier and feature extractor, T to S. Takes (B, in_chans, H, W) images of any size.

    Two reduction cells, then a pyramid reduction and the normal cells, on maps of strides 4, 8 and 16. Images are
    padded at the bottom and right to multiples of 4; odd sides of maps are rounded up. The reduction cells have a
    dropout of 0.1 in training, after the attention and after the MLP, whatever `drop_rate` says, as published.

    Args:
        in_chans: Image channels.
        depth: Normal cells.
        dims: Channels of each stage. Those of the last are shared by the two dilations of its pyramid reduction.
        embed_dim: Channels of each dilation of the first two stages, and between the convolutions of their cells.
        num_heads: Heads of the normal cells.
        groups: Groups of the normal cells' convolutions.
        mlp_ratio: Hidden width of the normal cells' MLPs and convolutions, in multiples of their channels.
        drop_path_rate: Stochastic depth of the last normal cell; grows linearly from 0 over all of them.
        num_classes: Classes; 0 leaves the head out.
        global_pool: Pooling of the head, "avg", "max", ..., or "" for none.
        drop_rate: Dropout before the classifier.
        output_stride: Stride of the last map, 16.

    It has no head for token labels, whose tokens have a stride of 32.

    Raises:
        ValueError: There is not one width for each of the three stages, or the last is odd; heads or groups do not
            divide the channels; or a number is out of range or no whole one.
    """

    output_strides = (16,)

    def __init__(
        self,
        in_chans: int = 3,
        depth: int = 7,
        dims: tuple[int, int, int] = (64, 64, 256),
        embed_dim: int = 64,
        num_heads: int = 4,
        groups: int = 64,
        mlp_ratio: float = 2.0,
        drop_path_rate: float = 0.0,
        num_classes: int = 1000,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        output_stride: int = 16,
        device=None,
        dtype=None,
    ):
        check_whole(in_chans=in_chans, embed_dim=embed_dim)
        check_per_stage(3, check=partial(check_whole, 2), dims=dims)
        if dims[2] % len(DILATIONS[2]):
            raise ValueError(f"the last of dims must be even, for its two dilations, got {dims}")
        dd = dict(device=device, dtype=dtype)
        first = ReductionCell(in_chans, embed_dim, dims[0], DILATIONS[0], is_first=True, **dd)
        second = ReductionCell(dims[0], embed_dim, dims[1], DILATIONS[1], **dd)
        third = PyramidReduction(dims[1], dims[2] // len(DILATIONS[2]), 3, 2, DILATIONS[2], **dd)
        cells = make_cells(NormalCell, depth, drop_path_rate, dims[2], num_heads, groups, mlp_ratio, **dd)
        stages = [
            Stage(first, [], checkpoint_downsample=True),
            Stage(second, [], checkpoint_downsample=True),
            Stage(third, cells),
        ]
        super().__init__(
            PadToMultiple(4), stages, dims, nn.Identity(), in_chans, num_classes, global_pool, drop_rate,
            output_stride=output_stride, **dd,
        )


class PlainViTAE(PlainNetwork):
    """ViTAE image classifier and feature extractor, B to H. Takes (B, in_chans, H, W) images of any size.

    Images that 16 does not divide are padded at the bottom and right, and positions are resampled to the grid of the
    image, as timm's vision transformers do both.

    Args:
        img_size: Side, or height and width, of the images that the learnt positions are for.
        in_chans: Image channels.
        embed_dim: Channels.
        depth: Cells.
        num_heads: Heads; must divide `embed_dim`.
        groups: Groups of the convolutions; must divide `embed_dim`.
        mlp_ratio: Hidden width of the MLPs and convolutions in multiples of `embed_dim`.
        drop_path_rate: Stochastic depth of the last cell; grows linearly from 0 over all cells.
        **kwargs: `num_classes`, `global_pool` ("avg" unless given) and `drop_rate`, as of `PlainNetwork`.

    Raises:
        ValueError: `global_pool` is unknown, heads or groups do not divide the channels, or a number is out of range or
            no whole one.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        in_chans: int = 3,
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        groups: int = 192,
        mlp_ratio: float = 4.0,
        drop_path_rate: float = 0.0,
        device=None,
        dtype=None,
        **kwargs,
    ):
        check_whole(in_chans=in_chans, embed_dim=embed_dim)
        dd = dict(device=device, dtype=dtype)
        patch_embed = embed_patches(in_chans, embed_dim, **dd)
        cells = make_cells(PlainCell, depth, drop_path_rate, embed_dim, num_heads, groups, mlp_ratio, **dd)
        fc_norm = nn.LayerNorm(embed_dim, eps=1e-6, **dd)
        super().__init__(
            nn.Identity(), patch_embed, cells, nn.Identity(), fc_norm, img_size, in_chans, **dd, **kwargs
        )

    def reset_parameters(self):
        """The class token and the positions begin as zeros."""
        nn.init.zeros_(self.pos_embed)
        nn.init.zeros_(self.cls_token)


# Published name -> ours, tried in this order.
_REDUCTION = [
    (r"^layers\.2\.RC\.PRM\.convs\.(\d+)\.0\.", r"stages.2.downsample.convs.\1."),
    (r"^layers\.(\d+)\.RC\.PRM\.convs\.(\d+)\.0\.", r"stages.\1.downsample.prm.convs.\2."),
    (r"^layers\.(\d+)\.RC\.PCM\.0\.", r"stages.\1.downsample.pcm.conv1."),
    (r"^layers\.(\d+)\.RC\.PCM\.2\.", r"stages.\1.downsample.pcm.conv2."),
    (r"^layers\.(\d+)\.RC\.PCM\.3\.", r"stages.\1.downsample.pcm.norm2."),
    (r"^layers\.(\d+)\.RC\.PCM\.5\.", r"stages.\1.downsample.pcm.conv3."),
    (r"^layers\.(\d+)\.RC\.attn\.(norm[12])\.", r"stages.\1.downsample.\2."),
    (r"^layers\.(\d+)\.RC\.attn\.mlp\.0\.", r"stages.\1.downsample.mlp.fc1."),
    (r"^layers\.(\d+)\.RC\.attn\.mlp\.2\.", r"stages.\1.downsample.mlp.fc2."),
    (r"^layers\.(\d+)\.RC\.", r"stages.\1.downsample."),
    (r"^layers\.(\d+)\.NC\.(\d+)\.", r"stages.\1.blocks.\2."),
]
_PLAIN = [
    (r"^layers\.0\.RC\.PRM\.proj\.", r"patch_embed.proj."),
    (r"^layers\.0\.RC\.", r""),
    (r"^layers\.2\.NC\.(\d+)\.", r"blocks.\1."),
]


def checkpoint_filter_fn(
    state_dict: dict[str, torch.Tensor], model: ViTAE | PlainViTAE
) -> dict[str, torch.Tensor]:
    """Rename the entries of a published ViTAE checkpoint, and resample the positions of one for another image size.

    Entries of our own checkpoints pass unchanged.
    """
    state_dict = stored.unwrap(state_dict)
    is_plain = isinstance(model, PlainNetwork)
    is_published = any(name.startswith("layers.0.RC.") for name in state_dict)
    if is_published:
        state_dict = rename_published(state_dict, [*(_PLAIN if is_plain else _REDUCTION), *CELL_RENAMES])
    return fit_positions(state_dict, model, is_square=is_published) if is_plain else state_dict


def _create_vitae(variant: str, pretrained: bool = False, **kwargs) -> ViTAE:
    return build_hierarchical(ViTAE, variant, pretrained, checkpoint_filter_fn, num_stages=3, **kwargs)


def _create_plain(variant: str, pretrained: bool = False, **kwargs) -> PlainViTAE:
    return build_plain(PlainViTAE, variant, pretrained, checkpoint_filter_fn, **kwargs)


def _cfg(**kwargs) -> dict:
    common = dict(
        pool_size=(14, 14),
        crop_pct=0.9,
        first_conv=FIRST_CONVS,
        paper_ids="arXiv:2106.03348",
        paper_name="ViTAE: Vision Transformer Advanced by Exploring Intrinsic Inductive Bias",
        origin_url="https://github.com/ViTAE-Transformer/ViTAE-Transformer",
    )
    return imagenet_cfg(**common | kwargs)


def _plain_cfg(**kwargs) -> dict:
    return _cfg(
        pool_size=None,
        crop_pct=0.875,
        first_conv="patch_embed.proj",
        paper_ids="arXiv:2202.10108",
        paper_name="ViTAEv2: Vision Transformer Advanced by Exploring Inductive Bias for Image Recognition and "
        "Beyond",
        **kwargs,
    )


default_cfgs = generate_default_cfgs({
    "vitae_tiny.in1k": _cfg(),
    "vitae_6m.in1k": _cfg(),
    "vitae_13m.untrained": _cfg(),
    "vitae_s.in1k": _cfg(),
    "vitae_b.in1k": _plain_cfg(),
    "vitae_l.in1k": _plain_cfg(),
    "vitae_h.in1k": _plain_cfg(),
})


@register_model
def vitae_tiny(pretrained: bool = False, **kwargs) -> ViTAE:
    """ViTAE-T: 4.9 M parameters, 1.8 GMACs at 224."""
    return _create_vitae("vitae_tiny", pretrained, **kwargs)


@register_model
def vitae_6m(pretrained: bool = False, **kwargs) -> ViTAE:
    """ViTAE-6M: 6.6 M parameters, 2.2 GMACs at 224."""
    return _create_vitae("vitae_6m", pretrained, **dict(dict(depth=10), **kwargs))


@register_model
def vitae_13m(pretrained: bool = False, **kwargs) -> ViTAE:
    """ViTAE-13M: 10.8 M parameters as published in code, whatever its name says; 3.1 GMACs at 224."""
    model_args = dict(depth=11, dims=(64, 64, 320), num_heads=5)
    return _create_vitae("vitae_13m", pretrained, **dict(model_args, **kwargs))


@register_model
def vitae_s(pretrained: bool = False, **kwargs) -> ViTAE:
    """ViTAE-S: 24.0 M parameters, 6.2 GMACs at 224."""
    model_args = dict(depth=14, dims=(96, 192, 384), num_heads=6, groups=96, mlp_ratio=3.0)
    return _create_vitae("vitae_s", pretrained, **dict(model_args, **kwargs))


@register_model
def vitae_b(pretrained: bool = False, **kwargs) -> PlainViTAE:
    """ViTAE-B: 89.3 M parameters, 18.1 GMACs at 224."""
    return _create_plain("vitae_b", pretrained, **kwargs)


@register_model
def vitae_l(pretrained: bool = False, **kwargs) -> PlainViTAE:
    """ViTAE-L: 311.7 M parameters, 63.0 GMACs at 224."""
    model_args = dict(embed_dim=1024, depth=24, num_heads=16, groups=256)
    return _create_plain("vitae_l", pretrained, **dict(model_args, **kwargs))


@register_model
def vitae_h(pretrained: bool = False, **kwargs) -> PlainViTAE:
    """ViTAE-H: 644.5 M parameters, 129.8 GMACs at 224."""
    model_args = dict(embed_dim=1280, depth=32, num_heads=16, groups=320)
    return _create_plain("vitae_h", pretrained, **dict(model_args, **kwargs))
