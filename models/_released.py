"""What a model's registration says, and weights that were released outside of timm's hub."""
import argparse
import pickle
import re
import shutil
from pathlib import Path

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg
from torch import nn


def imagenet_cfg(**kwargs) -> dict:
    """A default config of timm for ImageNet-1K at 224; `kwargs` add to it or win over it."""
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


def unwrap(checkpoint: dict) -> dict[str, torch.Tensor]:
    """The weights of a checkpoint, which may lie bare in it, or as "model" or "state_dict"."""
    for key in ("model", "state_dict"):
        checkpoint = checkpoint.get(key, checkpoint)
    return checkpoint


def rename(name: str, renames: list[tuple[str, str]]) -> str:
    """A published name as ours: every (pattern, replacement) in its turn."""
    for pattern, replacement in renames:
        name = re.sub(pattern, replacement, name)
    return name


def build_with_released_weights(model_cls: type[nn.Module], variant: str, pretrained: bool, **kwargs) -> nn.Module:
    """timm's `build_model_with_cfg`, for weights that lie behind the `url` of a default config.

    Takes a local file in timm's way: `create_model(name, pretrained=True, pretrained_cfg_overlay=dict(file=path))`.

    Raises:
        RuntimeError: The weights cannot be downloaded or read; says what to do instead.
    """
    if not pretrained or "file" in (kwargs.get("pretrained_cfg_overlay") or {}):
        return build_model_with_cfg(model_cls, variant, pretrained, **kwargs)
    # A folder for each model: file-sharing services serve all files under the same name.
    cache = Path(kwargs.pop("cache_dir", None) or torch.hub.get_dir()) / "checkpoints" / variant
    try:
        # The published files hold the command line of their training, an inert Namespace, beside the weights.
        with torch.serialization.safe_globals([argparse.Namespace]):
            return build_model_with_cfg(model_cls, variant, pretrained, cache_dir=str(cache), **kwargs)
    except (OSError, EOFError, pickle.UnpicklingError) as error:
        # What was downloaded may be a page that says so; it must not be taken for the weights the next time.
        shutil.rmtree(cache, ignore_errors=True)
        raise RuntimeError(
            f"the released weights of {variant} could not be had ({str(error).splitlines()[0]}). Download them by "
            f"hand, from the page that timm.get_pretrained_cfg({variant!r}).origin_url names, and pass the file: "
            f"timm.create_model({variant!r}, pretrained=True, "
            "pretrained_cfg_overlay=dict(file='/path/to/file.pth'))"
        ) from error
