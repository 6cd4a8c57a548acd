"""datasets.py: transforms, data sets, unreadable and missing files, batches on the device."""
import errno
import hashlib
import io
import os
import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import auto_augment
from torch.utils.data import DataLoader
from torchvision.datasets import CIFAR10, CIFAR100

from datasets import MissingDataError, Reading, build_dataset, check_same_classes
from helpers.loading import MEAN, STD, complaint_of, different_images, loader_of, read_all, transform
from helpers.photos import noise, photograph, write_noise
from scripts import make_shards
from training.data.images import UnreadableImageError
from utils import LostDataError, UserError


@pytest.fixture
def folder(tmp_path):
    return write_noise(tmp_path)


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


def test_augmentation_is_a_function_of_the_seed(folder):
    dataset = build_dataset("IMNET", folder, "train", transform(True))
    assert torch.equal(dataset[3, 7][0], dataset[3, 7][0])
    assert not torch.equal(dataset[3, 7][0], dataset[3, 8][0])


@pytest.mark.parametrize("bits", [0, 1, 4, 8])
def test_posterize_at_every_strength(bits):
    image = Image.effect_noise((32, 32), 60).convert("RGB")
    expected = np.asarray(image) >> (8 - bits) << (8 - bits) if bits else np.zeros((32, 32, 3), np.uint8)
    assert (np.asarray(auto_augment.NAME_TO_OP["PosterizeIncreasing"](image, bits)) == expected).all()


@pytest.mark.parametrize("name", ["image_folder", "wds/x"])
def test_folders_and_shards_read_photographs_upright(tmp_path, name):
    (tmp_path / "photos" / "train" / "a").mkdir(parents=True)
    upright = photograph(tmp_path / "photos" / "train" / "a" / "0.png", 8)
    make_shards.main([str(tmp_path / "photos"), str(tmp_path / "shards"), "--splits", "train"])
    root = tmp_path / ("photos" if name == "image_folder" else "shards")
    assert np.array_equal(np.array(build_dataset(name, root, "train")[0][0]), upright)
    assert build_dataset(name, root, "train", reading=Reading(exif_transpose=False))[0][0].size == (16, 32)


# --- data sets --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["IMNET", "image_folder"])
def test_image_folder(folder, name):
    train, val = (build_dataset(name, folder, split) for split in ("train", "val"))
    assert train.classes == val.classes == ["ant", "bee"]
    assert (len(train), len(val)) == (10, 7)
    assert [train[i][1] for i in range(10)] == [0] * 5 + [1] * 5
    assert train.class_counts() == [5, 5] and val.class_counts() == [3, 4]
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
    assert val.class_counts() == [0, 1, 0, 1]

    (base / kind.test_list[0][0]).write_bytes(b"half a downlo")
    with pytest.raises(MissingDataError, match=f"{name} is not in .*, or incomplete; unpack https"):
        build_dataset(name, tmp_path, "val")


def test_hidden_folders_are_no_classes(folder, tmp_path):
    classes = build_dataset("image_folder", folder, "train").classes
    (folder / "train" / ".ipynb_checkpoints").mkdir()
    assert build_dataset("image_folder", folder, "train").classes == classes
    (tmp_path / "alone" / "train" / ".hidden").mkdir(parents=True)
    with pytest.raises(UserError, match="needs class folders"):
        build_dataset("image_folder", tmp_path / "alone", "train")


def test_cifar_missing(tmp_path, monkeypatch):
    with pytest.raises(MissingDataError, match="CIFAR10 is not in"):
        build_dataset("CIFAR10", tmp_path / "nowhere", "train")
    with pytest.raises(UserError, match="needs a data folder"):
        build_dataset("CIFAR100", None, "train")

    def offline(self):
        raise OSError("no route\nto host")

    monkeypatch.setattr(CIFAR10, "download", offline)
    with pytest.raises(UserError, match=r"CIFAR10 is not in .*: no route to host$"):
        build_dataset("CIFAR10", tmp_path, "train", reading=Reading(download=True))


def test_digits():
    load_digits = pytest.importorskip("sklearn.datasets").load_digits
    train, val = (build_dataset("digits", None, split) for split in ("train", "val"))
    assert (len(train), len(val)) == (1437, 360) and train.classes == [str(i) for i in range(10)]
    counts = [np.bincount([split[i][1] for i in range(len(split))]) for split in (train, val)]
    assert [train.class_counts(), val.class_counts()] == [count.tolist() for count in counts]
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
    line = complaint_of(loader, UnreadableImageError)  # by its class main.py knows what to advise
    assert "\n" not in line and line.startswith(f"cannot read {folder / 'val' / 'ant' / '1.png'}: ")


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
@pytest.mark.parametrize("name", ["EIO", "ESTALE", "EACCES", "ENOTCONN"])
def test_a_fault_of_the_system_is_no_bad_image(folder, monkeypatch, where, name):
    """An outage of the storage must not become skipped images."""
    dataset = build_dataset("IMNET", folder, "val", on_error="mask")
    number = getattr(errno, name)
    make_reading_fail(monkeypatch, where, number)
    with pytest.raises(LostDataError, match=rf"^cannot read .*ant/0\.png: {os.strerror(number)}; check the disk"):
        dataset[0]
    assert dataset.bad_images.sum() == 0


