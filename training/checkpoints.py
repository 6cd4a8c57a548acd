"""Checkpoint files: written whole or not at all, read without running anything that is in them."""
import argparse
import fcntl
import hashlib
import os
import pickle
import re
import shutil
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import urlparse

import safetensors.torch
import torch
from timm.models import clean_state_dict

from utils import UserError, is_url, replace_file

# --- reading --------------------------------------------------------------------------------------------------------


class HostileFileError(UserError):
    """A file that would run code if it were unpickled."""


def fetch(source: str) -> Path:
    """The local file of a path or URL; URLs are downloaded into torch.hub's folder, once for all processes.

    A URL that ends in `#sha256=` and (the beginning of) a file's hash is downloaded and compared with it.

    Raises:
        UserError: There is no such file, the download failed, or the file is another one.
    """
    if not is_url(source):
        path = Path(source)
        if not path.is_file():
            raise UserError(f"{source}: no such checkpoint file")
        return path
    # The name alone would not do: sharing services serve every file under the same one.
    name = f"{hashlib.sha256(source.encode()).hexdigest()[:16]}-{Path(urlparse(source).path).name}"
    path = Path(torch.hub.get_dir()) / "checkpoints" / name
    if not path.exists():
        try:
            _download(source, path)
        except (OSError, RuntimeError) as error:
            raise UserError(f"{source}: cannot be downloaded ({error}); fetch it by hand and pass the file") from error
    return path


def _download(source: str, path: Path):
    """Download `source` to `path`, unless another process of this machine does, for which this one waits."""
    url, _, fragment = source.partition("#")
    expected = fragment.removeprefix("sha256=").lower() if fragment.startswith("sha256=") else None
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.with_name(f"{path.name}.lock"), "wb") as lock:
        with suppress(OSError):  # a file system without locks: each process then downloads a copy of its own
            fcntl.lockf(lock, fcntl.LOCK_EX)
        if not path.exists():
            torch.hub.download_url_to_file(url, str(path), hash_prefix=expected)


def read_checkpoint(source: str) -> dict[str, Any]:
    """Read a checkpoint file or URL. Nothing in it is executed: tensors and plain values are all that is accepted.

    Raises:
        UserError: It is missing, truncated, no checkpoint, or holds Python objects that would have to be run.
    """
    path = fetch(source)
    try:
        return _read_file(path)
    except UserError:
        if is_url(source):
            # A page that says no, or half a file: the next try must not find it in the cache.
            path.unlink(missing_ok=True)
        raise


def _read_file(path: Path) -> dict[str, Any]:
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        # Published checkpoints store their command line as a Namespace, which is inert.
        with torch.serialization.safe_globals([argparse.Namespace]):
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # on damaged bytes the unpickler raises nearly anything
        if isinstance(error, pickle.UnpicklingError) and "unsupported global" in str(error).lower():
            raise HostileFileError(
                f"{path}: refused, since loading it would run code ({', '.join(_foreign_objects(path))}); "
                "ask its author for a file of tensors alone"
            ) from error
        raise UserError(f"{path}: not a PyTorch checkpoint, or a truncated one; fetch it again") from error
    if not isinstance(checkpoint, dict):
        raise UserError(f"{path}: holds a {type(checkpoint).__name__}, not a checkpoint")
    return checkpoint


def _foreign_objects(path: Path) -> list[str]:
    """Python objects that a checkpoint would have called, where its format lets us look."""
    try:
        return torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:  # an old format, or a damaged file
        return ["it holds Python objects"]


def model_weights(checkpoint: dict[str, Any], key: str | None = None) -> dict[str, torch.Tensor]:
    """The weights in a checkpoint: under `key`, else under "model" or "state_dict", else the checkpoint itself.

    Raises:
        UserError: There is no `key`, or what was found are no weights.
    """
    if key is not None and not isinstance(checkpoint.get(key), dict):
        found = ", ".join(sorted(k for k, v in checkpoint.items() if isinstance(v, dict)))
        raise UserError(f"the checkpoint holds no {key!r}; it holds {found or 'bare weights'}")
    keys = [key] if key is not None else ["model", "state_dict"]
    weights = next((checkpoint[k] for k in keys if isinstance(checkpoint.get(k), dict)), checkpoint)
    weights = {k: v for k, v in weights.items() if isinstance(k, str) and isinstance(v, torch.Tensor)}
    weights = clean_state_dict(weights)
    if not weights:
        raise UserError("the checkpoint holds no weights")
    return weights


