"""BViT: a vision transformer whose last layer is followed by broad attention, attention over all layers at once.

Paper: `BViT: Broad Attention based Vision Transformer` - https://arxiv.org/abs/2202.06268 (TNNLS 2023)
Published code and, by the paper, weights: https://github.com/DRL-CASIA/Broad_ViT
"""
import math

import torch
from timm.layers import DropPath, calculate_drop_path_rates, use_fused_attn
from timm.models import checkpoint, generate_default_cfgs, register_model
from timm.models.vision_transformer import init_weights_vit_timm
from torch import nn

from ._checkpoints import rename_published
from ._layers import Mlp, attend, check_divides, split_qkv
from ._ops import check_positive, check_rates, check_whole
from ._plain import PATCH_SIZE, PlainNetwork, build_plain, embed_patches, fit_positions, square_side
from ._pretrained import imagenet_cfg, stored

__all__ = ["BViT"]

BROAD_SCALE = 0.4  # weight of broad attention beside the last layer's output


@torch.fx.wrap
def broad_attention(qkvs: list[torch.Tensor], num_heads: int, num_queries: int | None = None) -> torch.Tensor:
    """Attention of every layer's queries, keys and values, which lie side by side in each head. No parameters.

    The published formulation concatenates queries, keys and values of L layers to (B, heads, N, L * head_dim), and
    averages the attended features down to the network's width, L at a time. Here only the attended features are
    concatenated. The logits are the sum of the layers' own, summed in float32 at least, so that each is rounded once,
    and every layer's values are weighted in place. No query depends on another: for the few that are needed it is
    cheap, while copies of all keys and values would cost more than the attention.

    Args:
        qkvs: (B, N, 3 * heads * head_dim) packed projections of the L layers.
        num_heads: Heads of each layer.
        num_queries: Attend for the first tokens alone; None for all.

    Returns:
        (B, num_queries, heads * head_dim).
    """
    layers = [split_qkv(qkv, num_heads) for qkv in qkvs]
    head_dim = layers[0][0].shape[-1]
    dtype = torch.promote_types(qkvs[0].dtype, torch.float32)
    scale = head_dim**-0.5  # of one layer, not of L * head_dim
    logits = sum((query[:, :, :num_queries] * scale @ key.transpose(-2, -1)).to(dtype) for query, key, _ in layers)
    weights = logits.softmax(dim=-1).to(qkvs[0].dtype)
    attended = torch.cat([weights @ value for _, _, value in layers], dim=-1)
    # No window of L features spans two heads.
    return attended.unflatten(-1, (head_dim, len(qkvs))).mean(dim=-1).transpose(1, 2).flatten(2)


