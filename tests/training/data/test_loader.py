"""training/data/loader.py: an epoch is a function of seed, epoch and rank; processes share it; workers end with it."""
import gc
import multiprocessing
import os
import random
import subprocess
import sys
import threading
import time
from itertools import chain

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DistributedSampler

from datasets import ImageDataset, build_dataset
from helpers.loading import different_images, draw, loader_of, process, random_states, read_all, same, transform
from helpers.photos import write_noise
from training.data import loader
from training.data.loader import ToDevice, _follow_main_process, report_skipped, seeded
from training.distributed import Distributed
from training.options import LoaderOptions
from training.signals import SharedMemoryFault
from training.waits import NoDataFault
from utils import UserError


@pytest.fixture
def folder(tmp_path):
    return write_noise(tmp_path)


# --- randomness -------------------------------------------------------------------------------------------------------


@pytest.fixture
def train_set(folder):
    return build_dataset("IMNET", folder, "train", transform(True, auto_augment="augmix-m5-w3"))


def test_an_epoch_does_not_depend_on_workers_or_on_what_came_before(train_set):
    settings = dict(batch_size=3, seed=5, re_prob=0.5)
    here, workers = loader_of(train_set, **settings), loader_of(train_set, num_workers=2, **settings)
    assert len(here) == 3
    first, again, theirs = read_all(here), read_all(here), read_all(workers)
    assert same(first, again) and same(first, theirs)
    here.set_epoch(1)
    workers.set_epoch(1)  # its workers are those of epoch 0
    second = read_all(here)
    assert not same(first, second) and same(second, read_all(workers))
    here.set_epoch(0)
    assert same(first, read_all(here))
    next(iter(workers))  # leave an epoch early
    assert same(second, read_all(workers))


def test_seeds_and_ranks_differ(train_set):
    read = [read_all(loader_of(train_set, batch_size=5, **settings)) for settings in (
        dict(seed=0), dict(seed=1), dict(seed=0, distributed=process(0, 2)), dict(seed=0, distributed=process(1, 2)))]
    assert not same(read[0], read[1])
    assert not same(read[2], read[3])
    assert sorted(read[2][1].tolist() + read[3][1].tolist()) == [0] * 5 + [1] * 5, "ranks share the images"


def test_ranks_get_equally_many_full_batches(train_set):
    for repeats in (1, 3):
        counts = [[len(targets) for _, targets in loader_of(
            train_set, batch_size=3, distributed=process(rank, 3), repeats=repeats)] for rank in range(3)]
        assert counts == [[3]] * 3


def test_every_image_of_every_epoch_and_rank_has_draws_of_its_own(folder):
    dataset = build_dataset("IMNET", folder, "train", draw)
    images, indices = [], []
    for rank in range(3):
        loader = loader_of(dataset, batch_size=1, distributed=process(rank, 3))
        for epoch in range(2):
            loader.set_epoch(epoch)
            images.append(read_all(loader)[0])
            indices.append([index for index, _ in loader.sampler])
    assert different_images(torch.cat(images)) == 3 * 3 * 2
    for epoch in range(2):
        assert len(set(chain(*indices[epoch::2]))) == 9, "ranks must not share an image"


def test_global_generators_are_left_alone(train_set):
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    before = random_states()
    loader = loader_of(train_set, re_prob=1.0)
    for epoch in range(2):
        loader.set_epoch(epoch)
        read_all(loader)
    assert random_states() == before
    train_set[0]  # without a seed it draws from them
    assert random_states() != before


def draw_from_each(image):
    """In place of a transform: a pixel from each of the generators that augmentation draws from."""
    return torch.tensor([random.randrange(256), np.random.randint(256), int(torch.randint(256, ()))], dtype=torch.uint8)


def test_workers_draw_what_this_process_draws(folder):
    dataset = build_dataset("IMNET", folder, "train", lambda image: draw_from_each(image).view(3, 1, 1))
    here, there = (read_all(loader_of(dataset, batch_size=5, num_workers=workers))[0] for workers in (0, 1))
    assert torch.equal(here, there)
    assert all(different_images(here[:, channel]) > 5 for channel in range(3))


def test_global_generators_are_put_back_after_an_error():
    before = random_states()
    with pytest.raises(KeyError), seeded(3):
        torch.rand(1), random.random(), np.random.rand()
        raise KeyError
    assert random_states() == before


def test_global_generators_do_not_matter(train_set):
    loader = loader_of(train_set, re_prob=1.0)
    torch.manual_seed(1)
    one = read_all(loader)
    torch.manual_seed(2)
    assert same(one, read_all(loader))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_on_cuda(train_set):
    cuda = process(device="cuda")
    loader = loader_of(train_set, num_workers=1, distributed=cuda, re_prob=1.0)
    before = torch.cuda.get_rng_state()
    first, again = read_all(loader), read_all(loader)
    assert first[0].is_cuda and first[1].is_cuda and same(first, again)
    assert torch.equal(torch.cuda.get_rng_state(), before)
    plain, plain_here = (read_all(loader_of(train_set, num_workers=1, distributed=each)) for each in (cuda, process()))
    assert torch.allclose(plain[0].cpu(), plain_here[0], atol=1e-5)


