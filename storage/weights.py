"""Weights of networks: checkpoint files from paths and URLs, read without running anything that is in them."""
import errno
import hashlib
import json
import pickle
import re
import sys
import unicodedata
import zipfile
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import torch

from .plain import PLAIN, NotPlainError, as_numpy
from .remote import RemoteCache, TransferError, public

# Prefixes that torch.compile and DistributedDataParallel put before parameter names, in either order.
_WRAPPERS = ("_orig_mod.", "module.", "_orig_mod.")
# torch.save does not compress. Whoever did may have saved a tenth, and zeros that need next to nothing.
_MOST_COMPRESSED = 10
_MOST_ZEROS = 2**26
# The entry of a safetensors file's metadata that holds what a checkpoint says beside its weights, as JSON.
_METADATA = "routedvit"
# Where timm's train.py keeps EMA weights.
_TIMMS_EMA = "state_dict_ema"


class WeightsError(ValueError):
    """Weights cannot be obtained, read, or loaded; one line that says why."""


class HostileFileError(WeightsError):
    """A file that would run code, read memory of its own choice, or fill it, if it were unpacked as it asks."""


class DamagedFileError(WeightsError):
    """A file whose content has changed since it was written."""


class UnreadableError(WeightsError):
    """The system could not read a file: memory was short, or an I/O error. This says nothing about the file."""


class WeightsKeyError(WeightsError):
    """A checkpoint that holds weights under other keys than was asked for, or than the usual ones; names them."""


class MismatchError(WeightsError):
    """Weights of another architecture, or of another number of classes."""


def _is_url(source: str) -> bool:
    with suppress(ValueError):
        return urlparse(source).scheme in ("http", "https", "file")
    return False


def _copy_name(source: str) -> str:
    # The last part of the address would not do: file-sharing services serve every file under the same one.
    url, has_hash, _ = source.partition("#")
    key = hashlib.sha256((public(source) if has_hash else url).encode()).hexdigest()[:16]
    return f"{key}-{Path(urlparse(url).path).name[-100:]}"


def _cache(cache_dir: str | Path | None) -> RemoteCache:
    return _cache_in(Path(cache_dir or torch.hub.get_dir()) / "checkpoints")


@cache  # a program reads a checkpoint several times, and compares its copy with its hash the first time
def _cache_in(folder: Path) -> RemoteCache:
    return RemoteCache(folder, on_download=lambda url: print(f"downloading {url} to {folder}", file=sys.stderr))


def fetch(source: str, cache_dir: str | Path | None = None) -> Path:
    """The local file of a path or URL; a URL is downloaded once for all processes of the machine.

    A URL may end in `#sha256=` and the file's hash, or at least the first 8 hexadecimal digits of it; the download and,
    at the start of each later run, its copy is compared with it. Without, a copy is compared with what was downloaded.

    Args:
        source: Path or URL.
        cache_dir: Copies are kept in the folder `checkpoints` of this one; by default in torch.hub's.

    Raises:
        WeightsError: There is no such file, the download failed, or it is another file than the hash says;
            UnreadableError where the system cannot say whether there is one.
    """
    if not _is_url(source):
        path = Path(source)
        try:
            if path.is_file():
                return path
        except OSError as error:  # a folder that may not be entered, or a disk that does not answer
            raise UnreadableError(f"{source}: the system cannot read it: {error.strerror}") from error
        if path.exists():
            raise WeightsError(f"{source}: no checkpoint file, but something else")
        raise WeightsError(f"{source}: no such checkpoint file")
    url, has_fragment, fragment = source.partition("#")
    expected = re.fullmatch("sha256=([0-9a-fA-F]{8,64})", fragment)
    if has_fragment and expected is None:
        raise WeightsError(
            f"{public(source)}: after # must stand sha256= and the file's SHA-256, or at least its first 8 digits"
        )
    try:
        return _cache(cache_dir).path(url, _copy_name(source), expected and expected[1])
    except (OSError, TransferError) as error:
        raise WeightsError(f"{public(source)}: cannot be downloaded: {error}") from error


