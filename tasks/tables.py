"""Tables of predictions as CSV files, which programs and spreadsheets read; of scripts/predict.py and of reports."""
import csv
import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from utils import UserError, replace_file

# What spreadsheets take for a formula: https://owasp.org/www-community/attacks/CSV_Injection
_FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n")
Guesses = Sequence[tuple[str, float | None]]  # class and probability


def as_cell(value: Any) -> str:
    """A value for a CSV file: an apostrophe comes before text that a spreadsheet would take for a formula."""
    text = str(value)
    return f"'{text}" if isinstance(value, str | Path) and text.startswith(_FORMULA) else text


def complete(names: Sequence[Any], count: int) -> list[str]:
    """The names of `count` classes: those that are given, and numbers for the rest."""
    return [str(name) for name in names[:count]] + [str(index) for index in range(len(names), count)]


def prediction_columns(count: int) -> list[str]:
    """The titles of `count` guesses: class_1, probability_1, class_2, ..."""
    return [f"{what}_{rank}" for rank in range(1, count + 1) for what in ("class", "probability")]


def prediction_cells(guesses: Guesses) -> list[str]:
    """The values of these columns; those of a probability that is None are empty."""
    return [cell for name, value in guesses for cell in (name, "" if value is None else f"{value:.6f}")]


def check_output(path: Path):
    """Raises UserError where `path` is a folder, or a device, which no file should replace."""
    if path.exists() and not path.is_file():
        kind = "is a folder" if path.is_dir() else "is a device"
        raise UserError(f"cannot write {path}: it {kind}, and a table needs a file")


def write_csv(path: Path, rows: Iterable[Sequence[Any]]):
    """Write a table row by row, in UTF-8; `path` is never half a row, and is replaced at the end.

    That `path` can be written to is seen before the first row is asked for. Where `rows` raises, Ctrl-C included, what
    it gave after the first row, the titles, is kept in `path`, and the error is raised.

    Raises:
        UserError: It cannot be written.
    """
    check_output(path)
    raised: list[BaseException] = []

    def write(file: BinaryIO):
        # Bytes of file names that are no UTF-8 are written as escapes: every program can read the file.
        text = io.TextIOWrapper(file, "utf-8", errors="backslashreplace", newline="")
        writer, iterator, count = csv.writer(text), iter(rows), 0
        while True:
            try:
                row = next(iterator)
            except StopIteration:
                break
            except BaseException as error:
                raised.append(error)
                if count < 2:
                    raise
                break
            writer.writerow([as_cell(cell) for cell in row])
            count += 1
        text.flush()
        text.detach()

    try:
        replace_file(path, write)
    except OSError as error:
        if error in raised:
            raise
        raise UserError(f"cannot write {path}: {error.strerror}") from error
    if raised:
        raise raised[0]
