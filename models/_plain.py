"""Plain vision transformers, whose blocks see one grid of patches: timm's contract for classifiers and extractors."""
import math
from collections.abc import Callable, Sequence

import torch
from timm.layers import (
    ClassifierHead,
    PatchEmbed,
    global_pool_nlc,
    resample_abs_pos_embed,
    to_2tuple,
    trunc_normal_,
)
from timm.models import checkpoint
from timm.models._features import feature_take_indices
from torch import nn

from ._network import Network
from ._ops import check_rates, check_whole
from ._pretrained import build_with_pretrained_weights

torch.fx.wrap("resample_abs_pos_embed")  # which looks at the grid's size

PATCH_SIZE = 16
GLOBAL_POOLS = ("", "token", "avg", "avgmax", "max")


def _sides(img_size: int | tuple[int, int]) -> tuple[int, int]:
    """Height and width; raises ValueError unless they are whole numbers from 1 up."""
    sides = to_2tuple(img_size)
    if len(sides) != 2:
        raise ValueError(f"img_size must be a side, or height and width, got {img_size!r}")
    for side in sides:
        check_whole(img_size=side)
    return sides


def embed_patches(in_chans: int, embed_dim: int, **dd) -> PatchEmbed:
    """Patches of 16 x 16 pixels; (B, in_chans, H, W) -> (B, h, w, embed_dim), padded at the bottom and right."""
    return PatchEmbed(
        img_size=None, patch_size=PATCH_SIZE, in_chans=in_chans, embed_dim=embed_dim, output_fmt="NHWC",
        dynamic_img_pad=True, **dd,
    )


