"""DeBiFormer's attention through agents, which are read from the map at deformable points.

Paper: `DeBiFormer: Vision Transformer with Deformable Agent Bi-level Routing Attention` - ACCV 2024
"""
import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from timm.layers import trunc_normal_, use_fused_attn
from torch import nn
from torch.utils.checkpoint import checkpoint

from ._layers import attend, check_divides
from ._ops import (
    AttentionRecord,
    DepthwiseConv2d,
    PositionBias,
    RegionGrid,
    Routing,
    apply_linear,
    channels_first,
    check_positive,
    check_whole,
    conv_channels_last,
    depthwise_conv2d,
    fixed_if_traced,
    flatten_map,
    fx_leaf,
    is_open,
    is_traced_or_transformed,
    route_regions,
    routed_attention,
)

HEAD_DIM = 32


@fx_leaf  # what it computes depends on the dtype
class ResidualConv2d(DepthwiseConv2d):
    """x + conv(x), of a 3 x 3 depthwise convolution."""

    def __init__(self, channels: int, device=None, dtype=None):
        super().__init__(channels, kernel_size=3, device=device, dtype=dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, channels, H, W) -> (B, channels, H, W)."""
        if x.dtype in (torch.bfloat16, torch.float16) or torch.jit.is_tracing():
            # In low precision, a weight added to 1 would lose most of its digits. The older of the exporters to ONNX,
            # which traces, takes no weight that is computed.
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
        self.conv = DepthwiseConv2d(group_dim, kernel_size, stride, bias=False, **dd)
        self.norm = nn.LayerNorm(group_dim, eps=1e-5, **dd)
        self.act = nn.GELU()
        self.proj = nn.Linear(group_dim, 1, bias=False, **dd)

    def forward(self, query: torch.Tensor) -> torch.Tensor:
        """(B, H, W, dim) queries -> (B, groups, Ha, Wa) offsets."""
        # One depthwise convolution over all channels is the shared one over every group.
        weight = self.conv.weight.repeat(self.num_groups, 1, 1, 1)
        x = depthwise_conv2d(channels_first(query), weight, None, self.conv.stride, self.conv.padding)
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
    steps = count - 1
    doubled = torch.arange(count, device=like.device, dtype=like.dtype) * 2  # linspace takes no symbolic count
    return (doubled - steps) / torch.sym_max(steps, 1)


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


@fx_leaf  # regions, points and positions depend on the map's size
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
        ValueError: `dim` is no multiple of 32, `num_groups` does not divide the heads, or a number is out of range or
            no whole one.
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
        check_whole(dim=dim, num_groups=num_groups, stride=stride, offset_kernel=offset_kernel, table_side=table_side)
        check_whole(num_regions=num_regions, topk=topk)
        check_positive(mlp_ratio=mlp_ratio)
        check_divides("the heads' channels", HEAD_DIM, "dim", dim)
        check_divides("num_groups", num_groups, "the number of heads", dim // HEAD_DIM)
        dd = dict(device=device, dtype=dtype)
        self.num_heads = dim // HEAD_DIM
        self.num_groups = num_groups
        self.num_regions = num_regions
        self.topk = topk
        self.scale = dim**-0.5
        self.attn_impl = attn_impl
        self.fused_attn = use_fused_attn()
        self.qkv = nn.Linear(dim, 3 * dim, **dd)
        self.lepe = DepthwiseConv2d(dim, kernel_size=5, stride=stride, **dd)
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
        self.reset_parameters()

    def reset_parameters(self):
        """Draw what is the module's own, the biases."""
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
        groups = channels_first(x.to(points.dtype)).unflatten(1, (self.num_groups, -1)).flatten(0, 1)
        agents = _sample(groups, points.flip(-1).flatten(0, 1))
        agents = agents.unflatten(0, (-1, self.num_groups)).flatten(1, 2).permute(0, 2, 3, 1)
        return agents.to(x.dtype).clone(memory_format=torch.contiguous_format), points

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
        of_images = points[:, :1, :1, :1, :1].detach() * 0  # the older exporter to ONNX takes a batch for a constant
        return (table + of_images).flatten(0, 1)

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
        out = attend(query, key, value, self.fused_attn, bias, self.scale)
        return out.transpose(1, 2).flatten(2)

    def _rows_at_once(self, width: int, num_agents: int, points: torch.Tensor) -> int:
        """How many rows of the map a band has."""
        numbers = 2 * self.num_groups + self.num_heads  # two coordinates for each group, a bias for each head
        limit = _BAND_BYTES.get(points.device.type, _BAND_BYTES_ELSEWHERE)
        return max(1, limit // (numbers * width * num_agents * points.element_size()))

    def _attend_to_agents(self, query: torch.Tensor, agents: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
        """(B, H, W, dim): attention of the (B, H, W, dim) queries to all agents, with a bias by position."""
        height, width = fixed_if_traced(*query.shape[1:3])
        inputs = query, self.agent_key(agents), self.agent_value(agents)
        query, key, value = (flatten_map(self._heads(x)).transpose(1, 2) for x in inputs)
        rows, cols = (_token_positions(count, points) for count in (height, width))
        table, step = self._table(points), self._rows_at_once(width, key.shape[2], points)
        if is_open(height, width) or step >= height:
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
