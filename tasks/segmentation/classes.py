"""The names of the classes of a data set: a classes.txt, or the table that comes with ADE20K."""
import unicodedata
from pathlib import Path

from utils import UserError, some

from .labels import IGNORE

_ADE_CLASSES, _ADE_NAMES = 150, "objectInfo150.txt"


def about_names(root: Path, data_set: str) -> list[str]:
    """A line where the classes have numbers for names."""
    is_named = data_set != "ade20k" or (root / _ADE_NAMES).is_file()
    return [] if is_named else [f"{root} has no {_ADE_NAMES}: classes are called by their numbers"]


def read_classes(root: Path, data_set: str) -> list[str]:
    """The names of the classes of a data set, "ade20k" or "segmentation_folder".

    Raises:
        UserError: There is no list of them, or it has one class or more than 255, an empty line, or a name twice.
    """
    if data_set == "ade20k":
        return _read_ade20k(root / _ADE_NAMES)
    path = root / "classes.txt"
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except FileNotFoundError:
        raise UserError(f"{root} has no classes.txt: a class a line, the first has the value 1") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {getattr(error, 'strerror', None) or 'it is no text in UTF-8'}") from None
    names = [unicodedata.normalize("NFC", line.strip()) for line in lines]
    while names and not names[-1]:
        names.pop()
    if not all(names):
        raise UserError(f"{path}: line {names.index('') + 1} is empty, and each is to name a class")
    if not names:
        raise UserError(f"{path}: it is empty")
    if len(names) == 1:
        raise UserError(f"{path}: one class alone cannot be told from another; name the background too, since 0 stands "
                        "for what is not labelled")
    if doubled := [name for name in dict.fromkeys(names) if names.count(name) > 1]:
        raise UserError(f"{path}: names {some(doubled)} twice")
    if len(names) > IGNORE:
        raise UserError(f"{path}: {len(names)} classes are more than the {IGNORE} that label files of 8 bits can hold")
    return names


def _read_ade20k(path: Path) -> list[str]:
    """The names of SceneParse150's classes by the table that comes with it; numbers where it was left out."""
    if not path.is_file():
        return [str(number) for number in range(1, _ADE_CLASSES + 1)]
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()[1:]
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    names = [line.rpartition("\t")[2].strip() for line in lines if line.strip()]
    if len(names) != _ADE_CLASSES:
        raise UserError(f"{path}: names {len(names)} classes, and ADE20K has {_ADE_CLASSES}")
    first = [name.partition(",")[0] for name in names]  # of synonyms
    return first if len(set(first)) == len(first) else names
