"""Export a classifier to a file that other runtimes run, and check it against PyTorch on photographs.

    python scripts/export.py nano.onnx
    python scripts/export.py flowers.onnx --checkpoint runs/flowers/best.pth --dynamic batch,size
    python scripts/export.py flowers.xml --checkpoint runs/flowers/best.pth --images photos/
    python scripts/predict.py --model flowers.onnx photos/

Formats, by the file's ending or by --format: onnx (.onnx), openvino (.xml, with .bin beside it), torch_export (.pt2,
read by torch.export.load), aoti (.pt2, compiled by AOTInductor for this kind of machine) and torchscript (.pt). Each
file says which images it takes and what its classes are, under the key "routedvit".

--dynamic names what is left open: "batch" (the default), "batch,size", "size", or "none". Images may then be of any
height and width from 32 pixels up.

The network is that of --checkpoint, or of --model with its published weights; without either biformer_nano, whose
weights are in the repository. The file is opened again by its own runtime, on the CPU, and compared with PyTorch on
--images or, without any, on photographs that come with scikit-learn: the exit code is 1 where logits differ by more
than rounding.
"""
import argparse
import os
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import training.startup  # before torch  # noqa: F401  # isort: skip
import torch
from timm.layers import to_2tuple

from scripts.exporting import check
from scripts.exporting.formats import FORMATS, check_needs, of_ending, open_exported
from scripts.exporting.metadata import Metadata
from scripts.prediction.classifier import load_network
from scripts.prediction.images import find_images
from scripts.prediction.names import class_names
from scripts.prediction.published import DEFAULT_MODEL
from tasks.classification.images import ImagePipeline
from tasks.options import image_size
from training import flags
from training.task import refusal
from utils import UsageError, UserError, count, print_line, run_script, user_path

PARTS = ("batch", "size")


def dynamic(text: str) -> tuple[str, ...]:
    """What is left open, of "batch,size" or "none"."""
    parts = () if text == "none" else tuple(text.split(","))
    if not set(parts) <= set(PARTS):
        raise argparse.ArgumentTypeError(f"must be of {', '.join(PARTS)}, or none, got {text!r}")
    return tuple(part for part in PARTS if part in parts)


def describe(args: argparse.Namespace) -> tuple[torch.nn.Module, ImagePipeline, Metadata]:
    """The network of the flags, how its images are prepared, and what its file says of both."""
    network, recipe, checkpoint = load_network(args)
    network = network.eval().requires_grad_(False)
    images = ImagePipeline(recipe.model, to_2tuple(recipe.input_size), recipe.crop_pct)
    config = images.config
    return network, images, Metadata(
        model=recipe.model,
        class_names=class_names(checkpoint, network),
        input_size=images.input_size,
        mean=tuple(config["mean"]),
        std=tuple(config["std"]),
        interpolation=config["interpolation"],
        crop_pct=images.crop_pct or config["crop_pct"],
        crop_mode=config["crop_mode"],
        exif_transpose=recipe.exif_transpose,
        dynamic=args.dynamic,
        torch=torch.__version__,
    )


def write(network: torch.nn.Module, metadata: Metadata, name: str, output: Path):
    """Write the file, and whatever belongs to it, in place of those that are there."""
    height, width = metadata.input_size
    with refusal(UsageError, f"{metadata.model} cannot take images of 3 x {height} x {width}"):
        network(torch.zeros(1, 3, height, width))
    try:
        with tempfile.TemporaryDirectory(dir=output.parent) as folder:
            FORMATS[name].write(network, Path(folder, output.name), metadata)
            for file in Path(folder).iterdir():
                os.replace(file, output.parent / file.name)
    except OSError as error:
        raise UserError(f"cannot write {output}: {error.strerror or error}") from error