class PlainNetwork(Network):
    """Patches and a class token at learnt positions, blocks and a classifier, with timm's contract.

    Takes (B, in_chans, H, W) images of any size. Images that patches do not divide are padded at the bottom and right,
    and positions are resampled to the grid of the image, as timm's vision transformers do both.

    Args:
        stem: Module before the patches, NCHW in and out.
        patch_embed: By `embed_patches`.
        blocks: Each (B, 1 + h * w, C), (h, w) -> (B, 1 + h * w, C): the class token first, then the patches in rows.
        norm: Applied to the tokens after the last block.
        fc_norm: Applied to what the pooling leaves of them.
        img_size: Side, or height and width, of the images that the learnt positions are for.
        in_chans: Image channels.
        num_classes: Classes; 0 leaves the head out.
        global_pool: Pooling of the head: "token" (the class token), "avg", "max" or "avgmax" of the others, "" for
            none.
        drop_rate: Dropout before the classifier.
        stem_stride: How much the stem reduces the image's sides.

    Raises:
        ValueError: `global_pool` is unknown, or a number is out of range or no whole one.
    """

    output_fmt = "NLC"
    num_prefix_tokens = 1

    def __init__(
        self,
        stem: nn.Module,
        patch_embed: PatchEmbed,
        blocks: Sequence[nn.Module],
        norm: nn.Module,
        fc_norm: nn.Module,
        img_size: int | tuple[int, int],
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        stem_stride: int = 1,
        device=None,
        dtype=None,
    ):
        super().__init__()
        check_whole(0, num_classes=num_classes)
        check_rates(drop_rate=drop_rate)
        dd = dict(device=device, dtype=dtype)
        embed_dim = patch_embed.proj.out_channels
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.num_features = self.head_hidden_size = self.embed_dim = embed_dim
        self.reduction = PATCH_SIZE * stem_stride
        self.grid_size = tuple(math.ceil(side / self.reduction) for side in _sides(img_size))
        self.feature_info = [
            dict(num_chs=embed_dim, reduction=self.reduction, module=f"blocks.{i}") for i in range(len(blocks))
        ]
        self.grad_checkpointing = False
        self._set_global_pool(global_pool)

        self.stem = stem
        self.patch_embed = patch_embed
        self.cls_token = nn.Parameter(torch.empty(1, 1, embed_dim, **dd))
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + math.prod(self.grid_size), embed_dim, **dd))
        self.blocks = nn.Sequential(*blocks)
        self.norm = norm
        self.fc_norm = fc_norm
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
            blocks=[(r"^blocks\.(\d+)", None), (r"^norm", (99999,))],  # `fc_norm` goes with the head
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
        self._reset_head(num_classes)

    def _embed(self, x: torch.Tensor) -> tuple[torch.Tensor, tuple[int, int]]:
        """(B, in_chans, H, W) images -> (B, 1 + h * w, C) tokens at their positions, the class token first; (h, w)."""
        x = self.patch_embed(self.stem(x))
        grid_size = (x.shape[1], x.shape[2])
        pos_embed = resample_abs_pos_embed(self.pos_embed, new_size=grid_size, old_size=self.grid_size)
        cls_token = self.cls_token.expand(x.shape[0], -1, -1)
        return torch.cat([cls_token, x.flatten(1, 2)], dim=1) + pos_embed, grid_size

    def _forward_blocks(
        self, x: torch.Tensor, grid_size: tuple[int, int], take_indices: list[int] = (), stop_early: bool = False
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """The (B, N, C) tokens after the last block, and after those in `take_indices`."""
        taken = []
        for i, block in enumerate(self.blocks[: max(take_indices) + 1] if stop_early else self.blocks):
            x = checkpoint(block, x, grid_size) if self.grad_checkpointing else block(x, grid_size)
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
        """The tokens after the chosen blocks, and the final features.

        Args:
            x: (B, in_chans, H, W) images.
            indices: The last n blocks if a number, all if None, else the blocks listed.
            return_prefix_tokens: Return pairs of the image's tokens and the (B, 1, C) class token.
            norm: Apply the final norm to all of them.
            stop_early: Stop after the last block asked for; the final features are then that block's tokens, normed.
            output_fmt: "NCHW" for maps, "NLC" for tokens without the class token.
            intermediates_only: Return the intermediates alone.

        Returns:
            [(B, C, h, w) or (B, h * w, C), ...], or ((B, 1 + h * w, C) features, that list).
        """
        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError(f"output_fmt must be 'NCHW' or 'NLC', got {output_fmt!r}")
        take_indices, _ = feature_take_indices(len(self.blocks), indices)
        x, grid_size = self._embed(x)
        x, taken = self._forward_blocks(x, grid_size, take_indices, stop_early)
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
        """Drop the blocks that those in `indices` do not need; returns the indices."""
        take_indices, max_index = feature_take_indices(len(self.blocks), indices)
        self.blocks = self.blocks[: max_index + 1]
        if prune_norm:
            self.norm = nn.Identity()
        if prune_head:
            self.fc_norm = nn.Identity()
            self.reset_classifier(0, "")
        return take_indices

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """(B, in_chans, H, W) -> (B, 1 + h * w, num_features), normed and not pooled; the class token first."""
        x, _ = self._forward_blocks(*self._embed(x))
        return self.norm(x)

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """(B, N, num_features) -> (B, num_classes) logits, or (B, num_features) before the classifier."""
        x = self.fc_norm(global_pool_nlc(x, self.global_pool, self.num_prefix_tokens))
        return self.head(x, pre_logits=pre_logits)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, in_chans, H, W) -> (B, num_classes) logits."""
        return self.forward_head(self.forward_features(x))


def square_side(pos_embed: torch.Tensor) -> int:
    """The side of the grid that (1, 1 + side ** 2, C) positions are of; raises ValueError where it is no square."""
    num_positions = pos_embed.shape[1] - 1
    side = math.isqrt(num_positions)
    if side**2 != num_positions:
        raise ValueError(f"the checkpoint's {num_positions} positions are no square grid, and cannot be resampled")
    return side


def fit_positions(
    state_dict: dict[str, torch.Tensor], model: PlainNetwork, is_square: bool = False
) -> dict[str, torch.Tensor]:
    """The entries, with the positions of a network for another image size resampled.

    Args:
        state_dict: Weights under our names.
        model: The network to load.
        is_square: Whether the positions are known to be of a square grid. Otherwise those of as many as the network
            has are taken to be of its own: 14 x 14 could be 7 x 28.

    Raises:
        ValueError: The positions are of another number, and of no square grid.
    """
    pos_embed = state_dict.get("pos_embed")
    if pos_embed is None or (pos_embed.shape[1] == model.pos_embed.shape[1] and not is_square):
        return state_dict
    side = square_side(pos_embed)
    resampled = resample_abs_pos_embed(pos_embed, new_size=model.grid_size, old_size=(side, side))
    return {**state_dict, "pos_embed": resampled}


def build_plain(
    model_cls: type[PlainNetwork],
    variant: str,
    pretrained: bool,
    checkpoint_filter_fn: Callable[[dict, nn.Module], dict],
    **kwargs,
) -> PlainNetwork:
    """`build_with_pretrained_weights`, with the maps after the last three blocks as the default of `features_only`."""
    return build_with_pretrained_weights(
        model_cls,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg=dict(out_indices=3, feature_cls="getter"),
        **kwargs,
    )
