"""Small images of coloured rectangles and their label files, for tests of segmentation."""
from pathlib import Path

import numpy as np
from PIL import Image

CLASSES = ("red", "green", "blue")


def write_segments(root: Path, train: int = 6, val: int = 3) -> Path:
    """A segmentation_folder at `root` with so many training and validation images of `CLASSES`; returns `root`.

    Each image has two rectangles of each class, of its colour, on a dark ground that is not labelled: 44 to 62 pixels
    high and 57 to 83 wide, never a multiple of 32.
    """
    rng = np.random.default_rng(0)
    for split, number in (("training", train), ("validation", val)):
        for kind in ("images", "annotations"):
            (root / kind / split).mkdir(parents=True, exist_ok=True)
        for i in range(number):
            pixels, values = _rectangles(rng, height=44 + 9 * (i % 3), width=57 + 13 * (i % 3))
            Image.fromarray(pixels).save(root / "images" / split / f"{i}.png")
            Image.fromarray(values).save(root / "annotations" / split / f"{i}.png")
    (root / "classes.txt").write_text("".join(f"{name}\n" for name in CLASSES))
    return root


def _rectangles(rng: np.random.Generator, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """(height, width, 3) uint8 pixels, and the (height, width) values of their label file."""
    pixels = rng.integers(0, 60, (height, width, 3), np.uint8)
    values = np.zeros((height, width), np.uint8)
    order = rng.permutation([0, 0, 1, 1, 2, 2])
    for place, index in enumerate(order.tolist()):
        # six tiles, two rows of three: a rectangle in each, with a margin around it
        row, column = divmod(place, 3)
        top, left = row * height // 2 + rng.integers(1, 4), column * width // 3 + rng.integers(1, 4)
        bottom, right = (row + 1) * height // 2 - rng.integers(1, 4), (column + 1) * width // 3 - rng.integers(1, 4)
        pixels[top:bottom, left:right, index] += 160
        values[top:bottom, left:right] = index + 1
    return pixels, values
