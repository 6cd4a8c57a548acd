"""Small images of three classes, each of a colour, for tests that train."""
from pathlib import Path
from typing import Any

import numpy as np
from PIL import ExifTags, Image


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


def photograph(path: Path, orientation: int, **settings: Any) -> np.ndarray:
    """Write a photograph as a camera held so stores it, with its EXIF orientation, 1 to 8.

    Returns its pixels upright, (16, 32, 3): redder to the right, greener to the bottom.
    """
    upright = np.zeros((16, 32, 3), np.uint8)
    upright[..., 0], upright[..., 1] = np.arange(32) * 8, np.arange(16)[:, None] * 16
    # what undoes each orientation, by the standard's table
    stored = {
        1: lambda x: x, 2: np.fliplr, 3: lambda x: np.rot90(x, 2), 4: np.flipud,
        5: lambda x: x.swapaxes(0, 1), 6: lambda x: np.rot90(x, 1),
        7: lambda x: np.rot90(x, 2).swapaxes(0, 1), 8: lambda x: np.rot90(x, -1),
    }[orientation](upright)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    Image.fromarray(np.ascontiguousarray(stored)).save(path, exif=exif, **settings)
    return upright
