"""Which folders in a data folder are of splits, and which of classes; without torch, for the command line."""
import os
from pathlib import Path

from utils import UsageError

from .files import is_hidden, list_folder

SPLITS = ("train", "val", "test")
# Folders of these names are splits, and no classes of a folder without train.
SPLIT_NAMES = {"train", "training", "val", "valid", "validation", "test", "testing"}


def are_classes(folders: list[str]) -> bool:
    """Whether the folders in a data folder without train are those of classes."""
    return bool(folders) and not SPLIT_NAMES & {name.lower() for name in folders}


def check_is_no_class(folder: Path, root: Path, name: str):
    """Check that images of `root` can still be read once something is written to `folder`.

    Args:
        folder: It need not be there.
        root: A folder of images, as of `open_folders`.
        name: What is written there, for the message.

    Raises:
        UsageError: It would be taken for a class, or for a part of one.
    """
    if not root.is_dir():
        return
    is_flat = not (root / "train").is_dir() and are_classes(list_folder(root)[0])
    for place in [root] if is_flat else [root / split for split in SPLITS]:
        below, above = Path(os.path.realpath(folder)), os.path.realpath(place)
        parts = below.relative_to(above).parts if below.is_relative_to(above) else ()
        if parts and not any(map(is_hidden, parts)):
            raise UsageError(f"{name} lies among the class folders of {place} and would be taken for a class: "
                             "take a folder elsewhere")
