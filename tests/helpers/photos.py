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


def noise(height: int = 12, width: int = 16, seed: int = 0) -> np.ndarray:
    """(height, width, 3) uint8."""
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def write_noise(root: Path) -> Path:
    """An image folder at `root` of ten train and seven val images in two classes; image i is `noise(seed=i)`."""
    for split, number in (("train", 10), ("val", 7)):
        for i in range(number):
            path = root / split / ("ant" if i < number // 2 else "bee") / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(noise(seed=i)).save(path)
    return root
