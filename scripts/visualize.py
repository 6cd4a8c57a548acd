"""Show what a network attends to in photographs: one HTML page that stands alone, or a figure for a paper.

    python scripts/visualize.py photos/ cat.jpg --output routes.html
    python scripts/visualize.py cat.jpg --checkpoint runs/pets/best.pth
    python scripts/visualize.py cat.jpg --figure routes.pdf --query 120 90
    python scripts/visualize.py --serve 8000

Point at a region: the regions that it is routed to light up by their rank, with the attention of the token under the
pointer, in any stage, block and head; of DeBiFormer also the agents, with their points. Without --checkpoint or
--model, biformer_nano looks, with weights of its own. BViT and ViTAEv2 route nothing.

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
            print(f"{photo['name']}: {photo['width']} x {photo['height']}, "
                  + ", ".join(f"{label} {100 * share:.1f} %" for label, share in photo["guesses"][:3]), file=sys.stderr)
            photos.append(photo)
    finally:
        if photos:
            page = make_page(name, photos).encode()
            replace_file(args.output, lambda file: file.write(page))
            print(f"{args.output}: {count(len(photos), 'photograph')}, {len(page) / 1e6:.1f} MB", file=sys.stderr)


def run(args: argparse.Namespace):
    """Write the page or the figure, or serve."""
    paths = find_images(args.photos) if args.photos else []
    network, name = open_network(args)
    looker = Looker(network, args.input_size, with_weights=not args.routes_only)
    if args.serve is not None:
        from scripts.viewer.server import serve

        serve(looker, name, list(looked_at(looker, paths)), args.serve)
    elif args.figure is not None:
        from scripts.viewer.figure import draw_figure  # imports Matplotlib, which the other outputs do without

        draw_figure(looker, load_image(paths[0]), tuple(args.query), args.figure)
    else:
        write_page(args, looker, name, paths)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", nargs="*", type=user_path, metavar="PHOTO_OR_FOLDER")
    parser.add_argument("--checkpoint", type=flags.path, help="the weights of a classifier, file or URL")
    parser.add_argument("--model", help=f"a BiFormer or DeBiFormer (default: the checkpoint's, or {DEFAULT_MODEL})")
    parser.add_argument("--model_key", help="which weights of a checkpoint to take, for example model_ema")
    parser.add_argument("--input_size", type=image_size, metavar="PIXELS",
                        help="shorter side of what the network gets, or HEIGHTxWIDTH (default: the network's own)")
    parser.add_argument("--output", type=user_path, default=Path("routes.html"), metavar="FILE",
                        help="the page (default: %(default)s)")
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
    if args.figure is not None and args.serve is not None:
        parser.error("--figure and --serve are mutually exclusive")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    return run_script(lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
