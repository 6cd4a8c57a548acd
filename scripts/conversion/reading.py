"""What both formats are read by: folders of splits, images, texts, names of classes, and coordinates in them."""
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from training.data.files import describe_left_out, find_images
from utils import UserError, one_line, print_line

from .samples import BadSampleError, Picture

# Split -> the names that its folder may have.
SPLITS = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation"),
    "test": ("test", "testing"),
}
# Endings of what lies among images and is no image that a user may have meant.
NOT_MEANT = (".txt", ".xml", ".json", ".yaml", ".cache", ".npy")


# --- files and folders ------------------------------------------------------------------------------------------------


def images_below(folder: Path) -> list[Path]:
    """The images below a folder; says what lies there and is no image that can be read."""
    found = find_images(folder)
    for ending in NOT_MEANT:
        del found.left_out[ending]
    if note := describe_left_out(found.left_out, folder):
        print_line(note)
    return [Path(path) for path in found.images]


def split_folders(data: Path, pattern: str) -> dict[str, Path]:
    """Split -> its folder, where the data folder has one; `pattern` is its path below, with {} for the split."""
    found = {}
    for split, aliases in SPLITS.items():
        folders = [folder for alias in aliases if (folder := data / pattern.format(alias)).is_dir()]
        if folders:
            found[split] = folders[0]
    return found


def read_text(path: Path) -> str:
    """The text of a file in UTF-8, with a byte order mark or without."""
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadSampleError(f"{path}: not text in UTF-8 ({one_line(error)})") from None


def check_names(names: list[str], place: Path) -> list[str]:
    """The names of the classes; raises UserError where there is none, one is empty, or two are the same."""
    repeated = [name for name, number in Counter(names).items() if number > 1]
    if not names or "" in names or repeated:
        what = f"two classes have the name {repeated[0]!r}" if repeated and repeated[0] else "a class has no name"
        raise UserError(f"{place}: {what if names else 'there are no names of classes'}")
    return names


def read_classes(path: Path) -> list[str]:
    """The names of the classes in a file, one a line."""
    return check_names([line.strip() for line in read_text(path).rstrip().splitlines()], path)


# --- coordinates ------------------------------------------------------------------------------------------------------


def numbers(words: Iterable[str], place: str) -> list[float]:
    """Words as finite numbers; `place`, the file and the line, is for the message."""
    values = []
    for word in words:
        try:
            values.append(float(word))
        except ValueError:
            raise BadSampleError(f"{place}: {word!r} is no number") from None
        if not math.isfinite(values[-1]):
            raise BadSampleError(f"{place}: {word} is not finite")
    return values


def inside(points: Sequence[float], picture: Picture) -> tuple[float, ...]:
    """Coordinates (x1, y1, x2, y2, ...) in pixels, moved into the image and rounded to a thousandth of a pixel."""
    sides = float(picture.width), float(picture.height)
    return tuple(round(min(max(0.0, value), sides[i % 2]), 3) for i, value in enumerate(points))


def is_empty(corners: Sequence[float]) -> bool:
    """Whether a box has no area."""
    x1, y1, x2, y2 = corners
    return x2 <= x1 or y2 <= y1
