"""Whether two runs are in the same state: weights, EMA weights, optimizer, position and log, bit for bit."""
import json
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import torch

from training.options import NO_RESULT, NOT_OF_RUN

# Times.
NOT_STATE = {"seconds"}
NOT_LOGGED = {"train_images_per_second", "train_seconds"}


def differences(one: Path, other: Path, flags: Collection[str] = ()) -> list[str]:
    """Where the runs in two folders differ: names of values in the checkpoints and the logs.

    Their settings count, but for those that say where and from what a run starts or change no result, and `flags`.
    """
    found = []
    for name in ("last.pth", "best.pth"):
        a, b = (_state(folder / name, NO_RESULT | NOT_OF_RUN | set(flags)) for folder in (one, other))
        found += [f"{name} {where}" for where in _compare(a, b)]
    return found + [f"log.txt {where}" for where in _compare(_log(one), _log(other))]


def _state(path: Path, left_out: Collection[str]) -> dict[str, Any]:
    checkpoint = torch.load(path, weights_only=True)
    return checkpoint | dict(args={k: v for k, v in checkpoint["args"].items() if k not in left_out})


def _log(folder: Path) -> list[dict[str, Any]]:
    records = [json.loads(line) for line in (folder / "log.txt").read_text().splitlines()]
    return [{k: v for k, v in record.items() if k not in NOT_LOGGED} for record in records]


def _compare(a: Any, b: Any, where: str = "") -> Iterator[str]:
    if isinstance(a, dict) and isinstance(b, dict):
        for key in sorted((a.keys() | b.keys()) - NOT_STATE, key=str):
            yield from _compare(a.get(key), b.get(key), f"{where}.{key}")
    elif isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        for index, pair in enumerate(zip(a, b, strict=True)):
            yield from _compare(*pair, f"{where}[{index}]")
    elif isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        if a.dtype != b.dtype or not torch.equal(a, b):
            yield where
    elif type(a) is not type(b) or a != b:
        yield f"{where}: {a} and {b}"
