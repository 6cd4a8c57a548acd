"""Networks of stages, each of which halves the map: timm's contract for classifiers and feature extractors."""
from collections.abc import Callable

import torch
from timm.layers import ClassifierHead
from timm.models import checkpoint, checkpoint_seq
from timm.models._features import feature_take_indices
from torch import nn

from ._layers import channels_last_image
from ._network import Network, NotScriptable
from ._ops import channels_first, check_rates, check_whole
from ._pretrained import build_with_pretrained_weights

torch.fx.wrap("channels_last_image")  # which looks at the image's size


def dilation_of(stage: int, output_stride: int) -> int:
    """How many times finer a stage's map is than without `output_stride`; that of 32 asks for nothing."""
    return 1 if output_stride == 32 else max(1, 2 ** (stage + 2) // output_stride)


class Stage(NotScriptable, nn.Module):
    """Optional downsampling, then blocks. NCHW in and out, channels last in memory.

    Args:
        downsample: (B, C, H, W) -> (B, C', H', W').
        blocks: Each (B, H', W', C') -> (B, H', W', C').
        checkpoint_downsample: Whether gradient checkpointing recomputes the downsampling too, in which batch norms then
            update their statistics twice, as those of blocks do.
    """

    def __init__(self, downsample: nn.Module, blocks: list[nn.Module], checkpoint_downsample: bool = False):
        super().__init__()
        self.grad_checkpointing = False
        self.checkpoint_downsample = checkpoint_downsample
        self.downsample = downsample
        self.blocks = nn.Sequential(*blocks)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) -> (B, C', H', W')."""
        if self.grad_checkpointing and self.checkpoint_downsample:
            # Not reentrant, whatever timm is set to: an image needs no gradient, and then no parameter would get one.
            x = checkpoint(self.downsample, x, use_reentrant=False)
        else:
            x = self.downsample(x)
        x = x.permute(0, 2, 3, 1)
        x = checkpoint_seq(self.blocks, x) if self.grad_checkpointing else self.blocks(x)
        return channels_first(x)


class HierarchicalNetwork(Network):
    """Stem, stages, norm and classifier, with timm's contract for image classifiers and feature extractors.

    Takes (B, in_chans, H, W) images from 32 x 32 up.

    Args:
        stem: Module before the stages, NCHW in and out.
        stages: Each (B, C, H, W) -> (B, C', H', W').
        dims: Channels after each stage.
        norm: Applied to the last stage's map.
        in_chans: Image channels.
        num_classes: Classes; 0 leaves the head out.
        global_pool: Pooling of the head, "avg", "max", ..., or "" for none.
        drop_rate: Dropout before the classifier.
        token_head: Whether to have a second classifier, for every token of the last map, for training with token labels
            (Jiang et al., https://arxiv.org/abs/2104.10858).
        output_stride: Stride of the last map: of the stages that would go beyond it, which do not halve theirs.

    Raises:
        ValueError: `num_classes` or `drop_rate` is out of range, or the stages have another `output_stride`.
    """

    output_strides = (32,)

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
        output_stride: int = 32,
        device=None,
        dtype=None,
    ):
        super().__init__()
        check_whole(0, num_classes=num_classes)
        check_rates(drop_rate=drop_rate)
        self.check_output_stride(output_stride)
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.num_features = dims[-1]
        self.feature_info = [
            dict(num_chs=dim, reduction=2 ** (i + 2) // dilation_of(i, output_stride), module=f"stages.{i}")
            for i, dim in enumerate(dims)
        ]
        self.stem = stem
        self.stages = nn.Sequential(*stages)
        self.norm = norm
        self.head = ClassifierHead(
            self.num_features, num_classes, global_pool, drop_rate, device=device, dtype=dtype
        )
        self.head_hidden_size = self._pooled_features()
        self.token_head = self._make_token_head(device=device, dtype=dtype) if token_head else None
        self.init_weights(needs_reset=False)

    def _make_token_head(self, **dd) -> nn.Module:
        return nn.Linear(self.num_features, self.num_classes, **dd) if self.num_classes else nn.Identity()

    def _pooled_features(self) -> int:
        return self.num_features * self.head.global_pool.feat_mult()

    def no_weight_decay(self) -> set[str]:
        return set()

    def group_matcher(self, coarse: bool = False) -> dict:
        return dict(
            stem=r"^stem",
            blocks=r"^stages\.(\d+)" if coarse else [
                (r"^stages\.(\d+)\.downsample", (0,)),
                (r"^stages\.(\d+)\.blocks\.(\d+)", None),
                (r"^norm", (99999,)),
            ],
        )

    def set_grad_checkpointing(self, enable: bool = True):
        for stage in self.stages:
            stage.grad_checkpointing = enable

    def get_classifier(self) -> nn.Module:
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None):
        """Replace the classifiers by new ones of `num_classes` classes (0: none), and the pooling if one is given."""
        self.num_classes = num_classes
        self._reset_head(num_classes, global_pool)
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
            [(B, C_i, H_i, W_i), ...], or ((B, C, h, w) features, that list).
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
        """(B, in_chans, H, W) -> (B, num_features, h, w), normed and not pooled."""
        x = self.stem(channels_last_image(x))
        return self.norm(self.stages(x))

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """(B, num_features, h, w) -> (B, num_classes) logits, or (B, num_features) before the classifier."""
        return self.head(x, pre_logits=pre_logits)

    def forward(self, x: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """(B, in_chans, H, W) -> (B, num_classes) logits.

        In training mode a network with a token head also returns the tokens' logits: (B, num_classes) and
        (B, h, w, num_classes). Evaluation leaves them out, so that the logits are those of the network
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
    num_stages: int = 4,
    **kwargs,
) -> HierarchicalNetwork:
    """`build_with_pretrained_weights`, with the maps after all stages as the default of `features_only`."""
    return build_with_pretrained_weights(
        model_cls,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg=dict(out_indices=tuple(range(num_stages)), flatten_sequential=True),
        **kwargs,
    )
