"""Bi-level routing attention as a ready module."""
import torch
import torch.nn.functional as F
from torch import nn

from .attention import routed_attention, unsupported
from .checks import check_positive, check_whole
from .depthwise import DepthwiseConv
from .layout import crop_map, is_open, missing_to_multiple
from .linear import apply_linear
from .record import AttentionRecord
from .regions import RegionGrid
from .routing import Routing, route_regions
from .support import check_layer_impl, in_low_precision_on_gpu, triton_unsupported
from .transforms import fx_leaf


@fx_leaf  # its regions depend on the map's size
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
        num_regions: Regions along each side of the map. Sizes that it does not divide are padded, see `padding`.
        topk: Key regions for each query region, 1 to `num_regions` ** 2; a map with fewer regions uses all of them.
        qkv_bias: Give the query, key and value projection a bias.
        scale: Factor of the logits. The published networks scale by the whole width, dim ** -0.5, the default.
        attn_impl: The implementation of `ops.routed_attention`.
        layer_impl: The implementation of `ops.depthwise_conv`, for the local term. Where it and `attn_impl` are or
            choose "triton", routing, attention and local term are one fused operator on the packed projection.
        padding: "masked": padding has no effect, and small maps have fewer regions, so that none is padding alone.
            "published", for weights that were trained with the published code on maps that `num_regions` does not
            divide: the input is padded with zeros to `num_regions` regions along each side, and padding tokens are
            tokens like any other, with the projection's bias as query, key and value. Both are the same where
            `num_regions` divides the map.
        dilation: Dilation of the local term. The fused operators take 1 alone.

    Raises:
        ValueError: `dim` is not a multiple of `num_heads`, a number is out of range or no whole one, or there is no
            such implementation or padding.
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
        layer_impl: str = "auto",
        padding: str = "masked",
        dilation: int = 1,
        device=None,
        dtype=None,
    ):
        super().__init__()
        check_whole(dim=dim, num_heads=num_heads, num_regions=num_regions, topk=topk, dilation=dilation)
        if dim % num_heads:
            raise ValueError(f"dim {dim} is not a multiple of num_heads {num_heads}")
        if topk > num_regions**2:
            raise ValueError(f"topk must be 1 to num_regions ** 2 = {num_regions**2}, got {topk}")
        if scale is not None:
            check_positive(scale=scale)
        if attn_impl != "auto" and unsupported(attn_impl):
            raise ValueError(f"attn_impl={attn_impl!r}: {unsupported(attn_impl)}")
        check_layer_impl(layer_impl)
        if padding not in ("masked", "published"):
            raise ValueError(f"padding must be 'masked' or 'published', got {padding!r}")
        dd = dict(device=device, dtype=dtype)
        self.num_heads = num_heads
        self.num_regions = num_regions
        self.topk = topk
        self.scale = dim**-0.5 if scale is None else scale
        self.attn_impl = attn_impl
        self.padding = padding
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias, **dd)
        self.lepe = DepthwiseConv(dim, 5, layer_impl, dilation, **dd)
        self.proj = nn.Linear(dim, dim, **dd)

    def _pad(self, x: torch.Tensor) -> torch.Tensor:
        """(B, H, W, dim) -> (B, H', W', dim): as published, zeros up to multiples of `num_regions`; else `x` itself."""
        if self.padding == "masked":
            return x
        pad_bottom, pad_right = (missing_to_multiple(side, self.num_regions) for side in x.shape[1:3])
        is_padded = is_open(*x.shape[1:3]) or pad_bottom or pad_right
        return F.pad(x, (0, 0, 0, pad_right, 0, pad_bottom)) if is_padded else x

    def _crop(self, attended: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """(B, H', W', dim) of the padded map -> (B, H, W, dim) of the input `x`."""
        if self.padding == "masked":
            return attended
        # A linear layer adds its bias in a second pass over what is not contiguous.
        return crop_map(attended, 0, 0, *x.shape[1:3]).contiguous()

    def _project(self, x: torch.Tensor) -> torch.Tensor:
        """(B, H, W, dim) -> (B, H', W', 3 * dim): queries, keys and values of the padded map.

        All heads of each are side by side. H' and W' are H and W but for published padding.
        """
        if x.ndim != 4 or x.shape[-1] != self.qkv.in_features:
            raise ValueError(f"input must be (B, H, W, {self.qkv.in_features}), channels last, got {tuple(x.shape)}")
        return apply_linear(self.qkv, self._pad(x))

    def _split(self, qkv: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries, keys and values, (B, H, W, heads, head_dim) each, as views of the projection."""
        return qkv.unflatten(-1, (3, self.num_heads, -1)).unbind(3)

    def routing(self, x: torch.Tensor) -> Routing:
        """The regions that each region of a (B, H, W, dim) map attends to.

        With published padding they are those of the padded map, and so are the grids.
        """
        query, key, _ = self._split(self._project(x))
        return self._route(query, key)

    def records(self, x: torch.Tensor) -> dict[str, AttentionRecord]:
        """What the weights of its one attention, "map", to a (B, H, W, dim) map are computed from."""
        query, key, _ = self._split(self._project(x))
        return {"map": AttentionRecord(query, key, self.scale, self._route(query, key))}

    def _route(self, query: torch.Tensor, key: torch.Tensor) -> Routing:
        grid = RegionGrid.fit(*query.shape[1:3], self.num_regions)
        return route_regions(query, key, grid, grid, self.topk)

    def _packed_settings(self, qkv: torch.Tensor):
        """What the packed operator is called with, or None where attention or the local term do not take Triton."""
        lepe = self.lepe
        if type(lepe) is not DepthwiseConv or lepe._forward_hooks or lepe._forward_pre_hooks or lepe.bias is None:
            return None  # what changes a module, or watches it, waits for its call
        if lepe.dilation != (1, 1) or is_open(*qkv.shape[1:3]):
            return None
        impls = (self.attn_impl, lepe.layer_impl)
        if "auto" in impls and not in_low_precision_on_gpu(qkv):
            return None
        if not all(impl in ("auto", "triton") for impl in impls) or triton_unsupported(qkv) is not None:
            return None
        from .impl.triton import packed  # imports Triton, which only its users need

        settings = packed.settings_for(qkv, self.num_heads, self.num_regions, self.topk, self.scale)
        everything_routed = settings is not None and settings.topk == settings.grid.num_regions
        return None if everything_routed and "auto" in impls else settings

    def _attend_packed(self, qkv: torch.Tensor, settings) -> torch.Tensor:
        """Routed attention and the local term, (B, H, W, 3 * dim) -> (B, H, W, dim), as one operator."""
        from .impl.triton import packed

        return packed.packed_attention(qkv, self.lepe.weight, self.lepe.bias, settings)

    def _attend(self, qkv: torch.Tensor) -> torch.Tensor:
        """Routed attention and the local term, (B, H, W, 3 * dim) -> (B, H, W, dim), one after another."""
        query, key, value = self._split(qkv)
        attended = routed_attention(query, key, value, self._route(query, key), self.scale, self.attn_impl).flatten(3)
        return self.lepe(value.flatten(3), residual=attended)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, H, W, dim) -> (B, H, W, dim).

        Raises:
            ValueError: The input is of another shape.
        """
        qkv = self._project(x)
        settings = self._packed_settings(qkv)
        attended = self._attend(qkv) if settings is None else self._attend_packed(qkv, settings)
        return apply_linear(self.proj, self._crop(attended, x))
