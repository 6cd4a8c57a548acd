"""The image files below a folder, in an order that is the same on every machine, and what else lies among them.

Left out without a word is what systems and programs leave behind: hidden names (`.ipynb_checkpoints`, `.Trash`, the
AppleDouble files `._NAME` of macOS), and the folders `NOT_THE_USERS`. Other files that are no images are counted; so
are pipes, sockets and devices, whatever their name.
"""
import os
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from utils import LostDataError, some

# Without their dots. Of several files of a sample in a shard, the first in this order is its image, as in timm.
IMAGE_EXTENSIONS = ("jpg", "png", "webp", "jpeg", "jfif", "bmp", "tif", "tiff", "ppm", "pgm")
# Copies and thumbnails of macOS, Windows, Synology and ext4.
NOT_THE_USERS = {"__MACOSX", "$RECYCLE.BIN", "System Volume Information", "@eaDir", "lost+found"}
Identity = tuple[int, int]


@dataclass
class ImageFiles:
    """What was found below a folder.

    Args:
        images: Paths of the images, sorted by folder and then by name.
        left_out: How many files are no images: ending in lower case, with its dot -> number.
    """

    images: list[str] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)


def is_image(name: str) -> bool:
    """Whether a file name ends as an image's does."""
    return _ending(name)[1:] in IMAGE_EXTENSIONS


def is_hidden(name: str) -> bool:
    """Whether the user did not put a file or folder of this name there."""
    return name.startswith(".") or name in NOT_THE_USERS


def find_images(folder: str | Path) -> ImageFiles:
    """The images below a folder, at any depth, and the endings of the other files.

    Links are followed, also to folders elsewhere; each folder is visited once, and one above `folder` not at all, so
    that links in a circle add nothing.

    Raises:
        LostDataError: A folder cannot be listed.
    """
    found, by_folder = ImageFiles(), []
    seen = _above(folder)
    waiting, links = [os.fspath(folder)], []
    while waiting or links:
        # links last, lest a folder that lies here has the name of a link to it
        path = waiting.pop() if waiting else links.pop(0)
        identity = _identity(path)
        if identity is None or identity in seen:
            continue
        seen.add(identity)
        names = []
        for entry in _entries(path):
            if _is_folder(entry):
                (links if entry.is_symlink() else waiting).append(entry.path)
            elif _is_special(entry):
                found.left_out["pipe, socket or device"] += 1
            elif is_image(entry.name):
                names.append(entry.name)
            else:
                found.left_out[_ending(entry.name)] += 1
        by_folder.append((path, names))
    found.images = [os.path.join(path, name) for path, names in sorted(by_folder) for name in names]
    return found


def list_folder(folder: str | Path) -> tuple[list[str], list[str]]:
    """The folders and the files right in a folder, by name and sorted; not hidden ones, nor links to folders above it.

    Raises:
        LostDataError: It cannot be listed.
    """
    folders, files = [], []
    above = _above(folder) | {_identity(folder)}
    for entry in _entries(folder):
        if not _is_folder(entry):
            files.append(entry.name)
        elif not (entry.is_symlink() and _identity(entry.path) in above):
            folders.append(entry.name)
    return folders, files


def describe_left_out(left_out: Counter[str], place: str | Path) -> str | None:
    """One line that says how many files of `place` are no images; None where there is no such file."""
    number = left_out.total()
    if not number:
        return None
    kinds = sorted(left_out.items(), key=lambda item: (-item[1], item[0]))
    what = some([f"{count} {ending if ending.isprintable() else ascii(ending)}" if ending else f"{count} of no ending"
                 for ending, count in kinds])
    if number == 1:
        return f"left out 1 file in {place} that is no image: {what}"
    return f"left out {number} files in {place} that are no images: {what}"


def _ending(name: str) -> str:
    """The part of a file name from its last dot on, in lower case."""
    return os.path.splitext(name)[1].lower()


def _entries(folder: str | Path) -> list[os.DirEntry]:
    """What lies right in a folder, but for hidden names, sorted by name; raises LostDataError as `find_images`."""
    try:
        with os.scandir(folder) as entries:
            found = [entry for entry in entries if not is_hidden(entry.name)]
    except OSError as error:
        raise LostDataError(f"cannot list the folder {folder}: {error.strerror}") from None
    return sorted(found, key=lambda entry: entry.name)


def _is_folder(entry: os.DirEntry) -> bool:
    """Whether an entry is a folder, or a link to one."""
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _is_special(entry: os.DirEntry) -> bool:
    """Whether an entry, no folder, is a pipe, socket or device, or a link to one: to read it may take for ever.

    A link to nothing is none: it is named when it cannot be read. Only links cost a system call.
    """
    try:
        return not entry.is_file() and (not entry.is_symlink() or os.path.exists(entry.path))
    except OSError:  # a link to itself
        return False


def _identity(path: str | Path) -> Identity | None:
    """Device and inode of a folder, the same by whatever path it is reached; None where it is gone."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _above(folder: str | Path) -> set[Identity]:
    """The identities of the folders above one: those in its path, and those in its path without links."""
    paths = (Path(os.path.abspath(folder)), Path(os.path.realpath(folder)))
    return {identity for path in paths for parent in path.parents if (identity := _identity(parent)) is not None}
