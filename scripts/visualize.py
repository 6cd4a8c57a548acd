"""Show what a network attends to in photographs: one HTML page that stands alone, or a figure for a paper.

    python scripts/visualize.py photos/ cat.jpg --output routes.html
    python scripts/visualize.py cat.jpg --checkpoint runs/pets/best.pth
    python scripts/visualize.py cat.jpg --figure routes.pdf --query 120 90
    python scripts/visualize.py --serve 8000

Point at a region: the regions that it is routed to light up by their rank, with the attention of the token under the
pointer, in any stage, block and head; of DeBiFormer also the agents, with their points. Without --checkpoint or
--model, biformer_nano looks, with weights of its own. BViT, ViTAE and ViTAEv2 route nothing.

--serve opens a server for this machine alone, to which the page sends photographs and webcam frames.
"""
import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import training.startup  # before torch  # noqa: F401  # isort: skip
import timm
import torch
from torch import nn

import models
from scripts.prediction.images import find_images
from scripts.prediction.published import DEFAULT_MODEL, build_published
from scripts.viewer.page import make_page
from scripts.viewer.photos import Looker
from storage.weights import WeightsError
from tasks.networks import check_model
from tasks.options import image_size
from training import flags
from training.data.images import load_image
from training.distributed import init_distributed
from utils import UsageError, UserError, as_user_error, count, printable, replace_file, run_script, user_path

# Of figures, by their files' endings.
FORMATS = (".png", ".jpg", ".jpeg", ".pdf", ".svg")


def check_routes(network: nn.Module, name: str):
    """Raises UsageError where a network, here called `name`, routes nothing."""
    if not any(hasattr(module, "routing") for module in network.modules()):
        raise UsageError(f"{name} has no routed attention; BiFormer and DeBiFormer have")


def open_network(args: argparse.Namespace) -> tuple[nn.Module, str]:
    """The network that looks, in evaluation mode on the device, and the model's name.

    Raises:
        UserError: Its weights cannot be read; UsageError where there is no such model, or it routes nothing.
    """
    if args.checkpoint is None:
        name = args.model or DEFAULT_MODEL
        check_model(name)
        with torch.device("meta"):
            check_routes(timm.create_model(name), name)
        network = build_published(name, {}).eval()
    else:
        with as_user_error(WeightsError):
            network, _ = models.load(args.checkpoint, args.model_key, args.model)
        name = network.pretrained_cfg["architecture"]
        check_routes(network, name)
    return network.to(init_distributed(args.device).device), name


def looked_at(looker: Looker, paths: list[Path]) -> Iterator[dict[str, Any]]:
    """What the page holds of each photograph.

    Raises:
        UserError: At the end, where some could not be read, or are too large.
    """
    left_out = 0
    for path in paths:
        try:
            looked = looker.look(load_image(path), path.name)
        except UserError as error:
            print(printable(str(error)), file=sys.stderr)
            left_out += 1
            continue
        yield looked
    if left_out:
        raise UserError(f"{left_out} of {count(len(paths), 'image')} could not be shown")


def write_page(args: argparse.Namespace, looker: Looker, name: str, paths: list[Path]):
    """Write the page of all photographs that can be read."""
    photos = []
    try:
        for photo in looked_at(looker, paths):
            guesses = ", ".join(f"{label} {100 * share:.1f} %" for label, share in photo["guesses"][:3])
            size = f"{photo['width']} x {photo['height']} pixels"
            print(printable(f"{photo['name']}: {guesses}, of {size}"), file=sys.stderr)
            photos.append(photo)
    finally:
        if photos:
            page = make_page(name, photos).encode()
            replace_file(args.output, lambda file: file.write(page))
            print(f"{args.output}: {count(len(photos), 'photograph')}, {len(page) / 1e6:.1f} MB", file=sys.stderr)


def serve_page(args: argparse.Namespace, looker: Looker, name: str, paths: list[Path]):
    """Serve the page, with all photographs that can be read."""
    from scripts.viewer.server import serve

    photos = []
    try:
        for photo in looked_at(looker, paths):
            photos.append(photo)
    except UserError as error:
        print(printable(str(error)), file=sys.stderr)
    serve(looker, name, photos, args.serve)


def write_figure(args: argparse.Namespace, looker: Looker, paths: list[Path]):
    """Draw the figure of one photograph."""
    from scripts.viewer.figure import draw_figure  # imports Matplotlib, which the other outputs do without

    (path,) = paths
    draw_figure(looker, load_image(path), path.name, tuple(args.query), args.figure)


def run(args: argparse.Namespace):
    """Write the page or the figure, or serve."""
    paths = find_images(args.photos) if args.photos else []
    if args.figure is not None and len(paths) > 1:
        raise UserError(f"--figure draws one photograph, not {len(paths)}")
    network, name = open_network(args)
    looker = Looker(network, args.input_size, with_weights=not args.routes_only)
    if args.serve is not None:
        serve_page(args, looker, name, paths)
    elif args.figure is not None:
        write_figure(args, looker, paths)
    else:
        write_page(args, looker, name, paths)


def check_output(parser: argparse.ArgumentParser, args: argparse.Namespace):
    """Refuse what cannot be written, before any work."""
    given = [flag for flag in ("output", "figure", "serve") if getattr(args, flag) is not None]
    if len(given) > 1:
        parser.error(f"--{given[0]} and --{given[1]} are mutually exclusive")
    for path in filter(None, (args.output, args.figure)):
        if path.is_dir():
            parser.error(f"--{given[0]}: {path} is a folder")
    if args.figure is not None and args.figure.suffix.lower() not in FORMATS:
        parser.error(f"{args.figure} is none of the formats of a figure: {', '.join(FORMATS)}")
    if args.figure is not None and args.routes_only:
        parser.error("--routes_only is of a page")


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", nargs="*", type=user_path, metavar="PHOTO_OR_FOLDER")
    parser.add_argument("--checkpoint", type=flags.path, help="the weights of a classifier, file or URL")
    parser.add_argument("--model", help=f"a BiFormer or DeBiFormer (default: the checkpoint's, or {DEFAULT_MODEL})")
    parser.add_argument("--model_key", help="which weights of a checkpoint to take, for example model_ema")
    parser.add_argument("--input_size", type=image_size, metavar="PIXELS",
                        help="shorter side of what the network gets, or HEIGHTxWIDTH (default: the network's own)")
    parser.add_argument("--output", type=user_path, metavar="FILE", help="the page (default: routes.html)")
    parser.add_argument("--routes_only", action="store_true",
                        help="leave the attention of single tokens out of the page, which is most of its bytes")
    parser.add_argument("--figure", type=user_path, metavar="FILE",
                        help="draw one photograph and one query as PNG, JPEG, PDF or SVG instead, by Matplotlib")
    parser.add_argument("--query", type=float, nargs=2, metavar=("Y", "X"),
                        help="for --figure: the query, in pixels of the photograph from its top and left")
    parser.add_argument("--serve", type=int, metavar="PORT",
                        help="serve the page on 127.0.0.1, to add photographs and webcam frames (0: any free port)")
    parser.add_argument("--device", default="auto", help="auto, cuda, cuda:1 or cpu (default: %(default)s)")
    args = parser.parse_args(argv)
    if not args.photos and args.serve is None:
        parser.error("give photographs or folders of them, or --serve PORT")
    if (args.figure is None) != (args.query is None):
        parser.error("--figure and --query go together")
    check_output(parser, args)
    args.output = args.output or Path("routes.html")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    return run_script(lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