def read_checkpoint(source: str, cache_dir: str | Path | None = None, mmap: bool = False) -> dict[str, Any]:
    """The content of a checkpoint file or URL; nothing in it is executed, only tensors and plain values are accepted.

    The copy of a URL that cannot be read is removed, so that the next attempt downloads it again.

    Args:
        source: Path or URL of what torch.save or safetensors wrote.
        cache_dir: As `fetch` takes it.
        mmap: Leave tensors in the file until they are looked at, and checksums unchecked; for what else is in it.

    Raises:
        WeightsError: It is missing, truncated, or no checkpoint; DamagedFileError where its checksums are wrong;
            HostileFileError where reading it would run code, or where it holds other data of NumPy than numbers and
            texts; UnreadableError where the system failed.
    """
    path = fetch(source, cache_dir)
    try:
        return read_file(path, mmap)
    except UnreadableError:
        raise
    except WeightsError:
        if _is_url(source):  # a page that says no, or half a file
            _cache(cache_dir).discard(path.name)
        raise


def read_file(path: Path, mmap: bool = False) -> dict[str, Any]:
    """`read_checkpoint` of a local file."""
    try:
        if path.suffix == ".safetensors":  # which neither compresses nor lets tensors overlap
            return _read_safetensors(path)
        if unpacked := _unpacked_size(path):
            size, full = (f"{length / 1e6:,.1f} MB" for length in (path.stat().st_size, unpacked))
            raise HostileFileError(
                f"{path}: refused, since its {size} unpack to {full}; ask its author for a file that is not compressed"
            )
        if not mmap and _is_damaged(path):
            raise DamagedFileError(f"{path}: damaged, its checksums are wrong; fetch it again")
        with torch.serialization.safe_globals(PLAIN):
            # Files of old formats cannot be mapped.
            mmap = mmap and zipfile.is_zipfile(path)
            checkpoint = as_numpy(torch.load(path, map_location="cpu", weights_only=True, mmap=mmap))
    except (HostileFileError, DamagedFileError):
        raise
    except Exception as error:  # on damaged bytes the unpickler raises nearly anything
        fault = system_fault(error)
        if fault is not None:
            raise UnreadableError(f"{path}: the system cannot read it: {fault}") from error
        why = _why_refused(path, error)
        if why is not None:
            message = f"{path}: refused, since {why}; ask its author for a file of tensors alone"
            raise HostileFileError(message) from error
        raise WeightsError(f"{path}: not a PyTorch checkpoint, or a truncated one; fetch it again") from error
    if not isinstance(checkpoint, dict):
        raise WeightsError(f"{path}: holds a {type(checkpoint).__name__}, not a checkpoint")
    return checkpoint


def _read_safetensors(path: Path) -> dict[str, Any]:
    """The tensors in a safetensors file; where `to_safetensors` wrote it, the checkpoint."""
    import safetensors.torch

    tensors = safetensors.torch.load_file(path)
    with safetensors.safe_open(path, "pt") as file:
        metadata = file.metadata() or {}
    return {**json.loads(metadata[_METADATA]), "model": tensors} if _METADATA in metadata else tensors


def to_safetensors(checkpoint: dict[str, Any]) -> bytes:
    """The content of a safetensors file from which `read_file` reads this checkpoint again; the same bytes each time.

    Args:
        checkpoint: Weights under "model", contiguous tensors of memory of their own; the rest are values of JSON.
    """
    import safetensors.torch

    about = {key: value for key, value in checkpoint.items() if key != "model"}
    # In one entry: safetensors writes several in any order.
    return safetensors.torch.save(checkpoint["model"], {_METADATA: json.dumps(about)})


def _is_damaged(path: Path) -> bool:
    """Whether a part of a zip file does not have its checksum, which torch.load does not look at."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return archive.testzip() is not None


def _unpacked_size(path: Path) -> int | None:
    """Bytes that a zip file unpacks to, where that is more than a checkpoint would; None where it is not, or no zip."""
    try:
        with zipfile.ZipFile(path) as archive:
            size = sum(entry.file_size for entry in archive.infolist())
    except Exception:  # another format, or damaged: torch says what
        return None
    return size if size > _MOST_COMPRESSED * path.stat().st_size + _MOST_ZEROS else None


def system_fault(error: Exception) -> str | None:
    """Why the system could not read a file; None where an error is of what is in the file."""
    if isinstance(error, MemoryError) or "allocate memory" in str(error):  # torch has no class for that of a CPU
        return "out of memory"
    # Damaged offsets in a zip file ask for places before its beginning, which is an invalid argument.
    if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
        return error.strerror
    return None


def _why_refused(path: Path, error: Exception) -> str | None:
    """What of a file's content must not be read, where that is why reading it raised an error; None where it is not."""
    if not isinstance(error, pickle.UnpicklingError | NotPlainError):
        return None
    if foreign := _foreign_objects(path, error):
        return f"loading it would run code ({', '.join(foreign)})"
    return f"it holds {error}" if isinstance(error, NotPlainError) else None


