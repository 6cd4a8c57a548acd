"""Default configs, and pretrained weights that lie outside of timm's hub."""
import warnings
from pathlib import Path
from typing import Any

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import PretrainedCfg, build_model_with_cfg, resolve_pretrained_cfg
from torch import nn

from ._network import Network
from ._recipe import NetworkRecipe, count_classes
from ._shipped import is_shipped

# The other modules of this room take it from here.
if "." in __package__:  # installed, as routedvit.models
    from ..storage import weights as stored
else:  # from the checkout
    from storage import weights as stored

# Entries of a config that name weights in other places than a file.
_SOURCES = ("url", "hf_hub_id", "state_dict")


class NoWeightsError(RuntimeError):
    """There are no weights to download, or they cannot be downloaded; the text ends with what to pass instead.

    Attributes:
        reason: The text without that.
    """

    def __init__(self, variant: str, reason: str):
        super().__init__(
            f"{reason}; pass a file: timm.create_model({variant!r}, pretrained=True, "
            "pretrained_cfg_overlay=dict(file='/path/to/file.pth'))"
        )
        self.reason = reason


def imagenet_cfg(**kwargs) -> dict:
    """A default config of timm for ImageNet-1K at 224; `kwargs` extend or override it.

    Tags say what weights were trained on. timm takes a config without `url` or `file` to have none, and
    `list_models(pretrained=True)` leaves it out; it needs `origin_url`, the page to download them from by hand, or,
    where they were never published, the tag "untrained".
    """
    common = dict(
        url="",
        num_classes=1000,
        input_size=(3, 224, 224),
        min_input_size=(3, 32, 32),
        pool_size=(7, 7),
        crop_pct=0.875,
        interpolation="bicubic",
        mean=IMAGENET_DEFAULT_MEAN,
        std=IMAGENET_DEFAULT_STD,
        classifier="head.fc",
    )
    return common | kwargs


def _check_has_weights(variant: str, cfg: PretrainedCfg):
    """Raises NoWeightsError, which says where to get weights, where the config has none."""
    if cfg.has_weights or cfg.state_dict:
        return
    if cfg.tag == "untrained":
        raise NoWeightsError(variant, f"the weights of {variant} were never published")
    raise NoWeightsError(
        variant,
        f"no program can download the weights of {variant}: get them by hand, from the page where its authors offer "
        f"them, {cfg.origin_url}",
    )


def build_with_pretrained_weights(model_cls: type[Network], variant: str, pretrained: bool, **kwargs) -> nn.Module:
    """timm's `build_model_with_cfg`, for weights that lie behind the `url` of a default config, or in its `file`.

    A local file is given as in timm: `create_model(name, pretrained=True, pretrained_cfg_overlay=dict(file=path))`.
    Of a checkpoint the weights are loaded that `storage.weights.default_weights` names: the model's own, or the EMA's
    where a run's best metric is theirs, or timm's train.py wrote some. The model has as many classes as the weights
    unless `num_classes` says another number; a warning tells so for a file of the caller's, and of arguments that the
    run had.

    Raises:
        RuntimeError: The file cannot be read; NoWeightsError where there are no weights to download, or they cannot be.
        ValueError: The network has no such `output_stride`.
    """
    if "output_stride" in kwargs:
        model_cls.check_output_stride(kwargs["output_stride"])
    if not pretrained:
        return build_model_with_cfg(model_cls, variant, pretrained, **kwargs)
    overlay = dict(kwargs.pop("pretrained_cfg_overlay", None) or {})
    if any(overlay.get(key) for key in _SOURCES):  # which a file in the default config would outrank
        overlay.setdefault("file", None)
    cfg = resolve_pretrained_cfg(variant, kwargs.get("pretrained_cfg"), overlay)
    _check_has_weights(variant, cfg)
    if cfg.source in ("hf-hub", "local-dir") or (cfg.hf_hub_id and not cfg.file and not cfg.state_dict):
        return build_model_with_cfg(model_cls, variant, pretrained, pretrained_cfg_overlay=overlay, **kwargs)
    checkpoint, weights = _read_weights(variant, cfg, kwargs.pop("cache_dir", None))
    recipe = NetworkRecipe.of(checkpoint)
    num_classes = count_classes(weights, cfg) or cfg.num_classes
    if cfg.file and not is_shipped(cfg.file):  # what its owner trained, not what was published
        _warn_of_differences(cfg.file, recipe, num_classes, kwargs)
    # timm keeps the classifier where its config has as many classes as the model.
    said = {**recipe.config(cfg.label_names), **overlay, "num_classes": num_classes}
    overlay = {**said, "file": None, "state_dict": weights}
    model = build_model_with_cfg(model_cls, variant, True, pretrained_cfg_overlay=overlay, **kwargs)
    # The model's config says where the weights came from, and need not keep a second copy of them.
    model.pretrained_cfg = model.default_cfg = dict(model.pretrained_cfg, file=cfg.file, state_dict=None)
    return model


def _read_weights(
    variant: str, cfg: PretrainedCfg, cache_dir: str | Path | None
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """The checkpoint in memory, in the file, or behind the URL, of a config; and the weights in it.

    Raises:
        RuntimeError: It cannot be read; NoWeightsError where it cannot be downloaded.
    """
    try:
        checkpoint = cfg.state_dict or stored.read_checkpoint(str(cfg.file or cfg.url), cache_dir)
        key = stored.default_weights(checkpoint, variant)[0]
        weights = stored.without_model_prefix(stored.unwrap(checkpoint, key))
        # For other `in_chans` timm adds up weights in the type that they have.
        return checkpoint, {name: value.float() if _is_half(value) else value for name, value in weights.items()}
    except stored.WeightsError as error:
        if cfg.file or cfg.state_dict:
            name = stored.public(str(cfg.file or "state_dict"))
            raise RuntimeError(f"{name} cannot be read as weights: {error}") from error
        advice = f": download them by hand, from {cfg.origin_url}" if cfg.origin_url else ""
        raise NoWeightsError(variant, f"the weights of {variant} could not be loaded ({error}){advice}") from error


def _is_half(value: torch.Tensor) -> bool:
    return value.dtype in (torch.float16, torch.bfloat16)


def _as_list(value: Any) -> Any:
    """A recipe in YAML has lists where a model may be given tuples."""
    return list(value) if isinstance(value, tuple) else value


def _warn_of_differences(file: str, recipe: NetworkRecipe, num_classes: int, kwargs: dict[str, Any]):
    """Warn where the model that is built is not the one that the weights in `file` were trained in."""
    asked = 0 if kwargs.get("features_only") else kwargs.get("num_classes", num_classes)
    if asked not in (0, num_classes):  # without a classifier, none is untrained
        message = f"{file} has {num_classes} classes, and the model {asked}: its classifier is untrained"
        warnings.warn(message, stacklevel=2)
    others = [f"{k}={v!r}" for k, v in recipe.kwargs.items() if _as_list(kwargs.get(k)) != _as_list(v)]
    if others:
        warnings.warn(f"{file} was trained with {', '.join(others)}; give the model the same", stacklevel=2)
