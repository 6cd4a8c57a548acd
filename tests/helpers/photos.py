"""Small images of three classes, each of a colour, for tests that train."""
from pathlib import Path

import numpy as np
from PIL import Image


def write_photos(root: Path, train: int, val: int) -> Path:
    """An image folder at `root` with so many training and validation images of 40 x 48 pixels; returns `root`."""
    rng = np.random.default_rng(0)
    for split, count in (("train", train), ("val", val)):
        for i in range(count):
            folder = root / split / f"class{i % 3}"
            folder.mkdir(parents=True, exist_ok=True)
            pixels = rng.integers(0, 90, (40, 48, 3), np.uint8)
            pixels[..., i % 3] += 120
            Image.fromarray(pixels).save(folder / f"{i}.png")
    return root
