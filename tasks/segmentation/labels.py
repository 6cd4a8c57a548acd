"""Label files of semantic segmentation: PNGs of one channel, 0 where a pixel is not labelled, else its class from 1."""
from pathlib import Path

import numpy as np
from PIL import Image

from training.data.images import reading
from utils import UserError

from ..colours import palette

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


def overlay(image: np.ndarray, labels: np.ndarray, opacity: float = 0.5) -> np.ndarray:
    """An image, (H, W, 3) uint8, under the colours of its labels, (H, W); what is not labelled stays as it is."""
    colours = palette()[np.where(labels == IGNORE, 0, labels.astype(np.int64) + 1)]
    mixed = np.rint(image * (1 - opacity) + colours * opacity).astype(np.uint8)
    return np.where((labels == IGNORE)[..., None], image, mixed)


def _shape(shape: tuple[int, ...]) -> str:
    return f"{shape[0]} x {shape[1]} pixels"