def test_repeated_augmentation(folder):
    """Ten images three times over two ranks: an image's repeats lie next to each other, on both ranks, and differ."""
    dataset = build_dataset("IMNET", folder, "train", transform(True))
    loaders = [loader_of(dataset, batch_size=5, distributed=process(rank, 2), repeats=3) for rank in range(2)]
    indices = [[index for index, _ in loader.sampler] for loader in loaders]
    seeds = [seed for loader in loaders for _, seed in loader.sampler]
    assert len(set(seeds)) == 10
    repeats = [pair for pairs in zip(*indices, strict=True) for pair in pairs]
    assert repeats == [index for index in dict.fromkeys(repeats) for _ in range(3)][:10]
    images = torch.cat([images for loader in loaders for images, _ in loader])
    by_rank = indices[0] + indices[1]
    repeats_of_first = images[[i for i, index in enumerate(by_rank) if index == by_rank[0]]]
    assert len(repeats_of_first) == 3
    assert different_images(repeats_of_first) == 3
    loaders[0].set_epoch(1)
    list(loaders[0])
    assert [index for index, _ in loaders[0].sampler] != indices[0]
    other_seed = loader_of(dataset, batch_size=5, distributed=process(world_size=2), repeats=3, seed=1)
    assert [index for index, _ in other_seed.sampler] != indices[0]


def test_a_source_may_order_its_images_itself():
    class InOrder(list):
        def sampler(self, world_size, rank, repeats):
            sampler = DistributedSampler(self, world_size, rank, shuffle=False)
            sampler.repeats = repeats
            return sampler

    image = Image.new("RGB", (8, 8))
    dataset = ImageDataset(InOrder((image, i) for i in range(6)), transform=transform())
    for rank in range(2):
        loader = loader_of(dataset, batch_size=3, distributed=process(rank, 2), repeats=3 if rank else 1)
        assert read_all(loader)[1].tolist() == list(range(rank, 6, 2))
        assert loader.sampler.sampler.repeats == (3 if rank else 1) and loader.ranges == 1


# --- batches ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("world_size", [1, 2, 3, 9])
def test_evaluation_reads_each_image_once(folder, world_size):
    dataset = build_dataset("IMNET", folder, "val", transform())
    read = [read_all(loader_of(dataset, train=False, batch_size=2, distributed=process(rank, world_size)))
            for rank in range(world_size)]
    images = [tuple(image.flatten().tolist()) for part, _ in read for image in part]
    assert len(images) == len(set(images)) == 7
    assert sorted(target for _, part in read for target in part.tolist()) == [0] * 3 + [1] * 4


@pytest.mark.parametrize("repeats", [1, 3])
def test_training_set_smaller_than_a_batch(folder, repeats):
    dataset = build_dataset("IMNET", folder, "train", transform(True))
    settings = dict(batch_size=5, repeats=repeats)
    assert len(list(loader_of(dataset, distributed=process(world_size=2), **settings))) == 1
    with pytest.raises(UserError, match=r"has 10 images, fewer than one batch of 15 \(5 on each of 3 process"):
        loader_of(dataset, distributed=process(world_size=3), **settings)


def test_batches_of_any_nesting_go_to_the_device():
    nested = dict(images=torch.zeros(2), targets=[(torch.ones(1), "name", 3)])
    (moved,) = ToDevice([nested], torch.device("meta"))
    assert moved["images"].is_meta and moved["targets"][0][0].is_meta
    assert moved["targets"][0][1:] == ("name", 3) and isinstance(moved["targets"], list)


# --- workers ----------------------------------------------------------------------------------------------------------


def test_workers_end_at_once_after_an_error(folder):
    gc.collect()  # what earlier tests left
    (folder / "val" / "ant" / "1.png").write_bytes(b"")
    loader = loader_of(build_dataset("IMNET", folder, "val", transform()), train=False, num_workers=1)
    try:
        read_all(loader)
    except UserError:
        start = time.perf_counter()
    del loader
    gc.collect()
    assert time.perf_counter() - start < 4  # left to itself, torch waits five seconds for each worker


