"""What every part of a run shares: processes, randomness, checkpoints, logs."""
import argparse
import hashlib
import json
import os
import pickle
import random
import tempfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import numpy as np
import safetensors.torch
import torch
import torch.distributed as dist
from timm.models import clean_state_dict


class UserError(ValueError):
    """A mistake of the user's: one line that says what was wrong and what to do. A run ends with it and exit code 1."""

    exit_code = 1


class UsageError(UserError):
    """A wrong command line or recipe: exit code 2."""

    exit_code = 2


# --- processes ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Process:
    """This process among those of the run."""

    device: torch.device
    rank: int = 0
    world_size: int = 1

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def is_distributed(self) -> bool:
        return self.world_size > 1

    def mean(self, values: torch.Tensor) -> torch.Tensor:
        """Mean of `values` over all processes."""
        return self.sum(values) / self.world_size

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Sum of `values` over all processes."""
        if self.is_distributed:
            dist.all_reduce(values)
        return values


def start_process(device: str = "auto") -> Process:
    """Join the run that torchrun or torch.distributed.launch started, or start one of a single process.

    Args:
        device: "auto" (a GPU where there is one), "cuda", "cuda:1" or "cpu".

    Raises:
        UserError: The device is not there.
    """
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        resolved = torch.device(device)
        if resolved.type == "cuda" and resolved.index is None:
            resolved = torch.device("cuda", local_rank)
        torch.empty(1, device=resolved)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"--device {device} cannot be used ({reason}); --device auto takes what is there") from error
    if resolved.type == "cuda":
        torch.cuda.set_device(resolved)
    if world_size > 1:
        backend = "nccl" if resolved.type == "cuda" else "gloo"
        dist.init_process_group(backend, rank=rank, world_size=world_size, timeout=timedelta(minutes=30))
    return Process(resolved, rank, world_size)


def end_process():
    """Leave the process group. Gloo's needs no farewell, and torch 2.6 can hang in it when a peer has left before."""
    if dist.is_initialized() and dist.get_backend() != "gloo":
        dist.destroy_process_group()


def seed_everything(seed: int, *salt: int):
    """Seed Python, NumPy and torch from `seed` and, say, the epoch and the rank.

    Called at the start of every epoch, it makes the state of the generators a function of the epoch, so that a
    checkpoint need not store them.
    """
    mixed = int(np.random.SeedSequence((seed, *salt)).generate_state(1)[0])
    random.seed(mixed)
    np.random.seed(mixed)
    torch.manual_seed(mixed)


# --- checkpoints ----------------------------------------------------------------------------------------------------


def save_checkpoint(path: Path, state: dict[str, Any]):
    """Write `state` (tensors, numbers, strings, and containers of them) so that `path` is never half written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def _is_url(source: str) -> bool:
    return urlparse(source).scheme in ("http", "https")


def fetch(source: str) -> Path:
    """The local file of a path or URL; URLs are downloaded once, into torch.hub's folder.

    Raises:
        UserError: There is no such file, or the download failed.
    """
    if not _is_url(source):
        path = Path(source)
        if not path.is_file():
            raise UserError(f"{source}: no such checkpoint file")
        return path
    # The name alone would not do: sharing services serve every file under the same one.
    name = f"{hashlib.sha256(source.encode()).hexdigest()[:16]}-{Path(urlparse(source).path).name}"
    path = Path(torch.hub.get_dir()) / "checkpoints" / name
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(source, str(path))
        except (OSError, RuntimeError) as error:
            raise UserError(f"{source}: cannot be downloaded ({error}); fetch it by hand and pass the file") from error
    return path


def read_checkpoint(source: str) -> dict[str, Any]:
    """Read a checkpoint file or URL. Nothing in it is executed: tensors and plain values are all that is accepted.

    Raises:
        UserError: It is missing, truncated, no checkpoint, or holds Python objects that would have to be run.
    """
    path = fetch(source)
    try:
        return _read_file(path)
    except UserError:
        if _is_url(source):
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
            raise UserError(
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


# --- logs -----------------------------------------------------------------------------------------------------------


class RunLog:
    """TensorBoard curves and one line of JSON per epoch in `log.txt`; silent on all processes but the main one."""

    def __init__(self, folder: Path | None):
        self.folder = folder
        self.tensorboard = None
        if folder is not None:
            from torch.utils.tensorboard import SummaryWriter

            self.tensorboard = SummaryWriter(str(folder / "tensorboard"))

    def scalars(self, group: str, values: dict[str, float], step: int):
        if self.tensorboard is not None:
            for name, value in values.items():
                self.tensorboard.add_scalar(f"{group}/{name}", value, step)

    def epoch(self, record: dict[str, Any]):
        if self.folder is not None:
            self.tensorboard.flush()
            with open(self.folder / "log.txt", "a") as file:
                file.write(json.dumps(record) + "\n")
