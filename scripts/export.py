"""Export a classifier to a file that other runtimes run, and check it against PyTorch on photographs.

    python scripts/export.py nano.onnx
    python scripts/export.py flowers.onnx --checkpoint runs/flowers/best.pth --dynamic batch,size
    python scripts/export.py flowers.xml --checkpoint runs/flowers/best.pth --int8 flowers/train --images flowers/val
    python scripts/predict.py --model flowers.onnx photos/

Formats, by the file's ending or by --format: onnx (.onnx), openvino (.xml, with .bin beside it), torch_export (.pt2,
read by torch.export.load), aoti (.pt2, compiled by AOTInductor for this kind of machine) and torchscript (.pt). Each
file says which images it takes and what its classes are, under the key "routedvit".

--dynamic names what is left open: "batch" (the default), "batch,size", "size", or "none". Images may then be of any
height and width from 32 pixels up.

With --int8 FOLDER, linear layers compute in 8-bit integers, in openvino and aoti convolutions too. These two formats
are calibrated on photographs in the folder, for example the training images.

The network is that of --checkpoint, or of --model with its published weights; without either biformer_nano, whose
weights are in the repository. The file is opened again by its own runtime, on the CPU, and compared with PyTorch in
float32 on --images; without any on photographs that come with scikit-learn, in int8 on others of the folder. Of images
in folders named after their classes, the top-1 accuracy is printed. The exit code is 1 where logits differ by more than
rounding; in int8, where more than a tenth of the images have another class first.
"""
import argparse
import os
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import training.startup  # before torch  # noqa: F401  # isort: skip
import torch

from scripts.exporting import check
from scripts.exporting.formats import FORMATS, check_needs, of_ending, open_exported, reason_of
from scripts.exporting.int8 import CALIBRATION_IMAGES, spread
from scripts.exporting.source import Source
from scripts.prediction.classifier import add_network_flags, load_network
from scripts.prediction.images import find_images
from scripts.prediction.published import DEFAULT_MODEL
from training.task import refusal
from utils import UsageError, UserError, count, print_line, run_script, user_path

PARTS = ("batch", "size")


def dynamic(text: str) -> tuple[str, ...]:
    """What is left open, of "batch,size" or "none"."""
    parts = () if text == "none" else tuple(text.split(","))
    if not set(parts) <= set(PARTS):
        raise argparse.ArgumentTypeError(f"must be of {', '.join(PARTS)}, or none, got {text!r}")
    return tuple(part for part in PARTS if part in parts)


def photographs(args: argparse.Namespace) -> tuple[list[Path], list[Path]]:
    """Those to calibrate int8 on, and those to check the file on: --images, or others of the same folder."""
    to_check = find_images(args.images) if args.images else []
    if not args.int8:
        return [], to_check
    found = spread(find_images([args.int8]), 2 * CALIBRATION_IMAGES)
    return found[::2], to_check or found[1::2] or found


def write(source: Source, calibration: list[Path], name: str, output: Path):
    """Write the file, and whatever belongs to it, in place of those that are there."""
    network, metadata = source.network, source.metadata
    height, width = metadata.input_size
    with refusal(UsageError, f"{metadata.model} cannot take images of 3 x {height} x {width}"):
        network(torch.zeros(1, 3, height, width))
    images = source.photographs(calibration) if calibration else None
    try:
        with tempfile.TemporaryDirectory(dir=output.parent) as folder:
            FORMATS[name].write(network, Path(folder, output.name), metadata, images)
            for file in Path(folder).iterdir():
                os.replace(file, output.parent / file.name)
    except OSError as error:
        raise UserError(f"cannot write {output}: {error.strerror or error}") from error
    except Exception as error:  # each exporter has errors of its own for what it cannot follow
        version = torch.__version__
        raise UserError(f"PyTorch {version} cannot export {metadata.model} as {name}: {reason_of(error)}") from error


