"""Folders and files of pictures that a run or an evaluation writes."""
import tempfile
from pathlib import Path

import numpy as np
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
