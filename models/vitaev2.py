"""ViTAEv2: a hierarchical vision transformer whose cells hold attention and convolutions side by side.

Paper: `ViTAEv2: Vision Transformer Advanced by Exploring Inductive Bias for Image Recognition and Beyond` -
https://arxiv.org/abs/2202.10108 (IJCV 2023)
Published code and weights: https://github.com/ViTAE-Transformer/ViTAE-Transformer
"""
import torch
import torch.nn.functional as F
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
from ._checkpoints import fit_token_head, rename_published
from ._hierarchical import Stage, build_hierarchical
from ._layers import Mlp, check_depths, check_divides, check_per_stage
from ._ops import check_rates, check_whole, crop_map, fx_leaf, is_open, missing_to_multiple, settle
from ._pretrained import imagenet_cfg, stored

__all__ = ["ViTAEv2"]


def to_windows(x: torch.Tensor, size: int) -> torch.Tensor:
    """(B, H, W, C) -> (B * H / size * W / size, size, size, C), windows in row-major order."""
    return settle(x.unflatten(2, (-1, size)).unflatten(1, (-1, size)).transpose(2, 3)).flatten(0, 2)


def from_windows(windows: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """The (B, height, width, C) map that `to_windows` cut."""
    size = windows.shape[1]
    x = windows.unflatten(0, (-1, height // size, width // size)).transpose(2, 3)
    return settle(x).flatten(3, 4).flatten(1, 2)


@fx_leaf  # its windows depend on the map's size
class WindowAttention(Attention):
    """Self-attention in unshifted windows.

    A map that the windows do not divide is padded with zeros, half on either side with the odd pixel at the bottom and
    right; the padding is attended to like anything else.

    Args:
        dim: Channels of the input.
        out_dim: Channels of the output, queries, keys and values.
        num_heads: Heads; must divide `out_dim`.
        window_size: Side of the windows.
    """

    def __init__(self, dim: int, out_dim: int, num_heads: int, window_size: int, device=None, dtype=None):
        super().__init__(dim, out_dim, num_heads, device=device, dtype=dtype)
        self.window_size = window_size

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, H, W, dim) -> (B, H, W, out_dim)."""
        height, width = x.shape[1:3]
        pad_height, pad_width = (missing_to_multiple(side, self.window_size) for side in (height, width))
        top, left = pad_height // 2, pad_width // 2
        if is_open(height, width) or pad_height or pad_width:
            x = F.pad(x, (0, 0, left, pad_width - left, top, pad_height - top))
        out = from_windows(super().forward(to_windows(x, self.window_size)), *x.shape[1:3])
        return crop_map(out, top, left, height, width)


class ReductionCell(BaseReductionCell):
    """The reduction cell of a stage. Sides of the map must be multiples of the stride.

    Args:
        dim: Channels of the input.
        embed_dim: Channels of each dilation, and of the inner convolutions.
        out_dim: Channels of the output.
        num_heads: Heads; must divide `out_dim`.
        stride: 4 or 2.
        kernel_size: Kernel size of the pyramid reduction.
        dilations: Dilations of the pyramid reduction.
        groups: Groups of the convolutions beside the attention.
        window_size: Side of the attention's windows; 0 attends to the whole map, without a bias for query, key and
            value, and with a skip from the values.
    """

    def __init__(
        self,
        dim: int,
        embed_dim: int,
        out_dim: int,
        num_heads: int,
        stride: int,
        kernel_size: int,
        dilations: tuple[int, ...],
        groups: int,
        window_size: int = 0,
        device=None,
        dtype=None,
    ):
        dd = dict(device=device, dtype=dtype)
        reduced_dim = embed_dim * len(dilations)
        prm = PyramidReduction(dim, embed_dim, kernel_size, stride, dilations, **dd)
        strides = (2, 2, 1) if stride == 4 else (2, 1, 1)
        pcm = ParallelConv((dim, embed_dim, embed_dim, out_dim), strides, groups, **dd)
        if window_size:
            attn = WindowAttention(reduced_dim, out_dim, num_heads, window_size, **dd)
        else:
            attn = Attention(reduced_dim, out_dim, num_heads, qkv_bias=False, value_skip=True, **dd)
        super().__init__(prm, pcm, attn, Mlp(out_dim, out_dim, **dd), reduced_dim, out_dim, **dd)


class NormalCell(BaseNormalCell):
    """A normal cell of a stage.

    Args:
        dim: Channels.
        num_heads: Heads; must divide `dim`.
        groups: Groups of the convolutions.
        window_size: Side of the attention's windows; 0 attends to the whole map.
        drop_path: Stochastic depth, drawn separately for attention, convolutions and MLP.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        groups: int,
        window_size: int = 0,
        drop_path: float = 0.0,
        device=None,
        dtype=None,
    ):
        dd = dict(device=device, dtype=dtype)
        attn = (
            WindowAttention(dim, dim, num_heads, window_size, **dd) if window_size else
            Attention(dim, dim, num_heads, **dd)
        )
        pcm = ParallelConv((dim, 4 * dim, dim, dim), groups=groups, **dd)
        super().__init__(dim, attn, pcm, Mlp(dim, 4 * dim, **dd), drop_path, **dd)


class ViTAEv2(CellNetwork):
    """ViTAEv2 image classifier and feature extractor. Takes (B, in_chans, H, W) images from 32 x 32 up.

    Images are padded at the bottom and right to multiples of 32; feature maps are those of the padded image.

    Args:
        in_chans: Image channels.
        depths: Normal cells of each stage.
        dims: Channels of each stage.
        embed_dims: Channels of each dilation of the stages' reduction cells.
        num_heads: Heads of each stage's normal cells.
        reduction_heads: Heads of each stage's reduction cell.
        groups: Groups of the convolutions beside the attention, of each stage's normal cells.
        reduction_groups: The same for each stage's reduction cell.
        window_size: Side of the attention's windows in the first two stages; the last two attend to whole maps.
        drop_path_rate: Stochastic depth of the last normal cell; grows linearly from 0 over all normal cells.
        **kwargs: `num_classes`, `global_pool`, `drop_rate` and `token_head`, as of `HierarchicalNetwork`.

    Raises:
        ValueError: There is not one entry for each of the four stages, heads or groups do not divide the channels, or
            a number is out of range or no whole one.
    """

    def __init__(
        self,
        in_chans: int = 3,
        depths: tuple[int, ...] = (2, 2, 8, 2),
        dims: tuple[int, ...] = (64, 128, 256, 512),
        embed_dims: tuple[int, ...] = (64, 64, 128, 256),
        num_heads: tuple[int, ...] = (1, 2, 4, 8),
        reduction_heads: tuple[int, ...] = (1, 1, 2, 4),
        groups: tuple[int, ...] = (1, 32, 64, 128),
        reduction_groups: tuple[int, ...] = (1, 16, 32, 64),
        window_size: int = 7,
        drop_path_rate: float = 0.0,
        device=None,
        dtype=None,
        **kwargs,
    ):
        check_whole(in_chans=in_chans, window_size=window_size)
        check_rates(drop_path_rate=drop_path_rate)
        check_per_stage(4, check=check_depths, depths=depths)
        check_per_stage(
            4,
            dims=dims,
            embed_dims=embed_dims,
            num_heads=num_heads,
            reduction_heads=reduction_heads,
            groups=groups,
            reduction_groups=reduction_groups,
        )
        check_divides("num_heads", num_heads, "the stages' channels", dims)
        check_divides("reduction_heads", reduction_heads, "the stages' channels", dims)
        check_divides("groups", groups, "the stages' channels", dims)
        check_divides("reduction_groups", reduction_groups, "the stages' channels", dims)
        check_divides("reduction_groups", reduction_groups, "embed_dims", embed_dims)
        dd = dict(device=device, dtype=dtype)
        windows = (window_size, window_size, 0, 0)
        drop_path_rates = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)
        stages = []
        for i, dim in enumerate(dims):
            reduction = ReductionCell(
                dims[i - 1] if i else in_chans,
                embed_dims[i],
                dim,
                reduction_heads[i],
                stride=2 if i else 4,
                kernel_size=3 if i else 7,
                dilations=((1, 2, 3, 4), (1, 2, 3), (1, 2), (1, 2))[i],
                groups=reduction_groups[i],
                window_size=windows[i],
                **dd,
            )
            cells = [
                NormalCell(dim, num_heads[i], groups[i], windows[i], drop_path, **dd)
                for drop_path in drop_path_rates[i]
            ]
            stages.append(Stage(reduction, cells, checkpoint_downsample=True))
        super().__init__(PadToMultiple(32), stages, dims, nn.Identity(), in_chans, **dd, **kwargs)


