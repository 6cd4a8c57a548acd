"""Make label maps of an image folder, for training with `--token_label`: a teacher's top classes all over each image.

    python scripts/make_label_maps.py --data_path /path/to/data --output /path/to/maps --model convnext_base.fb_in1k
    python scripts/make_label_maps.py --data_path /path/to/data --output /path/to/maps --model biformer_tiny \
      --checkpoint outputs/teacher/best.pth --input_size 320

The teacher is any timm model, with its published weights or a checkpoint of main.py's, of the folder's classes. Its
classifier is applied at every position of its last map. The whole image is resized to a square, nothing is cropped, and
so a map covers the whole image whatever its shape.

Each map is a file as of https://github.com/zihangJiang/TokenLabeling: FOLDER/CLASS/IMAGE.pt, a tensor (2, 5, h, w) of
scores over class indices in float16 (float32 for more classes than float16 can count). Training takes the classes that
a map leaves out for scores of 0; so that this comes to the teacher's own probabilities, scores are its logits less the
logarithm of the mean exponential of those left out.

It resumes where it was interrupted: maps that are there are kept.
"""
import argparse
import math
import os
import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import training.startup  # before torch  # noqa: F401  # isort: skip
import torch
from timm.layers import get_spatial_dim
from torch.utils.data import Subset
from tqdm import tqdm

import datasets
from tasks.classification.images import ImagePipeline
from tasks.classification.token_labels import label_map_dtype, label_map_path
from tasks.networks import PretrainedClassesError, check_model, create_teacher
from training import flags
from training.data.images import UnreadableImageError
from training.data.loader import report_skipped
from training.data.splits import check_is_no_class
from training.distributed import Distributed, init_distributed
from training.options import LoaderOptions
from training.precision import Precision
from utils import UserError, replace_file, run_script, user_path


def dense_logits(model: torch.nn.Module, images: torch.Tensor) -> torch.Tensor:
    """What the teacher would say of an image that is the same all over, for each position of its last map.

    Args:
        model: A timm model whose `forward_features` gives a map, (B, C, h, w) or (B, h, w, C), or the tokens of a
            square one, (B, N, C) after the prefix tokens.
        images: (B, 3, H, W), H = W.

    Returns:
        (B, num_classes, h, w) logits.

    Raises:
        UserError: Its tokens are those of no square map.
    """
    features = model.forward_features(images)
    if features.ndim == 3:
        prefix = getattr(model, "num_prefix_tokens", 0)
        tokens = features[:, prefix:]
        height = width = math.isqrt(tokens.shape[1])
        if height * width != tokens.shape[1]:
            raise UserError(f"the teacher has {tokens.shape[1]} tokens, which are no square map; take another --model")
        # Whichever of them the head reads, the class token or the mean of the others, it reads this position.
        alone = tokens.flatten(0, 1)[:, None].expand(-1, prefix + 1, -1)
    else:
        output_fmt = getattr(model, "output_fmt", "NCHW")
        height, width = (features.shape[dim] for dim in get_spatial_dim(output_fmt))
        tokens = features.permute(0, 2, 3, 1) if output_fmt == "NCHW" else features
        alone = tokens.flatten(0, 2)[:, None, None]
        alone = alone.permute(0, 3, 1, 2) if output_fmt == "NCHW" else alone
    logits = model.forward_head(alone)
    return logits.unflatten(0, (len(images), height, width)).permute(0, 3, 1, 2)


def label_maps(logits: torch.Tensor, topk: int) -> torch.Tensor:
    """(B, classes, h, w) logits -> (B, 2, k, h, w) label maps of the top-k classes, or of all if they are fewer."""
    num_classes = logits.shape[1]
    logits = logits.float()
    kept = logits.topk(min(topk, num_classes), dim=1)
    scores = kept.values
    if num_classes > topk:
        others = logits.scatter(1, kept.indices, -torch.inf)
        scores = scores - (others.logsumexp(dim=1, keepdim=True) - math.log(num_classes - topk))
    return torch.stack([scores, kept.indices.float()], dim=1).to(label_map_dtype(num_classes))


def save(path: Path, label_map: torch.Tensor):
    """Write one map so that `path` is never half written."""
    label_map = label_map.clone()  # a view would bring its whole batch along
    replace_file(path, lambda file: torch.save(label_map, file))


def missing_maps(images: list[Path], output: Path) -> tuple[list[int], list[Path]]:
    """Indices and paths of the maps that are still to be made.

    Raises:
        UserError: Two images would share a map.
    """
    paths = [label_map_path(output, image) for image in images]
    path, number = Counter(paths).most_common(1)[0]
    if number > 1:
        raise UserError(f"{number} images share the name of {path.stem} in {path.parent.name}; rename them")
    missing = [i for i, path in enumerate(paths) if not path.exists()]
    return missing, [paths[i] for i in missing]


