"""Name the classes of images by a trained network, one line for each image.

    python scripts/predict.py --checkpoint runs/flowers/best.pth photos/ cat.jpg --output predictions.csv
    python scripts/predict.py --model convnext_tiny photos/

A checkpoint of this repository knows its model, its image size and its classes. For any other, give --model; if it has
1000 classes, they are named as those of ImageNet-1K.
"""
import argparse
import csv
import io
import os
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import training.startup  # before torch  # noqa: F401  # isort: skip
import torch
from timm.data import ImageNetInfo, infer_imagenet_subset
from torch.utils.data import Dataset

import datasets
from models._recipe import NetworkRecipe
from tasks.classification.images import ImagePipeline
from tasks.classification.options import image_size
from tasks.networks import (
    PretrainedWeightsError,
    build_model,
    check_model,
    check_outputs,
    load_checkpoint,
    model_data_config,
    read,
)
from training import flags
from training.data import files
from training.distributed import init_distributed
from training.options import LoaderOptions
from training.precision import Precision
from utils import UsageError, UserError, replace_file, run_script, user_path


class Images(Dataset):
    """(transformed image, its index) of files."""

    def __init__(self, paths: list[Path], transform: datasets.Transform):
        self.paths, self.transform = paths, transform

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return self.transform(datasets.load_image(self.paths[index])), index


def find_images(places: list[Path]) -> list[Path]:
    """The files that were named, and the images in the folders that were, at any depth, in order.

    Raises:
        UserError: There is none.
    """
    found = []
    for place in places:
        if not place.exists():
            raise UserError(f"{place}: no such file or folder")
        if not place.is_dir():
            found.append(place)
            continue
        inside = files.find_images(place)
        found += map(Path, inside.images)
        if left_out := files.describe_left_out(inside.left_out, place):
            print(left_out, file=sys.stderr)
    if not found:
        raise UserError(f"no image in {', '.join(map(str, places))}; endings are {', '.join(files.IMAGE_EXTENSIONS)}")
    return found


def recipe_of(checkpoint: dict[str, Any], args: argparse.Namespace) -> NetworkRecipe:
    """What the network is: as the checkpoint says, or as was given.

    Raises:
        UsageError: Nothing says which model it is, or there is none of that name.
    """
    recipe = NetworkRecipe.of(checkpoint, args.model)
    if recipe.model is None:
        raise UsageError("the checkpoint does not say which model it belongs to; give --model")
    check_model(recipe.model)
    return replace(
        recipe,
        num_classes=args.nb_classes or recipe.num_classes,
        input_size=args.input_size or recipe.input_size or model_data_config(recipe.model)["input_size"][-2:],
    )


def class_names(checkpoint: dict[str, Any], num_classes: int) -> list[str]:
    """The checkpoint's classes, those of ImageNet where they are as many, or numbers."""
    if checkpoint.get("classes"):
        return checkpoint["classes"]
    subset = infer_imagenet_subset(dict(num_classes=num_classes))
    if subset is None:
        return [str(index) for index in range(num_classes)]
    return ImageNetInfo(subset).label_descriptions()


def load_network(args: argparse.Namespace) -> tuple[torch.nn.Module, NetworkRecipe, dict[str, Any]]:
    """The network, its recipe, and the checkpoint that it came from, which is empty for published weights."""
    if args.checkpoint is None and args.model is None:
        raise UsageError("give --checkpoint FILE, or --model NAME for published weights")
    checkpoint = read(args.checkpoint) if args.checkpoint else {}
    recipe = recipe_of(checkpoint, args)
    try:
        model = build_model(recipe.model, args.checkpoint is None, recipe.build_kwargs)
    except PretrainedWeightsError as error:
        raise UserError(f"{error}; --checkpoint takes a file of weights") from error
    if args.checkpoint:
        load_checkpoint(model, checkpoint, args.checkpoint, args.model_key)
    return model, recipe, checkpoint


@torch.inference_mode()
def predict(args: argparse.Namespace) -> Iterator[tuple[Path, list[tuple[str, float]]]]:
    """Each image, and its (class, probability) pairs, the most probable first.

    Raises:
        UserError: The weights or an image cannot be read.
    """
    paths = find_images(args.images)
    distributed = init_distributed(args.device)
    model, recipe, checkpoint = load_network(args)
    model.eval().to(distributed.device)
    names = class_names(checkpoint, model.num_classes)
    images = ImagePipeline(recipe.model, recipe.input_size, recipe.crop_pct)
    loader_options = LoaderOptions(batch_size=args.batch_size, num_workers=args.num_workers)
    precision = Precision.on(distributed.device, args.amp)
    for batch, indices in images.loader(Images(paths, images.transform()), loader_options, distributed):
        with precision.autocast():
            logits = model(batch)
        for index, outputs in zip(indices.tolist(), logits, strict=True):
            check_outputs(outputs, str(paths[index]))
        top = logits.float().softmax(dim=1).topk(min(args.topk, logits.shape[1]))
        for index, values, classes in zip(indices.tolist(), top.values.tolist(), top.indices.tolist(), strict=True):
            yield paths[index], [(names[c], value) for c, value in zip(classes, values, strict=True)]


def as_csv(rows: list[tuple[Path, list[tuple[str, float]]]]) -> bytes:
    """A line for each image: its path, and class_1, probability_1, class_2, ..."""
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    ranks = range(1, len(rows[0][1]) + 1)
    writer.writerow(["image", *(f"{what}_{rank}" for rank in ranks for what in ("class", "probability"))])
    for path, guesses in rows:
        writer.writerow([path, *(x for name, value in guesses for x in (name, f"{value:.6f}"))])
    return text.getvalue().encode()


def write(args: argparse.Namespace):
    """Print what is predicted, and write it as CSV where it was asked for."""
    rows = []
    for path, guesses in predict(args):
        print(f"{path}: {', '.join(f'{name} {100 * value:.1f} %' for name, value in guesses)}")
        rows.append((path, guesses))
    if args.output:
        replace_file(args.output, lambda file: file.write(as_csv(rows)))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", nargs="+", type=user_path, metavar="IMAGE_OR_FOLDER")
    parser.add_argument("--checkpoint", type=flags.path,
                        help="the weights, file or URL (default: the published ones of --model)")
    parser.add_argument("--model", help="any model that timm knows, ours included (default: the checkpoint's)")
    parser.add_argument("--model_key", help="which weights of a checkpoint to take, for example model_ema")
    parser.add_argument("--nb_classes", type=int, help="where the weights are of another number than the model's own")
    parser.add_argument("--input_size", type=image_size, metavar="PIXELS",
                        help="side of the image, or HEIGHTxWIDTH (default: the checkpoint's)")
    parser.add_argument("--topk", default=5, type=int, help="classes to name for each image")
    parser.add_argument("--output", type=user_path, metavar="FILE", help="write them as CSV too")
    parser.add_argument("--batch_size", default=32, type=int)
    parser.add_argument("--num_workers", default=min(8, os.cpu_count() or 1), type=int)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--amp", default="auto", choices=["auto", "bf16", "fp16", "off"])
    args = parser.parse_args(argv)
    for name in ("topk", "batch_size", "nb_classes"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(args, name)}")
    return run_script(lambda: write(args))


if __name__ == "__main__":
    sys.exit(main())
