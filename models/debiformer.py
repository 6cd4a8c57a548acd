"""DeBiFormer: bi-level routing attention, and attention through agents that are read at deformable points.

Paper: `DeBiFormer: Vision Transformer with Deformable Agent Bi-level Routing Attention` - ACCV 2024
Published code and weights: https://github.com/maclong01/DeBiFormer

The published factories do not run as they are; the networks here are their configurations, tested against outputs of
the published code after its errors were fixed. The paper's table gives 77 M parameters for the base model, the
published configuration has 95.5 M, and is followed.
"""
import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from timm.layers import calculate_drop_path_rates, register_notrace_module, trunc_normal_
from timm.models import generate_default_cfgs, register_model
from torch import nn
from torch.utils.checkpoint import checkpoint

from ._checkpoints import rename_biformer
from ._hierarchical import HierarchicalNetwork, Stage, build_hierarchical
from ._layers import Block, Downsample, Stem, check_divides, check_per_stage
from ._ops import (
    AttentionRecord,
    BiLevelRoutingAttention,
    PositionBias,
    RegionGrid,
    Routing,
    apply_linear,
    check_layer_impl,
    conv_channels_last,
    is_traced_or_transformed,
    route_regions,
    routed_attention,
)
from ._pretrained import imagenet_cfg
from ._shipped import imagenette_cfg

__all__ = ["DeBiFormer"]

HEAD_DIM = 32

# Side of a 224 image's map in each stage, which the tables of relative positions are made for.
_TABLE_SIDES = (56, 28, 14, 7)


@register_notrace_module  # what it computes depends on the dtype, which torch.fx does not know while it traces
class ResidualConv2d(nn.Conv2d):
    """x + conv(x), of a 3 x 3 depthwise convolution."""

    def __init__(self, channels: int, device=None, dtype=None):
        super().__init__(channels, channels, kernel_size=3, padding=1, groups=channels, device=device, dtype=dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, channels, H, W) -> (B, channels, H, W)."""
        if x.dtype in (torch.bfloat16, torch.float16):
            # In low precision, a weight added to 1 would lose most of its digits.
            return x + super().forward(x)
        # One convolution, with 1 added in the middle of each kernel: it saves writing one of the widest maps.
        identity = F.pad(self.weight.new_ones(1, 1, 1, 1), (1, 1, 1, 1))
        return F.conv2d(x, self.weight + identity, self.bias, padding=1, groups=self.groups)


class ConvMlp(nn.Module):
    """MLP with a 3 x 3 depthwise convolution on a residual path between its linear layers."""

    def __init__(self, dim: int, hidden_dim: int, device=None, dtype=None):
        super().__init__()
        dd = dict(device=device, dtype=dtype)
        self.fc1 = nn.Linear(dim, hidden_dim, **dd)
        self.conv = ResidualConv2d(hidden_dim, **dd)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden_dim, dim, **dd)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, H, W, dim) -> (B, H, W, dim)."""
        return apply_linear(self.fc2, self.act(conv_channels_last(self.conv, apply_linear(self.fc1, x))))


class Offsets(nn.Module):
    """How far each agent's point is moved from its cell's centre: one number for each group of channels.

    Args:
        dim: Channels of all groups.
        num_groups: Groups, which share the weights; must divide `dim`.
        kernel_size: Kernel size of the depthwise convolution.
        stride: Tokens of the map for one agent, along each side.
    """

    def __init__(self, dim: int, num_groups: int, kernel_size: int, stride: int, device=None, dtype=None):
        super().__init__()
        dd = dict(device=device, dtype=dtype)
        group_dim = dim // num_groups
        self.num_groups = num_groups
        self.conv = nn.Conv2d(
            group_dim, group_dim, kernel_size, stride, kernel_size // 2, groups=group_dim, bias=False, **dd
        )
        self.norm = nn.LayerNorm(group_dim, eps=1e-5, **dd)
        self.act = nn.GELU()
        self.proj = nn.Linear(group_dim, 1, bias=False, **dd)

    def forward(self, query: torch.Tensor) -> torch.Tensor:
        """(B, H, W, dim) queries -> (B, groups, Ha, Wa) offsets."""
        # One depthwise convolution over all channels is the shared one over every group.
        weight = self.conv.weight.repeat(self.num_groups, 1, 1, 1)
        x = F.conv2d(
            query.permute(0, 3, 1, 2), weight, None, self.conv.stride, self.conv.padding, groups=weight.shape[0]
        )
        x = x.permute(0, 2, 3, 1).unflatten(-1, (self.num_groups, -1))
        return self.proj(self.act(self.norm(x)))[..., 0].permute(0, 3, 1, 2)


