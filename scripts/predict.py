"""Name the classes of images by a trained network, one line for each image, as they are read.

    python scripts/predict.py docs/church.jpg
    python scripts/predict.py --checkpoint runs/flowers/best.pth photos/ cat.jpg --output predictions.csv
    python scripts/predict.py --model convnext_tiny photos/
    python scripts/predict.py --checkpoint runs/streets/best.pth photos/ --output maps
    python scripts/predict.py --checkpoint runs/animals/best.pth photos/ --output found --score 0.5
    python scripts/predict.py --model flowers.onnx photos/

A checkpoint of this repository knows its model, its image size and its classes. For any other, give --model, of a
segmenter or detector its backbone; if a classifier has 1000 classes, they are named as those of ImageNet-1K, and the
80 of a detector as COCO's.

Without --checkpoint the published weights of --model are taken, and without either those of biformer_nano, which are
in the repository. It knows ten classes, from tench to parachute, and answers with one of these whatever it sees.

--model may be a file of scripts/export.py, which says for itself what it takes. One of PyTorch's (.pt2, .pt) can hold
code: run it where you trust who wrote it.

Of a segmenter, each line says which parts of the image the classes cover; --output is a folder, for labels/NAME.png
with the values of the label files it was trained on, in colours, and overlays/NAME.jpg.

Of a detector, each line names the objects in the image whose scores are above --score; --output is a folder, for
NAME.jpg, into which they are drawn, and detections.json: all of them in COCO's format, masks too where there are any.

An image that cannot be read is named on standard error and has its error in the CSV file; the exit code is then 1.
Ctrl-C keeps what was predicted.
"""
import argparse
import os
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import training.startup  # before torch  # noqa: F401  # isort: skip
import torch
from timm.layers import to_2tuple
from tqdm import tqdm

from models import NetworkRecipe
from models.detection import is_detector
from models.segmentation import is_segmenter
from scripts.exporting.formats import ENDINGS, open_exported
from scripts.prediction import masks, objects
from scripts.prediction.classifier import add_network_flags, load_network
from scripts.prediction.images import Images, Prediction, collate, find_images
from scripts.prediction.names import class_names
from scripts.prediction.published import DEFAULT_MODEL
from storage import weights
from tasks.classification.images import ImagePipeline
from tasks.networks import check_outputs
from tasks.tables import prediction_cells, prediction_columns, write_csv
from training.advice import with_advice
from training.distributed import init_distributed
from training.options import LoaderOptions
from training.precision import Precision
from training.signals import (
    HostMemoryFault,
    OpenFilesFault,
    OutOfMemoryFault,
    SharedMemoryFault,
    WorkerFault,
    fault_of,
)
from training.task import refusal
from utils import UsageError, UserError, as_user_error, print_line, printable, run_script, user_path

ADVICE = {
    OutOfMemoryFault: "lower --batch_size",
    **dict.fromkeys((HostMemoryFault, WorkerFault), "give fewer --num_workers or more memory"),
    **dict.fromkeys((OpenFilesFault, SharedMemoryFault), "give fewer --num_workers"),
}
# By their task, what predicts images whole, by a segmenter or detector, and writes files of each.
WHOLE = dict(segmentation=masks.predict, detection=objects.predict)


class Interrupted(UserError):
    """Ctrl-C, after images were predicted."""

    exit_code = 130


def check_input(model: torch.nn.Module, name: str, input_size: int | tuple[int, int], precision: Precision):
    """Raises UsageError where a network, here called `name`, cannot take images of a size."""
    height, width = to_2tuple(input_size)
    with precision.autocast(), refusal(UsageError, f"{name} cannot take images of 3 x {height} x {width}"):
        model(torch.zeros(1, 3, height, width, device=next(model.parameters()).device))


