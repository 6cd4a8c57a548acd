"""DeBiFormer: bi-level routing attention, and attention through agents that are read at deformable points.

Paper: `DeBiFormer: Vision Transformer with Deformable Agent Bi-level Routing Attention` - ACCV 2024
Published code and weights: https://github.com/maclong01/DeBiFormer

The published factories do not run as they are; the networks here are their configurations, tested against outputs of
the published code after its errors were fixed. The paper's table gives 77 M parameters for the base model, the
published configuration has 95.5 M, and is followed.
"""
import torch
from timm.layers import calculate_drop_path_rates
from timm.models import generate_default_cfgs, register_model
from torch import nn

from ._agent_attention import HEAD_DIM, ConvMlp, DeformableAgentAttention
from ._checkpoints import rename_biformer
from ._hierarchical import HierarchicalNetwork, Stage, build_hierarchical
from ._layers import Block, Downsample, Stem, check_depths, check_divides, check_per_stage, resolve_impls
from ._ops import BiLevelRoutingAttention, check_layer_impl, check_positive, check_rates, check_whole
from ._pretrained import imagenet_cfg
from ._shipped import imagenette_cfg

__all__ = ["DeBiFormer"]

# Side of a 224 image's map in each stage, which the tables of relative positions are made for.
_TABLE_SIDES = (56, 28, 14, 7)


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
            heads, or a number is out of range or no whole one.
    """

    built_first = ("blocks", "attn", "mlp")

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
        attn_impl, layer_impl = resolve_impls(attn_impl, layer_impl)
        check_whole(in_chans=in_chans)
        check_rates(drop_path_rate=drop_path_rate)
        check_per_stage(4, check=check_depths, depths=depths)
        check_per_stage(4, check=check_positive, mlp_ratios=mlp_ratios, agent_mlp_ratios=agent_mlp_ratios)
        check_per_stage(4, dims=dims, num_groups=num_groups, agent_topk=agent_topk)
        check_per_stage(3, "routed stages", topk=topk)
        check_divides("the heads' channels", HEAD_DIM, "the stages' channels", dims)
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
