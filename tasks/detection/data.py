"""Images with their objects, in training and in evaluation; batches of one orientation."""
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Sampler

from datasets import ImageDataset

from .coco import Target


class Sample(NamedTuple):
    """An image to evaluate: uint8 (3, H, W), and its id; None for one that could not be read."""

    image: torch.Tensor
    id: int | None


class DetectionDataset(ImageDataset):
    """What the transform makes of (PIL RGB image, Target or id), by index or by (index, seed).

    As `datasets.ImageDataset`; its source gives such pairs, and its transform takes both.
    """

    def _transformed(self, image: Image.Image, target: Target | int | None) -> Any:
        return self.transform(image, target)

    @staticmethod
    def _masked() -> tuple[Image.Image, None]:
        return Image.new("RGB", (256, 256)), None


def collate_training(
    batch: list[tuple[torch.Tensor, dict[str, torch.Tensor]]]
) -> tuple[list[torch.Tensor], list[dict[str, torch.Tensor]]]:
    """Images of any sizes and their targets -> a batch of a detector."""
    images, targets = zip(*batch, strict=True)
    return list(images), list(targets)


def collate_samples(batch: list[tuple[torch.Tensor, int | None]]) -> list[Sample]:
    """Images of any sizes and their ids -> a batch of `metrics.DetectionScores`."""
    return [Sample(*sample) for sample in batch]


class OrientationSampler(Sampler):
    """Indices in such an order that batches are of wide images or of tall ones: they are padded least.

    What is left of both makes batches of its own, so that an epoch leaves out less than a batch of each process.

    Args:
        is_wide: (N,) bool, of each image.
        batch_size: Images of a batch.
        world_size, rank: The processes that share an epoch, and which this is.
    """

    def __init__(self, is_wide: np.ndarray, batch_size: int, world_size: int, rank: int):
        self.groups = [np.flatnonzero(is_wide), np.flatnonzero(~is_wide)]
        self.batch_size, self.world_size, self.rank = batch_size, world_size, rank
        self.rounds = len(is_wide) // (batch_size * world_size)
        self.set_epoch(0)

    def set_epoch(self, epoch: int):
        """Make the next pass that of an epoch, which decides the order."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        rng = np.random.default_rng(self.epoch)
        groups = [rng.permutation(group) for group in self.groups]
        whole = [len(group) // self.batch_size * self.batch_size for group in groups]
        rest = rng.permutation(np.concatenate([group[end:] for group, end in zip(groups, whole, strict=True)]))
        rest = rest[:len(rest) // self.batch_size * self.batch_size]
        order = np.concatenate([*(group[:end] for group, end in zip(groups, whole, strict=True)), rest])
        batches = rng.permutation(order.reshape(-1, self.batch_size))[:self.rounds * self.world_size]
        return iter(batches[self.rank::self.world_size].ravel().tolist())

    def __len__(self) -> int:
        """Indices of a whole epoch of this process."""
        return self.rounds * self.batch_size
