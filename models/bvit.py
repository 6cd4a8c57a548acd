"""BViT: a vision transformer whose last layer is followed by broad attention, attention over all layers at once.

Paper: `BViT: Broad Attention based Vision Transformer` - https://arxiv.org/abs/2202.06268 (TNNLS 2023)
Published code and, by the paper, weights: https://github.com/DRL-CASIA/Broad_ViT
"""
import math

import torch
from timm.layers import (
    ClassifierHead,
    DropPath,
    PatchEmbed,
    calculate_drop_path_rates,
    global_pool_nlc,
    resample_abs_pos_embed,
    to_2tuple,
    trunc_normal_,
    use_fused_attn,
)
from timm.models import checkpoint, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from timm.models.vision_transformer import init_weights_vit_timm
from torch import nn

from ._checkpoints import rename_published
from ._layers import Mlp, attend, check_divides, split_qkv
from ._network import Network
from ._ops import check_positive, check_rates, check_whole
from ._pretrained import build_with_pretrained_weights, imagenet_cfg, stored

__all__ = ["BViT"]

torch.fx.wrap("resample_abs_pos_embed")  # which looks at the grid's size

PATCH_SIZE = 16
BROAD_SCALE = 0.4  # weight of broad attention beside the last layer's output
GLOBAL_POOLS = ("", "token", "avg", "avgmax", "max")


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


def _sides(img_size: int | tuple[int, int]) -> tuple[int, int]:
    """Height and width; raises ValueError unless they are whole numbers from 1 up."""
    sides = to_2tuple(img_size)
    if len(sides) != 2:
        raise ValueError(f"img_size must be a side, or height and width, got {img_size!r}")
    for side in sides:
        check_whole(img_size=side)
    return sides