class Attention(nn.Module):
    """Multi-head self-attention that also returns its packed projection, for broad attention."""

    def __init__(self, dim: int, num_heads: int, device=None, dtype=None):
        super().__init__()
        dd = dict(device=device, dtype=dtype)
        self.num_heads = num_heads
        self.fused_attn = use_fused_attn()
        self.qkv = nn.Linear(dim, 3 * dim, bias=False, **dd)
        self.proj = nn.Linear(dim, dim, **dd)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, N, dim) -> (B, N, dim), and the (B, N, 3 * dim) projection."""
        qkv = self.qkv(x)
        query, key, value = split_qkv(qkv, self.num_heads)
        attended = attend(query, key, value, self.fused_attn)
        return self.proj(attended.transpose(1, 2).flatten(2)), qkv


class Block(nn.Module):
    """Attention and MLP, each on a residual path; also returns the attention's packed projection."""

    def __init__(
        self, dim: int, num_heads: int, mlp_ratio: float = 4.0, drop_path: float = 0.0, device=None, dtype=None
    ):
        super().__init__()
        dd = dict(device=device, dtype=dtype)
        self.norm1 = nn.LayerNorm(dim, eps=1e-5, **dd)
        self.attn = Attention(dim, num_heads, **dd)
        self.drop_path1 = DropPath(drop_path)
        self.norm2 = nn.LayerNorm(dim, eps=1e-5, **dd)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), **dd)
        self.drop_path2 = DropPath(drop_path)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, N, dim) -> (B, N, dim), and the (B, N, 3 * dim) projection."""
        attended, qkv = self.attn(self.norm1(x))
        x = x + self.drop_path1(attended)
        return x + self.drop_path2(self.mlp(self.norm2(x))), qkv


class BViT(PlainNetwork):
    """BViT image classifier and feature extractor. Takes (B, in_chans, H, W) images of any size from 32 x 32 up.

    Images that 16 * stem_stride does not divide are padded at the bottom and right, and positions are resampled to
    the grid of the image, as timm's vision transformers do both. Broad attention is part of the last layer, which a
    pruned network does not reach.

    Args:
        img_size: Side, or height and width, of the images that the learnt positions are for.
        in_chans: Image channels.
        global_pool: Pooling of the head: "token" (the class token), "avg", "max" or "avgmax" of the others, "" for
            none.
        embed_dim: Channels.
        depth: Layers.
        num_heads: Heads; must divide `embed_dim`.
        mlp_ratio: Hidden width of the MLPs in multiples of `embed_dim`.
        stem_stride: Stride of the convolution before the patches. 1 has the tokens and the cost of the paper's table,
            2 a quarter of the tokens, as in the published code.
        drop_path_rate: Stochastic depth of the last layer; grows linearly from 0 over all layers.
        **kwargs: `num_classes` and `drop_rate`, as of `PlainNetwork`.

    Raises:
        ValueError: `global_pool` is unknown, `num_heads` does not divide `embed_dim`, or a number is out of range or no
            whole one.
    """

    _init_weights = staticmethod(init_weights_vit_timm)

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        in_chans: int = 3,
        global_pool: str = "token",
        embed_dim: int = 192,
        depth: int = 12,
        num_heads: int = 3,
        mlp_ratio: float = 4.0,
        stem_stride: int = 1,
        drop_path_rate: float = 0.0,
        device=None,
        dtype=None,
        **kwargs,
    ):
        check_whole(in_chans=in_chans, embed_dim=embed_dim, num_heads=num_heads, stem_stride=stem_stride)
        check_whole(0, depth=depth)
        check_positive(mlp_ratio=mlp_ratio)
        check_rates(drop_path_rate=drop_path_rate)
        check_divides("num_heads", num_heads, "embed_dim", embed_dim)
        dd = dict(device=device, dtype=dtype)
        stem = nn.Conv2d(in_chans, 3, kernel_size=7, stride=stem_stride, padding=3, **dd)
        patch_embed = embed_patches(3, embed_dim, **dd)
        drop_path_rates = calculate_drop_path_rates(drop_path_rate, depth)
        blocks = [Block(embed_dim, num_heads, mlp_ratio, rate, **dd) for rate in drop_path_rates]
        norm = nn.LayerNorm(embed_dim, eps=1e-5, **dd)
        super().__init__(
            stem, patch_embed, blocks, norm, nn.Identity(), img_size, in_chans, global_pool=global_pool,
            stem_stride=stem_stride, **dd, **kwargs,
        )
        self.depth = depth
        self.num_heads = num_heads
        self.stem_stride = stem_stride

    def _forward_blocks(
        self,
        x: torch.Tensor,
        grid_size: tuple[int, int],
        take_indices: list[int] = (),
        stop_early: bool = False,
        num_tokens: int | None = None,
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """The (B, N, C) tokens after the last block, and after those in `take_indices`.

        `num_tokens` limits the output of the network's last block to the first tokens.
        """
        taken, qkvs = [], []
        for i, block in enumerate(self.blocks[: max(take_indices) + 1] if stop_early else self.blocks):
            x, qkv = checkpoint(block, x) if self.grad_checkpointing else block(x)
            qkvs.append(qkv)
            if i + 1 == self.depth:
                x = x[:, :num_tokens] + BROAD_SCALE * broad_attention(qkvs, self.num_heads, num_tokens)
            if i in take_indices:
                taken.append(x)
        return x, taken

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, in_chans, H, W) -> (B, num_classes) logits."""
        # Where the class token alone reaches the classifier, broad attention is computed for it alone.
        x, _ = self._forward_blocks(*self._embed(x), num_tokens=1 if self.global_pool == "token" else None)
        return self.forward_head(self.norm(x))


