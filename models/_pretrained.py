"""What a model's registration says, and weights that were released outside of timm's hub."""
from pathlib import Path

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import PretrainedCfg, build_model_with_cfg, resolve_pretrained_cfg
from torch import nn

if "." in __package__:  # installed, as routedvit.models
    from ..storage.weights import WeightsError, read_checkpoint, unwrap
else:  # from the checkout
    from storage.weights import WeightsError, read_checkpoint, unwrap

# Tags say what weights were trained on. A config without `url` has none for timm, and `list_models(pretrained=True)`
# leaves it out; under "in1k" its authors nonetheless offer weights, on the page in `origin_url`, to be had by hand.
UNTRAINED = "untrained"


def imagenet_cfg(**kwargs) -> dict:
    """A default config of timm for ImageNet-1K at 224; `kwargs` add to it or win over it.

    `origin_url` is needed: weights that no program can download are to be found there.
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


def _pass_the_file(variant: str) -> str:
    return (
        f"pass the file: timm.create_model({variant!r}, pretrained=True, "
        "pretrained_cfg_overlay=dict(file='/path/to/file.pth'))"
    )


def _check_has_weights(variant: str, cfg: PretrainedCfg):
    """Raises RuntimeError where there is nothing to load, and says where weights may come from."""
    if cfg.has_weights or cfg.state_dict:
        return
    if cfg.tag == UNTRAINED:
        raise RuntimeError(f"no weights of {variant} were released; train it, and {_pass_the_file(variant)}")
    raise RuntimeError(
        f"no program can download the weights of {variant}. Get them by hand, from the page where its authors offer "
        f"them, {cfg.origin_url}, and {_pass_the_file(variant)}"
    )


def build_with_pretrained_weights(model_cls: type[nn.Module], variant: str, pretrained: bool, **kwargs) -> nn.Module:
    """timm's `build_model_with_cfg`, for weights that lie behind the `url` of a default config, or in a file.

    Takes a local file in timm's way: `create_model(name, pretrained=True, pretrained_cfg_overlay=dict(file=path))`.
    Where a file holds a moving average too, it takes the weights themselves, as from a `url`.

    Raises:
        RuntimeError: There are no weights to download, or they cannot be downloaded or read; says what to do instead.
    """
    if not pretrained:
        return build_model_with_cfg(model_cls, variant, pretrained, **kwargs)
    overlay = kwargs.pop("pretrained_cfg_overlay", None) or {}
    cfg = resolve_pretrained_cfg(variant, kwargs.get("pretrained_cfg"), overlay)
    _check_has_weights(variant, cfg)
    from_elsewhere = cfg.source in ("hf-hub", "local-dir") or cfg.state_dict or (cfg.hf_hub_id and not cfg.file)
    if from_elsewhere:
        return build_model_with_cfg(model_cls, variant, pretrained, pretrained_cfg_overlay=overlay, **kwargs)
    weights = _read_weights(variant, cfg, kwargs.pop("cache_dir", None))
    overlay = dict(overlay, file=None, state_dict=weights)
    model = build_model_with_cfg(model_cls, variant, True, pretrained_cfg_overlay=overlay, **kwargs)
    # The model's own description says where the weights came from, and need not hold them once more.
    model.pretrained_cfg = dict(model.pretrained_cfg, file=cfg.file, state_dict=None)
    return model


def _read_weights(variant: str, cfg: PretrainedCfg, cache_dir: str | Path | None) -> dict[str, torch.Tensor]:
    """The weights in the file, or behind the URL, of a config. Raises RuntimeError, which says what to do instead."""
    try:
        return unwrap(read_checkpoint(str(cfg.file or cfg.url), cache_dir))
    except WeightsError as error:
        if cfg.file:
            raise RuntimeError(f"{cfg.file} cannot be read as weights: {error}") from error
        raise RuntimeError(
            f"the weights of {variant} could not be had from {cfg.url} ({error}). Download them by hand, "
            f"from {cfg.origin_url}, and {_pass_the_file(variant)}"
        ) from error
