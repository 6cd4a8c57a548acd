"""What the cells of ViTAE and ViTAEv2 have in common: attention and convolutions side by side.

Papers: `ViTAE: Vision Transformer Advanced by Exploring Intrinsic Inductive Bias` - https://arxiv.org/abs/2106.03348
and `ViTAEv2` - https://arxiv.org/abs/2202.10108

Every map is held channels last, so that linear layers, layer norms, windows and convolutions all read the same memory.
"""
import math

import torch
import torch.nn.functional as F
from timm.layers import DropPath, use_fused_attn
from torch import nn

from ._hierarchical import HierarchicalNetwork
from ._layers import attend, channels_last, split_qkv
from ._ops import conv_channels_last, fx_leaf, is_open, missing_to_multiple


@fx_leaf  # its padding depends on the image's size
class PadToMultiple(nn.Module):
    """Zeros at the bottom and right of an image, up to the next multiple of `multiple`; channels last in memory.

    The branches of a reduction cell round odd sizes differently.
    """

    def __init__(self, multiple: int):
        super().__init__()
        self.multiple = multiple

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) -> (B, C, H', W')."""
        height, width = x.shape[-2:]
        pad_bottom, pad_right = (missing_to_multiple(side, self.multiple) for side in (height, width))
        if is_open(height, width) or pad_bottom or pad_right:
            x = F.pad(x, (0, pad_right, 0, pad_bottom))
        return channels_last(x)


class Attention(nn.Module):
    """Multi-head self-attention of all tokens.

    Args:
        dim: Channels of the input.
        out_dim: Channels of the output, queries, keys and values.
        num_heads: Heads; must divide `out_dim`.
        qkv_bias: Give the query, key and value projection a bias.
        value_skip: Add the values to the output.
    """

    def __init__(
        self,
        dim: int,
        out_dim: int,
        num_heads: int,
        qkv_bias: bool = True,
        value_skip: bool = False,
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd = dict(device=device, dtype=dtype)
        self.num_heads = num_heads
        self.value_skip = value_skip
        self.fused_attn = use_fused_attn()
        self.qkv = nn.Linear(dim, 3 * out_dim, bias=qkv_bias, **dd)
        self.proj = nn.Linear(out_dim, out_dim, **dd)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, N, dim) -> (B, N, out_dim), or a map, (B, H, W, dim) -> (B, H, W, out_dim)."""
        qkv = self.qkv(x.flatten(1, -2))
        query, key, value = split_qkv(qkv, self.num_heads)
        attended = attend(query, key, value, self.fused_attn).transpose(1, 2)
        out = self.proj(attended.flatten(2))
        if self.value_skip:
            out = out + qkv.chunk(3, dim=-1)[2]
        return out.unflatten(1, x.shape[1:-1])


class ParallelConv(nn.Sequential):
    """The convolutions beside the attention ("PCM"): three of 3 x 3 with norm and SiLU between them.

    Args:
        dims: Channels of the input and of each convolution's output.
        strides: Stride of each convolution.
        groups: Groups of each convolution.
    """

    def __init__(
        self,
        dims: tuple[int, int, int, int],
        strides: tuple[int, int, int] = (1, 1, 1),
        groups: int = 1,
        device=None,
        dtype=None,
    ):
        dd = dict(device=device, dtype=dtype)
        conv = dict(kernel_size=3, padding=1, groups=groups, **dd)
        super().__init__()
        self.conv1 = nn.Conv2d(dims[0], dims[1], stride=strides[0], **conv)
        self.norm1 = nn.BatchNorm2d(dims[1], **dd)
        self.act1 = nn.SiLU(inplace=True)
        self.conv2 = nn.Conv2d(dims[1], dims[2], stride=strides[1], **conv)
        self.norm2 = nn.BatchNorm2d(dims[2], **dd)
        self.act2 = nn.SiLU(inplace=True)
        self.conv3 = nn.Conv2d(dims[2], dims[3], stride=strides[2], **conv)