# Published name -> ours.
_RENAMES = [
    (r"^conv\.", r"stem."),
    (r"^to_patch_embedding\.1\.", r"patch_embed.proj."),
    (r"^pos_embedding$", r"pos_embed"),
    (r"^transformer\.layers\.(\d+)\.0\.norm\.", r"blocks.\1.norm1."),
    (r"^transformer\.layers\.(\d+)\.0\.fn\.to_qkv\.", r"blocks.\1.attn.qkv."),
    (r"^transformer\.layers\.(\d+)\.0\.fn\.to_out\.0\.", r"blocks.\1.attn.proj."),
    (r"^transformer\.layers\.(\d+)\.1\.norm\.", r"blocks.\1.norm2."),
    (r"^transformer\.layers\.(\d+)\.1\.fn\.net\.0\.", r"blocks.\1.mlp.fc1."),
    (r"^transformer\.layers\.(\d+)\.1\.fn\.net\.3\.", r"blocks.\1.mlp.fc2."),
    (r"^mlp_head\.0\.", r"norm."),
    (r"^mlp_head\.1\.", r"head.fc."),
]


def _from_published(state_dict: dict[str, torch.Tensor], stem_stride: int) -> dict[str, torch.Tensor]:
    out = rename_published(state_dict, _RENAMES)
    patches = out.get("patch_embed.proj.weight")
    if patches is not None:
        # A linear layer over patches that were flattened row by row, the channel fastest.
        out["patch_embed.proj.weight"] = patches.unflatten(1, (PATCH_SIZE, PATCH_SIZE, -1)).permute(0, 3, 1, 2)
    if stem_stride > 1:
        # There is a position for every patch of the image, of which the tokens after the stem take the first.
        positions = out["pos_embed"]
        out["pos_embed"] = positions[:, : 1 + math.ceil(square_side(positions) / stem_stride) ** 2]
    return out


def checkpoint_filter_fn(state_dict: dict[str, torch.Tensor], model: BViT) -> dict[str, torch.Tensor]:
    """Rename the entries of a published BViT checkpoint, and resample the positions of one for another image size."""
    state_dict = stored.unwrap(state_dict)
    is_published = "pos_embedding" in state_dict
    if is_published:
        state_dict = _from_published(state_dict, model.stem_stride)
    return fit_positions(state_dict, model, is_square=is_published)


def _create_bvit(variant: str, pretrained: bool = False, **kwargs) -> BViT:
    return build_plain(BViT, variant, pretrained, checkpoint_filter_fn, **kwargs)


def _cfg(**kwargs) -> dict:
    return imagenet_cfg(
        pool_size=None,
        first_conv="stem",
        paper_ids="arXiv:2202.06268",
        paper_name="BViT: Broad Attention based Vision Transformer",
        origin_url="https://github.com/DRL-CASIA/Broad_ViT",
        **kwargs,
    )


default_cfgs = generate_default_cfgs({
    "bvit_5m.in1k": _cfg(),
    "bvit_22m.in1k": _cfg(),
})


@register_model
def bvit_5m(pretrained: bool = False, **kwargs) -> BViT:
    """BViT-5M: 5.7 M parameters, 1.3 GMACs at 224."""
    model_args = dict(embed_dim=192, depth=12, num_heads=3)
    return _create_bvit("bvit_5m", pretrained, **dict(model_args, **kwargs))


@register_model
def bvit_22m(pretrained: bool = False, **kwargs) -> BViT:
    """BViT-22M: 22.0 M parameters, 4.6 GMACs at 224."""
    model_args = dict(embed_dim=384, depth=12, num_heads=6)
    return _create_bvit("bvit_22m", pretrained, **dict(model_args, **kwargs))
