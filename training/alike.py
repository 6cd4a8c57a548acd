"""Whether the processes of a run do the same: asked for the same, on the same data, with the same weights.

Nothing else would notice: gradients are averaged whatever they are of, and weights drift apart without an error.
"""
import json
import zlib
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from utils import UserError

from .distributed import Distributed
from .options import PLACES
from .run import SpoiledRunError

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class UnlikeProcessesError(UserError):
    """The processes of a run were started with other settings, or on other data."""


class DivergedError(SpoiledRunError):
    """The weights of the processes of a run differ."""


def check_same_start(recipe: Mapping[str, Any], images: Mapping[str, str], distributed: Distributed):
    """Check that all processes were asked for the same; where each reads and writes may differ.

    Args:
        recipe: The settings, plain values.
        images: `Data.fingerprints`.
        distributed: This process.

    Raises:
        UnlikeProcessesError: On every process; names what differs, and the first process that has it.
    """
    places = {name: "unset" if recipe[name] is None else "set" for name in PLACES & recipe.keys()}
    asked = dict(recipe) | places
    own = json.dumps([asked, images]).encode()
    texts = distributed.gather(list(own.ljust(distributed.max(len(own)))))
    (asked, found), *others = (json.loads(bytes(text)) for text in texts)
    for rank, (asked_there, found_there) in enumerate(others, start=1):
        differ = [f"{k} is {asked_there[k]}, not {asked[k]}" for k in asked if asked_there[k] != asked[k]]
        differ += [f"the {split} images are others" for split in found if found_there.get(split) != found[split]]
        if differ:
            raise UnlikeProcessesError(f"in process {rank}, unlike in process 0, {'; '.join(differ)}")


def check_same_source(model: torch.nn.Module, source: Path, distributed: Distributed):
    """Raises UnlikeProcessesError, on every process, where they have read different weights from `source`."""
    if difference := _difference(model, distributed):
        raise UnlikeProcessesError(f"{difference}, read from {source}: machines must share that file")


def check_same_weights(model: torch.nn.Module, distributed: Distributed):
    """Check that the processes of a run have the same weights, as they do unless a machine computes wrongly.

    Devices of different kinds may add up in another order, which DistributedDataParallel leaves as it is: compared are
    those of one kind.

    Raises:
        DivergedError: On every process; names those that differ from most, where most agree.
    """
    if difference := _difference(model, distributed, distributed.kind):
        raise DivergedError(f"{difference}, which are not saved: a memory or a processor may be faulty")


def _difference(model: torch.nn.Module, distributed: Distributed, kind: str = "") -> str | None:
    """Which of the processes of a kind have weights unlike the others', the same on all; None where there are none."""
    if not distributed.is_distributed:
        return None
    said = distributed.gather([checksum(model.parameters()), zlib.crc32(kind.encode())])
    for kind in {kind for _, kind in said}:
        sums = {rank: value for rank, (value, of_kind) in enumerate(said) if of_kind == kind}
        usual, among = Counter(sums.values()).most_common(1)[0]
        odd = [str(rank) for rank, value in sums.items() if value != usual]
        who = f"process {', '.join(odd)} has" if among > len(odd) else "they have"
        if odd:
            return f"of the {len(sums)} processes, {who} weights unlike the others'"
    return None


@torch.no_grad()
def checksum(tensors: Iterable[torch.Tensor]) -> int:
    """A number that any single changed bit changes; read from the device once."""
    sums = [t.contiguous().view(_INTEGERS[t.element_size()]).sum(dtype=torch.int64) for t in tensors]
    return int(torch.stack(sums).sum())