class PyramidReduction(nn.Module):
    """Convolutions of several dilations over the same pixels ("PRM"), their outputs side by side as channels."""

    def __init__(
        self,
        dim: int,
        embed_dim: int,
        kernel_size: int,
        stride: int,
        dilations: tuple[int, ...],
        device=None,
        dtype=None,
    ):
        super().__init__()
        self.convs = nn.ModuleList([
            nn.Conv2d(
                dim,
                embed_dim,
                kernel_size,
                stride=stride,
                dilation=dilation,
                padding=math.ceil(((kernel_size - 1) * dilation + 1 - stride) / 2),
                device=device,
                dtype=dtype,
            )
            for dilation in dilations
        ])
        self.act = nn.GELU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) -> (B, dilations * embed_dim, H / stride, W / stride)."""
        return self.act(torch.cat([conv(x) for conv in self.convs], dim=1))


class BaseReductionCell(nn.Module):
    """Reduce a map and change its width: pyramid reduction and attention, beside convolutions, then an MLP.

    There is no residual path from the input.

    Args:
        prm: (B, C, H, W) -> (B, reduced_dim, h, w).
        pcm: (B, C, H, W) -> (B, dim, h, w).
        attn: (B, h, w, reduced_dim) -> (B, h, w, dim).
        mlp: (B, h, w, dim) -> (B, h, w, dim).
        reduced_dim: Channels that the pyramid reduction leaves.
        dim: Channels of the output.
    """

    def __init__(
        self,
        prm: nn.Module,
        pcm: nn.Module,
        attn: nn.Module,
        mlp: nn.Module,
        reduced_dim: int,
        dim: int,
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd = dict(device=device, dtype=dtype)
        self.prm = prm
        self.pcm = pcm
        self.norm1 = nn.LayerNorm(reduced_dim, **dd)
        self.attn = attn
        self.norm2 = nn.LayerNorm(dim, **dd)
        self.mlp = mlp

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) -> (B, dim, h, w)."""
        reduced = self.prm(x).permute(0, 2, 3, 1)
        local = self.pcm(x).permute(0, 2, 3, 1)
        x = self.attn(self.norm1(reduced)) + local
        x = x + self.mlp(self.norm2(x))
        return x.permute(0, 3, 1, 2)


class BaseNormalCell(nn.Module):
    """Attention beside convolutions, then an MLP, on residual paths.

    Args:
        dim: Channels.
        attn: (B, H, W, dim) -> (B, H, W, dim).
        pcm: (B, dim, H, W) -> (B, dim, H, W).
        mlp: (B, H, W, dim) -> (B, H, W, dim).
        drop_path: Stochastic depth, drawn separately for attention, convolutions and MLP.
    """

    def __init__(
        self,
        dim: int,
        attn: nn.Module,
        pcm: nn.Module,
        mlp: nn.Module,
        drop_path: float = 0.0,
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd = dict(device=device, dtype=dtype)
        self.norm1 = nn.LayerNorm(dim, eps=1e-6, **dd)
        self.attn = attn
        self.drop_path1 = DropPath(drop_path)
        self.pcm = pcm
        self.drop_path2 = DropPath(drop_path)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6, **dd)
        self.mlp = mlp
        self.drop_path3 = DropPath(drop_path)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, H, W, dim) -> (B, H, W, dim)."""
        local = self.drop_path2(conv_channels_last(self.pcm, x))
        x = x + self.drop_path1(self.attn(self.norm1(x))) + local
        return x + self.drop_path3(self.mlp(self.norm2(x)))


class CellNetwork(HierarchicalNetwork):
    """Stages that each begin with a reduction of the map, the first of which is the stem."""

    def group_matcher(self, coarse: bool = False) -> dict:
        return dict(
            stem=r"^stages\.0\.downsample",
            blocks=r"^stages\.(\d+)" if coarse else [
                (r"^stages\.(\d+)\.downsample", (-1,)),
                (r"^stages\.(\d+)\.blocks\.(\d+)", None),
            ],
        )


# The convolutions that see the image, for default configs.
FIRST_CONVS = (*(f"stages.0.downsample.prm.convs.{i}" for i in range(4)), "stages.0.downsample.pcm.conv1")
# Published name -> ours, in the convolutions of normal cells and in the classifier.
CELL_RENAMES = [
    (r"\.PCM\.0\.", r".pcm.conv1."),
    (r"\.PCM\.1\.", r".pcm.norm1."),
    (r"\.PCM\.3\.", r".pcm.conv2."),
    (r"\.PCM\.4\.", r".pcm.norm2."),
    (r"\.PCM\.6\.", r".pcm.conv3."),
    (r"^head\.(weight|bias)$", r"head.fc.\1"),
]
