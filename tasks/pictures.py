"""Pictures that a run or an evaluation shows or writes: which images, their pixels, folders and files."""
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

from utils import UserError, replace_file

from .lettering import can_draw, drawable, load_font, shorten

# Of a picture among others, in pixels.
WIDTH = 320
_LINE, _GAP = 14, 4
# Names in a line of the legend.
_NAMES = 5


def prepare_folder(folder: Path):
    """Make the folder of a report.

    Raises:
        UserError: It cannot be written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror}") from error


def places_to_show(number: int, images: int, world_size: int) -> list[int]:
    """Which of the main process's own images to show, evenly spread: their places among them, in order.

    Args:
        number: How many, at most.
        images: How many there are on all processes.
        world_size: Processes, each of which has every `world_size`-th.
    """
    own = len(range(0, images, world_size))
    return sorted({place * own // number for place in range(number)}) if own else []


def as_pixels(images: torch.Tensor, mean: Sequence[float], std: Sequence[float]) -> np.ndarray:
    """Normalised (B, 3, H, W) images -> uint8 (B, H, W, 3)."""
    mean, std = (torch.tensor(x, device=images.device).view(-1, 1, 1) for x in (mean, std))
    return (images.float() * std + mean).clamp(0, 1).mul(255).round().byte().permute(0, 2, 3, 1).cpu().numpy()


def write_picture(file: Path, pixels: np.ndarray):
    """Write uint8 (H, W, 3) pixels in the format of the file's ending.

    Raises:
        UserError: It cannot be written.
    """
    image = Image.fromarray(pixels)
    try:
        replace_file(file, lambda out: image.save(out, Image.registered_extensions()[file.suffix.lower()], quality=95))
    except OSError as error:
        raise UserError(f"cannot write {file}: {error.strerror}") from error


def at_width(pixels: np.ndarray) -> Image.Image:
    """uint8 (H, W, 3) pixels as a picture of `WIDTH`."""
    height = max(1, round(pixels.shape[0] * WIDTH / pixels.shape[1]))
    return Image.fromarray(pixels).resize((WIDTH, height))


def stack(
    rows: list[list[Image.Image]], titles: Sequence[str], legend: Sequence[tuple[str, tuple[int, ...]]] = ()
) -> np.ndarray:
    """Pictures of `WIDTH` in rows, below the titles of their columns and above a legend of names and colours."""
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
        draw.text((left + 14, line), shorten(drawable(name, letters), font, width // _NAMES - 16), "black", font)
    return np.asarray(canvas)
