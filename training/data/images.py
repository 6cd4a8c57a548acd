"""Reading image files, whatever their format, as PIL RGB images."""
import errno
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from utils import LostDataError, UserError, one_line

# System errors that concern one file: it is missing, or its damaged bytes made a decoder seek to an impossible place.
# PIL's own errors have no number. All others are faults of the machine or its storage, which other images share.
_OF_ONE_FILE = (None, errno.ENOENT, errno.EINVAL)
# Too many files are open: neither a file nor a disk is at fault.
_OF_THIS_PROCESS = (errno.EMFILE, errno.ENFILE)
# Pixels of an image that is read: 0.5 GB as RGB in each process that reads. The largest cameras have 151 million, a
# tile of Sentinel-2 has 121 million.
_MOST_PIXELS = 160_000_000
Image.MAX_IMAGE_PIXELS = _MOST_PIXELS // 2  # Pillow warns of more, and refuses what is more than twice as much
# What telephones save and not every Pillow reads: the brand that such a file begins with -> its format.
_FORMATS = {b"heic": "HEIC", b"heix": "HEIC", b"mif1": "HEIF", b"avif": "AVIF"}
# Of damaged EXIF and large images, for example; PIL would print them in every data loading process.
for _category in (UserWarning, RuntimeWarning):
    warnings.filterwarnings("ignore", category=_category, module=r"PIL\.")


class UnreadableImageError(UserError):
    """What should be an image is not an intact one."""


class UnreadableFileError(UnreadableImageError):
    """A file of its own, which can be removed."""


class UnreadableMemberError(UnreadableImageError):
    """A part of a file, which holds other images too."""


def load_image(file: str | Path | BinaryIO, exif_transpose: bool = True) -> Image.Image:
    """Read the image in `file`, whatever its mode, as PIL RGB.

    Alpha is dropped, as in timm and torchvision. Greys of more than 8 bits are scaled to 8, see `_to_8_bits`.

    Args:
        file: Path, or open file.
        exif_transpose: Turn and mirror the image as its EXIF orientation says, which timm and torchvision do not; one
            that cannot be read is passed over.

    Raises:
        LostDataError: The folder in which it should be is gone, or the system cannot read the file.
        MemoryError: There is no memory to read any image.
        OSError: No file can be opened: too many are.
        UnreadableFileError, for an open file UnreadableMemberError: It is not an intact image, is too large, or has
            values of no known scale; names the file.
    """
    with reading(file), Image.open(file) as image:
        image.load()
        if exif_transpose:
            _turn_upright(image)
        return _to_rgb(image)


@contextmanager
def reading(file: str | Path | BinaryIO) -> Iterator[None]:
    """Raise what goes wrong while `file` is read as an image, and its pixels are, as `load_image` does."""
    try:
        yield
    except Exception as error:  # on damaged bytes PIL's decoders raise nearly anything
        name = file if isinstance(file, (str, Path)) else getattr(file, "name", file)  # a Path's name is its last part
        if _is_out_of_memory(error):
            raise MemoryError(f"out of memory while reading {name}") from None
        if isinstance(error, OSError) and error.errno in _OF_THIS_PROCESS:
            raise
        if isinstance(error, OSError) and error.errno not in _OF_ONE_FILE:
            raise LostDataError(f"cannot read {name}: {error.strerror}; check the disk, or the mount") from None
        if isinstance(file, (str, Path)) and not Path(file).parent.is_dir():
            raise LostDataError(f"cannot read {file}: its folder is gone; was the data moved, or unmounted?") from None
        reason = one_line(error)
        if isinstance(error, UnidentifiedImageError):
            reason = _why_unidentified(file)
        elif isinstance(error, Image.DecompressionBombError):
            reason = f"it has more than {_MOST_PIXELS // 10**6} million pixels; make it smaller, or cut it up"
        kind = UnreadableFileError if isinstance(file, (str, Path)) else UnreadableMemberError
        raise kind(f"cannot read {name}: {reason}") from None


def _turn_upright(image: Image.Image):
    """Turn and mirror an image as its EXIF orientation says."""
    try:
        ImageOps.exif_transpose(image, in_place=True)
    except Exception as error:  # on damaged EXIF, PIL raises nearly anything
        if _is_out_of_memory(error):
            raise


def _is_out_of_memory(error: Exception) -> bool:
    """Whether there was no memory to read an image, or any other."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM or str(error).startswith("out of memory")  # the words of PIL's decoders
    return isinstance(error, MemoryError)


def _why_unidentified(file: str | Path | BinaryIO) -> str:
    """Why Pillow does not know what is in a file."""
    if isinstance(file, (str, Path)):
        with open(file, "rb") as opened:
            start = opened.read(12)
    else:
        file.seek(0)
        start = file.read(12)
    kind = _FORMATS.get(start[8:]) if start[4:8] == b"ftyp" else None
    if kind is None or f".{kind.lower()}" in Image.registered_extensions():
        return "not an image"
    return f"{kind} is a format that this Pillow does not read: convert it to JPEG"


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F" or image.mode.startswith("I"):  # I, I;16 and its byte orders
        image = Image.fromarray(_to_8_bits(np.asarray(image), image.mode))
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # straight to RGB, PIL warns
    return image.convert("RGB")


def _to_8_bits(values: np.ndarray, mode: str) -> np.ndarray:
    """Greys as uint8, which PIL's own conversion clips instead of scaling.

    16-bit integers are 0 to 65535. 32-bit ones and floats have no scale of their own, so that their largest value has
    to tell: integers are of 8 bits up to 255, and of 16 bits up to 65535; floats are 0 to 1 up to 1, and 0 to 255 from
    2 to 255.

    Raises:
        ValueError: Other values.
    """
    low, high = values.min(), values.max()
    if mode == "F":
        # between 1 and 2 lie 0 to 1 with an overshoot of resampling
        scale = 1 if high <= 1 else 255 if 2 <= high <= 255 else None
        known = "floats are read where they are 0 to 1 or 0 to 255"
    else:
        scale = 65535 if mode != "I" or 255 < high <= 65535 else 255 if high <= 255 else None
        known = "32-bit integers are read where they are of 8 or 16 bits"
    if scale is None or not low >= 0:  # nor is NaN
        raise ValueError(f"its values are {low:g} to {high:g}, and {known}; save it with 8 or 16 bits")
    if mode == "F":
        return np.rint(values * np.float32(255 / scale)).astype(np.uint8)
    return values.astype(np.uint8) if scale == 255 else ((values.astype(np.uint32) + 128) // 257).astype(np.uint8)
