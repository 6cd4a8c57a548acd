"""Layers that families share.

Maps are held channels last, so that linear layers, layer norms, routing and depthwise convolutions all read the same
memory and nothing is transposed between them.
"""
import functools
import operator
from collections.abc import Callable, Sequence

import timm.layers
import torch
import torch.fx
from timm.layers import DropPath, use_fused_attn
from torch import nn

from ._ops import (
    DepthwiseConv,
    add_layer_norm,
    apply_linear,
    check_whole,
    dense_attention,
    fx_leaf,
    is_exported,
    is_plain,
    layer_norm,
    linear_gelu,
    reuses_memory,
)

torch.fx.wrap("dense_attention")  # what it computes depends on the device; torch.fx records the call


def split_qkv(qkv: torch.Tensor, num_heads: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(B, N, 3 * heads * head_dim) packed projection -> query, key and value, views of (B, heads, N, head_dim)."""
    return qkv.unflatten(-1, (3, num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    fused: bool,
    bias: torch.Tensor | None = None,
    scale: float | None = None,
) -> torch.Tensor:
    """softmax(scale * q k^T + bias) v.

    Args:
        query: (B, heads, N, head_dim).
        key: (B, heads, M, head_dim).
        value: (B, heads, M, head_dim).
        fused: By PyTorch's fused attention, or by plain products, which also have second and forward derivatives.
        bias: (B, heads, N, M), or None.
        scale: Factor of the products, head_dim ** -0.5 unless given.

    Returns:
        (B, heads, N, head_dim).
    """
    if fused:
        return dense_attention(query, key, value, bias, scale)
    logits = query * (query.shape[-1] ** -0.5 if scale is None else scale) @ key.transpose(-2, -1)
    return (logits if bias is None else logits + bias).softmax(dim=-1) @ value


def resolve_impls(attn_impl: str, layer_impl: str) -> tuple[str, str]:
    """The implementations of routed attention and of layers, plain ones for "auto" where timm's fused attention is off.

    As with timm's models, that counts when a network is built.
    """
    if use_fused_attn():
        return attn_impl, layer_impl
    return "gather" if attn_impl == "auto" else attn_impl, "torch" if layer_impl == "auto" else layer_impl


def check_per_stage(
    num_stages: int, kind: str = "stages", check: Callable[..., None] = check_whole, **settings: Sequence
):
    """Raises ValueError unless each of `settings`, by name, has one entry for each of the `num_stages` stages.

    Each entry is checked by `check`, such as `check_whole`.
    """
    for name, values in settings.items():
        if not isinstance(values, (tuple, list)) or len(values) != num_stages:
            raise ValueError(f"{name} must have one entry for each of the {num_stages} {kind}, got {values}")
        for value in values:
            check(**{name: value})


check_depths = functools.partial(check_whole, 0)  # a stage may have no blocks


def check_divides(name: str, divisors: int | Sequence[int], what: str, numbers: int | Sequence[int]):
    """Raises ValueError unless `divisors`, one for all or one for each, divide the `numbers`, and all are positive.

    `name` and `what` name the divisors and the numbers in the message.
    """
    each_number = [numbers] if isinstance(numbers, int) else numbers
    each_divisor = [divisors] * len(each_number) if isinstance(divisors, int) else divisors
    if any(n < 1 or number < 1 or number % n for n, number in zip(each_divisor, each_number, strict=True)):
        raise ValueError(f"{name} must divide {what} {numbers}, got {divisors}")


def channels_last(x: torch.Tensor) -> torch.Tensor:
    """(B, C, H, W) in channels-last memory, by permutations: torch.func.vmap does not support memory formats.

    In an export the image stays as it is, see `ops.channels_first`.
    """
    if is_exported():
        return x
    return x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)


def channels_last_image(x: torch.Tensor) -> torch.Tensor:
    """(B, C, H, W) in channels-last memory; torch.compile treats H and W as constants from here on.

    A graph for each image size takes seconds to compile. One for all sizes takes minutes, if it succeeds: each stage's
    regions add another rounded division, and the compiler reasons about all of them, nested, at every reshape. An
    export may leave them open.
    """
    if torch.compiler.is_dynamo_compiling() and not is_exported():
        for side in x.shape[2:]:
            operator.index(side)
    return channels_last(x)


@fx_leaf  # its implementation depends on the device
class LayerNorm(nn.LayerNorm):
    """Layer norm by `ops.layer_norm`, whose `impl` is `layer_impl`."""

    def __init__(self, dim: int, eps: float = 1e-6, layer_impl: str = "auto", device=None, dtype=None):
        super().__init__(dim, eps, device=device, dtype=dtype)
        self.layer_impl = layer_impl

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., dim) -> (..., dim)."""
        return layer_norm(x, self.weight, self.bias, self.eps, self.layer_impl)


class AddLayerNorm(LayerNorm):
    """The next value of a residual path, and its layer norm, by `ops.add_layer_norm`."""

    def forward(self, x: torch.Tensor, branch: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(..., dim), (..., dim) -> x + branch and its layer norm, (..., dim) each."""
        return add_layer_norm(x, branch, self.weight, self.bias, self.eps, self.layer_impl)


class Mlp(timm.layers.Mlp):
    """timm's MLP by `ops.apply_linear`, and by `ops.linear_gelu` where that saves copies."""

    def _saves_copies(self, x: torch.Tensor) -> bool:
        """Whether it does, and nothing watches or changes the modules up to `fc2`, or stands between them."""
        fc1, act, drop = self.fc1, self.act, self.drop1
        if not is_plain(fc1, nn.Linear) or not reuses_memory(x, fc1.weight, fc1.bias):
            return False
        if not is_plain(act, nn.GELU) or act.approximate != "none" or not is_plain(self.norm, nn.Identity):
            return False
        return is_plain(drop, nn.Dropout) and not (drop.training and drop.p)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., in_features) -> (..., out_features)."""
        if self._saves_copies(x):
            x = linear_gelu(x, self.fc1.weight, self.fc1.bias)
        else:
            x = self.norm(self.drop1(self.act(apply_linear(self.fc1, x))))
        return self.drop2(apply_linear(self.fc2, x))


class Block(nn.Module):
    """Depthwise position encoding, attention and MLP, each on a residual path.

    Args:
        dim: Channels.
        attn: (B, H, W, dim) -> (B, H, W, dim).
        mlp: (B, H, W, dim) -> (B, H, W, dim).
        pos_conv: Whether to have the position encoding, a 3 x 3 depthwise convolution.
        dilation: Dilation of the position encoding.
        drop_path: Stochastic depth of attention and MLP.
        layer_impl: The implementation of the norms and of the position encoding, see `ops`.
    """

    def __init__(
        self,
        dim: int,
        attn: nn.Module,
        mlp: nn.Module,
        pos_conv: bool = True,
        drop_path: float = 0.0,
        layer_impl: str = "auto",
        dilation: int = 1,
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd = dict(layer_impl=layer_impl, device=device, dtype=dtype)
        self.pos_embed = DepthwiseConv(dim, 3, dilation=dilation, **dd) if pos_conv else None
        self.norm1 = LayerNorm(dim, **dd)
        self.attn = attn
        self.drop_path1 = DropPath(drop_path)
        self.norm2 = AddLayerNorm(dim, **dd)
        self.mlp = mlp
        self.drop_path2 = DropPath(drop_path)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, H, W, dim) -> (B, H, W, dim)."""
        if self.pos_embed is not None:
            x = self.pos_embed(x, residual=x)
        x, normed = self.norm2(x, self.drop_path1(self.attn(self.norm1(x))))
        return x + self.drop_path2(self.mlp(normed))


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
    """Halve a map between stages: convolution and norm, or norm and convolution ("stl" layout).

    With a stride of 1 the map keeps its size, and has the halved one's values at every second row and column.

    Args:
        dim: Channels of the input.
        out_dim: Channels of the output.
        patchify: Norm and convolution, without overlap where the map is halved.
        stride: 2 or 1.
        dilation: Dilation of the convolution, for a map that was not halved before; 1 where the stride is 2.
    """

    def __init__(
        self,
        dim: int,
        out_dim: int,
        patchify: bool = False,
        stride: int = 2,
        dilation: int = 1,
        device=None,
        dtype=None,
    ):
        dd = dict(stride=stride, dilation=dilation, device=device, dtype=dtype)
        super().__init__()
        if patchify:
            self.norm = nn.BatchNorm2d(dim, device=device, dtype=dtype)
            if stride == 1:
                self.pad = nn.ZeroPad2d((0, dilation, 0, dilation))
            self.conv = nn.Conv2d(dim, out_dim, kernel_size=2, **dd)
        else:
            self.conv = nn.Conv2d(dim, out_dim, kernel_size=3, padding=dilation, **dd)
            self.norm = nn.BatchNorm2d(out_dim, device=device, dtype=dtype)