class Classifier(NamedTuple):
    """What images are predicted by.

    network: (B, 3, H, W) normalised images -> (B, classes) logits.
    names: Of the classes.
    images: How images are prepared.
    exif_transpose: Whether they are turned upright, as their EXIF orientation says.
    """

    network: Callable[[torch.Tensor], torch.Tensor]
    names: list[str]
    images: ImagePipeline
    exif_transpose: bool


def is_exported(args: argparse.Namespace) -> bool:
    """Whether --model is a file of scripts/export.py."""
    return args.model is not None and Path(args.model).suffix in ENDINGS


def open_classifier(args: argparse.Namespace, device: torch.device, precision: Precision) -> Classifier:
    """The network of the flags, on the device."""
    if is_exported(args):
        metadata, run = open_exported(Path(args.model))
        images = ImagePipeline(metadata.model, metadata.input_size, metadata.crop_pct, metadata.crop_mode)
        return Classifier(run, metadata.class_names, images, metadata.exif_transpose)
    model, recipe, checkpoint = load_network(args)
    model.eval().to(device)
    images = ImagePipeline(recipe.model, recipe.input_size, recipe.crop_pct)
    check_input(model, recipe.model, images.input_size, precision)
    return Classifier(model, class_names(checkpoint, model), images, recipe.exif_transpose)


@torch.inference_mode()
def predict(args: argparse.Namespace, paths: list[Path]) -> Iterator[Prediction]:
    """The predictions of images, in order; each names `args.topk` classes, or all where there are fewer.

    Raises:
        UserError: The weights cannot be read; UsageError where the network cannot take images of their size.
    """
    distributed = init_distributed(args.device)
    loader_options = LoaderOptions(batch_size=args.batch_size, num_workers=args.num_workers)
    precision = Precision.on(distributed.device, args.amp)
    model, names, images, exif_transpose = open_classifier(args, distributed.device, precision)
    tqdm.write(f"evaluated at {images.description}", file=sys.stderr)
    dataset = Images(paths, images.transform(), exif_transpose)
    for batch, places in images.loader(dataset, loader_options, distributed, collate):
        with precision.autocast():
            logits = model(batch)
        for index, error, outputs in zip(places.indices, places.errors, logits, strict=True):
            if not error:
                check_outputs(outputs, str(paths[index]))
        top = logits.float().softmax(dim=1).topk(min(args.topk, logits.shape[1]))
        found = zip(places.indices, places.errors, top.values.tolist(), top.indices.tolist(), strict=True)
        for index, error, values, classes in found:
            guesses = [(names[c], value) for c, value in zip(classes, values, strict=True)]
            yield Prediction(paths[index], [("", None)] * len(guesses) if error else guesses, error)


def printed(predictions: Iterable[Prediction], total: int) -> Iterator[Prediction]:
    """The predictions, a line printed for each as it comes; at a terminal, over a progress bar.

    Raises:
        UserError: At the end, where images could not be read, or `Interrupted` once there is a prediction.
    """
    done = unreadable = 0
    try:
        for prediction in tqdm(predictions, total=total, leave=False, disable=not sys.stderr.isatty()):
            with tqdm.external_write_mode():
                if prediction.error:
                    print(printable(prediction.error), file=sys.stderr)
                else:
                    print_line(f"{prediction.path}: {prediction.text}")
            yield prediction
            done += 1
            unreadable += bool(prediction.error)
    except KeyboardInterrupt:
        if done:
            raise Interrupted(f"interrupted after {done} of {total} images") from None
        raise
    if unreadable:
        raise UserError(f"{unreadable} of {total} images could not be read")


def as_rows(predictions: Iterable[Prediction]) -> Iterator[list[Any]]:
    """The rows of a CSV file: titles, then for each image its path, class_1, probability_1, class_2, ... and error."""
    has_titles = False
    for path, guesses, error, _ in predictions:
        if not has_titles:
            yield ["image", *prediction_columns(len(guesses)), "error"]
            has_titles = True
        yield [path, *prediction_cells(guesses), error]


