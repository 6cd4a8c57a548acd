"""The classifier that a script's flags name: a checkpoint's, or a published one."""
import argparse
import sys
from dataclasses import replace
from typing import Any

import torch
from tqdm import tqdm

from models import NetworkRecipe, create_trained
from storage import weights
from tasks.networks import check_model, model_data_config, pretrained_num_classes, read
from tasks.options import image_size
from training import flags
from training.task import reading_weights
from utils import UsageError, UserError

from .names import class_names
from .published import DEFAULT_MODEL, build_published


def add_network_flags(parser: argparse.ArgumentParser, or_model: str = ""):
    """The flags of `load_network`; `or_model` says what else --model may be."""
    parser.add_argument("--checkpoint", type=flags.path,
                        help="the weights, file or URL (default: the published ones of --model)")
    parser.add_argument("--model", help="any model that timm knows, ours included (default: the checkpoint's; without "
                                        f"one {DEFAULT_MODEL}){or_model}")
    parser.add_argument("--model_key", help="which weights of a checkpoint to take, for example model_ema")
    parser.add_argument("--nb_classes", type=int, help="what the weights must have (default: what they have)")
    parser.add_argument("--input_size", type=image_size, metavar="PIXELS",
                        help="side of the image, or HEIGHTxWIDTH (default: the checkpoint's)")
    parser.set_defaults(use_test_size=False)


def recipe_of(checkpoint: dict[str, Any], args: argparse.Namespace) -> NetworkRecipe:
    """What the network is, and which images it takes: as the checkpoint says, or as was given.

    Raises:
        UsageError: Nothing says which model it is, or there is none of that name.
    """
    recipe = NetworkRecipe.of(checkpoint, args.model)
    if recipe.model is None:
        raise UsageError("the checkpoint does not say which model it belongs to; give --model")
    check_model(recipe.model)
    if args.use_test_size:
        config = model_data_config(recipe.model, use_test_size=True)
        recipe = replace(recipe, input_size=config["input_size"][-2:], crop_pct=config["crop_pct"])
    return replace(
        recipe,
        num_classes=args.nb_classes or recipe.num_classes,
        input_size=args.input_size or recipe.input_size or model_data_config(recipe.model)["input_size"][-2:],
    )


def load_published(args: argparse.Namespace) -> tuple[torch.nn.Module, NetworkRecipe]:
    """The network with its published weights, and its recipe; says which classes it has, where they are not ImageNet's.
    """
    recipe = recipe_of({}, args)
    published = pretrained_num_classes(recipe.model)
    if recipe.num_classes not in (None, published):
        raise UsageError(f"the published weights of {recipe.model} have {published} classes, not {recipe.num_classes}")
    model = build_published(recipe.model, recipe.build_kwargs)
    if model.pretrained_cfg.get("label_names"):
        names = class_names({}, model)
        tqdm.write(f"{recipe.model}'s own weights, for {len(names)} classes: {', '.join(names)}", file=sys.stderr)
    return model, recipe


def load_network(args: argparse.Namespace) -> tuple[torch.nn.Module, NetworkRecipe, dict[str, Any]]:
    """The network, its recipe, and the checkpoint that it came from, which is empty for published weights.

    Raises:
        UserError: The weights cannot be read, or are of a segmenter or detector.
    """
    if args.checkpoint is None:
        return *load_published(args), {}
    checkpoint = read(args.checkpoint)
    task = NetworkRecipe.of(checkpoint).task
    if task != "classification":
        raise UserError(f"{args.checkpoint} is no classifier, but of the task {task}")
    recipe = recipe_of(checkpoint, args)
    key, notes = (args.model_key, []) if args.model_key else weights.default_weights(checkpoint, args.checkpoint)
    for note in notes:
        tqdm.write(note, file=sys.stderr)
    with reading_weights():
        return create_trained(recipe, checkpoint, args.checkpoint, key), recipe, checkpoint
