"""Small images in batches, for tests of data sets and loaders."""
import random
from functools import partial
from typing import Any

import numpy as np
import torch
from timm.data.loader import fast_collate
from torch.utils.data import Dataset

from datasets import NormalizedImages, Transform, build_transform
from training.data.loader import EpochLoader, build_loader
from training.distributed import Distributed
from training.options import LoaderOptions
from utils import UserError

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


def complaint_of(loader: EpochLoader, kind: type[UserError] = UserError) -> str | None:
    """The text of the error of a class that reading an epoch raises.

    An exception that is kept, as pytest.raises does, keeps the workers, which then take five seconds to end.
    """
    try:
        read_all(loader)
    except kind as error:
        return str(error)


def same(one: tuple[torch.Tensor, ...], other: tuple[torch.Tensor, ...]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def draw(image: Any) -> torch.Tensor:
    """In place of a transform: the numbers that it would draw."""
    return torch.randint(256, (3, 4, 4), dtype=torch.uint8)


def different_images(images: torch.Tensor) -> int:
    """How many different ones there are."""
    return len({tuple(image.flatten().tolist()) for image in images})


def random_states() -> tuple:
    """The states of the generators of Python, NumPy and torch, to be compared."""
    return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