# Bytes of the positions and biases, of one image, that are made at once: on a CPU, few enough for the cache. The batch
# plays no part, for an export does not know it.
_BAND_BYTES = {"cpu": 2**24}
_BAND_BYTES_ELSEWHERE = 2**28


def _cell_centres(count: int, like: torch.Tensor) -> torch.Tensor:
    """Centres of `count` equal cells of [-1, 1]."""
    return (torch.arange(count, device=like.device, dtype=like.dtype) + 0.5) / count * 2 - 1


def _token_positions(count: int, like: torch.Tensor) -> torch.Tensor:
    """`count` positions from -1 to 1; a single one lies at 0."""
    return _cell_centres(1, like) if count == 1 else torch.linspace(-1, 1, count, device=like.device, dtype=like.dtype)


def _sample(maps: torch.Tensor, grid: torch.Tensor) -> torch.Tensor:
    """(B, C, H, W) maps at a (B, Ho, Wo, 2) grid of (x, y) from -1 to 1 -> (B, C, Ho, Wo), as `F.grid_sample` does.

    Where PyTorch is to be deterministic, cuDNN is left out: it samples with corners aligned, and says nothing of the
    order in which it adds up gradients. PyTorch's own kernel raises RuntimeError then.
    """
    if torch.are_deterministic_algorithms_enabled():
        bilinear, zeros = 0, 0
        return torch.grid_sampler_2d(maps, grid, bilinear, zeros, True)
    return F.grid_sample(maps, grid, align_corners=True)


