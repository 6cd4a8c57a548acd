"""Write the weights of a classifier's run to a small file to hand on: float16, in the format of safetensors.

    python scripts/release_weights.py runs/flowers/best.pth flowers.safetensors
    python scripts/release_weights.py runs/flowers/best.pth flowers.safetensors --input_size 160

The file is a sixth of the checkpoint or less, and says what is needed to use it: the model and its arguments, the
names of the classes, the image size, the crop. It is read wherever a checkpoint is:

    python scripts/predict.py --checkpoint flowers.safetensors photos/

It is used at the run's image size, or at `--input_size`: networks are mostly more accurate on images somewhat larger
than those that they were trained on ("Fixing the train-test resolution discrepancy", Touvron et al., 2019).

Of a run whose best metric is the EMA's, the EMA weights are taken, of any other the model's own. Nothing else of the
run is in the file: no paths, no images, no optimizer state.
"""
import argparse
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from models import NetworkRecipe, create_trained
from storage import weights as stored
from tasks.networks import check_model, read
from tasks.options import image_size
from training import flags
from training.task import reading_weights
from utils import UserError, count, print_line, replace_file, run_script, user_path

ENDING = ".safetensors"
# What `NetworkRecipe` reads of a run's arguments.
ARGUMENTS = ("task", "model", "model_kwargs", "nb_classes", "input_size", "crop_pct", "exif_transpose")


def in_half(weights: dict[str, torch.Tensor], source: str) -> dict[str, torch.Tensor]:
    """Weights in float16, each in memory of its own; integers, as batch norms count their steps in, stay.

    Raises:
        UserError: Some are not finite in float16, which ends at 65504; names the first.
    """
    halves = {}
    for name, value in weights.items():
        dtype = torch.float16 if value.is_floating_point() else value.dtype
        halves[name] = half = value.to(dtype, copy=True, memory_format=torch.contiguous_format)
        if half.is_floating_point() and not half.isfinite().all():
            raise UserError(f"{source}: weights are NaN or infinite, or would be in float16, {name} first")
    return halves


def released(
    checkpoint: dict[str, Any], source: str, input_size: int | tuple[int, int] | None = None
) -> tuple[dict[str, Any], list[str]]:
    """What is kept of a run's checkpoint, to be used at `input_size` or at the run's own; and lines about it.

    Raises:
        UserError: It is not of a classifier's run of ours, or the network cannot be built again from what is kept.
    """
    recipe = NetworkRecipe.of(checkpoint)
    said = checkpoint.get("args")
    if not isinstance(said, dict) or "task" not in said or recipe.model is None:
        raise UserError(f"{source} is no checkpoint of a run of this repository, which says what its weights belong to")
    if recipe.task != "classification":
        raise UserError(f"{source} is no classifier, but of the task {recipe.task}")
    check_model(recipe.model)
    key, notes = stored.default_weights(checkpoint, source)
    with reading_weights():
        halves = in_half(stored.unwrap(checkpoint, key), source)
        args = {name: said[name] for name in ARGUMENTS if name in said}
        kept = dict(
            args=args if input_size is None else args | dict(input_size=flags.plain(None, input_size)),
            classes=stored.class_names(checkpoint),
            model=halves,
        )
        create_trained(NetworkRecipe.of(kept), kept, source)
    return kept, notes


def release(source: str, output: Path, input_size: int | tuple[int, int] | None = None):
    """Write what is kept of the checkpoint `source`; prints what it is."""
    if output.suffix != ENDING:
        raise UserError(f"{output}: the file's name must end in {ENDING}")
    if output.is_dir():
        raise UserError(f"cannot write {output}: it is a folder")
    kept, notes = released(read(source), stored.public(source), input_size)
    content = stored.to_safetensors(kept)
    replace_file(output, lambda file: file.write(content))
    recipe = NetworkRecipe.of(kept)
    classes = f", {count(recipe.num_classes, 'class')}" if recipe.num_classes else ""
    for note in [*notes, f"{output}: {recipe.model}{classes}, {len(content) / 1e6:.1f} MB"]:
        print_line(note)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=flags.path, help="of a run: best.pth or last.pth, file or URL")
    parser.add_argument("output", type=user_path, metavar=f"NAME{ENDING}", help="is replaced where it exists")
    parser.add_argument("--input_size", type=image_size, metavar="PIXELS",
                        help="side, or HEIGHTxWIDTH, of the images in use (default: the run's)")
    args = parser.parse_args(argv)
    return run_script(lambda: release(args.checkpoint, args.output, args.input_size))


if __name__ == "__main__":
    sys.exit(main())
