"""datasets.py: what is read, what a bad input says, and that an epoch is a function of seed, epoch and rank."""
import errno
import gc
import hashlib
import io
import multiprocessing
import os
import pickle
import random
import subprocess
import sys
import threading
import time
import warnings
from itertools import chain

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import auto_augment
from torch.utils.data import DataLoader, DistributedSampler
from torchvision.datasets import CIFAR10, CIFAR100

import datasets
from datasets import build_dataset, build_loader, build_transform, check_same_classes, load_image
from utils import LostDataError, UserError

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.5)
CPU = torch.device("cpu")


def noise(height=12, width=16, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def transform(train=False, size=8, **settings):
    return build_transform(train=train, input_size=size, mean=MEAN, std=STD, **settings)


def loader_of(dataset, train=True, batch_size=4, num_workers=0, **settings):
    return build_loader(dataset, train=train, batch_size=batch_size, num_workers=num_workers, device=CPU, mean=MEAN,
                        std=STD, **settings)


def read_all(loader):
    batches = list(loader)
    if not batches:
        return torch.empty(0), torch.empty(0, dtype=torch.int64)
    images, targets = zip(*batches, strict=True)
    return torch.cat(images), torch.cat(targets)


@pytest.fixture
def folder(tmp_path):
    """Ten train and seven val images in two classes; the image numbered i has seed i."""
    for split, number in (("train", 10), ("val", 7)):
        for i in range(number):
            path = tmp_path / split / ("ant" if i < number // 2 else "bee") / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(noise(seed=i)).save(path)
    return tmp_path


# --- transforms -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size, shape", [(64, (3, 64, 64)), ((32, 48), (3, 32, 48)), ([32, 48], (3, 32, 48))])
@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("source", [(8, 8), (1, 30), (100, 40)])
def test_transform_gives_uint8_of_the_size_asked_for(size, shape, train, source):
    out = transform(train, size, auto_augment="rand-m9-mstd0.5-inc1")(Image.fromarray(noise(*source)))
    assert out.shape == shape and out.dtype == torch.uint8


def test_crop_pct_decides_how_much_evaluation_sees():
    image = noise(32, 32)
    whole = transform(size=32, crop_pct=1.0)(Image.fromarray(image))
    assert torch.equal(whole, torch.from_numpy(image).permute(2, 0, 1))
    default, same, other = (
        transform(size=28, crop_pct=pct)(Image.fromarray(image)) for pct in (None, 0.875, 0.5))
    assert torch.equal(default, same) and not torch.equal(default, other)
    assert torch.equal(default, torch.from_numpy(image[2:30, 2:30]).permute(2, 0, 1))  # 28 of 32 pixels


def test_training_options_reach_timm():
    image = Image.fromarray(noise(32, 32))
    plain = dict(scale=(1, 1), ratio=(1, 1), hflip=0.0, color_jitter=None)
    same = transform(True, 32, **plain)(image)
    assert torch.equal(same, torch.from_numpy(np.array(image)).permute(2, 0, 1))
    assert torch.equal(transform(True, 32, **{**plain, "hflip": 1.0})(image), same.flip(2))
    assert torch.equal(transform(True, 32, **plain, vflip=1.0)(image), same.flip(1))


# --- images of every mode ---------------------------------------------------------------------------------------------


def rgb(image, format="PNG", **settings):
    file = io.BytesIO()
    image.save(file, format, **settings)
    file.seek(0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = load_image(file)
    assert loaded.mode == "RGB"
    return np.array(loaded)


def test_rgb_and_rgba_keep_their_colours():
    colours = noise()
    alpha = noise(seed=1)[..., :1]
    assert np.array_equal(rgb(Image.fromarray(colours)), colours)
    assert np.array_equal(rgb(Image.fromarray(np.concatenate([colours, alpha], 2))), colours)


@pytest.mark.parametrize("mode", ["L", "LA", "1"])
def test_grey_fills_three_channels(mode):
    grey = np.where(noise()[..., 0] > 127, 255, 0).astype(np.uint8) if mode == "1" else noise()[..., 0]
    loaded = rgb(Image.fromarray(grey).convert(mode))
    assert all(np.array_equal(loaded[..., channel], grey) for channel in range(3))


@pytest.mark.parametrize("transparency", [None, 1, b"\x00\x80\xff"])
def test_palette(transparency):
    palette = np.array([[10, 20, 30], [250, 0, 1], [7, 70, 170]], np.uint8)
    indices = noise()[..., 0] % 3
    image = Image.fromarray(indices).convert("P")
    image.putpalette(palette.tobytes())
    image.putdata(indices.flatten().tolist())
    settings = {} if transparency is None else {"transparency": transparency}
    assert np.array_equal(rgb(image, **settings), palette[indices])


def test_cmyk():
    cmyk = np.array([[[0, 0, 0, 0], [255, 0, 0, 0], [0, 0, 0, 255], [0, 255, 255, 0]]], np.uint8)
    loaded = rgb(Image.frombytes("CMYK", (4, 1), cmyk.tobytes()), "TIFF")
    assert loaded.tolist() == [[[255, 255, 255], [0, 255, 255], [0, 0, 0], [255, 0, 0]]]


@pytest.mark.parametrize("mode, format", [("I;16", "PNG"), ("I;16", "TIFF"), ("I;16B", "TIFF"), ("I", "TIFF")])
def test_16_bits_are_scaled_not_clipped(mode, format):
    eight = np.arange(256, dtype=np.uint16)
    values = eight[None] * 257
    dtype = {"I;16": "<u2", "I;16B": ">u2", "I": "<i4"}[mode]
    image = Image.frombytes(mode, (256, 1), values.astype(dtype).tobytes())
    assert np.array_equal(rgb(image, format)[0], np.stack([eight] * 3, 1))


def test_16_bit_rounding_and_range():
    values = np.array([[0, 128, 129, 65535 - 129, 65535 - 128, 65535, 70000, -5]], "<i4")
    image = Image.frombytes("I", (8, 1), values.tobytes())
    assert rgb(image, "TIFF")[0, :, 0].tolist() == [0, 0, 1, 254, 255, 255, 255, 0]


# --- data sets --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["IMNET", "image_folder"])
def test_image_folder(folder, name):
    train, val = (build_dataset(name, folder, split) for split in ("train", "val"))
    assert train.classes == val.classes == ["ant", "bee"]
    assert (len(train), len(val)) == (10, 7)
    assert [train[i][1] for i in range(10)] == [0] * 5 + [1] * 5
    assert np.array_equal(np.array(val[4][0]), noise(seed=4))
    assert build_dataset(name, str(folder), "val", transform())[0][0].shape == (3, 8, 8)


@pytest.mark.parametrize("kind, name, labels", [(CIFAR10, "CIFAR10", "labels"), (CIFAR100, "CIFAR100", "fine_labels")])
def test_cifar(tmp_path, monkeypatch, kind, name, labels):
    base = tmp_path / kind.base_folder
    base.mkdir()

    def write(file, content):
        data = pickle.dumps(content)
        (base / file).write_bytes(data)
        return hashlib.md5(data).hexdigest()

    def batch(file):
        pixels = noise(32, 32).transpose(2, 0, 1).reshape(1, -1)
        return [file, write(file, {"data": pixels.repeat(2, 0), labels: [3, 1]})]

    names = ["a", "b", "c", "d"]
    for which in ("train_list", "test_list"):
        monkeypatch.setattr(kind, which, [batch(file) for file, _ in getattr(kind, which)])
    meta = kind.meta
    monkeypatch.setattr(kind, "meta", {**meta, "md5": write(meta["filename"], {meta["key"]: names})})

    train, val = (build_dataset(name, tmp_path, split) for split in ("train", "val"))
    assert train.classes == names and len(val) == 2 and len(train) == 2 * len(kind.train_list)
    image, target = val[0]
    assert np.array_equal(np.array(image), noise(32, 32)) and target == 3

    (base / kind.test_list[0][0]).write_bytes(b"half a downlo")
    with pytest.raises(UserError, match=f"{name} is not in .* or not whole: pass --download, or unpack https"):
        build_dataset(name, tmp_path, "val")


def test_hidden_folders_are_no_classes(folder, tmp_path):
    classes = build_dataset("image_folder", folder, "train").classes
    (folder / "train" / ".ipynb_checkpoints").mkdir()
    assert build_dataset("image_folder", folder, "train").classes == classes
    (tmp_path / "alone" / "train" / ".hidden").mkdir(parents=True)
    with pytest.raises(UserError, match="needs class folders"):
        build_dataset("image_folder", tmp_path / "alone", "train")


def test_cifar_missing(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="CIFAR10 is not in"):
        build_dataset("CIFAR10", tmp_path / "nowhere", "train")
    with pytest.raises(UserError, match="needs a data folder"):
        build_dataset("CIFAR100", None, "train")

    def offline(self):
        raise OSError("no route\nto host")

    monkeypatch.setattr(CIFAR10, "download", offline)
    with pytest.raises(UserError, match=r"CIFAR10 is not in .*: no route to host$"):
        build_dataset("CIFAR10", tmp_path, "train", download=True)


def test_digits():
    load_digits = pytest.importorskip("sklearn.datasets").load_digits
    train, val = (build_dataset("digits", None, split) for split in ("train", "val"))
    assert (len(train), len(val)) == (1437, 360) and train.classes == [str(i) for i in range(10)]
    counts = [np.bincount([split[i][1] for i in range(len(split))]) for split in (train, val)]
    share = counts[1] / (counts[0] + counts[1])
    assert np.all(abs(share - 0.2) < 0.01), "not stratified"
    images = sorted(np.array(split[i][0])[..., 0].tobytes() for split in (train, val) for i in range(len(split)))
    expected = np.rint(load_digits().images / 16 * 255).astype(np.uint8)
    assert images == sorted(image.tobytes() for image in expected), "each image in one split, scaled to 0..255"
    assert val[0][0].mode == "RGB"
    again = build_dataset("digits", None, "val")
    assert all(np.array_equal(np.array(val[i][0]), np.array(again[i][0])) for i in range(360))
    assert build_dataset("digits", None, "train", transform(True, 64))[0][0].shape == (3, 64, 64)


def test_check_same_classes():
    check_same_classes(["a", "b"], ["a", "b"])
    check_same_classes(None, ["a"])
    check_same_classes(["a"], None)
    with pytest.raises(UserError, match=r"lacks b and adds c$"):
        check_same_classes(["a", "b"], ["a", "c"])
    with pytest.raises(UserError, match=r"lacks 1, 2, 3, 4, 5 and 4 more$"):
        check_same_classes(list("0123456789"), ["0"])
    with pytest.raises(UserError, match="another order"):
        check_same_classes(["a", "b"], ["b", "a"])


# --- bad input --------------------------------------------------------------------------------------------------------


def test_unknown_name():
    with pytest.raises(UserError, match="no data set 'imnet'; there are IMNET, image_folder, "):
        build_dataset("imnet", None, "train")


def test_missing_root(tmp_path):
    for root, complaint in [(None, "none was given"), (tmp_path / "nowhere", "nowhere does not exist")]:
        with pytest.raises(UserError, match=complaint):
            build_dataset("IMNET", root, "train")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file is not a folder"):
        build_dataset("IMNET", tmp_path / "file", "train")


def test_root_without_the_split(folder):
    (folder / "val").rename(folder / "validation")
    assert len(build_dataset("IMNET", folder, "train")) == 10
    with pytest.raises(UserError, match=r"has no folder val: expected val/CLASS/IMAGE, found train, validation$"):
        build_dataset("IMNET", folder, "val")


def test_empty_root_and_empty_split(tmp_path):
    with pytest.raises(UserError, match="found nothing"):
        build_dataset("IMNET", tmp_path, "train")
    (tmp_path / "train").mkdir()
    with pytest.raises(UserError, match="train needs class folders, with images in each"):
        build_dataset("IMNET", tmp_path, "train")


def test_class_folder_without_images(folder):
    (folder / "train" / "cat").mkdir()
    (folder / "train" / "cat" / "notes.txt").touch()
    with pytest.raises(UserError, match=r"train needs class folders.*for the classes cat\b"):
        build_dataset("IMNET", folder, "train")


def damaged(kind, format):
    if kind == "empty":
        return b""
    if kind == "text":
        return b"this is not an image\n"
    file = io.BytesIO()
    Image.fromarray(noise(64, 64)).save(file, format)
    return file.getvalue()[: len(file.getvalue()) // 2]


@pytest.mark.parametrize("kind, format", [
    ("empty", None), ("text", None), ("cut", "JPEG"), ("cut", "PNG"), ("cut", "WEBP"), ("cut", "TIFF"), ("cut", "GIF")])
@pytest.mark.parametrize("num_workers", [0, 1])
def test_unreadable_image_is_named(folder, kind, format, num_workers):
    if num_workers and kind == "cut" and format != "JPEG":
        return  # one of each kind is enough for the way through a worker
    (folder / "val" / "ant" / "1.png").write_bytes(damaged(kind, format))
    loader = loader_of(build_dataset("IMNET", folder, "val", transform()), train=False, num_workers=num_workers)
    with pytest.raises(UserError) as error:
        read_all(loader)
    line = str(error.value)
    assert "\n" not in line and line.startswith(f"cannot read {folder / 'val' / 'ant' / '1.png'}: ")
    assert line.endswith("; remove it, or pass --skip_bad_images")


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
    datasets._live_and_die_with_main(0)
    started.set()
    threading.Event().wait()


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux who sent a signal")
def test_workers_obey_their_main_process_alone():
    """What Slurm or a terminal sends to all processes does not end one that reads images."""
    context = multiprocessing.get_context("fork")
    started = context.Event()
    worker = context.Process(target=read_for_ever, args=(started,), daemon=True)
    worker.start()
    assert started.wait(10)
    for number in ("INT", "USR1", "TERM"):
        subprocess.run(["kill", f"-{number}", str(worker.pid)], check=True)
    worker.join(0.3)
    assert worker.is_alive()
    worker.terminate()  # as multiprocessing does at the end of the main process, which then waits
    worker.join(10)
    assert worker.exitcode == 143


def test_file_that_has_gone(folder):
    dataset = build_dataset("IMNET", folder, "val")
    (folder / "val" / "ant" / "0.png").unlink()
    with pytest.raises(UserError, match=r"cannot read .*ant/0.png: .*No such file"):
        dataset[0]


def make_reading_fail(monkeypatch, where, number):
    """The system answers `number` where an image file is opened, or read."""
    def fail(*_, **__):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("builtins.open" if where == "open" else "PIL.PngImagePlugin.PngImageFile.load_read", fail)


@pytest.mark.parametrize("where", ["open", "read"])
@pytest.mark.parametrize("name", ["EMFILE", "EIO", "ESTALE", "ENOMEM", "EACCES", "ENOTCONN"])
def test_a_fault_of_the_system_is_no_bad_image(folder, monkeypatch, where, name):
    """An outage of the storage must not become images that are passed over."""
    dataset = build_dataset("IMNET", folder, "val", on_bad="mask")
    number = getattr(errno, name)
    make_reading_fail(monkeypatch, where, number)
    with pytest.raises(LostDataError, match=rf"^cannot read .*ant/0\.png: {os.strerror(number)}; see to the machine"):
        dataset[0]
    assert dataset.bad_images == 0


def test_a_seek_that_damaged_bytes_ask_for_is_no_fault_of_the_system(folder, monkeypatch):
    """PIL's JPEG 2000 decoder passes the system's answer to it on."""
    make_reading_fail(monkeypatch, "read", errno.EINVAL)
    with pytest.raises(UserError, match=r"ant/0\.png: .*Invalid argument; remove it, or pass --skip_bad_images"):
        build_dataset("IMNET", folder, "val")[0]
    dataset = build_dataset("IMNET", folder, "val", on_bad="mask")
    assert dataset[0][1] == -1 and dataset.bad_images == 1


@pytest.mark.parametrize("num_workers", [0, 2])
def test_skipping_in_evaluation_masks(folder, num_workers):
    for file in ("0.png", "2.png"):
        (folder / "val" / "ant" / file).write_bytes(b"")
    dataset = build_dataset("IMNET", folder, "val", transform(), on_bad="mask")
    assert dataset.bad_images == 0
    images, targets = read_all(loader_of(dataset, train=False, num_workers=num_workers))
    assert targets.tolist() == [-1, 0, -1, 1, 1, 1, 1] and targets.dtype == torch.int64
    black = -torch.tensor(MEAN) / torch.tensor(STD)
    assert torch.allclose(images[0], black.view(3, 1, 1).expand(3, 8, 8)) and images[1].std() > 0
    assert dataset.bad_images == 2


@pytest.mark.parametrize("num_workers", [0, 2])
def test_skipping_in_training_takes_the_next_good_image(folder, num_workers):
    for i in (3, 4):
        (folder / "train" / "ant" / f"{i}.png").write_bytes(b"")
    dataset = build_dataset("IMNET", folder, "train", transform(True), on_bad="next")
    _, targets = read_all(loader_of(dataset, batch_size=5, num_workers=num_workers))
    assert sorted(targets.tolist()) == [0] * 3 + [1] * 7
    assert dataset.bad_images == 3  # 3 and then 4 for index 3, and 4 for index 4
    plain = build_dataset("IMNET", folder, "train", on_bad="next")
    assert np.array_equal(np.array(plain[3][0]), noise(seed=5))


@pytest.mark.parametrize("split", ["train", "val"])
def test_what_becomes_of_a_bad_image_does_not_depend_on_the_split(folder, split):
    (folder / split / "ant" / "0.png").write_bytes(b"")
    masked, following = (build_dataset("IMNET", folder, split, on_bad=on_bad)[0] for on_bad in ("mask", "next"))
    assert masked[1] == -1 and not np.any(masked[0])
    assert following[1] == 0 and np.array_equal(np.array(following[0]), noise(seed=1))


def test_counting_in_spawned_workers(folder):
    (folder / "val" / "ant" / "0.png").write_bytes(b"")
    dataset = build_dataset("IMNET", folder, "val", transform(), on_bad="mask")
    list(DataLoader(dataset, num_workers=1, multiprocessing_context="spawn"))
    assert dataset.bad_images == 1


def test_nothing_but_bad_images(folder):
    for file in (folder / "train").rglob("*.png"):
        file.write_bytes(b"")
    dataset = build_dataset("IMNET", folder, "train", on_bad="next")
    with pytest.raises(UserError, match="none of the 10 images can be read"):
        dataset[0]


@pytest.mark.parametrize("repeated_aug", [False, True])
def test_training_set_smaller_than_a_batch(folder, repeated_aug):
    dataset = build_dataset("IMNET", folder, "train", transform(True))
    settings = dict(batch_size=5, repeated_aug=repeated_aug)
    assert len(list(loader_of(dataset, world_size=2, **settings))) == 1
    with pytest.raises(UserError, match=r"has 10 images, fewer than one batch of 15 \(5 on each of 3 process"):
        loader_of(dataset, world_size=3, **settings)


# --- loaders: randomness ----------------------------------------------------------------------------------------------


@pytest.fixture
def train_set(folder):
    return build_dataset("IMNET", folder, "train", transform(True, auto_augment="augmix-m5-w3"))


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_an_epoch_does_not_depend_on_workers_or_on_what_came_before(train_set):
    settings = dict(batch_size=3, seed=5, reprob=0.5)
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
        dict(seed=0), dict(seed=1), dict(seed=0, rank=0, world_size=2), dict(seed=0, rank=1, world_size=2))]
    assert not same(read[0], read[1])
    assert not same(read[2], read[3])
    assert sorted(read[2][1].tolist() + read[3][1].tolist()) == [0] * 5 + [1] * 5, "ranks share the images"


def test_same_image_is_augmented_afresh_each_epoch(folder):
    """The seed is the position's: neither the image nor the worker alone decides."""
    dataset = build_dataset("IMNET", folder, "train", transform(True))
    assert torch.equal(dataset[3, 7][0], dataset[3, 7][0])
    assert not torch.equal(dataset[3, 7][0], dataset[3, 8][0])


def test_ranks_get_equally_many_full_batches(train_set):
    for repeated_aug in (False, True):
        counts = [[len(targets) for _, targets in loader_of(
            train_set, batch_size=3, rank=rank, world_size=3, repeated_aug=repeated_aug)] for rank in range(3)]
        assert counts == [[3]] * 3


def draw(image):
    """In place of a transform: the numbers that it would draw."""
    return torch.randint(256, (3, 4, 4), dtype=torch.uint8)


def different_images(images):
    return len({tuple(image.flatten().tolist()) for image in images})


def test_every_image_of_every_epoch_and_rank_has_draws_of_its_own(folder):
    dataset = build_dataset("IMNET", folder, "train", draw)
    images, indices = [], []
    for rank in range(3):
        loader = loader_of(dataset, batch_size=1, rank=rank, world_size=3)
        for epoch in range(2):
            loader.set_epoch(epoch)
            images.append(read_all(loader)[0])
            indices.append([index for index, _ in loader.sampler])
    assert different_images(torch.cat(images)) == 3 * 3 * 2
    for epoch in range(2):
        assert len(set(chain(*indices[epoch::2]))) == 9, "ranks must not share an image"


def random_states():
    return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()


def test_global_generators_are_left_alone(train_set):
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    before = random_states()
    loader = loader_of(train_set, reprob=1.0)
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
    with pytest.raises(KeyError), datasets.seeded(3):
        torch.rand(1), random.random(), np.random.rand()
        raise KeyError
    assert random_states() == before


def test_global_generators_do_not_matter(train_set):
    loader = loader_of(train_set, reprob=1.0)
    torch.manual_seed(1)
    one = read_all(loader)
    torch.manual_seed(2)
    assert same(one, read_all(loader))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_on_cuda(train_set):
    settings = dict(train=True, batch_size=4, num_workers=1, mean=MEAN, std=STD, reprob=1.0)
    loader = build_loader(train_set, device="cuda", **settings)
    before = torch.cuda.get_rng_state()
    first, again = read_all(loader), read_all(loader)
    assert first[0].is_cuda and first[1].is_cuda and same(first, again)
    assert torch.equal(torch.cuda.get_rng_state(), before)
    plain, plain_here = (read_all(build_loader(train_set, device=device, **{**settings, "reprob": 0.0}))
                         for device in ("cuda", "cpu"))
    assert torch.allclose(plain[0].cpu(), plain_here[0], atol=1e-5)


def test_repeated_augmentation(folder):
    """Ten images three times over two ranks: an image's turns lie next to each other, on both ranks, and differ."""
    dataset = build_dataset("IMNET", folder, "train", transform(True))
    loaders = [loader_of(dataset, batch_size=5, rank=rank, world_size=2, repeated_aug=True) for rank in range(2)]
    indices = [[index for index, _ in loader.sampler] for loader in loaders]
    seeds = [seed for loader in loaders for _, seed in loader.sampler]
    assert len(set(seeds)) == 10
    turns = [pair for pairs in zip(*indices, strict=True) for pair in pairs]
    assert turns == [index for index in dict.fromkeys(turns) for _ in range(3)][:10]
    images = torch.cat([images for loader in loaders for images, _ in loader])
    by_rank = indices[0] + indices[1]
    turns_of_first = images[[i for i, index in enumerate(by_rank) if index == by_rank[0]]]
    assert len(turns_of_first) == 3
    assert different_images(turns_of_first) == 3
    loaders[0].set_epoch(1)
    list(loaders[0])
    assert [index for index, _ in loaders[0].sampler] != indices[0]
    other_seed = loader_of(dataset, batch_size=5, world_size=2, repeated_aug=True, seed=1)
    assert [index for index, _ in other_seed.sampler] != indices[0]


def test_a_source_may_order_its_images_itself():
    class InOrder(list):
        def sampler(self, world_size, rank, repeats):
            sampler = DistributedSampler(self, world_size, rank, shuffle=False)
            sampler.repeats = repeats
            return sampler

    image = Image.new("RGB", (8, 8))
    dataset = datasets.ImageDataset(InOrder((image, i) for i in range(6)), transform=transform())
    for rank in range(2):
        loader = loader_of(dataset, batch_size=3, rank=rank, world_size=2, repeated_aug=rank == 1)
        assert read_all(loader)[1].tolist() == list(range(rank, 6, 2))
        assert loader.sampler.sampler.repeats == (3 if rank else 1) and loader.ranges == 1


def test_random_erasing_is_for_training(folder, train_set):
    plain, erased = read_all(loader_of(train_set)), read_all(loader_of(train_set, reprob=1.0, remode="const"))
    changed = (plain[0] != erased[0]).any(1)
    assert changed.flatten(1).any(1).all() and (erased[0][changed.unsqueeze(1).expand_as(erased[0])] == 0).all()
    loader = loader_of(build_dataset("IMNET", folder, "train", lambda image: torch.ones(3, 16, 16)), batch_size=2,
                       reprob=1.0)
    masks = read_all(loader)[0]
    loader.set_epoch(1)
    assert different_images(torch.cat([masks, read_all(loader)[0]])) == 20
    dataset = build_dataset("IMNET", folder, "val", transform())
    assert same(read_all(loader_of(dataset, train=False)), read_all(loader_of(dataset, train=False, reprob=1.0)))


# --- loaders: evaluation ----------------------------------------------------------------------------------------------


def test_evaluation_normalises_and_keeps_the_last_batch(folder):
    dataset = build_dataset("IMNET", folder, "val", transform())
    loader = loader_of(dataset, train=False, batch_size=3)
    batches = list(loader)
    assert len(loader) == 3 and [len(targets) for _, targets in batches] == [3, 3, 1]
    images, targets = read_all(loader)
    expected = torch.stack([dataset[i][0] for i in range(7)]) / 255
    expected = (expected - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    assert images.dtype == torch.float32 and torch.allclose(images, expected, atol=1e-5)
    assert targets.tolist() == [0] * 3 + [1] * 4


@pytest.mark.parametrize("world_size", [1, 2, 3, 9])
def test_evaluation_reads_each_image_once(folder, world_size):
    dataset = build_dataset("IMNET", folder, "val", transform())
    read = [read_all(loader_of(dataset, train=False, batch_size=2, rank=rank, world_size=world_size))
            for rank in range(world_size)]
    images = [tuple(image.flatten().tolist()) for part, _ in read for image in part]
    assert len(images) == len(set(images)) == 7
    assert sorted(target for _, part in read for target in part.tolist()) == [0] * 3 + [1] * 4


@pytest.mark.parametrize("bits", [0, 1, 4, 8])
def test_posterize_at_every_strength(bits):
    image = Image.effect_noise((32, 32), 60).convert("RGB")
    expected = np.asarray(image) >> (8 - bits) << (8 - bits) if bits else np.zeros((32, 32, 3), np.uint8)
    assert (np.asarray(auto_augment.NAME_TO_OP["PosterizeIncreasing"](image, bits)) == expected).all()