def _foreign_objects(path: Path, error: Exception) -> list[str]:
    """Python objects that loading a file would have called, where its format lists them; empty where there are none."""
    try:
        with torch.serialization.safe_globals(PLAIN):
            return torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:  # an old format, or a damaged file
        return ["it holds Python objects"] if "unsupported global" in str(error).lower() else []


def _bare(name: str) -> str:
    for wrapper in _WRAPPERS:
        name = name.removeprefix(wrapper)
    return name


def _holds_weights(value: Any) -> bool:
    return isinstance(value, dict) and any(isinstance(v, torch.Tensor) for v in value.values())


def unwrap(checkpoint: dict[str, Any], key: str | None = None) -> dict[str, torch.Tensor]:
    """The weights in a checkpoint: under `key`, else under "model" or "state_dict", else the checkpoint itself.

    Prefixes of DistributedDataParallel and torch.compile are removed from the names; where there are none, the
    dictionary is the checkpoint's own, not a copy.

    Raises:
        WeightsError: What was found are no weights; WeightsKeyError where there are some under other keys.
    """
    keyed = [str(name) for name, value in checkpoint.items() if _holds_weights(value)]
    if key is not None and not isinstance(checkpoint.get(key), dict):
        raise WeightsKeyError(f"the checkpoint holds no {key!r}; it holds {', '.join(sorted(keyed)) or 'bare weights'}")
    keys = [key] if key is not None else [name for name in ("model", "state_dict") if name in keyed]
    # a number among the tensors, for example of steps, is no weight
    if not keys and keyed and not any(isinstance(v, torch.Tensor) and v.ndim for v in checkpoint.values()):
        raise WeightsKeyError(f"the checkpoint holds weights under {' and '.join(sorted(keyed))}; say which")
    content = checkpoint[keys[0]] if keys else checkpoint
    weights = {_bare(k): v for k, v in content.items() if isinstance(k, str) and isinstance(v, torch.Tensor)}
    if not weights:
        raise WeightsError("the checkpoint holds no weights")
    return content if content.keys() == weights.keys() else weights


def default_weights(checkpoint: dict[str, Any], source: str) -> tuple[str | None, list[str]]:
    """The key of the weights to take where nobody says which, None for the model's own; and a line if it is the EMA's.

    The EMA's are taken where a run of ours chose its best by a metric of theirs, and from checkpoints of timm's
    train.py that have some, as timm does: what was published of such a run is of theirs.
    """
    if _holds_weights(checkpoint.get(_TIMMS_EMA)):
        return _TIMMS_EMA, [f"{public(source)}: the EMA weights are taken, as timm takes them"]
    best = checkpoint.get("best")
    metrics = best if isinstance(best, dict) and _holds_weights(checkpoint.get("model_ema")) else ()
    for name in metrics:
        if str(name).startswith("ema_"):
            return "model_ema", [f"{public(source)}: the EMA weights are taken, since the run's best metric is {name}"]
    return None, []


def without_model_prefix(weights: dict[str, torch.Tensor], expected: Iterable[str] = ()) -> dict[str, torch.Tensor]:
    """The weights without the prefix "model.", as Lightning writes it before all names, unless the network's have it.

    Args:
        weights: As `unwrap` returns them.
        expected: Names in the network, or those that are looked for. By default none has the prefix.
    """
    prefix = "model."
    if any(name.startswith(prefix) for name in expected) or not all(name.startswith(prefix) for name in weights):
        return weights
    return {_bare(name.removeprefix(prefix)): value for name, value in weights.items()}


def class_names(checkpoint: dict[str, Any]) -> list[str] | None:
    """The names of the classes that a checkpoint was trained on, in order; None where it does not say.

    They are in Unicode NFC, as data sets have them; older runs kept those of folders as they were on disk.
    """
    names = checkpoint.get("classes")  # others keep their number there
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        return None
    return [unicodedata.normalize("NFC", name) for name in names]