def report(network: torch.nn.Module, images: ImagePipeline, args: argparse.Namespace):
    """Compare the file with the network, and print how they differ and how fast both are.

    Raises:
        UserError: They differ by more than rounding.
    """
    metadata, run = open_exported(args.output)
    x = check.prepare(find_images(args.images) if args.images else [], images, metadata.exif_transpose)
    batch = args.batch_size if "batch" in metadata.dynamic else 1
    sizes = [x, check.of_another_size(x)] if "size" in metadata.dynamic else [x]
    found = [check.compare(network, run, each, batch) for each in sizes]
    for each, agreement in zip(sizes, found, strict=True):
        print_line(f"{count(agreement.total, 'image')} of {each.shape[2]} x {each.shape[3]}: logits differ by at most "
                   f"{agreement.difference:.1e}, the largest is {agreement.largest:.1f}; "
                   f"the same class first in {agreement.alike}")
    part = x[:1].expand(batch, -1, -1, -1).contiguous()
    for name, (median, least, most) in check.images_per_second({"file": run, "PyTorch": network}, part).items():
        print_line(f"{name}: {median:.1f} images/s ({least:.1f} to {most:.1f}), batches of {batch}, "
                   f"{torch.get_num_threads()} threads")
    if not all(agreement.holds for agreement in found):
        raise UserError(f"{args.output} does not compute what PyTorch does")


def export(args: argparse.Namespace):
    """Write the file, and check it."""
    name = args.format or of_ending(args.output)
    if not FORMATS[name].leaves_size_open and "size" in args.dynamic:
        raise UsageError(f"--dynamic size: {name} records the network for images of one size")
    if args.output.suffix != FORMATS[name].ending:
        raise UsageError(f"{args.output}: files of {name} end in {FORMATS[name].ending}")
    for fault, is_so in (("it is a folder", args.output.is_dir()), ("no such folder", not args.output.parent.is_dir())):
        if is_so:
            raise UserError(f"cannot write {args.output}: {fault}")
    check_needs(name)
    network, images, metadata = describe(args)
    write(network, metadata, name, args.output)
    size = sum(file.stat().st_size for file in args.output.parent.glob(f"{args.output.stem}.*")
               if file.suffix in (args.output.suffix, ".bin", ".data"))
    left_open = " and ".join(metadata.dynamic) or "nothing"
    print_line(f"{args.output}: {metadata.model}, {len(metadata.class_names)} classes, {size / 1e6:.1f} MB; "
               f"{left_open} left open")
    report(network, images, args)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=user_path, metavar="FILE")
    parser.add_argument("--format", choices=FORMATS, help="default: by the file's ending")
    parser.add_argument("--checkpoint", type=flags.path,
                        help="the weights, file or URL (default: the published ones of --model)")
    parser.add_argument("--model", help="any model that timm knows, ours included (default: the checkpoint's; without "
                                        f"one {DEFAULT_MODEL})")
    parser.add_argument("--model_key", help="which weights of a checkpoint to take, for example model_ema")
    parser.add_argument("--nb_classes", type=int, help="what the weights must have (default: what they have)")
    parser.add_argument("--input_size", type=image_size, metavar="PIXELS",
                        help="side of the image, or HEIGHTxWIDTH (default: the checkpoint's)")
    parser.add_argument("--dynamic", type=dynamic, default="batch", metavar="PARTS",
                        help="what is left open: batch, size, both with a comma, or none (default: %(default)s)")
    parser.add_argument("--images", nargs="+", type=user_path, metavar="IMAGE_OR_FOLDER",
                        help="to check the file on (default: photographs of scikit-learn)")
    parser.add_argument("--batch_size", default=8, type=int,
                        help="images of a forward pass of the check (default: %(default)s)")
    args = parser.parse_args(argv)
    if args.checkpoint is None and args.model is None:
        args.model = DEFAULT_MODEL
    for name in ("batch_size", "nb_classes"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(args, name)}")
    args.use_test_size = False
    return run_script(lambda: export(args))


if __name__ == "__main__":
    sys.exit(main())
