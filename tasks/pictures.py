"""Pictures that a run or an evaluation shows or writes: which images, their pixels, folders and files."""
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from utils import UserError, replace_file


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