def load_teacher(args: argparse.Namespace, classes: list[str], distributed: Distributed) -> torch.nn.Module:
    """The teacher on the device, in evaluation mode."""
    try:
        teacher, notes = create_teacher(
            args.model, len(classes), args.input_size, args.checkpoint, args.model_key, trained_on=classes
        )
    except PretrainedClassesError as error:
        raise UserError(f"{error}; give a teacher of these classes by --checkpoint") from error
    for note in notes:
        print(note)
    return teacher.eval().to(distributed.device)


@torch.inference_mode()
def make(args: argparse.Namespace):
    """Make the maps that are missing; prints how many there are, and how often they agree with the folders."""
    check_model(args.model)
    check_is_no_class(args.output, Path(args.data_path), str(args.output))
    distributed = init_distributed(args.device)
    images = ImagePipeline(args.model, args.input_size, crop_pct=1.0, crop_mode="squash")
    # An image that is skipped gets no map, rather than the next one's.
    on_error = "mask" if args.skip_bad_images else "raise"
    dataset = datasets.build_dataset(
        "image_folder", args.data_path, args.split, images.transform(), on_error=on_error,
        reading=datasets.Reading(exif_transpose=args.exif_transpose),
    )
    folder = Path(dataset.source.root)
    files = [Path(path).relative_to(folder) for path, _ in dataset.source.samples]
    indices, paths = missing_maps(files, args.output)
    for note in dataset.notes:
        print(note)
    print(f"{len(files)} images in {folder}, {len(files) - len(indices)} of which have a map in {args.output}")
    if not indices:
        return
    args.output.mkdir(parents=True, exist_ok=True)
    teacher = load_teacher(args, dataset.classes, distributed)
    loader_options = LoaderOptions(batch_size=args.batch_size, num_workers=args.num_workers)
    loader = images.loader(Subset(dataset, indices), loader_options, distributed)
    precision = Precision.on(distributed.device, args.amp)
    made = agree = 0
    bar = tqdm(loader, desc="label maps", disable=not sys.stderr.isatty())
    with report_skipped(dataset, distributed.alone(), is_main=True), bar:
        for batch, (pictures, targets) in enumerate(bar):
            with precision.autocast():
                logits = dense_logits(teacher, pictures)
            agree += int((logits.float().mean(dim=(2, 3)).argmax(dim=1) == targets).sum())
            maps = label_maps(logits, args.topk).cpu()
            start = batch * args.batch_size
            for path, label_map, target in zip(paths[start : start + len(maps)], maps, targets.tolist(), strict=True):
                if target >= 0:
                    save(path, label_map)
                    made += 1
    share = 100 * agree / max(made, 1)
    print(f"made {made} maps of {tuple(maps.shape[1:])}; {share:.1f}% of them are of their folder's class")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_path", required=True, type=flags.path,
                        help="the image folder, with train/CLASS/IMAGE or CLASS/IMAGE")
    parser.add_argument("--split", default="train", choices=["train", "val"],
                        help="of which images (default: %(default)s)")
    parser.add_argument("--output", required=True, type=user_path, metavar="FOLDER", help="where the maps go")
    parser.add_argument("--model", required=True, help="the teacher: any model that timm knows, ours included")
    parser.add_argument("--checkpoint", type=flags.path, help="its weights, file or URL (default: its published ones)")
    parser.add_argument("--model_key", help="which weights of a checkpoint to take, for example model_ema")
    parser.add_argument("--input_size", default=576, type=int,
                        help="side that the images are resized to (default: %(default)s)")
    parser.add_argument("--topk", default=5, type=int, help="classes to keep at each position (default: %(default)s)")
    parser.add_argument("--batch_size", default=32, type=int, help="images of a forward pass (default: %(default)s)")
    parser.add_argument("--num_workers", default=min(8, os.cpu_count() or 1), type=int,
                        help="data loading processes (default: %(default)s)")
    parser.add_argument("--device", default="auto", help="auto, cuda, cuda:1 or cpu (default: %(default)s)")
    parser.add_argument("--amp", default="auto", choices=["auto", "bf16", "fp16", "off"],
                        help="mixed precision; auto: bf16 if the GPU has it (default: %(default)s)")
    parser.add_argument("--exif_transpose", default=True, type=flags.boolean, metavar="BOOL",
                        help="turn images upright by their EXIF orientation, as main.py does (default: true)")
    parser.add_argument("--skip_bad_images", action="store_true", help="make no map of an image that cannot be read")
    args = parser.parse_args(argv)
    for name in ("input_size", "topk", "batch_size"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(args, name)}")

    def run():
        try:
            make(args)
        except UnreadableImageError as error:
            raise UserError(f"{error}; remove it, or pass --skip_bad_images") from error

    return run_script(run)


if __name__ == "__main__":
    sys.exit(main())