# Published name -> ours, tried in this order.
_RENAMES = [
    (r"^layers\.(\d+)\.RC\.attn\.", r"layers.\1.RC."),
    (r"^layers\.(\d+)\.RC\.", r"stages.\1.downsample."),
    (r"^layers\.(\d+)\.NC\.(\d+)\.", r"stages.\1.blocks.\2."),
    (r"\.PRM\.convs\.(\d+)\.0\.", r".prm.convs.\1."),
    *CELL_RENAMES,
]


def checkpoint_filter_fn(state_dict: dict[str, torch.Tensor], model: nn.Module) -> dict[str, torch.Tensor]:
    """Rename the entries of a published ViTAEv2 checkpoint; entries of our own checkpoints pass unchanged."""
    state_dict = fit_token_head(stored.unwrap(state_dict), model)
    if "stages.0.downsample.norm1.weight" in state_dict:
        return state_dict
    # The indices into a table of position biases, which these models do not have, are left out.
    weights = {name: value for name, value in state_dict.items() if not name.endswith(".relative_position_index")}
    return rename_published(weights, _RENAMES)


def _create_vitaev2(variant: str, pretrained: bool = False, **kwargs) -> ViTAEv2:
    return build_hierarchical(ViTAEv2, variant, pretrained, checkpoint_filter_fn, **kwargs)


