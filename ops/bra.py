"""Bi-level routing attention as a ready module."""
import torch
from torch import nn

from .attention import routed_attention, unsupported
from .layout import conv_channels_last
from .regions import RegionGrid
from .routing import Routing, route_regions


class BiLevelRoutingAttention(nn.Module):
    """Bi-level routing attention with a local depthwise term (BiFormer, https://arxiv.org/abs/2303.08810).

    The map is cut into at most `num_regions` x `num_regions` regions. Each region is routed to the `topk` regions
    most similar to it, and its tokens attend to all tokens of those. A 5 x 5 depthwise convolution on the values (LePE)
    adds a local term. Drops into any network that holds its features channels last:

    >>> attention = BiLevelRoutingAttention(dim=128, num_heads=4, num_regions=7, topk=4)
    >>> attention(torch.randn(2, 50, 61, 128)).shape
    torch.Size([2, 50, 61, 128])

    Input and output are (B, H, W, dim), of any H and W from 1 up.

    Args:
        dim: Channels.
        num_heads: Heads; must divide `dim`.
        num_regions: Regions along each side of the map. Sizes that it does not divide are padded, without an effect.
        topk: Key regions for each query region, 1 to `num_regions` ** 2; a map with fewer regions uses all of them.
        qkv_bias: Give the query, key and value projection a bias.
        scale: Factor of the logits. The published networks scale by the whole width, dim ** -0.5, the default.
        attn_impl: The implementation of `ops.routed_attention`.

    Raises:
        ValueError: `dim` is not a multiple of `num_heads`, `num_regions` or `topk` is out of range, or there is no such
            implementation.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        num_regions: int = 7,
        topk: int = 4,
        qkv_bias: bool = True,
        scale: float | None = None,
        attn_impl: str = "auto",
        device=None,
        dtype=None,
    ):
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f"dim {dim} is not a multiple of num_heads {num_heads}")
        if num_regions < 1:
            raise ValueError(f"num_regions must be at least 1, got {num_regions}")
        if not 1 <= topk <= num_regions**2:
            raise ValueError(f"topk must be 1 to num_regions ** 2 = {num_regions**2}, got {topk}")
        if attn_impl != "auto" and unsupported(attn_impl):
            raise ValueError(f"attn_impl={attn_impl!r}: {unsupported(attn_impl)}")
        dd = dict(device=device, dtype=dtype)
        self.num_heads = num_heads
        self.num_regions = num_regions
        self.topk = topk
        self.scale = dim**-0.5 if scale is None else scale
        self.attn_impl = attn_impl
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias, **dd)
        self.lepe = nn.Conv2d(dim, dim, kernel_size=5, padding=2, groups=dim, **dd)
        self.proj = nn.Linear(dim, dim, **dd)

    def _project(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries, keys and values, (B, H, W, heads, head_dim) each, as views of one projection."""
        if x.ndim != 4 or x.shape[-1] != self.qkv.in_features:
            raise ValueError(f"input must be (B, H, W, {self.qkv.in_features}), channels last, got {tuple(x.shape)}")
        return self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).unbind(3)

    def routing(self, x: torch.Tensor) -> Routing:
        """The regions that each region of a (B, H, W, dim) map attends to."""
        query, key, _ = self._project(x)
        return self._route(query, key)

    def _route(self, query: torch.Tensor, key: torch.Tensor) -> Routing:
        grid = RegionGrid.fit(*query.shape[1:3], self.num_regions)
        return route_regions(query, key, grid, grid, self.topk)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, H, W, dim) -> (B, H, W, dim).

        Raises:
            ValueError: The input is of another shape.
        """
        query, key, value = self._project(x)
        routing = self._route(query, key)
        attended = routed_attention(query, key, value, routing, self.scale, self.attn_impl).flatten(3)
        lepe = conv_channels_last(self.lepe, value.flatten(3))
        return self.proj(attended + lepe)