def _recomputed(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """The function, which eager autograd computes again for its gradients instead of keeping what is in between."""
    if not torch.is_grad_enabled() or torch.compiler.is_compiling() or is_traced_or_transformed():
        return function  # compilers choose what they keep, and transforms refuse it
    return functools.partial(checkpoint, function, use_reentrant=False, preserve_rng_state=False)


class DeformableAgentAttention(nn.Module):
    """Attention of every token to a few agents, which have attended to the map by bi-level routing.

    The agents are sampled from the map at learnt points, one for each `stride` x `stride` cell. Each attends to the
    tokens of the `topk` regions that its region is routed to; then every token attends to all agents, with a bias by
    position. Where a map has very many tokens, they do so in bands of its rows, and training computes a band's
    attention a second time for its gradients instead of keeping the biases.

    Args:
        dim: Channels, a multiple of the heads' 32.
        num_groups: Groups of channels with points of their own; must divide the heads.
        stride: Tokens of the map for one agent, along each side.
        offset_kernel: Kernel size of the convolution that computes the offsets.
        table_side: Side of the map that the table of relative positions is made for.
        mlp_ratio: Hidden width of the agents' MLP in multiples of `dim`.
        num_regions: Regions along each side, of the map and of the agents.
        topk: Regions of the map that each region of agents attends to; a map with fewer regions uses all of them.
        attn_impl: The implementation of `ops.routed_attention`.

    Raises:
        ValueError: `dim` is no multiple of 32, or `num_groups` does not divide the heads.
    """

    def __init__(
        self,
        dim: int,
        num_groups: int,
        stride: int,
        offset_kernel: int,
        table_side: int,
        mlp_ratio: float = 3.0,
        num_regions: int = 7,
        topk: int = 4,
        attn_impl: str = "auto",
        device=None,
        dtype=None,
    ):
        super().__init__()
        check_divides("the heads' channels", HEAD_DIM, "dim", dim)
        check_divides("num_groups", num_groups, "the number of heads", dim // HEAD_DIM)
        dd = dict(device=device, dtype=dtype)
        self.num_heads = dim // HEAD_DIM
        self.num_groups = num_groups
        self.num_regions = num_regions
        self.topk = topk
        self.scale = dim**-0.5
        self.attn_impl = attn_impl
        self.qkv = nn.Linear(dim, 3 * dim, **dd)
        self.lepe = nn.Conv2d(dim, dim, kernel_size=5, stride=stride, padding=2, groups=dim, **dd)
        self.offsets = Offsets(dim, num_groups, offset_kernel, stride, **dd)
        self.agent_query = nn.Linear(dim, dim, **dd)
        self.agent_proj = nn.Linear(dim, dim, **dd)
        self.agent_norm1 = nn.LayerNorm(dim, eps=1e-6, **dd)
        self.agent_mlp = ConvMlp(dim, int(dim * mlp_ratio), **dd)
        self.agent_norm2 = nn.LayerNorm(dim, eps=1e-6, **dd)
        self.agent_key = nn.Linear(dim, dim, **dd)
        self.agent_value = nn.Linear(dim, dim, **dd)
        self.bias_table = nn.Parameter(torch.empty(self.num_heads, 2 * table_side - 1, 2 * table_side - 1, **dd))
        self.proj = nn.Linear(dim, dim, **dd)
        trunc_normal_(self.bias_table, std=0.01)

    def make_agents(self, x: torch.Tensor, query: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Sample the agents from the map.

        Args:
            x: (B, H, W, dim) map.
            query: (B, H, W, dim) its queries, from which the points are computed.

        Returns:
            (B, Ha, Wa, dim) agents, and the (B, groups, Ha, Wa, 2) points (y, x) where they were sampled, from -1 (the
            first row or column) to 1 (the last), in float32 at least. Ha is H / stride, rounded up.
        """
        offsets = self.offsets(query)
        offsets = offsets.to(torch.promote_types(offsets.dtype, torch.float32))
        rows, cols = (_cell_centres(count, offsets) for count in offsets.shape[2:])
        points = torch.stack([rows[:, None] + offsets, cols + offsets], dim=-1).clamp(-1, 1)
        groups = x.to(points.dtype).unflatten(-1, (self.num_groups, -1)).permute(0, 3, 4, 1, 2).flatten(0, 1)
        agents = _sample(groups, points.flip(-1).flatten(0, 1))
        agents = agents.unflatten(0, (-1, self.num_groups)).permute(0, 3, 4, 1, 2).flatten(3)
        return agents.to(x.dtype), points

    def _heads(self, x: torch.Tensor) -> torch.Tensor:
        """(B, H, W, dim) -> (B, H, W, heads, 32)."""
        return x.unflatten(-1, (self.num_heads, -1))

    def _route(self, agent_query: torch.Tensor, key: torch.Tensor) -> Routing:
        agent_grid, grid = (RegionGrid.fit(*y.shape[1:3], self.num_regions) for y in (agent_query, key))
        return route_regions(agent_query, key, agent_grid, grid, self.topk)

    def routing(self, x: torch.Tensor) -> Routing:
        """The regions that the agents of a (B, H, W, dim) map attend to, and the points where they are sampled."""
        query, key, _ = apply_linear(self.qkv, x).chunk(3, dim=-1)
        agents, points = self.make_agents(x, query)
        return self._route(self._heads(self.agent_query(agents)), self._heads(key))._replace(points=points)

    def records(self, x: torch.Tensor) -> dict[str, AttentionRecord]:
        """What the weights of its attentions to a (B, H, W, dim) map are computed from.

        "agents" is the agents' attention to the regions that they are routed to, and "map" that of the map to agents.
        """
        query, key, value = apply_linear(self.qkv, x).chunk(3, dim=-1)
        agents, points = self.make_agents(x, query)
        agent_query, key = self._heads(self.agent_query(agents)), self._heads(key)
        routing = self._route(agent_query, key)._replace(points=points)
        agents = self._inform(agents, key.flatten(3), value)
        bias = PositionBias(self.bias_table, points)
        return {
            "agents": AttentionRecord(agent_query, key, self.scale, routing),
            "map": AttentionRecord(self._heads(query), self._heads(self.agent_key(agents)), self.scale, bias=bias),
        }

    def _attend_to_regions(self, agents: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """(B, Ha, Wa, dim): the agents' attention to the regions that they are routed to."""
        agent_query, key = self._heads(self.agent_query(agents)), self._heads(key)
        routing = self._route(agent_query, key)
        return routed_attention(agent_query, key, self._heads(value), routing, self.scale, self.attn_impl).flatten(3)

    def _inform(self, agents: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """(B, Ha, Wa, dim): the agents, after their attention to the (B, H, W, dim) keys and values and their MLP."""
        attended = self._attend_to_regions(agents, key, value)
        agents = agents + self.agent_proj(attended + conv_channels_last(self.lepe, value))
        return self.agent_norm2(agents + self.agent_mlp(self.agent_norm1(agents)))

    def _table(self, points: torch.Tensor) -> torch.Tensor:
        """The table of relative positions for each image and group, (B * groups, heads / groups, S, S)."""
        table = self.bias_table.to(points.dtype).unflatten(0, (self.num_groups, -1))
        return table.expand(points.shape[0], *table.shape).flatten(0, 1)

    def _position_bias(
        self, table: torch.Tensor, points: torch.Tensor, rows: torch.Tensor, cols: torch.Tensor
    ) -> torch.Tensor:
        """(B, heads, h * W, Ha * Wa): the table, sampled at half the offset from each agent to each token.

        Args:
            table: As `_table` makes it.
            points: (B, groups, Ha, Wa, 2) of the agents.
            rows: (h,) positions of the tokens' rows.
            cols: (W,) positions of their columns.
        """
        agent_rows, agent_cols = points.flatten(2, 3).unbind(-1)
        rows = (rows[:, None] - agent_rows[:, :, None]) / 2
        cols = (cols[:, None] - agent_cols[:, :, None]) / 2
        grid = torch.stack(torch.broadcast_tensors(cols[:, :, None], rows[:, :, :, None]), dim=-1)
        bias = _sample(table, grid.flatten(2, 3).flatten(0, 1))
        return bias.unflatten(0, (-1, self.num_groups)).flatten(1, 2)

    def _attend_band(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *positions: torch.Tensor
    ) -> torch.Tensor:
        """(B, h * W, dim): `_attend_to_agents` of (B, heads, h * W, 32) queries; `positions` are `_position_bias`'s.

        It reads tensors that it is given and none of the module's, which may change before it is computed again.
        """
        bias = self._position_bias(*positions).to(query.dtype)
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=self.scale)
        return out.transpose(1, 2).flatten(2)

    def _rows_at_once(self, width: int, num_agents: int, points: torch.Tensor) -> int:
        """How many rows of the map a band has."""
        numbers = 2 * self.num_groups + self.num_heads  # two coordinates for each group, a bias for each head
        limit = _BAND_BYTES.get(points.device.type, _BAND_BYTES_ELSEWHERE)
        return max(1, limit // (numbers * width * num_agents * points.element_size()))

    def _attend_to_agents(self, query: torch.Tensor, agents: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
        """(B, H, W, dim): attention of the (B, H, W, dim) queries to all agents, with a bias by position."""
        height, width = query.shape[1:3]
        inputs = query, self.agent_key(agents), self.agent_value(agents)
        query, key, value = (self._heads(x).flatten(1, 2).transpose(1, 2) for x in inputs)
        rows, cols = (_token_positions(count, points) for count in (height, width))
        table, step = self._table(points), self._rows_at_once(width, key.shape[2], points)
        if step >= height:
            out = self._attend_band(query, key, value, table, points, rows, cols)
        else:
            attend = _recomputed(self._attend_band)
            bands = zip(query.split(step * width, dim=2), rows.split(step), strict=True)
            out = torch.cat([attend(part, key, value, table, points, at, cols) for part, at in bands], dim=1)
        return out.unflatten(1, (height, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, H, W, dim) -> (B, H, W, dim)."""
        query, key, value = apply_linear(self.qkv, x).chunk(3, dim=-1)
        agents, points = self.make_agents(x, query)
        agents = self._inform(agents, key, value)
        return apply_linear(self.proj, self._attend_to_agents(query, agents, points))


# Regions, points and positions depend on the map's size, which torch.fx does not know while it traces.
register_notrace_module(DeformableAgentAttention)


class DeBiFormerBlock(nn.Sequential):
    """Two blocks that count as one of a stage's depth: bi-level routing attention, then deformable agent attention."""

    def __init__(self, first: Block, second: Block):
        super().__init__()
        self.first = first
        self.second = second


class DeBiFormer(HierarchicalNetwork):
    """DeBiFormer image classifier and feature extractor. Takes (B, in_chans, H, W) images from 32 x 32 up.

    Args:
        in_chans: Image channels.
        depths: Blocks of each stage, of two attentions each.
        dims: Channels of each stage, multiples of 32.
        mlp_ratios: Hidden width of each stage's MLPs in multiples of the stage's width.
        agent_mlp_ratios: The same for the agents' MLPs.
        num_groups: Groups of channels in each stage with points of their own.
        num_regions: Regions along each side of the maps.
        topk: Regions that each region attends to in bi-level routing attention, for each stage but the last.
        agent_topk: Regions that each region of agents attends to, for each stage.
        drop_path_rate: Stochastic depth of the last block; grows linearly from 0 over all blocks.
        attn_impl: The implementation of `ops.routed_attention`.
        layer_impl: The implementation of the blocks' layer norms and depthwise convolutions: "torch", "triton" (fused,
            for GPUs) or "auto", see `ops.layer_norm` and `ops.depthwise_conv`.
        **kwargs: `num_classes`, `global_pool`, `drop_rate` and `token_head`, as of `HierarchicalNetwork`.

    Raises:
        ValueError: There is not one entry for each stage, `dims` are no multiples of 32, groups do not divide the
            heads, or `num_regions`, `topk` or `agent_topk` is out of range.
    """

    def __init__(
        self,
        in_chans: int = 3,
        depths: tuple[int, ...] = (1, 1, 4, 1),
        dims: tuple[int, ...] = (64, 128, 256, 512),
        mlp_ratios: tuple[float, ...] = (3, 3, 3, 3),
        agent_mlp_ratios: tuple[float, ...] = (3, 3, 3, 3),
        num_groups: tuple[int, ...] = (1, 2, 4, 8),
        num_regions: int = 7,
        topk: tuple[int, ...] = (1, 4, 16),
        agent_topk: tuple[int, ...] = (4, 8, 16, 49),
        drop_path_rate: float = 0.0,
        attn_impl: str = "auto",
        layer_impl: str = "auto",
        device=None,
        dtype=None,
        **kwargs,
    ):
        check_layer_impl(layer_impl)
        check_per_stage(
            4,
            depths=depths,
            dims=dims,
            mlp_ratios=mlp_ratios,
            agent_mlp_ratios=agent_mlp_ratios,
            num_groups=num_groups,
            agent_topk=agent_topk,
        )
        check_per_stage(3, "routed stages", topk=topk)
        check_divides("the heads' channels", HEAD_DIM, "the stages' channels", dims)
        if min(agent_topk) < 1:
            raise ValueError(f"agent_topk must be at least 1, got {agent_topk}")
        dd = dict(device=device, dtype=dtype)

        def agent_attention(i: int) -> nn.Module:
            # 7 x 7 agents of a 224 image in every stage
            stride = 2 ** (len(dims) - 1 - i)
            return DeformableAgentAttention(
                dims[i],
                num_groups[i],
                stride,
                offset_kernel=9 - 2 * i,
                table_side=_TABLE_SIDES[i],
                mlp_ratio=agent_mlp_ratios[i],
                num_regions=num_regions,
                topk=agent_topk[i],
                attn_impl=attn_impl,
                **dd,
            )

        def half(i: int, attn: nn.Module, drop_path: float) -> Block:
            mlp = ConvMlp(dims[i], int(dims[i] * mlp_ratios[i]), **dd)
            return Block(dims[i], attn, mlp, drop_path=drop_path, layer_impl=layer_impl, **dd)

        stem = Stem(in_chans, dims[0], **dd)
        drop_path_rates = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)
        stages = []
        for i, dim in enumerate(dims):
            blocks = []
            for drop_path in drop_path_rates[i]:
                if i < len(topk):
                    first = BiLevelRoutingAttention(
                        dim, dim // HEAD_DIM, num_regions, topk[i], attn_impl=attn_impl, layer_impl=layer_impl, **dd
                    )
                else:
                    first = agent_attention(i)
                blocks.append(DeBiFormerBlock(half(i, first, drop_path), half(i, agent_attention(i), drop_path)))
            downsample = Downsample(dims[i - 1], dim, **dd) if i else nn.Identity()
            stages.append(Stage(downsample, blocks))
        super().__init__(stem, stages, dims, nn.BatchNorm2d(dims[-1], **dd), in_chans, **dd, **kwargs)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        return {name for name, _ in self.named_parameters() if name.endswith("bias_table")}


# Published name -> ours, tried in this order.
_BLOCK = r"^(stages\.\d+\.blocks\.\d+)"
_RENAMES = [
    (_BLOCK + r"\.(pos_embed|attn|mlp)1\.", r"\1.first.\2."),
    (_BLOCK + r"\.(pos_embed|attn|mlp)2\.", r"\1.second.\2."),
    (_BLOCK + r"\.(norm[12])\.", r"\1.first.\2."),
    (_BLOCK + r"\.norm3\.", r"\1.second.norm1."),
    (_BLOCK + r"\.norm4\.", r"\1.second.norm2."),
    (r"\.attn\.(qkv|qkv_conv)\.qkv\.", r".attn.qkv."),
    (r"\.attn\.(wo|proj_out)\.", r".attn.proj."),
    (r"\.attn\.lepe1\.", r".attn.lepe."),
    (r"\.attn\.rpe_table$", r".attn.bias_table"),
    (r"\.attn\.conv_offset_q\.0\.", r".attn.offsets.conv."),
    (r"\.attn\.conv_offset_q\.1\.norm\.", r".attn.offsets.norm."),
    (r"\.attn\.conv_offset_q\.3\.", r".attn.offsets.proj."),
    (r"\.attn\.proj_q\.", r".attn.agent_query."),
    (r"\.attn\.unifyheads1\.", r".attn.agent_proj."),
    (r"\.attn\.norm2\.", r".attn.agent_norm1."),
    (r"\.attn\.mlp\.", r".attn.agent_mlp."),
    (r"\.attn\.norm\.", r".attn.agent_norm2."),
    (r"\.attn\.proj_k\.", r".attn.agent_key."),
    (r"\.attn\.proj_v\.", r".attn.agent_value."),
    (r"mlp\.linear1\.0\.", r"mlp.fc1."),
    (r"mlp\.linear2\.0\.", r"mlp.fc2."),
    (r"mlp\.dwc\.", r"mlp.conv."),
]


def checkpoint_filter_fn(state_dict: dict[str, torch.Tensor], model: nn.Module) -> dict[str, torch.Tensor]:
    """Rename the entries of a published DeBiFormer checkpoint; entries of our own checkpoints pass unchanged."""
    return rename_biformer(state_dict, model, _RENAMES)


def _create_debiformer(variant: str, pretrained: bool = False, **kwargs) -> DeBiFormer:
    return build_hierarchical(DeBiFormer, variant, pretrained, checkpoint_filter_fn, **kwargs)


def _cfg(**kwargs) -> dict:
    common = dict(
        first_conv="stem.conv1",
        paper_name="DeBiFormer: Vision Transformer with Deformable Agent Bi-level Routing Attention",
        origin_url="https://github.com/maclong01/DeBiFormer",
    )
    return imagenet_cfg(**common | kwargs)


default_cfgs = generate_default_cfgs({
    "debiformer_nano.imagenette": _cfg(**imagenette_cfg("debiformer_nano")),
    "debiformer_tiny.in1k": _cfg(),
    "debiformer_small.in1k": _cfg(),
    "debiformer_base.in1k": _cfg(),
    "debi_tiny.in1k": _cfg(),
    "debi_small.in1k": _cfg(),
    "debi_base.in1k": _cfg(),
})


@register_model
def debiformer_nano(pretrained: bool = False, **kwargs) -> DeBiFormer:
    """Under 2.5 M parameters, for quick starts and tests; not of the paper."""
    model_args = dict(
        depths=(1, 1, 2, 1),
        dims=(32, 64, 128, 192),
        mlp_ratios=(2, 2, 2, 2),
        agent_mlp_ratios=(1, 1, 1, 1),
        num_groups=(1, 2, 4, 6),
    )
    return _create_debiformer("debiformer_nano", pretrained, **dict(model_args, **kwargs))


@register_model
def debiformer_tiny(pretrained: bool = False, **kwargs) -> DeBiFormer:
    """DeBiFormer-T, 81.9 % published."""
    return _create_debiformer("debiformer_tiny", pretrained, **kwargs)


@register_model
def debiformer_small(pretrained: bool = False, **kwargs) -> DeBiFormer:
    """DeBiFormer-S, 83.9 % published."""
    model_args = dict(depths=(2, 2, 9, 3), mlp_ratios=(3, 3, 3, 2), agent_mlp_ratios=(3, 3, 3, 1))
    return _create_debiformer("debiformer_small", pretrained, **dict(model_args, **kwargs))


@register_model
def debiformer_base(pretrained: bool = False, **kwargs) -> DeBiFormer:
    """DeBiFormer-B, 84.4 % published."""
    model_args = dict(depths=(2, 2, 9, 2), dims=(96, 192, 384, 768), num_groups=(1, 2, 3, 6))
    return _create_debiformer("debiformer_base", pretrained, **dict(model_args, **kwargs))


@register_model
def debi_tiny(pretrained: bool = False, **kwargs) -> DeBiFormer:
    """The published name of `debiformer_tiny`."""
    return debiformer_tiny(pretrained, **kwargs)


@register_model
def debi_small(pretrained: bool = False, **kwargs) -> DeBiFormer:
    """The published name of `debiformer_small`."""
    return debiformer_small(pretrained, **kwargs)


@register_model
def debi_base(pretrained: bool = False, **kwargs) -> DeBiFormer:
    """The published name of `debiformer_base`."""
    return debiformer_base(pretrained, **kwargs)
