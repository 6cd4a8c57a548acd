"""Write the weights of a classifier's run to a small file to hand on: float16, in the format of safetensors.

    python scripts/release_weights.py runs/flowers/best.pth flowers.safetensors

The file is a sixth of the checkpoint or less, and says what is needed to use it: the model and its arguments, the
names of the classes, the image size, the crop. It is read wherever a checkpoint is:

    python scripts/predict.py --checkpoint flowers.safetensors photos/

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


def released(checkpoint: dict[str, Any], source: str) -> tuple[dict[str, Any], list[str]]:
    """What is kept of a run's checkpoint, and lines about it.

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
        kept = dict(
            args={name: said[name] for name in ARGUMENTS if name in said},
            classes=stored.class_names(checkpoint),
            model=halves,
        )
        create_trained(recipe, kept, source)
    return kept, notes


def release(source: str, output: Path):
    """Write what is kept of the checkpoint `source`; prints what it is."""
    if output.suffix != ENDING:
        raise UserError(f"{output}: the file's name must end in {ENDING}")
    if output.is_dir():
        raise UserError(f"cannot write {output}: it is a folder")
    kept, notes = released(read(source), stored.public(source))
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
    args = parser.parse_args(argv)
    return run_script(lambda: release(args.checkpoint, args.output))


if __name__ == "__main__":
    sys.exit(main())