@pytest.mark.parametrize("where", ["open", "read"])
@pytest.mark.parametrize("name, error", [("EMFILE", OSError), ("ENFILE", OSError), ("ENOMEM", MemoryError)])
def test_what_the_process_lacks_is_no_bad_image(folder, monkeypatch, where, name, error):
    """Neither a damaged image, nor a fault of the disk: what runs the loader says what is short."""
    dataset = build_dataset("IMNET", folder, "val", on_error="mask")
    make_reading_fail(monkeypatch, where, getattr(errno, name))
    with pytest.raises(error) as raised:
        dataset[0]
    assert not isinstance(raised.value, UserError) and dataset.bad_images.sum() == 0


def test_an_impossible_seek_in_damaged_bytes_is_a_bad_image(folder, monkeypatch):
    """PIL's JPEG 2000 decoder passes on the error of the system."""
    make_reading_fail(monkeypatch, "read", errno.EINVAL)
    with pytest.raises(UnreadableImageError, match=r"ant/0\.png: .*Invalid argument$"):
        build_dataset("IMNET", folder, "val")[0]
    dataset = build_dataset("IMNET", folder, "val", on_error="mask")
    assert dataset[0][1] == -1 and dataset.bad_images.sum() == 1


@pytest.mark.parametrize("num_workers", [0, 2])
def test_skipping_in_evaluation_masks(folder, num_workers):
    for file in ("0.png", "2.png"):
        (folder / "val" / "ant" / file).write_bytes(b"")
    dataset = build_dataset("IMNET", folder, "val", transform(), on_error="mask")
    assert dataset.bad_images.sum() == 0
    images, targets = read_all(loader_of(dataset, train=False, num_workers=num_workers))
    assert targets.tolist() == [-1, 0, -1, 1, 1, 1, 1] and targets.dtype == torch.int64
    black = -torch.tensor(MEAN) / torch.tensor(STD)
    assert torch.allclose(images[0], black.view(3, 1, 1).expand(3, 8, 8)) and images[1].std() > 0
    assert dataset.bad_images.sum() == 2


@pytest.mark.parametrize("num_workers", [0, 2])
def test_skipping_in_training_takes_the_next_good_image(folder, num_workers):
    for i in (3, 4):
        (folder / "train" / "ant" / f"{i}.png").write_bytes(b"")
    dataset = build_dataset("IMNET", folder, "train", transform(True), on_error="next")
    _, targets = read_all(loader_of(dataset, batch_size=5, num_workers=num_workers))
    assert sorted(targets.tolist()) == [0] * 3 + [1] * 7
    assert dataset.bad_images.nonzero().flatten().tolist() == [3, 4], "4 once, though it is tried for 3 too"
    plain = build_dataset("IMNET", folder, "train", on_error="next")
    assert np.array_equal(np.array(plain[3][0]), noise(seed=5))


@pytest.mark.parametrize("split", ["train", "val"])
def test_bad_images_are_handled_alike_in_both_splits(folder, split):
    (folder / split / "ant" / "0.png").write_bytes(b"")
    masked, following = (build_dataset("IMNET", folder, split, on_error=on_error)[0] for on_error in ("mask", "next"))
    assert masked[1] == -1 and not np.any(masked[0])
    assert following[1] == 0 and np.array_equal(np.array(following[0]), noise(seed=1))


@pytest.mark.slow
def test_counting_in_spawned_workers(folder):
    (folder / "val" / "ant" / "0.png").write_bytes(b"")
    dataset = build_dataset("IMNET", folder, "val", transform(), on_error="mask")
    list(DataLoader(dataset, num_workers=1, multiprocessing_context="spawn"))
    assert dataset.bad_images.sum() == 1


def test_nothing_but_bad_images(folder):
    for file in (folder / "train").rglob("*.png"):
        file.write_bytes(b"")
    dataset = build_dataset("IMNET", folder, "train", on_error="next")
    with pytest.raises(UserError, match="none of the 10 images can be read"):
        dataset[0]


# --- batches on the device --------------------------------------------------------------------------------------------


def test_random_erasing(folder):
    train_set = build_dataset("IMNET", folder, "train", transform(True))
    plain, erased = read_all(loader_of(train_set)), read_all(loader_of(train_set, re_prob=1.0, re_mode="const"))
    changed = (plain[0] != erased[0]).any(1)
    assert changed.flatten(1).any(1).all() and (erased[0][changed.unsqueeze(1).expand_as(erased[0])] == 0).all()
    ones = build_dataset("IMNET", folder, "train", lambda image: torch.ones(3, 16, 16))
    loader = loader_of(ones, batch_size=2, re_prob=1.0)
    masks = read_all(loader)[0]
    loader.set_epoch(1)
    masks = torch.cat([masks, read_all(loader)[0]])
    assert different_images(masks) == 20, "each image of each epoch has its own"


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