def other_classes(checkpoint: dict[str, Any], classes: list[str] | None) -> str | None:
    """How the classes that a checkpoint of ours was trained on differ from `classes`; None where nothing says so."""
    trained_on = checkpoint.get("classes")
    if trained_on is None or classes is None or trained_on == classes:
        return None
    if len(trained_on) != len(classes):
        return f"was trained on {len(trained_on)} classes, the data has {len(classes)}"
    index = next(i for i, (ours, theirs) in enumerate(zip(classes, trained_on, strict=True)) if ours != theirs)
    return f"was trained on other classes: number {index} was {trained_on[index]!r}, and is {classes[index]!r} here"


def load_weights(
    model: torch.nn.Module,
    weights: dict[str, torch.Tensor],
    filter_fn: Callable | None = None,
    new_classifier: tuple[str, ...] = (),
) -> bool:
    """Load `weights` in full, after the model family's own renaming of published names.

    Args:
        model: The model, not wrapped.
        weights: Name to tensor.
        filter_fn: timm's `checkpoint_filter_fn` of the family.
        new_classifier: Names of the classifier layers, to keep the model's own where the class count differs.

    Returns:
        Whether the classifier was kept.

    Raises:
        UserError: The weights are of another architecture; lists the first mismatches.
    """
    expected = model.state_dict()
    if filter_fn is not None:
        # What is not of the family can trip its filter; the list of mismatches below then says what it is.
        with suppress(Exception):
            weights = filter_fn(weights, model)
    kept = False
    for classifier in new_classifier:
        for leaf in ("weight", "bias"):
            name = f"{classifier}.{leaf}"
            if name in weights and name in expected and weights[name].shape != expected[name].shape:
                weights = {**weights, name: expected[name]}
                kept = True
    mismatches = [f"{name} is missing" for name in expected if name not in weights]
    mismatches += [f"{name} is unknown" for name in weights if name not in expected]
    mismatches += [
        f"{name} is {tuple(value.shape)} instead of {tuple(expected[name].shape)}"
        for name, value in weights.items()
        if name in expected and value.shape != expected[name].shape
    ]
    if mismatches:
        more = f", and {len(mismatches) - 3} more" if len(mismatches) > 3 else ""
        raise UserError(
            f"the checkpoint does not fit {type(model).__name__} with {getattr(model, 'num_classes', '?')} classes: "
            f"{'; '.join(mismatches[:3])}{more}"
        )
    model.load_state_dict(weights)
    return kept


# --- the checkpoints of a run ---------------------------------------------------------------------------------------


class _Output:
    """A file that remembers why it could not be written, which torch.save forgets."""

    def __init__(self, file: BinaryIO):
        self.file = file
        self.flush = file.flush
        self.error: Exception | None = None

    def write(self, data: bytes) -> int:
        try:
            return self.file.write(data)
        except Exception as error:  # the system's, or that of a signal: a process that reads images has died
            self.error = error
            raise


def save_checkpoint(path: Path, state: dict[str, Any]):
    """Write `state` (tensors, numbers, strings, and containers of them) so that `path` is never half written.

    Raises:
        OSError: It cannot be written; what was there is as it was.
    """

    def write(file: BinaryIO):
        output = _Output(file)
        try:
            torch.save(state, output)
        except RuntimeError as error:
            raise output.error or error from None

    replace_file(path, write)


