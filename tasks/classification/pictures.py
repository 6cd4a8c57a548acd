"""Pictures of batches: images as the network sees them, each with a title."""
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw
from timm.data.mixup import Mixup
from torchvision.utils import make_grid

from ..lettering import can_draw, drawable, load_font, shorten
from ..pictures import as_pixels

# Pixels: the least width of an image, which a title needs; and the height of a line of its title.
_WIDTH, _LINE = 128, 13
Title = tuple[str, str]  # two lines, whatever is in the names that they hold


def draw_grid(images: torch.Tensor, titles: Sequence[Title], mean: Sequence[float], std: Sequence[float]) -> np.ndarray:
    """Normalised (B, 3, H, W) images and their titles -> uint8 (H', W', 3)."""
    tiles = [_tile(image, title) for image, title in zip(as_pixels(images, mean, std), titles, strict=True)]
    grid = make_grid(torch.from_numpy(np.stack(tiles)).permute(0, 3, 1, 2), nrow=4, padding=4, pad_value=255)
    return grid.permute(1, 2, 0).numpy()


def _tile(image: np.ndarray, title: Title) -> np.ndarray:
    """A uint8 (H, W, 3) image, enlarged where it is small, above its title."""
    scale = -(-_WIDTH // image.shape[1])
    image = image.repeat(scale, axis=0).repeat(scale, axis=1)
    height, width = image.shape[:2]
    tile = Image.new("RGB", (width, height + 2 + _LINE * len(title)), "white")
    tile.paste(Image.fromarray(image))
    draw, (font, letters) = ImageDraw.Draw(tile), load_font(can_draw())
    for row, line in enumerate(title):
        text = shorten(drawable(line, letters), font, width)
        draw.text((1, height + 1 + _LINE * row), text, fill="black", font=font)
    return np.asarray(tile)


def target_titles(targets: torch.Tensor, names: Sequence[str], mixup: Mixup | None) -> list[Title]:
    """What each image of a training batch is to be taken for, in two lines: a class, or two and their weights.

    Args:
        targets: (B,) class indices, or (B, classes) mixed and smoothed distributions.
        names: Of the classes.
        mixup: What mixed the targets; None for class indices.
    """
    if targets.ndim == 1:
        return [(names[target], "") for target in targets.tolist()]
    off = mixup.label_smoothing / len(names)
    weights, classes = ((targets - off) / max(1 - mixup.label_smoothing, 1e-6)).topk(min(2, len(names)), dim=1)
    titles = []
    for values, indices in zip(weights.tolist(), classes.tolist(), strict=True):
        lines = [f"{value:.2f} {names[c]}" for value, c in zip(values, indices, strict=True) if value >= 0.005]
        lines = [names[indices[0]]] if values[0] > 0.995 else lines
        first, second = [*lines, "", ""][:2]
        titles.append((first, second))
    return titles
