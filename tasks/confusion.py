"""Confusion matrices, and a picture of one."""
from pathlib import Path
from typing import Any

import numpy as np

from utils import replace_file

from .lettering import can_draw, drawable, load_font
from .tables import write_csv

# At most so many classes have their names on the axes, and their counts in the cells.
_NAMED, _COUNTED = 60, 20


def confusion_matrix(targets: np.ndarray, predicted: np.ndarray, num_classes: int) -> np.ndarray:
    """(N,) true and predicted class indices -> (true, predicted) int64 counts; targets below 0 are left out."""
    known = targets >= 0
    cells = targets[known] * num_classes + predicted[known]
    return np.bincount(cells, minlength=num_classes**2).reshape(num_classes, num_classes)


def confusion_figure(matrix: np.ndarray, classes: list[str], counts: bool = True) -> Any:
    """A matplotlib Figure of a confusion matrix: each row, a true class, is coloured by the shares of its predictions.

    Args:
        matrix: (true, predicted) counts.
        classes: Names of the classes.
        counts: Write the counts of few classes into their cells; those of pixels are long numbers.
    """
    from matplotlib.colors import PowerNorm
    from matplotlib.figure import Figure

    count = len(matrix)
    side = min(5 + 0.25 * count, 13)
    figure = Figure(figsize=(side + 1, side), layout="constrained")
    axes = figure.add_subplot()
    shares = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    # among many classes, mistakes are single pixels of small shares
    norm = PowerNorm(1 if count <= _NAMED else 0.3, vmin=0, vmax=1)
    image = axes.imshow(shares, cmap="Blues" if count <= _NAMED else "magma_r", norm=norm, interpolation="nearest")
    figure.colorbar(image, shrink=0.8, label="share of the true class")
    axes.set(xlabel="predicted class", ylabel="true class")
    if count <= _NAMED:
        letters = load_font(with_matplotlib=True)[1]
        names = [drawable(name, letters) for name in classes]
        names = [name if len(name) <= 24 else f"{name[:23]}\u2026" for name in names]
        # a class name may hold a $, which is no formula
        axes.set_xticks(range(count), names, rotation=90, parse_math=False)
        axes.set_yticks(range(count), names, parse_math=False)
    if counts and count <= _COUNTED:
        for row, column in np.ndindex(matrix.shape):
            colour = "white" if shares[row, column] > 0.5 else "black"
            axes.text(column, row, str(matrix[row, column]), ha="center", va="center", color=colour, fontsize=8)
    return figure


def write_confusion(folder: Path, matrix: np.ndarray, classes: list[str], counts: bool = True):
    """Write `confusion.csv` and, where matplotlib is installed, `confusion.png`; arguments as of `confusion_figure`.

    Raises:
        UserError: They cannot be written.
    """
    lines = ([name, *row] for name, row in zip(classes, matrix.tolist(), strict=True))
    write_csv(folder / "confusion.csv", [["true class", *classes], *lines])
    if can_draw():
        figure = confusion_figure(matrix, classes, counts)
        replace_file(folder / "confusion.png", lambda file: figure.savefig(file, format="png", dpi=120))
    else:
        print("no confusion.png is drawn: pip install matplotlib")


def as_pixels(figure: Any) -> np.ndarray:
    """A matplotlib Figure as uint8 (H, W, 3)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()
