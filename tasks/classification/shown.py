"""What a run shows: the images of its next steps, as the network will see them, and the images of its evaluations."""
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from training.data.loader import EpochLoader, seeded
from training.distributed import Distributed
from training.run import Clock
from utils import derive_seed

from .. import confusion, lettering
from ..pictures import write_picture
from . import pictures
from .metrics import RecordedAccuracy

# How many images are shown, and of at most how many classes an evaluation in training draws the confusion matrix.
SHOWN, DRAWN = 16, 50
Batch = tuple[torch.Tensor, torch.Tensor]


def evaluation_pictures(
    recorded: RecordedAccuracy, names: Sequence[str], config: dict[str, Any], world_size: int
) -> dict[str, np.ndarray]:
    """Images of an evaluation, and of at most `DRAWN` classes the confusion matrix, where it can be drawn.

    Args:
        recorded: The evaluation, which is done.
        names: Of the classes.
        config: "mean" and "std" of the images.
        world_size: Processes that shared the evaluation.

    Returns:
        "predictions" and "confusion": uint8 (H, W, 3).
    """
    indices = [place * world_size for place in recorded.shown]
    titles = [
        (
            names[recorded.targets[i]] if recorded.targets[i] >= 0 else "cannot be read",
            f"pred. {names[recorded.classes[i, 0]]} {100 * recorded.probabilities[i, 0]:.0f} %",
        )
        for i in indices
    ]
    images = torch.stack(recorded.images)
    shown = dict(predictions=pictures.draw_grid(images, titles, config["mean"], config["std"]))
    if len(names) <= DRAWN and lettering.can_draw():
        targets, predicted = recorded.targets.numpy(), recorded.classes[:, 0].numpy()
        matrix = confusion.confusion_matrix(targets, predicted, len(names))
        shown["confusion"] = confusion.as_pixels(confusion.confusion_figure(matrix, list(names)))
    return shown


def write_preview(
    file: Path, batches: Iterator[Batch], names: Sequence[str], mixup: Callable | None, config: dict[str, Any]
):
    """Write the images of batches, at least `SHOWN` where there are so many, and what they are to be taken for.

    Args:
        file: A picture, by its ending.
        batches: Normalised images and targets; no more are read than are shown.
        names: Of the classes.
        mixup: What mixed the targets.
        config: "mean" and "std" of the images.

    Raises:
        UserError: It cannot be written.
    """
    images, titles = [], []
    for batch in batches:
        images += batch[0]
        titles += pictures.target_titles(batch[1], names, mixup)
        if len(images) >= SHOWN:
            break
    images, titles = torch.stack(images[:2 * SHOWN]), titles[:2 * SHOWN]
    write_picture(file, pictures.draw_grid(images, titles, config["mean"], config["std"]))
    print(f"training images: {file}")


def next_batches(
    loader: EpochLoader, clock: Clock, seed: int, update_freq: int, mixup: Callable | None, distributed: Distributed
) -> Iterator[Batch]:
    """The images, mixed, and targets of the first batch of each step from `clock` on, as a process trains on them.

    What is drawn later does not depend on it.

    Args:
        loader: Training batches, read by this process itself.
        clock: Where the run is.
        seed: The run's.
        update_freq: Batches per step.
        mixup: What mixes a batch.
        distributed: The process.
    """
    epoch, step = clock.next_step
    loader.set_epoch(epoch, first_batch=step * update_freq)
    for number, (images, targets) in enumerate(loader):
        if number % update_freq == 0:
            key = derive_seed(seed, epoch, step + number // update_freq, distributed.rank)
            with seeded(key % 2**32, distributed.device):
                if mixup is not None:
                    images, targets = mixup(images, targets)
            # of token labels, those of the images
            yield images, targets[0] if isinstance(targets, tuple) else targets