def task_of(args: argparse.Namespace) -> str:
    """What the network is for: as the run of its checkpoint says, or by the names of published weights."""
    if args.checkpoint is None:
        return "classification"
    with as_user_error(weights.WeightsError):
        checkpoint = weights.read_checkpoint(args.checkpoint, mmap=True)
        task = NetworkRecipe.of(checkpoint).task
        if task in WHOLE:
            return task
        key = args.model_key or weights.default_weights(checkpoint, args.checkpoint)[0]
        found = weights.unwrap(checkpoint, key)
        return "segmentation" if is_segmenter(found) else "detection" if is_detector(found) else task


def write(args: argparse.Namespace):
    """Print what is predicted, and write it where it was asked for: as CSV, or what is written of `WHOLE` images."""
    paths: dict[str, Path] = {}
    for path in find_images(args.images):
        paths.setdefault(os.path.abspath(path), path)  # once, however many arguments name it
    task = task_of(args)
    found = WHOLE.get(task, predict)(args, list(paths.values()))
    predictions = printed(found, len(paths))
    try:
        with closing(found):  # which then writes what it has, whatever ended it
            if args.output and task not in WHOLE:
                write_csv(args.output, as_rows(predictions))
            else:
                deque(predictions, maxlen=0)
    except (OSError, RuntimeError, MemoryError) as error:
        fault = fault_of(error)
        if fault is None:
            raise
        raise UserError(with_advice(fault, ADVICE)) from error


def check_exported(parser: argparse.ArgumentParser, args: argparse.Namespace):
    """Ends the program where a flag is given that an exported file has settled; predicts on the CPU."""
    for name in ("checkpoint", "model_key", "nb_classes", "input_size", "use_test_size"):
        if getattr(args, name):
            parser.error(f"--{name}: {args.model} is a network that was exported with its weights and image size")
    if args.device not in ("auto", "cpu") or args.amp not in ("auto", "off"):
        parser.error(f"--device and --amp: {args.model} runs on the CPU, in the precision of the file")
    args.device, args.amp = "cpu", "off"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", nargs="+", type=user_path, metavar="IMAGE_OR_FOLDER")
    add_network_flags(parser, f"; or a file of scripts/export.py: {', '.join(ENDINGS)}")
    parser.add_argument("--use_test_size", action="store_true",
                        help="the image size and the crop that timm's validate.py takes, instead of the checkpoint's")
    parser.add_argument("--topk", default=5, type=int,
                        help="classes, or objects, to name for each image (default: %(default)s)")
    parser.add_argument("--score", default=0.3, type=float,
                        help="of a detector, above which score, 0 to 1, objects are named (default: %(default)s)")
    parser.add_argument("--output", type=user_path, metavar="FILE_OR_FOLDER",
                        help="write them as CSV too; of a segmenter or detector, a folder for label maps or pictures")
    parser.add_argument("--batch_size", default=32, type=int,
                        help="images of a forward pass, of a segmenter or detector always 1 (default: %(default)s)")
    parser.add_argument("--num_workers", default=min(8, os.cpu_count() or 1), type=int,
                        help="data loading processes (default: %(default)s)")
    parser.add_argument("--device", default="auto", help="auto, cuda, cuda:1 or cpu (default: %(default)s)")
    parser.add_argument("--amp", default="auto", choices=["auto", "bf16", "fp16", "off"],
                        help="mixed precision; auto: bf16 if the GPU has it (default: %(default)s)")
    args = parser.parse_args(argv)
    if args.checkpoint is None and args.model is None:
        args.model = DEFAULT_MODEL
    if is_exported(args):
        check_exported(parser, args)
    if args.use_test_size and args.input_size is not None:
        parser.error("--use_test_size and --input_size are mutually exclusive")
    for name in ("topk", "batch_size", "nb_classes"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(args, name)}")
    if not 0 <= args.score <= 1:
        parser.error(f"--score must be 0 to 1, got {args.score}")
    return run_script(lambda: write(args))


if __name__ == "__main__":
    sys.exit(main())
