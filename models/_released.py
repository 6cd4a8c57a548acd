"""Weights that were released outside of timm's hub."""
import argparse
import pickle
import shutil
from pathlib import Path

import torch
from timm.models import build_model_with_cfg
from torch import nn


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