def report(source: Source, photos: list[Path], args: argparse.Namespace):
    """Compare the file with the network, and print how they differ and how fast both are.

    Raises:
        UserError: They differ by more than they may.
    """
    network, metadata = source.network, source.metadata
    _, run = open_exported(args.output)
    batch_size = args.batch_size if "batch" in metadata.dynamic else 1
    found = [check.compare(network, run, source.batches(photos, batch_size))]
    if "size" in metadata.dynamic:
        found.append(check.compare(network, run, check.at_another_size(source.batches(photos, batch_size))))
    for agreement in found:
        height, width = agreement.size
        print_line(f"{count(agreement.total, 'image')} of {height} x {width}: logits differ by at most "
                   f"{agreement.difference:.1e}, the largest is {agreement.largest:.1f}; "
                   f"the same class first in {agreement.alike}")
        if agreement.labelled:
            print_line(f"top-1 accuracy: file {agreement.accuracy:.2f} %, PyTorch {agreement.accuracy_before:.2f} %, "
                       f"of {count(agreement.labelled, 'labelled image')}")
    x, _ = next(source.batches(photos, 1))
    part = x.expand(batch_size, -1, -1, -1).contiguous()
    for name, (median, least, most) in check.images_per_second({"file": run, "PyTorch": network}, part).items():
        print_line(f"{name}: {median:.1f} images/s ({least:.1f} to {most:.1f}), batches of {batch_size}, "
                   f"{torch.get_num_threads()} threads")
    if not all(agreement.holds(metadata.precision) for agreement in found):
        raise UserError(f"{args.output} does not compute what PyTorch does")


def check_output(args: argparse.Namespace, name: str):
    """Raises UsageError where the format cannot be what was asked, UserError where no file can be written."""
    if not FORMATS[name].leaves_size_open and "size" in args.dynamic:
        raise UsageError(f"--dynamic size: {name} records the network for images of one size")
    if args.int8 and FORMATS[name].int8_needs is None:
        able = [other for other, format in FORMATS.items() if format.int8_needs is not None]
        raise UsageError(f"--int8: {name} is written in float32 only; formats in int8 are {', '.join(able)}")
    if args.output.suffix != FORMATS[name].ending:
        raise UsageError(f"{args.output}: files of {name} end in {FORMATS[name].ending}")
    for fault, is_so in (("it is a folder", args.output.is_dir()), ("no such folder", not args.output.parent.is_dir())):
        if is_so:
            raise UserError(f"cannot write {args.output}: {fault}")
    check_needs(name, bool(args.int8))


def export(args: argparse.Namespace):
    """Write the file, and check it."""
    name = args.format or of_ending(args.output)
    check_output(args, name)
    calibration, photos = photographs(args)
    network, recipe, checkpoint = load_network(args)
    source = Source.of(network, recipe, checkpoint, args.dynamic, "int8" if args.int8 else "float32")
    write(source, calibration, name, args.output)
    metadata = source.metadata
    size = sum(file.stat().st_size for file in args.output.parent.glob(f"{args.output.stem}.*")
               if file.suffix in (args.output.suffix, ".bin", ".data"))
    left_open = " and ".join(metadata.dynamic) or "nothing"
    print_line(f"{args.output}: {metadata.model}, {len(metadata.class_names)} classes, {metadata.precision}, "
               f"{size / 1e6:.1f} MB; {left_open} left open")
    report(source, photos, args)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=user_path, metavar="FILE")
    parser.add_argument("--format", choices=FORMATS, help="default: by the file's ending")
    add_network_flags(parser)
    parser.add_argument("--dynamic", type=dynamic, default="batch", metavar="PARTS",
                        help="what is left open: batch, size, both with a comma, or none (default: %(default)s)")
    parser.add_argument("--int8", type=user_path, metavar="FOLDER",
                        help=f"compute in 8-bit integers, calibrated on {CALIBRATION_IMAGES} photographs of it")
    parser.add_argument("--images", nargs="+", type=user_path, metavar="IMAGE_OR_FOLDER",
                        help="to check the file on (default: photographs of scikit-learn, in int8 of FOLDER)")
    parser.add_argument("--batch_size", default=8, type=int,
                        help="images of a forward pass of the check (default: %(default)s)")
    args = parser.parse_args(argv)
    if args.checkpoint is None and args.model is None:
        args.model = DEFAULT_MODEL
    for name in ("batch_size", "nb_classes"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(args, name)}")
    return run_script(lambda: export(args))


if __name__ == "__main__":
    sys.exit(main())
