"""Small images in batches, for tests of data sets and loaders."""
from functools import partial
from typing import Any

import torch
from timm.data.loader import fast_collate
from torch.utils.data import Dataset

from datasets import NormalizedImages, Transform, build_transform
from training.data.loader import EpochLoader, build_loader
from training.distributed import Distributed
from training.options import LoaderOptions

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.5)


def transform(train: bool = False, size: int | tuple[int, int] = 8, **settings: Any) -> Transform:
    """`datasets.build_transform` of small images."""
    return build_transform(train=train, input_size=size, mean=MEAN, std=STD, **settings)


def process(rank: int = 0, world_size: int = 1, device: str = "cpu") -> Distributed:
    """One process of `world_size`."""
    return Distributed(torch.device(device), rank, world_size)


def loader_of(
    dataset: Dataset,
    train: bool = True,
    batch_size: int = 4,
    num_workers: int = 0,
    distributed: Distributed | None = None,
    seed: int = 0,
    repeats: int = 1,
    **erasing: Any,
) -> EpochLoader:
    """Normalised batches of `dataset`, by default of the only process; `erasing` is `re_prob` and `re_mode`."""
    distributed = distributed or process()
    return build_loader(
        dataset,
        LoaderOptions(batch_size=batch_size, num_workers=num_workers),
        distributed,
        train=train,
        seed=seed,
        repeats=repeats,
        collate_fn=fast_collate,
        transfer=partial(NormalizedImages, mean=MEAN, std=STD, device=distributed.device, **erasing),
    )


def read_all(loader: EpochLoader) -> tuple[torch.Tensor, torch.Tensor]:
    """All images and all targets of an epoch."""
    batches = list(loader)
    if not batches:
        return torch.empty(0), torch.empty(0, dtype=torch.int64)
    images, targets = zip(*batches, strict=True)
    return torch.cat(images), torch.cat(targets)
