"""Label files of semantic segmentation: PNGs of one channel, 0 where a pixel is not labelled, else its class from 1."""
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image

from training.data.images import reading
from utils import UserError

# In a label map, what is not labelled; also a value of label files, where there are fewer classes.
IGNORE = 255
# Pixel values in one channel; of a palette these are its indices.
_SPREAD = {"L;2": 85, "L;4": 17}
_ONE_CHANNEL = ("1", "L", "P", "I", "I;16", "I;16B", "I;16L")


class LabelError(UserError):
    """A file that holds no labels, or labels that do not fit its image or the classes; names the file."""


def read_label(path: Path, num_classes: int, size: tuple[int, int] | None = None) -> np.ndarray:
    """A label file as (H, W) uint8 class indices from 0, `IGNORE` where a pixel is not labelled.

    Args:
        path: The file.
        num_classes: Classes of the data set, at most 255.
        size: (height, width) that it must have; None for any.

    Raises:
        LabelError: Its size is another, it has several channels, or a value above `num_classes` other than 255.
        UnreadableFileError: It is not an intact image.
    """
    with reading(path), Image.open(path) as image:
        # Greys of 2 and 4 bits, which Pillow spreads over 0 to 255.
        spread = _SPREAD.get(image.tile[0][3], 1) if image.tile else 1
        mode, values = image.mode, np.asarray(image)
    if mode not in _ONE_CHANNEL:
        raise LabelError(f"{path}: is {mode}, and a label file has one channel: the numbers of classes")
    if size is not None and values.shape != size:
        raise LabelError(f"{path}: is {_shape(values.shape)}, and its image is {_shape(size)}")
    values = values.astype(np.int32) // spread
    beyond = (values > num_classes) & (values != IGNORE) | (values < 0)
    if beyond.any():
        y, x = np.argwhere(beyond)[0].tolist()
        raise LabelError(f"{path}: holds the value {values[y, x]}, at row {y} and column {x}, and there are "
                         f"{num_classes} classes, from 1, and 0 for what is not labelled")
    # 0 and, of fewer than 255 classes, 255 become 255
    labels = np.where(values == IGNORE, 0, values) if num_classes < IGNORE else values
    return (labels - 1).astype(np.uint8)


def write_label(labels: np.ndarray) -> Image.Image:
    """(H, W) class indices from 0, `IGNORE` for none, as a label file with a palette: what `read_label` reads."""
    image = Image.fromarray(np.where(labels == IGNORE, 0, labels.astype(np.int32) + 1).astype(np.uint8))
    image.putpalette(palette().tobytes())
    return image


@cache
def palette() -> np.ndarray:
    """(256, 3) uint8 colours of label values: black for 0, and the others as far from all before them as can be.

    Distances are Euclidean in CIELAB, among colours that are neither nearly black nor nearly white.
    """
    levels = np.linspace(0, 255, 9).round().astype(np.uint8)
    candidates = np.stack(np.meshgrid(levels, levels, levels, indexing="ij"), axis=-1).reshape(-1, 3)
    places = _cielab(candidates)
    is_clear = (places[:, 0] > 30) & (places[:, 0] < 90)
    candidates, places = candidates[is_clear], places[is_clear]
    chosen = [int(np.flatnonzero((candidates == (255, 0, 0)).all(axis=1))[0])]
    nearest = np.full(len(places), np.inf)
    while len(chosen) < IGNORE:
        nearest = np.minimum(nearest, np.linalg.norm(places - places[chosen[-1]], axis=1))
        chosen.append(int(nearest.argmax()))
    return np.concatenate([np.zeros((1, 3), np.uint8), candidates[chosen]])


def _cielab(colours: np.ndarray) -> np.ndarray:
    """(N, 3) uint8 sRGB colours in CIELAB, under D65."""
    x = colours / 255
    x = np.where(x > 0.04045, ((x + 0.055) / 1.055) ** 2.4, x / 12.92)
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    x = x @ to_xyz.T / (0.9505, 1.0, 1.089)
    x, y, z = np.where(x > 0.008856, np.cbrt(x), 7.787 * x + 16 / 116).T
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], axis=1)


def overlay(image: np.ndarray, labels: np.ndarray, opacity: float = 0.5) -> np.ndarray:
    """An image, (H, W, 3) uint8, under the colours of its labels, (H, W); what is not labelled stays as it is."""
    colours = palette()[np.where(labels == IGNORE, 0, labels.astype(np.int64) + 1)]
    mixed = np.rint(image * (1 - opacity) + colours * opacity).astype(np.uint8)
    return np.where((labels == IGNORE)[..., None], image, mixed)


def _shape(shape: tuple[int, ...]) -> str:
    return f"{shape[0]} x {shape[1]} pixels"
