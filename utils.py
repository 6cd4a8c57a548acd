"""What everything may use: errors, seeds, and files that are never half written."""
import argparse
import errno
import os
import random
import sys
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from difflib import get_close_matches
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import urlparse

import numpy as np

# --- errors -----------------------------------------------------------------------------------------------------------


class UserError(ValueError):
    """A mistake of the user's, or of their data: one line that says what is wrong. A run ends with it and exit code 1.

    Modules below main.py know no flags: they raise a class of their own, to which main.py adds what to do.
    """

    exit_code = 1


class LostDataError(UserError):
    """Data that was there is gone, or is not what it should be: more than one image that could be skipped."""


class UsageError(UserError):
    """A wrong command line or recipe: exit code 2."""

    exit_code = 2


@contextmanager
def as_user_error(kind: type[Exception]) -> Iterator[None]:
    """Raise an error of this kind, from a module that knows none of ours, as a `UserError` with the same text."""
    try:
        yield
    except kind as error:
        raise UserError(str(error)) from error


def nearest(name: str, known: Iterable[str], n: int = 1) -> str:
    """The ending of an error that suggests similar names among `known`; empty where none is similar."""
    close = get_close_matches(name, list(known), n, cutoff=0.5)
    return f"; did you mean {' or '.join(close)}?" if close else ""


def check_name(kind: str, name: str, known: Collection[str]):
    """Raises UsageError where `name` is not among those `known`; lists them if they are few, or else the nearest."""
    if name not in known:
        choices = f"; choose from {', '.join(known)}" if len(known) <= 10 else nearest(name, known, n=3)
        raise UsageError(f"unknown {kind} {name!r}{choices}")


def fail(message: str, exit_code: int) -> int:
    """Print the one line of an error, without the middle of words that fill a screen; returns `exit_code`."""
    words = [f"{word[:100]}[...]{word[-100:]}" if len(word) > 5000 else word for word in message.split()]
    with suppress(OSError):  # standard error may lie on the disk that is full
        # In one write, so that the lines of several processes do not run together.
        sys.stderr.write(f"error: {printable(' '.join(words))}\n")
    return exit_code


def run_script(run: Callable[[], Any]) -> int:
    """Call `run`; returns the exit code: the error's for a user's mistake, 1 for an unusable file or folder, 130 after
    Ctrl-C, or 0.
    """
    try:
        run()
    except UserError as error:
        return fail(str(error), error.exit_code)
    except KeyboardInterrupt:
        return fail("interrupted", 130)
    except BrokenPipeError:  # what reads the output, `head` for example, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes it once more at the end
        return 1
    except OSError as error:
        if error.filename is None:
            raise
        return fail(f"{error.filename}: {error.strerror}", 1)
    return 0


def one_line(error: Exception) -> str:
    """The text of an error without line breaks."""
    return " ".join(str(error).split())


def printable(text: str) -> str:
    """Text as one line that a terminal shows as it is: what is not printable, a line break or an escape sequence for
    example, is written as in Python's strings; so are the bytes of a file name that are no UTF-8, as `\\udcff`.
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def print_line(text: str):
    """Print `printable` text, with escapes for what standard output's encoding lacks."""
    encoding = sys.stdout.encoding or "utf-8"
    print(printable(text).encode(encoding, "backslashreplace").decode(encoding))


def count(number: int, noun: str) -> str:
    """A number of things for a message: "1 epoch", "2 epochs", "3 batches"; adds what a regular plural ends in."""
    plural = "" if number == 1 else "es" if noun.endswith(("ss", "tch")) else "s"
    return f"{number} {noun}{plural}"


def some(items: Sequence[str], most: int = 5) -> str:
    """The first of several items, and how many more there are, for a message."""
    return ", ".join(items[:most]) + (f" and {len(items) - most} more" if len(items) > most else "")


# --- seeds ------------------------------------------------------------------------------------------------------------


def use_deterministic_algorithms():
    """Make torch compute the same bits in every run on a GPU too, or name the operation that cannot."""
    import torch  # here, so that a mistake in a command line need not wait for it

    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.backends.cudnn.benchmark = False
    torch.use_deterministic_algorithms(True)
    # By default torch would then also fill memory that is written over right after.
    torch.utils.deterministic.fill_uninitialized_memory = False


def derive_seed(*key: int) -> int:
    """Mix integers >= 0 into one 64-bit seed."""
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0])


def seed_generators(seed: int, *manual_seed: Callable[[int], Any]):
    """Seed the generators of Python and NumPy, and by each `manual_seed` one of torch's."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    for start in manual_seed:
        start(seed)


def seed_everything(seed: int, *salt: int):
    """Seed Python, NumPy and torch from `seed` and, for example, the epoch, the step and the rank.

    Called at every step, it makes the state of the generators a function of the step, so that a checkpoint need not
    store them, and a run can resume with another number of processes.
    """
    import torch

    seed_generators(derive_seed(seed, *salt) % 2**32, torch.manual_seed)


# --- files ----------------------------------------------------------------------------------------------------------


def is_url(source: str | Path) -> bool:
    """Whether a file or folder is on a web server."""
    with suppress(ValueError):
        return urlparse(str(source)).scheme in ("http", "https")
    return False


def user_path(text: str | Path) -> Path:
    """The file or folder that a user names, where ~ is the home folder."""
    return Path(text).expanduser()


def positive_count(text: str) -> int:
    """A number of the command line that counts something. Raises argparse.ArgumentTypeError where it does not."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    return int(text)


def replace_file(path: Path, write: Callable[[BinaryIO], Any]):
    """Write `path` by `write` so that it is never half written, whatever ends the process or the machine.

    Raises:
        OSError: It cannot be written; IsADirectoryError where it is a folder.
    """
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    mask = os.umask(0)
    os.umask(mask)
    os.fchmod(handle, 0o666 & ~mask)  # as any file: mkstemp's are the owner's alone
    try:
        with os.fdopen(handle, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    with suppress(OSError):  # the new name too, where the file system can
        os.fsync(folder)
    os.close(folder)
