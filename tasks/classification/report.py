"""The report of an evaluation: what was predicted of every image, accuracy by class, and the confusion matrix."""
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..confusion import confusion_matrix, write_confusion
from ..tables import complete, prediction_cells, prediction_columns, write_csv
from .metrics import RecordedAccuracy


def write_report(folder: Path, recorded: RecordedAccuracy, images: Sequence[str], classes: list[str] | None):
    """Write `predictions.csv`, `classes.csv`, `confusion.csv` and, where matplotlib is installed, `confusion.png`.

    Args:
        folder: Where they are written.
        recorded: The evaluation.
        images: What each image is called, by its index.
        classes: Names of the classes, where they are known.

    Raises:
        UserError: They cannot be written.
    """
    names = complete(classes or [], recorded.num_classes)
    targets, top = recorded.targets.numpy(), recorded.classes.numpy()
    matrix = confusion_matrix(targets, top[:, 0], len(names))
    by_class = class_rows(matrix, targets, top, names)
    write_csv(folder / "predictions.csv", _predictions(recorded, images, names))
    write_csv(folder / "classes.csv", [["class", "images", "acc1", "acc5", "precision", "recall", "f1"], *by_class])
    write_confusion(folder, matrix, names)
    there = matrix.any(axis=1)  # of the others no accuracy is defined
    mean = 100 * np.mean(np.diag(matrix)[there] / matrix.sum(axis=1)[there])
    print(f"report: {folder}, mean accuracy of the classes {mean:.3f}")


def _predictions(recorded: RecordedAccuracy, images: Sequence[str], names: list[str]) -> Iterator[list[Any]]:
    yield ["image", "true_class", *prediction_columns(recorded.classes.shape[1]), "error"]
    for image, target, classes, probabilities in zip(
        images, recorded.targets.tolist(), recorded.classes.tolist(), recorded.probabilities.tolist(), strict=True
    ):
        guesses = [(names[c], value) for c, value in zip(classes, probabilities, strict=True)]
        if target < 0:
            yield [image, "", *prediction_cells([("", None)] * len(guesses)), "cannot be read"]
        else:
            yield [image, names[target], *prediction_cells(guesses), ""]


def class_rows(matrix: np.ndarray, targets: np.ndarray, top: np.ndarray, names: list[str]) -> list[list[Any]]:
    """For each class its name, number of images, and accuracy, top-5 accuracy, precision, recall and F1 in percent.

    The recall of a class is its accuracy. What is not defined, for a class without images or predictions, is "".

    Args:
        matrix: (true, predicted) counts.
        targets: (N,) class indices, -1 for images that are left out.
        top: (N, k) class indices, the most probable first.
        names: Of the classes.
    """
    found = np.bincount(targets[(top == targets[:, None]).any(axis=1)], minlength=len(names))
    hits, images, guesses = np.diag(matrix), matrix.sum(axis=1), matrix.sum(axis=0)
    with np.errstate(invalid="ignore"):  # 0 / 0, which is not defined
        recall, acc5, precision, f1 = hits / images, found / images, hits / guesses, 2 * hits / (images + guesses)
    values = np.stack([recall, acc5, precision, recall, f1], axis=1)
    cells = [["" if math.isnan(value) else round(100 * value, 3) for value in row] for row in values.tolist()]
    return [[name, count, *row] for name, count, row in zip(names, images.tolist(), cells, strict=True)]
