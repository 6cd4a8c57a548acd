"""Label maps of images, by a segmenter: written as PNGs with a palette, and as overlays."""
import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset
from tqdm import tqdm

from models import NetworkRecipe
from models.segmentation import NoBackboneError, Segmenter, SegmenterRecipe, create_trained
from storage.weights import default_weights
from tasks.networks import model_data_config, read
from tasks.options import image_size
from tasks.segmentation.inference import Inference
from tasks.segmentation.labels import overlay, write_label
from tasks.segmentation.options import ViewOptions
from tasks.segmentation.transforms import Views
from training.data.images import load_image
from training.data.loader import build_loader
from training.distributed import init_distributed
from training.options import LoaderOptions
from training.precision import Precision
from training.task import NonFiniteOutputError, reading_weights
from utils import UsageError, UserError, replace_file

from .images import Prediction

# Flags of predict.py that are for classifiers alone.
_OF_CLASSIFIERS = ("nb_classes", "input_size", "use_test_size")


@dataclass(frozen=True)
class Item:
    """An image as a segmenter sees it; `error` says why it could not be read."""

    index: int
    views: list[torch.Tensor]
    pixels: np.ndarray
    error: str = ""


class Images(Dataset):
    """`Item` by index."""

    def __init__(self, paths: list[Path], views: Views, exif_transpose: bool):
        self.paths, self.views, self.exif_transpose = paths, views, exif_transpose

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Item:
        try:
            image = load_image(self.paths[index], self.exif_transpose)
        except UserError as error:
            return Item(index, [], np.zeros((0, 0, 3), np.uint8), str(error))
        return Item(index, self.views(image, None)[0], np.asarray(image))


class _OnDevice:
    """A `training.data.loader.Transfer` of lists of `Item`: what they hold is moved where it is used."""

    def __init__(self, loader: Any):
        self.loader = loader

    def start(self, key: tuple[int, ...], first_batch: int):
        """Nothing here is random."""

    def __iter__(self) -> Iterator[list[Item]]:
        return iter(self.loader)


def output_names(places: list[Path], paths: list[Path], output: Path | None) -> list[Path]:
    """Where the label map of each image goes below the output folder, without its ending.

    Of an image in a folder that was named, that is its path there; of one that was named itself, its name.

    Raises:
        UserError: Two images would be written to one file, or the output would be read as images the next time.
    """
    folders = [place for place in places if place.is_dir()]
    if output is not None:
        _check_output(output, folders)
    names: dict[Path, Path] = {}
    for path in paths:
        above = next((folder for folder in folders if path.is_relative_to(folder)), path.parent)
        name = path.relative_to(above).with_suffix("")
        if name in names:
            raise UserError(f"{names[name]} and {path} would be written to one file, {name}.png: predict them apart")
        names[name] = path
    return list(names)


def _check_output(output: Path, folders: list[Path]):
    if output.suffix.lower() == ".csv":
        raise UsageError(f"--output {output}: of a segmenter it is a folder, for label maps")
    above = {*output.resolve().parents, output.resolve()}
    if inside := [folder for folder in folders if folder.resolve() in above]:
        raise UserError(f"{output} lies in {inside[0]}, among the images: its label maps would be read as such")


def load_network(args: argparse.Namespace) -> tuple[Segmenter, SegmenterRecipe, dict[str, Any]]:
    """The segmenter of `args.checkpoint`, its recipe, and the run's, which is empty for published weights.

    Raises:
        UserError: It cannot be read or built; UsageError where a flag is for classifiers alone, or a model is missing.
    """
    checkpoint = read(args.checkpoint)
    said = checkpoint.get("args") if NetworkRecipe.of(checkpoint).task == "segmentation" else {}
    of_others = (*_OF_CLASSIFIERS, "model") if said else _OF_CLASSIFIERS
    if given := [f"--{name}" for name in of_others if getattr(args, name)]:
        raise UsageError(f"{' and '.join(given)}: a segmenter is what its checkpoint says")
    key, notes = (args.model_key, []) if args.model_key else default_weights(checkpoint, args.checkpoint)
    for note in notes:
        tqdm.write(note, file=sys.stderr)
    with reading_weights():
        try:
            recipe = SegmenterRecipe.of(checkpoint, args.checkpoint, args.model)
        except NoBackboneError as error:
            raise UsageError(f"{error}; give --model") from error
        return create_trained(recipe, checkpoint, args.checkpoint, key), recipe, said


@torch.inference_mode()
def predict(args: argparse.Namespace, paths: list[Path]) -> Iterator[Prediction]:
    """The classes of each image by the part of it that they cover, the largest `args.topk` of them.

    Writes FOLDER/labels/NAME.png and FOLDER/overlays/NAME.jpg, where `args.output` is a folder; label values are those
    of training, class 1 and up.

    Raises:
        UserError: The weights cannot be read, or a file cannot be written.
    """
    names, distributed = output_names(args.images, paths, args.output), init_distributed(args.device)
    network, recipe, said = load_network(args)
    network.to(distributed.device)
    classes = recipe.class_names or [str(index + 1) for index in range(recipe.num_classes)]
    options = _view_options(said)
    inference = Inference.of(options, model_data_config(recipe.model), Precision.on(distributed.device, args.amp))
    dataset = Images(paths, Views(recipe.test_size, options.test_scales), recipe.exif_transpose)
    loader_options = LoaderOptions(batch_size=1, num_workers=args.num_workers)  # photographs of any size wait in memory
    loader = build_loader(dataset, loader_options, distributed, train=False, collate_fn=list, transfer=_OnDevice)
    for item in (item for batch in loader for item in batch):
        path = paths[item.index]
        if item.error:
            yield Prediction(path, [], item.error)
            continue
        with inference.precision.autocast():
            views = [view.to(distributed.device) for view in item.views]
            labels = inference.labels(network, views, item.pixels.shape[:2]).cpu().numpy()
        if labels[0, 0] < 0:
            raise NonFiniteOutputError(f"{path}: the outputs of the network are NaN or infinite")
        if args.output is not None:
            _write(args.output, names[item.index], labels.astype(np.uint8), item.pixels)
        yield Prediction(path, _shares(labels, classes)[:args.topk])


def _view_options(said: dict[str, Any]) -> ViewOptions:
    """How the run evaluated."""
    values = {field.name: said[field.name] for field in fields(ViewOptions) if field.name in said}
    sizes = {name: image_size(str(values[name])) for name in ("crop", "stride") if values.get(name) is not None}
    return ViewOptions(**{**values, **sizes})


def _shares(labels: np.ndarray, classes: list[str]) -> list[tuple[str, float]]:
    shares = np.bincount(labels.ravel(), minlength=len(classes)) / labels.size
    return [(classes[i], float(shares[i])) for i in np.argsort(-shares, kind="stable") if shares[i]]


def _write(folder: Path, name: Path, labels: np.ndarray, pixels: np.ndarray):
    label, mixed = write_label(labels), Image.fromarray(overlay(pixels, labels))
    try:
        replace_file(folder / "labels" / f"{name}.png", lambda file: label.save(file, "PNG"))
        replace_file(folder / "overlays" / f"{name}.jpg", lambda file: mixed.save(file, "JPEG", quality=90))
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror}") from error
