"""tasks/detection/data.py: batches of one orientation, in every process another part of the same order."""
import numpy as np
import pytest
import torch

from tasks.detection.data import OrientationSampler, Sample, collate_samples, collate_training


def batches(is_wide, batch_size, world_size=1, epoch=0):
    """The batches of each process."""
    found = []
    for rank in range(world_size):
        sampler = OrientationSampler(np.array(is_wide), batch_size, world_size, rank)
        sampler.set_epoch(epoch)
        indices = list(sampler)
        assert len(indices) == len(sampler)
        found.append(np.array(indices).reshape(-1, batch_size).tolist())
    return found


@pytest.mark.parametrize("wide,tall,batch_size,world_size", [
    (20, 12, 4, 1), (21, 14, 4, 1), (100, 37, 2, 4), (5, 5, 3, 1), (7, 0, 2, 1), (0, 9, 2, 2), (30, 1, 8, 2),
])
def test_an_epoch_sees_every_image_but_an_incomplete_step(wide, tall, batch_size, world_size):
    """In as few batches of both orientations as can be; each process has as many."""
    is_wide = np.random.default_rng(0).permutation([True] * wide + [False] * tall)
    of_processes = batches(is_wide, batch_size, world_size)
    assert len({len(found) for found in of_processes}) == 1
    found = [batch for of_process in of_processes for batch in of_process]
    seen = [index for batch in found for index in batch]
    assert len(seen) == len(set(seen)) == (wide + tall) // (batch_size * world_size) * batch_size * world_size
    mixed = [batch for batch in found if len({bool(is_wide[index]) for index in batch}) > 1]
    assert len(mixed) <= 2 * (batch_size - 1) // batch_size


def test_epochs_differ_and_come_again():
    is_wide = [True] * 30 + [False] * 10
    first = batches(is_wide, 4, epoch=1)
    assert first == batches(is_wide, 4, epoch=1) != batches(is_wide, 4, epoch=2)
    # no image is left out in all epochs, nor is a batch of an orientation always first
    seen = {index for epoch in range(6) for batch in batches(is_wide[:39], 4, epoch=epoch)[0] for index in batch}
    assert seen == set(range(39))
    assert len({is_wide[batches(is_wide, 4, epoch=epoch)[0][0][0]] for epoch in range(12)}) == 2


def test_batches():
    images = [torch.zeros(3, 4, 5), torch.zeros(3, 6, 4)]
    targets = [dict(labels=torch.ones(2)), dict(labels=torch.ones(1))]
    found, of_them = collate_training(list(zip(images, targets, strict=True)))
    assert found == images and of_them == targets
    assert collate_samples([(images[0], 7)]) == [Sample(images[0], 7)]
