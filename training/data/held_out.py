"""What is held out of the training images for validation, and what of it another run may have trained on."""
import hashlib
import os
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True)
class ValSplit:
    """Which images are held out of the training set for validation.

    Whether an image is held out follows from its own name, the names of its class's other images, and the seed: adding
    images moves few of those that were there from one part to the other. Names count in Unicode NFC.

    Args:
        share: How much of each class is held out, above 0 and below 1: at least one image, and not all of them.
        seed: Another one holds out others.
    """

    share: float
    seed: int = 0

    def __str__(self) -> str:
        return f"{self.share:g} of each class by seed {self.seed}"

    def held_out(self, paths: Sequence[str], below: Path) -> dict[str, int]:
        """The images of a class that are held out: path -> a number of 64 bits; empty for a class of one image.

        Args:
            paths: All images of the class.
            below: The folder of the class folders. The choice follows from the seed and from the paths relative to this
                folder, the numbers from these paths alone: they are the same wherever it lies.
        """
        count = min(max(round(self.share * len(paths)), 1), len(paths) - 1)
        names = {path: os.fsencode(unicodedata.normalize("NFC", path.removeprefix(f"{below}/"))) for path in paths}
        order = sorted(paths, key=lambda path: _hash(f"{self.seed}/".encode() + names[path]))
        return {path: int.from_bytes(_hash(names[path])[:8], "big", signed=True) for path in order[:count]}


def _hash(name: bytes) -> bytes:
    return hashlib.sha256(name).digest()


@dataclass(frozen=True, eq=False)
class HeldOut:
    """What is held out of the training images for validation.

    Args:
        rule: Which share of them, by which seed.
        images: The numbers of these images, see `ValSplit.held_out`; int64 (N,), sorted. In the checkpoint of a run,
            of those that were held out all along.
    """

    rule: str
    images: torch.Tensor

    def unseen(self, checkpoint: Mapping[str, Any]) -> "HeldOut":
        """What of it the run of a checkpoint has never trained on; all of it where the checkpoint does not say."""
        if not knows_images(checkpoint):
            return self
        return replace(self, images=self.images[torch.isin(self.images, checkpoint["held_out_images"])])

    def leak(self, checkpoint: Mapping[str, Any]) -> str | None:
        """What of it the run of a checkpoint may have trained on, for a message; None where that is nothing."""
        seen = len(self.images) - len(self.unseen(checkpoint).images)
        if not seen:
            return None
        return f"may have been trained on {seen} of the {len(self.images)} images held out for validation"


def knows_images(checkpoint: Mapping[str, Any]) -> bool:
    """Whether a checkpoint says which images its run has held out."""
    return isinstance(checkpoint.get("held_out_images"), torch.Tensor)


def rule_difference(checkpoint: Mapping[str, Any], held_out: HeldOut | None) -> str | None:
    """How the rule by which the run of a checkpoint held images out differs from that of `held_out`, or None.

    None too where the checkpoint does not say.
    """
    now = held_out and held_out.rule
    then = checkpoint.get("held_out", now)
    if then == now:
        return None
    return f"was trained with {then or 'nothing'} held out for validation, here it is {now or 'nothing'}"
