"""A trained network and its transform, from the checkpoint of a run or from other weights."""
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any

import timm
import torch
from PIL import Image, ImageOps
from timm.data import create_transform, resolve_data_config
from torch import nn

from ._pretrained import stored
from ._recipe import NetworkRecipe, count_classes

Transform = Callable[[Image.Image], torch.Tensor]


def to_rgb(image: Image.Image, exif_transpose: bool = True) -> Image.Image:
    """The image in RGB, turned as its EXIF orientation says.

    Raises:
        ValueError: It has greys of more than 8 bits, which PIL would clip.
    """
    if image.mode == "F" or image.mode.startswith("I"):
        raise ValueError(f"an image of mode {image.mode} has greys of more than 8 bits: scale it to 8 first")
    if exif_transpose:
        with suppress(Exception):  # on damaged EXIF data PIL raises nearly anything
            image = ImageOps.exif_transpose(image)
    return image.convert("RGB")


def family_filter(network: nn.Module) -> Callable | None:
    """The function with which the network's family, ours or timm's, reads published checkpoints."""
    return getattr(sys.modules[type(network).__module__], "checkpoint_filter_fn", None)


def set_config(network: nn.Module, recipe: NetworkRecipe):
    """Note classes, image size and crop where timm looks for them: in `network.pretrained_cfg`."""
    config = network.pretrained_cfg
    network.pretrained_cfg = network.default_cfg = {**config, **recipe.config(config.get("label_names"))}


def transform_of(network: nn.Module, exif_transpose: bool = True) -> Transform:
    """The transform of evaluation: PIL image of any mode with 8 bits -> normalised float tensor (3, H, W)."""
    transform = create_transform(**resolve_data_config(model=network))
    transform.transforms.insert(0, partial(to_rgb, exif_transpose=exif_transpose))
    return transform


def create_trained(
    recipe: NetworkRecipe, checkpoint: dict[str, Any], source: str, weights: str | None = None
) -> nn.Module:
    """The network of a recipe with the weights of a checkpoint, in evaluation mode, on the CPU.

    Args:
        recipe: It names a model that timm knows. Classes that it does not tell are counted in the weights.
        checkpoint: As `storage.weights.read_checkpoint` returns it.
        source: Where it was read from, for messages.
        weights: Its key in the checkpoint; None for `storage.weights.default_weights`.

    Raises:
        WeightsError: One line: the model refuses the recipe's arguments, or the weights do not fit or are not finite.
    """
    key = weights or stored.default_weights(checkpoint, source)[0]
    found = stored.without_model_prefix(stored.unwrap(checkpoint, key))
    if recipe.num_classes is None:
        recipe = replace(recipe, num_classes=count_classes(found, timm.get_pretrained_cfg(recipe.model)))
    kwargs = recipe.build_kwargs
    try:
        network = timm.create_model(recipe.model, **kwargs)
    except Exception as error:  # on arguments that it does not take, a model raises nearly anything
        asked = ", ".join(f"{name}={value!r}" for name, value in kwargs.items())
        reason = " ".join(str(error).split()) or repr(error)
        raise stored.WeightsError(f"{source}: {recipe.model} cannot be built with {asked}: {reason}") from error
    try:
        stored.load_weights(network, found, family_filter(network))
    except stored.MismatchError as error:
        raise stored.WeightsError(f"{source}: {error}{NetworkRecipe.of(checkpoint).owner}") from error
    stored.check_finite(network, source)
    set_config(network, recipe)
    return network.eval()


def load(source: str, weights: str | None = None, model: str | None = None) -> tuple[nn.Module, Transform]:
    """The network of a checkpoint in evaluation mode, on the CPU, and the transform of its images.

    A checkpoint of a run says all that is needed: the model and its arguments, the classes, the image size and the
    crop. The names of the classes are `network.pretrained_cfg["label_names"]`, where they are known.

        network, transform = load("best.pth")
        probabilities = network(transform(image)[None]).softmax(dim=1)

    Args:
        source: File or URL.
        weights: Its key in the checkpoint, for example "model_ema"; None for the model's own or, of a run whose best
            metric is the EMA's and of a checkpoint of timm's train.py that has some, for the EMA weights.
        model: The model's name, for weights that do not say what they belong to; any of timm's.

    Returns:
        The network: (B, 3, H, W) -> (B, classes) logits. And its transform: PIL image -> (3, H, W).

    Raises:
        WeightsError: A ValueError in one line: the checkpoint cannot be read, names no model that timm knows, does not
            fit it, has arguments that it does not take, or holds NaN or infinite weights.
    """
    checkpoint = stored.read_checkpoint(str(source))
    source = stored.public(str(source))
    recipe = NetworkRecipe.of(checkpoint, model)
    if recipe.task != "classification":
        has_load = recipe.task in ("segmentation", "detection")
        how = f": load it by models.{recipe.task}.load" if has_load else ""
        raise stored.WeightsError(f"{source} is no classifier, but of the task {recipe.task}{how}")
    if recipe.model is None:
        raise stored.WeightsError(f"{source} does not say which model it belongs to; name it: load(..., model='NAME')")
    if not timm.is_model(recipe.model):
        raise stored.WeightsError(f"{source} is of the model {recipe.model!r}, which timm does not know")
    network = create_trained(recipe, checkpoint, source, weights)
    return network, transform_of(network, recipe.exif_transpose)