def read_for_ever(started):
    _follow_main_process(0)
    started.set()
    threading.Event().wait()


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux who sent a signal")
def test_workers_obey_their_main_process_alone():
    """Signals that Slurm or a terminal sends to all processes do not end a data loading process."""
    context = multiprocessing.get_context("fork")
    started = context.Event()
    worker = context.Process(target=read_for_ever, args=(started,), daemon=True)
    worker.start()
    assert started.wait(10)
    for number in ("INT", "USR1", "HUP", "TERM"):
        subprocess.run(["kill", f"-{number}", str(worker.pid)], check=True)
    worker.join(0.3)
    assert worker.is_alive()
    worker.terminate()  # as multiprocessing does at the end of the main process, which then waits
    worker.join(10)
    assert worker.exitcode == 143


def test_a_worker_says_nothing_of_a_main_process_that_stopped_reading(capfd):
    for error in (ConnectionResetError(104, "Connection reset by peer"), EOFError()):
        loader._report_error(type(error), error, None)
    assert capfd.readouterr().err == ""
    loader._report_error(ValueError, ValueError("a mistake"), None)
    assert "a mistake" in capfd.readouterr().err


@pytest.fixture
def ended():
    """The errors that loaders have ended with, let go of in the end."""
    yield loader._of_ended_loaders
    for error in loader._of_ended_loaders:
        error.__traceback__ = None  # whose frames hold a loader, which would be waited for
    loader._of_ended_loaders.clear()


def test_a_batch_that_cannot_be_handed_over_ends_the_run(ended):
    """The thread of a data loading process that does it used to print the error, and the main process to wait."""
    data = loader.build_loader(
        range(8), LoaderOptions(batch_size=2, num_workers=1), process(), train=False, collate_fn=lambda _: lambda: 0
    )
    with pytest.raises(RuntimeError, match=r"(?s)^Caught RuntimeError in data loading process \d+.*pickle"):
        list(data)
    assert len(ended) == 1


def test_storage_that_does_not_answer_ends_the_run(tmp_path, ended):
    """Also where the main process reads itself, and takes what its decoders raise for a damaged image."""
    (tmp_path / "val" / "ant").mkdir(parents=True)
    image = tmp_path / "val" / "ant" / "0.png"
    Image.new("RGB", (8, 8)).save(image)
    data = loader_of(build_dataset("IMNET", tmp_path, "val", transform(), on_error="mask"), train=False)
    image.unlink()
    os.mkfifo(image)
    data.timeout = 1
    with pytest.raises(NoDataFault, match="no data for 1 seconds"):
        list(data)


def test_data_loading_processes_without_room_for_their_semaphores(ended, monkeypatch):
    data = loader_of(ImageDataset([(Image.new("RGB", (8, 8)), 0)] * 8, transform=transform()), num_workers=1)
    monkeypatch.setattr(data.transfer, "loader", raises_no_space())
    with pytest.raises(SharedMemoryFault, match=r"^shared memory, /dev/shm, is too small or full"):
        list(data)


def raises_no_space():
    raise OSError(28, "No space left on device")
    yield


# --- skipped images ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad, named", [
    ([3], "1 image that could not be read: ant/3.png"),
    ([0, 1, 2, 3, 4, 5], "6 images that could not be read: ant/0.png, ant/1.png, ant/2.png, ant/3.png, ant/4.png and 1 "
                         "more"),
])
@pytest.mark.parametrize("num_workers, repeats", [(0, 1), (0, 3), (2, 3)])
def test_skipped_images_are_named_and_counted_once_an_epoch(folder, capsys, bad, named, num_workers, repeats):
    """Repeated augmentation tries an image several times, and an image before it leads to it too."""
    ant = folder / "train" / "ant"
    for i in bad:
        (ant.parent / ("ant" if i < 5 else "bee") / f"{i}.png").write_bytes(b"")
    dataset = build_dataset("IMNET", folder, "train", transform(True), on_error="next")
    loader = loader_of(dataset, batch_size=10, num_workers=num_workers, repeats=repeats)
    for epoch in range(2):
        loader.set_epoch(epoch)
        with report_skipped(dataset, process(), is_main=True):
            list(loader)
            for index in bad:  # whichever images a third of them are
                dataset[index]
        assert capsys.readouterr().out == f"skipped {named.replace('ant', str(ant))}\n"
    with report_skipped(dataset, process(), is_main=False):
        dataset[bad[0]]
    with report_skipped(dataset, process(), is_main=True):
        dataset[9]
    assert capsys.readouterr().out == ""


def test_skipped_images_are_counted_once_over_all_processes(folder, capsys):
    """Each of which has tried its own, and one of them both."""

    class Two(Distributed):
        def sum(self, values):
            return values + torch.tensor([1, 1] + [0] * 8)

    (folder / "train" / "ant" / "0.png").write_bytes(b"")
    dataset = build_dataset("IMNET", folder, "train", on_error="mask")
    with report_skipped(dataset, Two(torch.device("cpu"), 0, 2), is_main=True):
        dataset[0]
    ant = folder / "train" / "ant"
    assert capsys.readouterr().out == f"skipped 2 images that could not be read: {ant}/0.png, {ant}/1.png\n"