class BViT(Network):
    """BViT image classifier and feature extractor. Takes (B, in_chans, H, W) images of any size from 32 x 32 up.

    Images that 16 * stem_stride does not divide are padded at the bottom and right, and positions are resampled to
    the grid of the image, as timm's vision transformers do both.

    Args:
        img_size: Side, or height and width, of the images that the learnt positions are for.
        in_chans: Image channels.
        num_classes: Classes; 0 leaves the head out.
        global_pool: Pooling of the head: "token" (the class token), "avg", "max" or "avgmax" of the others, "" for
            none.
        embed_dim: Channels.
        depth: Layers.
        num_heads: Heads; must divide `embed_dim`.
        mlp_ratio: Hidden width of the MLPs in multiples of `embed_dim`.
        stem_stride: Stride of the convolution before the patches. 1 has the tokens and the cost of the paper's table,
            2 a quarter of the tokens, as in the published code.
        drop_rate: Dropout before the classifier.
        drop_path_rate: Stochastic depth of the last layer; grows linearly from 0 over all layers.

    Raises:
        ValueError: `global_pool` is unknown, `num_heads` does not divide `embed_dim`, or a number is out of range or no
            whole one.
    """

    output_fmt = "NLC"
    num_prefix_tokens = 1
    _init_weights = staticmethod(init_weights_vit_timm)

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "token",
        embed_dim: int = 192,
        depth: int = 12,
        num_heads: int = 3,
        mlp_ratio: float = 4.0,
        stem_stride: int = 1,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device=None,
        dtype=None,
    ):
        super().__init__()
        check_whole(in_chans=in_chans, embed_dim=embed_dim, num_heads=num_heads, stem_stride=stem_stride)
        check_whole(0, num_classes=num_classes, depth=depth)
        check_positive(mlp_ratio=mlp_ratio)
        check_rates(drop_rate=drop_rate, drop_path_rate=drop_path_rate)
        check_divides("num_heads", num_heads, "embed_dim", embed_dim)
        dd = dict(device=device, dtype=dtype)
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.num_features = self.head_hidden_size = self.embed_dim = embed_dim
        self.depth = depth
        self.num_heads = num_heads
        self.stem_stride = stem_stride
        self.reduction = PATCH_SIZE * stem_stride
        self.grid_size = tuple(math.ceil(side / self.reduction) for side in _sides(img_size))
        self.feature_info = [
            dict(num_chs=embed_dim, reduction=self.reduction, module=f"blocks.{i}") for i in range(depth)
        ]
        self.grad_checkpointing = False
        self._set_global_pool(global_pool)

        self.stem = nn.Conv2d(in_chans, 3, kernel_size=7, stride=stem_stride, padding=3, **dd)
        self.patch_embed = PatchEmbed(
            img_size=None, patch_size=PATCH_SIZE, embed_dim=embed_dim, output_fmt="NHWC", dynamic_img_pad=True, **dd
        )
        self.cls_token = nn.Parameter(torch.empty(1, 1, embed_dim, **dd))
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + math.prod(self.grid_size), embed_dim, **dd))
        drop_path_rates = calculate_drop_path_rates(drop_path_rate, depth)
        self.blocks = nn.Sequential(*(Block(embed_dim, num_heads, mlp_ratio, rate, **dd) for rate in drop_path_rates))
        self.norm = nn.LayerNorm(embed_dim, eps=1e-5, **dd)
        # Tokens are pooled before the head, whose own pooling is for maps.
        self.head = ClassifierHead(embed_dim, num_classes, pool_type="", drop_rate=drop_rate, **dd)

        self.reset_parameters()
        self.init_weights(needs_reset=False)

    def reset_parameters(self):
        """Draw what is the network's own, the class token and the positions."""
        trunc_normal_(self.pos_embed, std=0.02)
        trunc_normal_(self.cls_token, std=0.02)

    def _set_global_pool(self, global_pool: str):
        if global_pool not in GLOBAL_POOLS:
            raise ValueError(f"global_pool must be one of {GLOBAL_POOLS}, got {global_pool!r}")
        self.global_pool = global_pool

    def no_weight_decay(self) -> set[str]:
        return {"cls_token", "pos_embed"}

    def group_matcher(self, coarse: bool = False) -> dict:
        return dict(
            stem=r"^(?:stem|patch_embed|cls_token|pos_embed)",
            blocks=[(r"^blocks\.(\d+)", None), (r"^norm", (99999,))],
        )

    def set_grad_checkpointing(self, enable: bool = True):
        self.grad_checkpointing = enable

    def get_classifier(self) -> nn.Module:
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None):
        """Replace the classifier by one of `num_classes` classes (0: none), and the pooling if one is given."""
        if global_pool is not None:
            self._set_global_pool(global_pool)
        self.num_classes = num_classes
        self.head.reset(num_classes)

    def _embed(self, x: torch.Tensor) -> tuple[torch.Tensor, tuple[int, int]]:
        """(B, in_chans, H, W) images -> (B, 1 + h * w, C) tokens at their positions, the class token first; (h, w)."""
        x = self.patch_embed(self.stem(x))
        grid_size = (x.shape[1], x.shape[2])
        pos_embed = resample_abs_pos_embed(self.pos_embed, new_size=grid_size, old_size=self.grid_size)
        cls_token = self.cls_token.expand(x.shape[0], -1, -1)
        return torch.cat([cls_token, x.flatten(1, 2)], dim=1) + pos_embed, grid_size

    def _forward_blocks(
        self, x: torch.Tensor, take_indices: list[int] = (), stop_early: bool = False, num_tokens: int | None = None
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """The (B, N, C) tokens after the last block, and after those in `take_indices`.

        Broad attention is part of the network's last block, which a pruned network does not reach. `num_tokens` limits
        the output of that block to the first tokens.
        """
        taken, qkvs = [], []
        for i, block in enumerate(self.blocks[: max(take_indices) + 1] if stop_early else self.blocks):
            if self.grad_checkpointing:
                x, qkv = checkpoint(block, x)
            else:
                x, qkv = block(x)
            qkvs.append(qkv)
            if i + 1 == self.depth:
                x = x[:, :num_tokens] + BROAD_SCALE * broad_attention(qkvs, self.num_heads, num_tokens)
            if i in take_indices:
                taken.append(x)
        return x, taken

    def forward_intermediates(
        self,
        x: torch.Tensor,
        indices: int | list[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list | tuple[torch.Tensor, list]:
        """The tokens after the chosen layers, and the final features. Broad attention is part of the last layer.

        Args:
            x: (B, in_chans, H, W) images.
            indices: The last n layers if a number, all if None, else the layers listed.
            return_prefix_tokens: Return pairs of the image's tokens and the (B, 1, C) class token.
            norm: Apply the final norm to all of them.
            stop_early: Stop after the last layer asked for; the final features are then that layer's tokens, normed.
            output_fmt: "NCHW" for maps, "NLC" for tokens without the class token.
            intermediates_only: Return the intermediates alone.

        Returns:
            [(B, C, h, w) or (B, h * w, C), ...], or ((B, 1 + h * w, C) features, that list).
        """
        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError(f"output_fmt must be 'NCHW' or 'NLC', got {output_fmt!r}")
        take_indices, _ = feature_take_indices(len(self.blocks), indices)
        x, grid_size = self._embed(x)
        x, taken = self._forward_blocks(x, take_indices, stop_early)
        intermediates = []
        for tokens in map(self.norm, taken) if norm else taken:
            prefix, tokens = tokens[:, : self.num_prefix_tokens], tokens[:, self.num_prefix_tokens :]
            if output_fmt == "NCHW":
                tokens = tokens.transpose(1, 2).unflatten(-1, grid_size).contiguous()
            intermediates.append((tokens, prefix) if return_prefix_tokens else tokens)
        return intermediates if intermediates_only else (self.norm(x), intermediates)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop the layers that those in `indices` do not need, broad attention with the last; returns the indices."""
        take_indices, max_index = feature_take_indices(len(self.blocks), indices)
        self.blocks = self.blocks[: max_index + 1]
        if prune_norm:
            self.norm = nn.Identity()
        if prune_head:
            self.reset_classifier(0, "")
        return take_indices

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """(B, in_chans, H, W) -> (B, 1 + h * w, num_features), normed and not pooled; the class token first."""
        x, _ = self._embed(x)
        x, _ = self._forward_blocks(x)
        return self.norm(x)

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """(B, N, num_features) -> (B, num_classes) logits, or (B, num_features) before the classifier."""
        x = global_pool_nlc(x, self.global_pool, self.num_prefix_tokens)
        return self.head(x, pre_logits=pre_logits)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, in_chans, H, W) -> (B, num_classes) logits."""
        x, _ = self._embed(x)
        # Where the class token alone reaches the classifier, broad attention is computed for it alone.
        x, _ = self._forward_blocks(x, num_tokens=1 if self.global_pool == "token" else None)
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


def _square_side(pos_embed: torch.Tensor) -> int:
    num_positions = pos_embed.shape[1] - 1
    side = math.isqrt(num_positions)
    if side**2 != num_positions:
        raise ValueError(f"the checkpoint's {num_positions} positions are no square grid, and cannot be resampled")
    return side


def _from_published(state_dict: dict[str, torch.Tensor], stem_stride: int) -> dict[str, torch.Tensor]:
    out = rename_published(state_dict, _RENAMES)
    patches = out.get("patch_embed.proj.weight")
    if patches is not None:
        # A linear layer over patches that were flattened row by row, the channel fastest.
        out["patch_embed.proj.weight"] = patches.unflatten(1, (PATCH_SIZE, PATCH_SIZE, -1)).permute(0, 3, 1, 2)
    if stem_stride > 1:
        # There is a position for every patch of the image, of which the tokens after the stem take the first.
        positions = out["pos_embed"]
        out["pos_embed"] = positions[:, : 1 + math.ceil(_square_side(positions) / stem_stride) ** 2]
    return out


def checkpoint_filter_fn(state_dict: dict[str, torch.Tensor], model: BViT) -> dict[str, torch.Tensor]:
    """Rename the entries of a published BViT checkpoint, and resample the positions of one for another image size."""
    state_dict = stored.unwrap(state_dict)
    if "pos_embedding" in state_dict:
        state_dict = _from_published(state_dict, model.stem_stride)
    pos_embed = state_dict.get("pos_embed")
    if pos_embed is not None and pos_embed.shape[1] != model.pos_embed.shape[1]:
        side = _square_side(pos_embed)
        resampled = resample_abs_pos_embed(pos_embed, new_size=model.grid_size, old_size=(side, side))
        state_dict = {**state_dict, "pos_embed": resampled}
    return state_dict


def _create_bvit(variant: str, pretrained: bool = False, **kwargs) -> BViT:
    return build_with_pretrained_weights(
        BViT,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg=dict(out_indices=3, feature_cls="getter"),
        **kwargs,
    )


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
