"""What an evaluation says by class: a table on the terminal, files, and overlays."""
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from utils import print_line

from ..confusion import write_confusion
from ..lettering import can_draw, drawable, load_font
from ..tables import write_csv
from .labels import IGNORE, overlay, palette
from .metrics import SegmentationScores, Shown, scores

# Images of an evaluation that are shown, and the width of each in pixels.
SHOWN, WIDTH = 6, 320
_LINE, _GAP = 14, 4
# Names in a line of the legend.
_NAMES = 5


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
        [_at_width(overlay(_fit_labels(x.image, labels), labels.numpy())) for labels in (x.labels, x.predicted)]
        for x in shown
    ]
    seen = [labels.numpy() for x in shown for labels in (x.labels, x.predicted)]
    return _stack(rows, ("labelled", "predicted"), _legend(seen, classes))


def draw_batch(
    images: Sequence[np.ndarray], labels: Sequence[np.ndarray], classes: Sequence[str]
) -> np.ndarray:
    """Training images, uint8 (H, W, 3), a row each, as they are and under their labels, and a legend."""
    rows = [[_at_width(x), _at_width(overlay(x, y))] for x, y in zip(images, labels, strict=True)]
    return _stack(rows, ("image", "labelled"), _legend(labels, classes))


def _legend(labels: Sequence[np.ndarray], classes: Sequence[str]) -> list[tuple[str, tuple[int, ...]]]:
    """Names and colours of the classes that occur, those of most pixels first."""
    counts = sum(np.bincount(x.ravel(), minlength=IGNORE + 1) for x in labels)[: len(classes)]
    order = [i for i in np.argsort(-counts, kind="stable") if counts[i]]
    return [(classes[i], tuple(palette()[i + 1].tolist())) for i in order]


def _fit_labels(image: Any, labels: Any) -> np.ndarray:
    """An image, uint8 (3, h, w), as large as its labels: (H, W, 3)."""
    height, width = labels.shape
    return np.asarray(Image.fromarray(image.permute(1, 2, 0).numpy()).resize((width, height)))


def _at_width(pixels: np.ndarray) -> Image.Image:
    height = max(1, round(pixels.shape[0] * WIDTH / pixels.shape[1]))
    return Image.fromarray(pixels).resize((WIDTH, height))


def _stack(
    rows: list[list[Image.Image]], titles: Sequence[str], legend: Sequence[tuple[str, tuple[int, ...]]]
) -> np.ndarray:
    """Pictures of one width in rows, below the titles of their columns and above a legend."""
    heights, width = [row[0].height for row in rows], len(titles) * (WIDTH + _GAP) - _GAP
    lines = -(-len(legend) // _NAMES) * _LINE
    canvas = Image.new("RGB", (width, _LINE + sum(heights) + _GAP * len(rows) + lines), "white")
    draw, (font, letters) = ImageDraw.Draw(canvas), load_font(can_draw())
    top = _LINE
    for column, title in enumerate(titles):
        draw.text((column * (WIDTH + _GAP) + 2, 1), title, fill="black", font=font)
    for row, height in zip(rows, heights, strict=True):
        for column, picture in enumerate(row):
            canvas.paste(picture, (column * (WIDTH + _GAP), top))
        top += height + _GAP
    for place, (name, colour) in enumerate(legend):
        left, line = place % _NAMES * (width // _NAMES), top + place // _NAMES * _LINE
        draw.rectangle((left + 2, line + 2, left + 10, line + 10), fill=colour)
        draw.text((left + 14, line), _short(drawable(name, letters), draw, font, width // _NAMES - 16), "black", font)
    return np.asarray(canvas)


def _short(text: str, draw: ImageDraw.ImageDraw, font: Any, width: int) -> str:
    """As much of a text as fits into a width."""
    while text and draw.textlength(text, font) > width:
        text = text[:-1]
    return text
