"""Label maps of images, by a segmenter: written as PNGs with a palette, and as overlays."""
import argparse
from collections.abc import Iterator
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from models.segmentation import Segmenter, SegmenterRecipe, create_trained
from tasks.networks import model_data_config
from tasks.options import image_size
from tasks.segmentation.inference import Inference
from tasks.segmentation.labels import overlay, write_label
from tasks.segmentation.options import ViewOptions
from tasks.segmentation.transforms import Views
from training.distributed import init_distributed
from training.precision import Precision
from training.task import NonFiniteOutputError
from utils import UserError, replace_file

from .images import Prediction
from .whole import Images, Kind, load_items, load_network, output_names

SEGMENTER = Kind("segmentation", Segmenter.kind, SegmenterRecipe, create_trained, "label maps", ".png")


@torch.inference_mode()
def predict(args: argparse.Namespace, paths: list[Path]) -> Iterator[Prediction]:
    """The classes of each image by the part of it that they cover, the largest `args.topk` of them.

    Writes FOLDER/labels/NAME.png and FOLDER/overlays/NAME.jpg, where `args.output` is a folder; label values are those
    of training, class 1 and up.

    Raises:
        UserError: The weights cannot be read, or a file cannot be written.
    """
    names = output_names(SEGMENTER, args.images, paths, args.output)
    distributed = init_distributed(args.device)
    network, recipe, said = load_network(SEGMENTER, args)
    network.to(distributed.device)
    classes = recipe.class_names or [str(index + 1) for index in range(recipe.num_classes)]
    options = _view_options(said)
    inference = Inference.of(options, model_data_config(recipe.model), Precision.on(distributed.device, args.amp))
    prepare = partial(_prepare, views=Views(recipe.test_size, options.test_scales))
    for item in load_items(Images(paths, prepare, recipe.exif_transpose), args.num_workers, distributed):
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


def _prepare(image: Image.Image, views: Views) -> list[torch.Tensor]:
    return views(image, None)[0]


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