def _cfg(**kwargs) -> dict:
    return imagenet_cfg(
        first_conv=FIRST_CONVS,
        paper_ids="arXiv:2202.10108",
        paper_name="ViTAEv2: Vision Transformer Advanced by Exploring Inductive Bias for Image Recognition and "
        "Beyond",
        origin_url="https://github.com/ViTAE-Transformer/ViTAE-Transformer",
        **kwargs,
    )


default_cfgs = generate_default_cfgs({
    "vitaev2_s.in1k": _cfg(),
    "vitaev2_48m.in1k": _cfg(),
    "vitaev2_b.in1k": _cfg(),
})


@register_model
def vitaev2_s(pretrained: bool = False, **kwargs) -> ViTAEv2:
    """ViTAEv2-S: 19.4 M parameters, 5.8 GMACs at 224."""
    return _create_vitaev2("vitaev2_s", pretrained, **kwargs)


@register_model
def vitaev2_48m(pretrained: bool = False, **kwargs) -> ViTAEv2:
    """ViTAEv2-48M: 48.7 M parameters, 13.4 GMACs at 224."""
    model_args = dict(depths=(2, 2, 11, 2), dims=(96, 192, 384, 768), embed_dims=(64, 64, 192, 384))
    return _create_vitaev2("vitaev2_48m", pretrained, **dict(model_args, **kwargs))


@register_model
def vitaev2_b(pretrained: bool = False, **kwargs) -> ViTAEv2:
    """ViTAEv2-B: 89.7 M parameters, 24.4 GMACs at 224."""
    model_args = dict(
        depths=(2, 2, 12, 2),
        dims=(128, 256, 512, 1024),
        embed_dims=(96, 96, 256, 512),
        num_heads=(1, 4, 8, 16),
        reduction_heads=(1, 1, 4, 8),
    )
    return _create_vitaev2("vitaev2_b", pretrained, **dict(model_args, **kwargs))
