"""Images that are seen whole, one at a time, by segmenters and detectors; and the names of what is written of them."""
import argparse
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset
from tqdm import tqdm

from models import NetworkRecipe
from models.segmentation import NoBackboneError
from storage.weights import default_weights
from tasks.networks import read
from training.data.images import load_image
from training.data.loader import build_loader
from training.distributed import Distributed
from training.options import LoaderOptions
from training.task import reading_weights
from utils import UsageError, UserError

# Flags of predict.py that are for classifiers alone.
_OF_CLASSIFIERS = ("nb_classes", "input_size", "use_test_size")


@dataclass(frozen=True)
class Kind:
    """A kind of network that sees images whole.

    Args:
        task: Of the runs that train it.
        name: With an article.
        recipe: Of its checkpoints: `SegmenterRecipe` or `DetectorRecipe`.
        create: Makes it by its recipe: `create_trained`.
        written: What is written of images, in the plural.
        ending: Of the file of an image.
    """

    task: str
    name: str
    recipe: Any
    create: Callable[..., torch.nn.Module]
    written: str
    ending: str


@dataclass(frozen=True)
class Item:
    """An image: as the network sees it, and its (H, W, 3) uint8 pixels; `error` says why it could not be read."""

    index: int
    views: list[torch.Tensor]
    pixels: np.ndarray
    error: str = ""


class Images(Dataset):
    """`Item` by index; `prepare` makes of an image what a network sees."""

    def __init__(self, paths: list[Path], prepare: Callable[[Image.Image], list[torch.Tensor]], exif_transpose: bool):
        self.paths, self.prepare, self.exif_transpose = paths, prepare, exif_transpose

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Item:
        try:
            image = load_image(self.paths[index], self.exif_transpose)
        except UserError as error:
            return Item(index, [], np.zeros((0, 0, 3), np.uint8), str(error))
        return Item(index, self.prepare(image), np.asarray(image))


class _OnDevice:
    """A `training.data.loader.Transfer` of lists of `Item`: what they hold is moved where it is used."""

    def __init__(self, loader: Any):
        self.loader = loader

    def start(self, key: tuple[int, ...], first_batch: int):
        """Nothing here is random."""

    def __iter__(self) -> Iterator[list[Item]]:
        return iter(self.loader)


def load_items(images: Images, num_workers: int, distributed: Distributed) -> Iterator[Item]:
    """The images, in order, read by so many processes ahead of time."""
    options = LoaderOptions(batch_size=1, num_workers=num_workers)  # photographs of any size wait in memory
    loader = build_loader(images, options, distributed, train=False, collate_fn=list, transfer=_OnDevice)
    return (item for batch in loader for item in batch)


def output_names(kind: Kind, places: list[Path], paths: list[Path], output: Path | None) -> list[Path]:
    """Where what is written of each image goes below the output folder, without its ending.

    Of an image in a folder that was named, that is its path there; of one that was named itself, its name.

    Raises:
        UserError: Two images would be written to one file, or the output would be read as images the next time.
    """
    folders = [place for place in places if place.is_dir()]
    if output is not None:
        _check_output(kind, output, folders)
    names: dict[Path, Path] = {}
    for path in paths:
        above = next((folder for folder in folders if path.is_relative_to(folder)), path.parent)
        name = path.relative_to(above).with_suffix("")
        if name in names:
            raise UserError(f"{names[name]} and {path} would be written to one file, {name}{kind.ending}: "
                            "predict them apart")
        names[name] = path
    return list(names)


def _check_output(kind: Kind, output: Path, folders: list[Path]):
    if output.suffix.lower() == ".csv":
        raise UsageError(f"--output {output}: of {kind.name} it is a folder, for {kind.written}")
    above = {*output.resolve().parents, output.resolve()}
    if inside := [folder for folder in folders if folder.resolve() in above]:
        raise UserError(f"{output} lies in {inside[0]}, among the images: its {kind.written} would be read as such")


def load_network(kind: Kind, args: argparse.Namespace) -> tuple[torch.nn.Module, Any, dict[str, Any]]:
    """The network of `args.checkpoint`, its recipe, and the run's, which is empty for published weights.

    Raises:
        UserError: It cannot be read or built; UsageError where a flag is for classifiers alone, or a model is missing.
    """
    checkpoint = read(args.checkpoint)
    said = checkpoint.get("args") if NetworkRecipe.of(checkpoint).task == kind.task else {}
    of_others = (*_OF_CLASSIFIERS, "model") if said else _OF_CLASSIFIERS
    if given := [f"--{name}" for name in of_others if getattr(args, name)]:
        raise UsageError(f"{' and '.join(given)}: {kind.name} is what its checkpoint says")
    key, notes = (args.model_key, []) if args.model_key else default_weights(checkpoint, args.checkpoint)
    for note in notes:
        tqdm.write(note, file=sys.stderr)
    with reading_weights():
        try:
            recipe = kind.recipe.of(checkpoint, args.checkpoint, args.model)
        except NoBackboneError as error:
            raise UsageError(f"{error}; give --model") from error
        return kind.create(recipe, checkpoint, args.checkpoint, key), recipe, said
