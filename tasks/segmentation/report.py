"""What an evaluation says by class: a table on the terminal, files, and overlays."""
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from utils import print_line

from ..colours import palette
from ..confusion import write_confusion
from ..pictures import at_width, stack
from ..tables import write_csv
from .labels import IGNORE, overlay
from .metrics import SegmentationScores, Shown, scores

# Images of an evaluation that are shown.
SHOWN = 6


def class_table(evaluator: SegmentationScores) -> list[list[Any]]:
    """For each class its name, labelled pixels, IoU and accuracy in percent, "" where they are not defined."""
    found, pixels = scores(evaluator.matrix), evaluator.matrix.sum(axis=1)
    cells = [["" if np.isnan(x) else round(x, 3) for x in pair] for pair in zip(found.iou, found.accuracy, strict=True)]
    rows = zip(evaluator.classes, pixels.tolist(), cells, strict=True)
    return [[name, number, *pair] for name, number, pair in rows]


def print_classes(evaluator: SegmentationScores):
    """Print IoU and accuracy by class."""
    width = max(map(len, ["class", *evaluator.classes]))
    for name, _, iou, accuracy in [["class", "", "IoU", "Acc"], *class_table(evaluator)]:
        iou, accuracy = (f"{x:.3f}" if isinstance(x, float) else x or "-" for x in (iou, accuracy))
        print_line(f"{name:{width}}  {iou:>8}  {accuracy:>8}")


def write_report(folder: Path, evaluator: SegmentationScores):
    """Write `classes.csv`, `confusion.csv` and, where matplotlib is installed, `confusion.png`.

    Raises:
        UserError: They cannot be written.
    """
    write_csv(folder / "classes.csv", [["class", "pixels", "IoU", "Acc"], *class_table(evaluator)])
    write_confusion(folder, evaluator.matrix, evaluator.classes, counts=False)
    print(f"report: {folder}")


def draw_overlays(shown: Sequence[Shown], classes: Sequence[str]) -> np.ndarray:
    """A row for each image, with its labels and with the predicted ones, and a legend; uint8 (H, W, 3)."""
    rows = [
        [at_width(overlay(_fit_labels(x.image, labels), labels.numpy())) for labels in (x.labels, x.predicted)]
        for x in shown
    ]
    seen = [labels.numpy() for x in shown for labels in (x.labels, x.predicted)]
    return stack(rows, ("labelled", "predicted"), _legend(seen, classes))


def draw_batch(
    images: Sequence[np.ndarray], labels: Sequence[np.ndarray], classes: Sequence[str]
) -> np.ndarray:
    """Training images, uint8 (H, W, 3), a row each, as they are and under their labels, and a legend."""
    rows = [[at_width(x), at_width(overlay(x, y))] for x, y in zip(images, labels, strict=True)]
    return stack(rows, ("image", "labelled"), _legend(labels, classes))


def _legend(labels: Sequence[np.ndarray], classes: Sequence[str]) -> list[tuple[str, tuple[int, ...]]]:
    """Names and colours of the classes that occur, those of most pixels first."""
    counts = sum(np.bincount(x.ravel(), minlength=IGNORE + 1) for x in labels)[: len(classes)]
    order = [i for i in np.argsort(-counts, kind="stable") if counts[i]]
    return [(classes[i], tuple(palette()[i + 1].tolist())) for i in order]


def _fit_labels(image: Any, labels: Any) -> np.ndarray:
    """An image, uint8 (3, h, w), as large as its labels: (H, W, 3)."""
    height, width = labels.shape
    return np.asarray(Image.fromarray(image.permute(1, 2, 0).numpy()).resize((width, height)))