def class_difference(checkpoint: dict[str, Any], classes: list[str] | None) -> str | None:
    """How the classes that a checkpoint of ours was trained on differ from `classes`, or None.

    None too where the checkpoint or the data does not name its classes.
    """
    trained_on = class_names(checkpoint)
    if trained_on is None or classes is None or trained_on == classes:
        return None
    gone, new = (sorted(set(some) - set(others)) for some, others in ((trained_on, classes), (classes, trained_on)))
    if len(trained_on) != len(classes):
        changes = [f"without {_listed(gone)}"] * bool(gone) + [f"with {_listed(new)} added"] * bool(new)
        return f"was trained on {len(trained_on)} classes, the data has {len(classes)}, {' and '.join(changes)}"
    if sorted(trained_on) == sorted(classes):
        index = next(i for i, (ours, theirs) in enumerate(zip(classes, trained_on, strict=True)) if ours != theirs)
        first = f"number {index} was {trained_on[index]!r}, and is {classes[index]!r} here"
        return f"was trained on the same classes in another order: {first}"
    return f"was trained on other classes: {_listed(gone)}, where the data has {_listed(new)}"


def _listed(names: list[str], most: int = 5) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(repr(name) for name in names[:most]) + more


def load_weights(
    model: torch.nn.Module,
    weights: dict[str, torch.Tensor],
    filter_fn: Callable | None = None,
    new_classifier: tuple[str, ...] = (),
    other_classes: bool = False,
) -> bool:
    """Load `weights` in full, after the model family's own renaming of published names.

    Args:
        model: The model, not wrapped.
        weights: Name to tensor, as `unwrap` returns them.
        filter_fn: timm's `checkpoint_filter_fn` of the family.
        new_classifier: Names of the classifier layers, to keep the model's own where the class count differs.
        other_classes: Keep those too where the count is the same.

    Returns:
        Whether the model's own classifier was kept.

    Raises:
        MismatchError: The weights are of another architecture; lists the first mismatches.
    """
    expected = model.state_dict()
    weights = without_model_prefix(weights, expected)
    if filter_fn is not None:
        # Weights of another family can make its filter fail; the list of mismatches below then says what is wrong.
        with suppress(Exception):
            weights = filter_fn(weights, model)
    kept = False
    for classifier in new_classifier:
        for leaf in ("weight", "bias"):
            name = f"{classifier}.{leaf}"
            if name not in weights or name not in expected:
                continue
            if other_classes or weights[name].shape != expected[name].shape:
                weights = {**weights, name: expected[name]}
                kept = True
    mismatches = _mismatches(expected, weights)
    if mismatches:
        more = f", and {len(mismatches) - 3} more" if len(mismatches) > 3 else ""
        number = getattr(model, "num_classes", None)
        classes = f" with {number} classes" if number else ""  # a backbone has none
        raise MismatchError(
            f"the checkpoint does not fit {_name(model)}{classes}: "
            f"{'; '.join(mismatches[:3])}{more}"
        )
    model.load_state_dict(weights)
    return kept


def _name(model: torch.nn.Module) -> str:
    """The name of a timm model, which several of a class have; of another, its class."""
    config = getattr(model, "default_cfg", None)
    return (config or {}).get("architecture") or type(model).__name__


def check_finite(model: torch.nn.Module, source: str):
    """Check the weights of `model`, which came from `source`.

    Raises:
        WeightsError: Some are NaN or infinite; names the first.
    """
    for name, value in model.state_dict().items():
        if value.is_floating_point() and not value.isfinite().all():
            raise WeightsError(f"{public(source)}: weights are NaN or infinite, {name} first")


def _mismatches(expected: dict[str, torch.Tensor], weights: dict[str, torch.Tensor]) -> list[str]:
    return [
        *(f"{name} is missing" for name in expected if name not in weights),
        *(f"{name} is unknown" for name in weights if name not in expected),
        *(
            f"{name} is {tuple(value.shape)} instead of {tuple(expected[name].shape)}"
            for name, value in weights.items()
            if name in expected and _is_dense(value) and value.shape != expected[name].shape
        ),
        *(f"{name} is no dense tensor" for name, value in weights.items() if name in expected and not _is_dense(value)),
    ]


def _is_dense(value: torch.Tensor) -> bool:
    """Whether a tensor holds a number for each element, which can be copied."""
    return value.layout == torch.strided and not (value.is_quantized or value.is_meta or value.is_nested)