def is_whole(path: Path) -> bool:
    """Whether a checkpoint of ours can be read, every byte as it was written: torch.load does not look at checksums.

    Raises:
        UserError: The system cannot read the file, or it holds code.
    """
    try:
        with open(path, "rb") as file:
            while file.read(2**24):
                pass
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    try:
        with zipfile.ZipFile(path) as archive:
            if archive.testzip() is not None:
                return False
        _read_file(path)
    except HostileFileError:
        raise
    except Exception:  # damaged bytes make zipfile raise nearly anything
        return False
    return True


class CheckpointStore:
    """The checkpoints of one run in its folder, named by the number of optimizer steps taken.

    `last.pth` is a link to the newest, `best.pth` a file of its own.

    Args:
        folder: The run's.
        keep: How many of the newest to keep.
    """

    def __init__(self, folder: Path, keep: int = 2):
        self.folder, self.keep = folder, keep
        self.last, self.best = folder / "last.pth", folder / "best.pth"

    def path(self, step: int) -> Path:
        """The file of the checkpoint after `step` optimizer steps."""
        return self.folder / f"checkpoint-{step:08d}.pth"

    def steps(self) -> list[int]:
        """Those of the checkpoints that are there, the newest last."""
        names = (re.fullmatch(r"checkpoint-(\d{8,})\.pth", path.name) for path in self.folder.glob("checkpoint-*.pth"))
        return sorted(int(name[1]) for name in names if name)

    def holds_run(self) -> bool:
        """Whether a run has written here."""
        return bool(self.steps()) or any(p.exists() for p in (self.last, self.best, self.folder / "log.txt"))

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Make the folder this process's own, and sweep up what a run that was killed left half written.

        Raises:
            UserError: Another process writes there.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            lock = open(self.folder / ".lock", "wb")  # noqa: SIM115, closed below
        except OSError as error:
            raise UserError(f"cannot write to {self.folder}: {error.strerror}") from error
        with lock as file:
            try:
                # A process's own: those that read images inherit files, and outlive one that is killed by seconds.
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(f"another run is writing to {self.folder}; end it, or take another folder") from None
            except OSError:
                pass  # a file system without locks
            for path in self.folder.glob(".*.pth.*"):
                path.unlink()
            yield

    def newest_whole(self) -> int | None:
        """The newest checkpoint that is whole; those after it are renamed to `*.damaged`, with a line about each.

        Raises:
            UserError: There are checkpoints, and none is whole.
        """
        damaged = []
        for step in reversed(self.steps()):
            path = self.path(step)
            if is_whole(path):
                for other in damaged:
                    other.rename(other.with_suffix(".pth.damaged"))
                    print(f"{other} is damaged, and set aside as {other.name}.damaged")
                self._point_last(path)  # the run may have ended before it did
                return step
            damaged.append(path)
        if damaged:
            raise UserError(f"no checkpoint in {self.folder} is whole; to start anew, take another folder")
        return None

    def save(self, step: int, state: dict[str, Any]):
        """Write the checkpoint after `step` optimizer steps, point `last.pth` to it, and remove the oldest.

        Raises:
            UserError: It cannot be written; those before are as they were.
        """
        path = self.path(step)
        self._write(path, state)
        self._point_last(path)
        for old in self.steps()[: -self.keep]:
            if old != step:
                self.path(old).unlink()

    def _point_last(self, path: Path):
        temporary = self.folder / f".{self.last.name}.{os.getpid()}"
        temporary.unlink(missing_ok=True)
        try:
            temporary.symlink_to(path.name)
        except OSError:  # a file system without links
            shutil.copyfile(path, temporary)
        os.replace(temporary, self.last)

    def save_best(self, state: dict[str, Any]):
        """Write `best.pth`.

        Raises:
            UserError: It cannot be written; the one before is as it was.
        """
        self._write(self.best, state)

    def _write(self, path: Path, state: dict[str, Any]):
        try:
            save_checkpoint(path, state)
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror}; {self.kept()}") from error

    def kept(self) -> str:
        """What an error message says of the last checkpoint."""
        steps = self.steps()
        return f"the last checkpoint is {self.path(steps[-1])}" if steps else "no checkpoint was written yet"
