"""What families share: for the hierarchical ones, blocks, stages, and timm's contract for a network made of them.

Maps are held channels last, so that linear layers, layer norms, routing and depthwise convolutions all read the same
memory and nothing is transposed between them.
"""
import operator
from collections.abc import Callable, Sequence

import torch
from timm.layers import ClassifierHead, DropPath, register_notrace_function, trunc_normal_
from timm.models import checkpoint_seq
from timm.models._features import feature_take_indices
from torch import nn

from ops import conv_channels_last

from ._pretrained import build_with_released_weights, rename_published, unwrap


def split_qkv(qkv: torch.Tensor, num_heads: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(B, N, 3 * heads * head_dim) packed projection -> query, key and value, views of (B, heads, N, head_dim)."""
    return qkv.unflatten(-1, (3, num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)


def check_per_stage(num_stages: int, kind: str = "stages", **settings):
    """Raises ValueError unless each of `settings`, by name, has one entry for each of the `num_stages` stages."""
    for name, values in settings.items():
        if not isinstance(values, (tuple, list)) or len(values) != num_stages:
            raise ValueError(f"{name} must have one entry for each of the {num_stages} {kind}, got {values}")


def check_divides(name: str, divisors: int | Sequence[int], what: str, numbers: int | Sequence[int]):
    """Raises ValueError unless `divisors`, one for all or one for each, divide the `numbers`, and all are positive.

    `name` and `what` are the names of the divisors and of the numbers.
    """
    each_number = [numbers] if isinstance(numbers, int) else numbers
    each_divisor = [divisors] * len(each_number) if isinstance(divisors, int) else divisors
    if any(n < 1 or number < 1 or number % n for n, number in zip(each_divisor, each_number, strict=True)):
        raise ValueError(f"{name} must divide {what} {numbers}, got {divisors}")


def channels_last(x: torch.Tensor) -> torch.Tensor:
    """(B, C, H, W) in channels-last memory; torch.func.vmap knows of no memory formats, but of permutations."""
    return x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)


@register_notrace_function
def channels_last_image(x: torch.Tensor) -> torch.Tensor:
    """(B, C, H, W) in channels-last memory, of which torch.compile takes H and W for constants.

    A graph for each image size takes seconds to compile. One for all sizes takes minutes, if it succeeds: each stage's
    regions add another rounded division, and the compiler reasons about all of them, nested, at every reshape.
    """
    for side in x.shape[2:]:
        operator.index(side)
    return channels_last(x)


class Block(nn.Module):
    """Depthwise position encoding, attention and MLP, each on a residual path.

    Args:
        dim: Channels.
        attn: (B, H, W, dim) -> (B, H, W, dim).
        mlp: (B, H, W, dim) -> (B, H, W, dim).
        pos_conv: Have the position encoding, a 3 x 3 depthwise convolution.
        drop_path: Stochastic depth of attention and MLP.
    """

    def __init__(
        self,
        dim: int,
        attn: nn.Module,
        mlp: nn.Module,
        pos_conv: bool = True,
        drop_path: float = 0.0,
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd = dict(device=device, dtype=dtype)
        self.pos_embed = nn.Conv2d(dim, dim, kernel_size=3, padding=1, groups=dim, **dd) if pos_conv else None
        self.norm1 = nn.LayerNorm(dim, eps=1e-6, **dd)
        self.attn = attn
        self.drop_path1 = DropPath(drop_path)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6, **dd)
        self.mlp = mlp
        self.drop_path2 = DropPath(drop_path)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, H, W, dim) -> (B, H, W, dim)."""
        if self.pos_embed is not None:
            x = x + conv_channels_last(self.pos_embed, x)
        x = x + self.drop_path1(self.attn(self.norm1(x)))
        return x + self.drop_path2(self.mlp(self.norm2(x)))


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
    """Halve a map between stages: convolution and norm, or norm and convolution ("stl" layout)."""

    def __init__(self, dim: int, out_dim: int, patchify: bool = False, device=None, dtype=None):
        dd = dict(device=device, dtype=dtype)
        super().__init__()
        if patchify:
            self.norm = nn.BatchNorm2d(dim, **dd)
            self.conv = nn.Conv2d(dim, out_dim, kernel_size=2, stride=2, **dd)
        else:
            self.conv = nn.Conv2d(dim, out_dim, kernel_size=3, stride=2, padding=1, **dd)
            self.norm = nn.BatchNorm2d(out_dim, **dd)


class Stage(nn.Module):
    """Optional downsampling, then blocks. NCHW in and out, channels last in memory."""

    def __init__(self, downsample: nn.Module, blocks: list[nn.Module]):
        super().__init__()
        self.grad_checkpointing = False
        self.downsample = downsample
        self.blocks = nn.Sequential(*blocks)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) -> (B, C', H', W')."""
        x = self.downsample(x).permute(0, 2, 3, 1)
        if self.grad_checkpointing and not torch.jit.is_scripting():
            x = checkpoint_seq(self.blocks, x)
        else:
            x = self.blocks(x)
        return x.permute(0, 3, 1, 2)


class HierarchicalNetwork(nn.Module):
    """Stem, stages, norm and classifier, with timm's contract for image classifiers and feature extractors.

    Takes (B, in_chans, H, W) images from 32 x 32 up.

    Args:
        stem: What comes before the stages, NCHW in and out.
        stages: Each (B, C, H, W) -> (B, C', H', W').
        dims: Channels after each stage.
        norm: Applied to the last stage's map.
        in_chans: Image channels.
        num_classes: Classes; 0 leaves the head out.
        global_pool: Pooling of the head, "avg", "max", ..., or "" for none.
        drop_rate: Dropout before the classifier.
        token_head: Have a second classifier, of every token of the last map, for training with token labels (Jiang et
            al., https://arxiv.org/abs/2104.10858).
    """

    def __init__(
        self,
        stem: nn.Module,
        stages: list[nn.Module],
        dims: tuple[int, ...],
        norm: nn.Module,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        token_head: bool = False,
        device=None,
        dtype=None,
    ):
        super().__init__()
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.num_features = dims[-1]
        self.feature_info = [
            dict(num_chs=dim, reduction=2 ** (i + 2), module=f"stages.{i}") for i, dim in enumerate(dims)
        ]
        self.stem = stem
        self.stages = nn.Sequential(*stages)
        self.norm = norm
        self.head = ClassifierHead(
            self.num_features, num_classes, global_pool, drop_rate, device=device, dtype=dtype
        )
        self.head_hidden_size = self._pooled_features()
        self.token_head = self._make_token_head(device=device, dtype=dtype) if token_head else None
        self.apply(self._init_weights)

    @staticmethod
    def _init_weights(module: nn.Module):
        if isinstance(module, nn.Linear):
            trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)

    def _make_token_head(self, **dd) -> nn.Module:
        return nn.Linear(self.num_features, self.num_classes, **dd) if self.num_classes else nn.Identity()

    def _pooled_features(self) -> int:
        return self.num_features * self.head.global_pool.feat_mult()

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        return set()

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict:
        return dict(
            stem=r"^stem",
            blocks=r"^stages\.(\d+)" if coarse else [
                (r"^stages\.(\d+)\.downsample", (0,)),
                (r"^stages\.(\d+)\.blocks\.(\d+)", None),
                (r"^norm", (99999,)),
            ],
        )

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True):
        for stage in self.stages:
            stage.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None):
        """Replace the classifiers by new ones of `num_classes` classes (0: none), and the pooling if one is given."""
        self.num_classes = num_classes
        self.head.reset(num_classes, pool_type=global_pool)
        self.head_hidden_size = self._pooled_features()
        if self.token_head is not None:
            parameter = next(self.parameters())
            self.token_head = self._make_token_head(device=parameter.device, dtype=parameter.dtype)
            self.token_head.apply(self._init_weights)

    def forward_intermediates(
        self,
        x: torch.Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[torch.Tensor] | tuple[torch.Tensor, list[torch.Tensor]]:
        """The maps after the chosen stages, and the final features.

        Args:
            x: (B, in_chans, H, W) images.
            indices: The last n stages if a number, all if None, else the stages listed.
            norm: Apply the final norm to the last stage's map.
            stop_early: Stop after the last stage asked for; the final features are then that stage's map.
            output_fmt: "NCHW", the one format there is.
            intermediates_only: Return the maps alone.

        Returns:
            [(B, C_i, H_i, W_i), ...], or ((B, C, H / 32, W / 32) features, that list).
        """
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt must be 'NCHW', got {output_fmt!r}")
        take_indices, max_index = feature_take_indices(len(self.stages), indices)
        last_index = len(self.stages) - 1
        stages = self.stages[: max_index + 1] if stop_early else self.stages
        intermediates = []
        x = self.stem(channels_last_image(x))
        for i, stage in enumerate(stages):
            x = stage(x)
            if i in take_indices:
                intermediates.append(self.norm(x) if norm and i == last_index else x)
        if intermediates_only:
            return intermediates
        if i == last_index:
            x = self.norm(x)
        return x, intermediates

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop the layers that the stages in `indices` do not need; returns those stages' indices."""
        take_indices, max_index = feature_take_indices(len(self.stages), indices)
        truncated = max_index < len(self.stages) - 1
        self.stages = self.stages[: max_index + 1]
        if prune_norm or truncated:
            self.norm = nn.Identity()
        if truncated:
            self.num_features = self.head.in_features = self.feature_info[max_index]["num_chs"]
        if prune_head or truncated:
            self.reset_classifier(0, "")
        return take_indices

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """(B, in_chans, H, W) -> (B, num_features, H / 32, W / 32), normed and not pooled."""
        x = self.stem(channels_last_image(x))
        return self.norm(self.stages(x))

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """(B, num_features, h, w) -> (B, num_classes) logits, or (B, num_features) before the classifier."""
        return self.head(x, pre_logits=pre_logits)

    def forward(self, x: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """(B, in_chans, H, W) -> (B, num_classes) logits.

        In training mode a network with a token head also returns the tokens' logits: (B, num_classes) and
        (B, H / 32, W / 32, num_classes). Evaluation leaves them out, so that the logits are those of the network
        without that head; LV-ViT's and VOLO's add half of their maximum over the tokens.
        """
        x = self.forward_features(x)
        logits = self.forward_head(x)
        if self.token_head is None or not self.training:
            return logits
        return logits, self.token_head(x.permute(0, 2, 3, 1))


def build_hierarchical(
    model_cls: type[HierarchicalNetwork],
    variant: str,
    pretrained: bool,
    checkpoint_filter_fn: Callable[[dict, nn.Module], dict],
    **kwargs,
) -> HierarchicalNetwork:
    """`build_with_released_weights`, with the maps after all four stages as the default of `features_only`."""
    return build_with_released_weights(
        model_cls,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg=dict(out_indices=(0, 1, 2, 3), flatten_sequential=True),
        **kwargs,
    )


def fit_token_head(state_dict: dict[str, torch.Tensor], model: nn.Module) -> dict[str, torch.Tensor]:
    """The entries with the token head that `model` has: none if it has none, its own where theirs does not fit."""
    own = {name: value for name, value in model.state_dict().items() if name.startswith("token_head.")}
    fits = {name: name in state_dict and state_dict[name].shape == value.shape for name, value in own.items()}
    if all(fits.values()) and not any(name.startswith("token_head.") and name not in own for name in state_dict):
        return state_dict
    out = {name: value for name, value in state_dict.items() if not name.startswith("token_head.")}
    return out | {name: state_dict[name] if fits[name] else value for name, value in own.items()}


# Published name -> ours, in what the BiFormer and DeBiFormer checkpoints have in common.
_COMMON_RENAMES = [
    (r"^downsample_layers\.0\.0\.", r"stem.conv1."),
    (r"^downsample_layers\.0\.1\.", r"stem.norm1."),
    (r"^downsample_layers\.0\.3\.", r"stem.conv2."),
    (r"^downsample_layers\.0\.4\.", r"stem.norm2."),
    (r"^stages\.(\d+)\.(\d+)\.", r"stages.\1.blocks.\2."),
    (r"^head\.(weight|bias)$", r"head.fc.\1"),
]


def _downsample_renames(state_dict: dict[str, torch.Tensor]) -> list[tuple[str, str]]:
    """Of what is between the stages: the conv layout has the convolution first, the stl layout the norm."""
    renames = []
    for i in range(1, 4):
        first = state_dict.get(f"downsample_layers.{i}.0.weight")
        parts = ("conv", "norm") if first is not None and first.ndim == 4 else ("norm", "conv")
        renames += [
            (rf"^downsample_layers\.{i}\.{j}\.", f"stages.{i}.downsample.{part}.") for j, part in enumerate(parts)
        ]
    return renames


def rename_biformer(
    state_dict: dict[str, torch.Tensor], model: nn.Module, renames: list[tuple[str, str]]
) -> dict[str, torch.Tensor]:
    """The entries of a checkpoint in BiFormer's published layout under our names; our own pass unchanged.

    Args:
        state_dict: The checkpoint, or what it holds as "model" or "state_dict".
        model: The network to load; 1 x 1 convolutions of the checkpoint that are linear layers in it are reshaped.
        renames: (pattern, replacement) of the family's own names, tried in this order after the common ones.
    """
    state_dict = fit_token_head(unwrap(state_dict), model)
    if "stem.conv1.weight" in state_dict:
        return state_dict
    out = rename_published(state_dict, [*_COMMON_RENAMES, *_downsample_renames(state_dict), *renames])
    linear = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    return {name: value.flatten(1) if name in linear and value.ndim == 4 else value for name, value in out.items()}
