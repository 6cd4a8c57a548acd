"""training/data/shards.py and shard_list.py: samples of a folder or URL, each once an epoch for any processes."""
import errno
import io
import json
import math
import os
import pickle
import re
import tarfile
import threading
import time
from collections import Counter
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from itertools import chain

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from datasets import Reading, ShardCache, build_dataset
from helpers.loading import (
    complaint_of,
    different_images,
    draw,
    loader_of,
    process,
    random_states,
    read_all,
    same,
    transform,
)
from helpers.photos import noise
from storage import remote
from storage.remote import sha256_of
from training.data import shard_list, shards
from training.data.images import UnreadableImageError, load_image
from training.data.shard_list import LocalFolder, ShardCacheError, ShardError, read_split
from training.data.shards import ShardClassError, ShardSampler, open_shards
from utils import UserError

LENGTHS = {"train": (5, 3, 0, 4, 4), "validation": (3, 1, 4, 2)}


def png(seed):
    file = io.BytesIO()
    Image.fromarray(noise(seed=seed)).save(file, "PNG")
    return file.getvalue()


def write_tar(path, members):
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))


def write_shards(root, lengths=LENGTHS, hashes=False):
    """Shards of the given lengths; the class index of a sample is its number, its image noise of that seed."""
    splits = {}
    for split, sizes in lengths.items():
        number, files = 0, [f"{split}-{i}.tar" for i in range(len(sizes))]
        for file, size in zip(files, sizes, strict=True):
            numbers = range(number, number + size)
            write_tar(root / file, [member for i in numbers for member in (
                (f"{i:03}.png", png(i)), (f"{i:03}.json", b"{}"), (f"{i:03}.cls", b"%d\n" % i))])
            number += size
        splits[split] = dict(name=split, num_samples=number, filenames=files, shard_lengths=list(sizes))
        if hashes:
            splits[split]["sha256"] = [sha256_of(root / file) for file in files]
    write_info(root, splits)
    return root


def write_info(root, splits, **others):
    (root / "_info.json").write_text(json.dumps({"splits": splits, **others}))


def read_info(root):
    return json.loads((root / "_info.json").read_text())["splits"]


class Handler(SimpleHTTPRequestHandler):
    """Serves a folder; `server.seen` counts the files asked for by `server.paths`, and `server.cut` says how often a
    transfer is still to break.
    """

    def copyfile(self, source, outputfile):
        name = self.path.partition("?")[0].rpartition("/")[2]
        self.server.seen[name] += 1
        self.server.paths.append(self.path)
        time.sleep(self.server.delay)
        data = source.read()
        if self.server.cut[name]:
            self.server.cut[name] -= 1
            data = data[: len(data) // 2]
        outputfile.write(data)

    def log_message(self, *_):
        pass


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "data set"
    root.mkdir()
    return write_shards(root)


@pytest.fixture
def server(tmp_path, monkeypatch):
    """Serves tmp_path; what it serves is copied into tmp_path/cache by default, and retries do not wait."""
    monkeypatch.setattr(remote, "RETRY_SECONDS", (0, 0))
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=tmp_path))
    server.seen, server.paths, server.cut, server.delay = Counter(), [], Counter(), 0
    server.url = f"http://127.0.0.1:{server.server_port}/data%20set"
    thread = threading.Thread(target=server.serve_forever, kwargs=dict(poll_interval=0.01))
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def copies(tmp_path):
    """Names of the shards in the default cache, without their keys."""
    return lambda: sorted(path.name.rpartition("-")[0] for path in (tmp_path / "hub" / "shards").glob("*.shard"))


def val_set(root, **settings):
    return build_dataset("wds/tiny", root, "val", transform(), **settings)


def train_set(root, **settings):
    return build_dataset("wds/tiny", root, "train", transform(True), **settings)


# --- every sample once ------------------------------------------------------------------------------------------------


def test_samples_by_index(folder, server):
    for root in (folder, server.url, server.url + "/"):
        dataset = build_dataset("wds/tiny", root, "train")
        assert dataset.classes is None and len(dataset) == len(list(dataset.source)) == 16
        for i in (15, 0, 8, 4, 5, 7):
            image, target = dataset[i]
            assert target == i and np.array_equal(np.array(image), noise(seed=i))
        with pytest.raises(IndexError):
            dataset.source[16]


@pytest.mark.parametrize("world_size, num_workers", [(1, 0), (1, 2), (2, 0), (3, 1), (5, 0), (11, 0)])
def test_evaluation_reads_each_image_once(folder, world_size, num_workers):
    targets = []
    for rank in range(world_size):
        loader = loader_of(val_set(folder), False, 2, num_workers, process(rank, world_size))
        assert len(loader) == len(list(loader))
        targets += read_all(loader)[1].tolist()
    assert sorted(targets) == list(range(10))


@pytest.mark.parametrize("lengths", [(5, 3, 0, 4, 4), (1,), (40,), (7,) * 30, (1, 100, 1), (0, 0, 9), tuple(range(25))])
@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_sampler_gives_each_sample_once(lengths, world_size):
    orders = []
    for epoch in range(2):
        ranks = [ShardSampler(lengths, world_size, rank) for rank in range(world_size)]
        for sampler in ranks:
            sampler.set_epoch(epoch)
        orders.append([list(sampler) for sampler in ranks])
        assert orders[-1] == [list(sampler) for sampler in ranks], "a function of the epoch"
        assert {len(order) for order in orders[-1]} == {len(ranks[0])} == {sum(lengths) // world_size}
        indices = list(chain(*orders[-1]))
        assert len(set(indices)) == len(indices) and set(indices) <= set(range(sum(lengths)))
    assert orders[0] != orders[1] or sum(lengths) < 2 * world_size
    if sum(lengths) >= 40:
        assert all(order != sorted(order) for order in orders[0])


def test_sampler_leaves_out_others_each_epoch():
    sampler = ShardSampler((7,), 2, 0), ShardSampler((7,), 2, 1)
    left_out = set()
    for epoch in range(30):
        for one in sampler:
            one.set_epoch(epoch)
        left_out |= set(range(7)) - {*sampler[0], *sampler[1]}
    assert left_out == set(range(7))


@pytest.mark.parametrize("repeats", [1, 3])
def test_sampler_keeps_to_few_shards(repeats):
    """64 shards of 10 samples over 4 processes: 16 shards each, in windows of 8, one after another."""
    for rank in range(4):
        order = np.array(list(ShardSampler((10,) * 64, 4, rank, repeats))) // 10
        assert len(set(order.tolist())) <= 16 / repeats + 2, "two may be shared with the neighbours"
        for start in range(0, 160, 80):
            window = order[start:start + 80]
            assert len(set(window.tolist())) <= shards.WINDOW_SHARDS
            assert len(set(window[:20].tolist())) > 2, "shards must be shuffled together"


def test_repeated_augmentation(folder):
    """Repeats of an image lie next to each other and are augmented differently; an epoch is a third of the images."""
    dataset = build_dataset("wds/tiny", folder, "train", draw)
    for world_size in (1, 2):
        order = []
        for rank in range(world_size):
            loader = loader_of(dataset, distributed=process(rank, world_size), repeats=3)
            images, targets = read_all(loader)
            assert len(targets) == 16 // world_size and different_images(images) == len(images)
            assert targets.tolist() == [i for i in dict.fromkeys(targets.tolist()) for _ in range(3)][:len(targets)]
            order.append(set(targets.tolist()))
        assert sum(map(len, order)) == len(set.union(*order)) == 6


@pytest.mark.parametrize("world_size, batch_size", [(1, 4), (2, 4), (3, 1), (2, 3)])
def test_training_reads_all_that_make_whole_batches(folder, world_size, batch_size):
    """Four shards that hold something; the processes and workers may be more than those."""
    epochs = []
    for epoch in range(2):
        read = []
        for rank in range(world_size):
            here, workers = (loader_of(train_set(folder), True, batch_size, num_workers, process(rank, world_size),
                                       re_prob=0.5) for num_workers in (0, 3 - world_size))
            here.set_epoch(epoch)
            workers.set_epoch(epoch)
            batches = read_all(here)
            assert same(batches, read_all(workers)) and len(batches[1]) == batch_size * len(here)
            read += batches[1].tolist()
        whole = 16 // (world_size * batch_size) * world_size * batch_size
        assert len(read) == len(set(read)) == whole
        epochs.append(read)
    assert epochs[0] != epochs[1]


def test_an_epoch_read_from_its_middle_is_the_rest_of_it(folder, server):
    """Nothing that was read before matters, nor from where."""
    loader = loader_of(train_set(folder))
    loader.set_epoch(3)
    images, targets = read_all(loader)
    fresh = train_set(server.url)
    rest = [fresh[item] for item in list(loader.sampler)[9:]]
    assert [target for _, target in rest] == targets[9:].tolist()
    normalised = (torch.stack([image for image, _ in rest]) - loader.transfer.mean) / loader.transfer.std
    assert torch.allclose(normalised, images[9:], atol=1e-5)


def test_global_generators_are_left_alone(folder):
    before = random_states()
    read_all(loader_of(train_set(folder), re_prob=1.0))
    assert random_states() == before


# --- opened when needed -----------------------------------------------------------------------------------------------


def test_few_shards_are_open(folder, monkeypatch):
    monkeypatch.setattr(shards, "OPEN_SHARDS", 2)
    source = train_set(folder).source
    opened = []
    open_shard = source._open_shard
    monkeypatch.setattr(source, "_open_shard", lambda number: opened.append(number) or open_shard(number))
    files = len(os.listdir("/proc/self/fd"))
    for i in (0, 5, 1, 8, 2, 6, 15):
        assert source[i][1] == i
    assert opened == [0, 1, 3, 1, 4], "the one used longest ago makes room"
    assert len(os.listdir("/proc/self/fd")) == files + 2


def test_open_shards_go_to_workers(folder):
    """Forked ones share what is open; what spawned ones get, by pickle, opens it for itself."""
    dataset = val_set(folder)
    dataset[0]
    assert dataset.source._open
    loader = DataLoader(dataset, num_workers=2, multiprocessing_context="fork")
    assert [target.item() for _, target in loader] == [dataset[i][1] for i in range(10)] == list(range(10))
    assert [target for _, target in pickle.loads(pickle.dumps(dataset.source))] == list(range(10))


def test_members_of_a_sample(tmp_path):
    """Grouped as WebDataset does: names up to the first dot; folders count, case of the extension does not."""
    write_tar(tmp_path / "a.tar", [
        ("x/0.cls", b"5"), ("x/0.PNG", png(0)), ("y/0.cls", b"6"), ("y/0.seg.png", b"no image"), ("y/0.webp", png(1)),
        ("README", b"no sample"), (".hidden.png", b""), ("2.bmp", b"second choice"), ("2.jpeg", png(2)),
        ("2.cls", b"7")])
    write_info(tmp_path, {"val": dict(num_samples=3, filenames=["a.tar"], shard_lengths=[3])})
    source = val_set(tmp_path).source
    assert [source[i][1] for i in range(3)] == [5, 6, 7]
    assert all(np.array_equal(np.array(source[i][0]), noise(seed=i)) for i in range(3))


def test_16_bit_images(folder):
    file = io.BytesIO()
    Image.frombytes("I;16", (2, 2), np.full(4, 128 * 257, "<u2").tobytes()).save(file, "PNG")
    write_tar(folder / "validation-1.tar", [("x.png", file.getvalue()), ("x.cls", b"77")])
    image, target = val_set(folder)[3]
    assert target == 77 and image.unique().tolist() == [128]


# --- what is wrong with them ------------------------------------------------------------------------------------------


def spoil_images(root):
    """Two of the first validation shard's three images become text."""
    write_tar(root / "validation-0.tar", [member for i in range(3) for member in (
        (f"{i}.png", png(i) if i == 1 else b"text"), (f"{i}.cls", b"%d" % i))])


@pytest.mark.parametrize("num_workers", [0, 2])
def test_unreadable_images_in_evaluation(folder, num_workers):
    spoil_images(folder)
    loader = loader_of(val_set(folder), train=False, num_workers=num_workers)
    expected = f"cannot read 0.png in {folder}/validation-0.tar: not an image"
    assert complaint_of(loader, UnreadableImageError) == expected
    dataset = val_set(folder, on_error="mask")
    _, targets = read_all(loader_of(dataset, train=False, num_workers=num_workers))
    assert targets.tolist() == [-1, 1, -1, *range(3, 10)] and dataset.bad_images.sum() == 2


def test_unreadable_images_in_training(folder):
    info = read_info(folder)
    write_info(folder, {"train": info["validation"]})
    spoil_images(folder)
    dataset = train_set(folder, on_error="next")
    assert sorted(read_all(loader_of(dataset, batch_size=5))[1].tolist()) == [1, 1, 3, 3, *range(4, 10)]
    assert dataset.bad_images.sum() == 2


def test_images_of_shards_have_names(folder, server):
    """Of a URL without opening a shard, whose copy may be gone."""
    dataset = val_set(folder)
    assert [dataset.name(i) for i in range(10)] == dataset.names() and dataset.name(9) == "validation-3.tar/009.png"
    remote = val_set(server.url)
    assert [remote.name(i) for i in (0, 3, 9)] == ["image 0 of validation-0.tar", "image 0 of validation-1.tar",
                                                   "image 1 of validation-3.tar"]
    assert set(server.seen) == {"_info.json"}


def wrong_count(path):
    write_tar(path, [("0.png", png(0)), ("0.cls", b"0"), ("1.png", png(1)), ("1.cls", b"1")])


def without_class(path):
    write_tar(path, [("0.png", png(0)), ("0.cls", b"0"), ("1.png", png(1)), ("2.png", png(2)), ("2.cls", b"0")])


def without_image(path):
    write_tar(path, [("0.png", png(0)), ("0.cls", b"0"), ("1.cls", b"1"), ("2.png", png(2)), ("2.cls", b"0")])


def cut(where):
    return lambda path: path.write_bytes(path.read_bytes()[:where])


DAMAGES = [
    (wrong_count, r"holds 2 samples, and _info.json says 3; correct shard_lengths"),
    (without_class, r"sample 1 lacks its .cls or its image next to it; 2 of the 3 samples in this shard have both"),
    (without_image, r"sample 1 lacks its .cls or its image next to it; 2 of the 3"),
    (cut(4200), r"is damaged or cut off in sample 2: unexpected end of data; make or copy it again"),
    (cut(4000), r"holds 1 samples, and _info.json says 3"),
    (cut(512 * 5), r"sample 000 lacks its .cls or its image next to it; 0 of the 1 samples"),
    (cut(100), "is damaged or cut off in sample 0: truncated header"),
    (cut(0), "is damaged or cut off in sample 0: empty file"),
    (lambda path: path.write_bytes(b"<html>" * 500), "is damaged or cut off in sample 0: invalid header"),
]


@pytest.mark.parametrize("damage, complaint", DAMAGES)
def test_damaged_shards_are_named_and_never_skipped(folder, damage, complaint):
    damage(folder / "validation-0.tar")
    for num_workers in (0, 1):
        loader = loader_of(val_set(folder, on_error="mask"), train=False, num_workers=num_workers)
        assert re.fullmatch(f"{folder}/validation-0.tar:? {complaint}.*", complaint_of(loader))


HOSTILE_CLASSES = [b"1 2", b"9" * 10_000, "\u00b2".encode(), "\u0663".encode()]


@pytest.mark.parametrize("text", [b"", b"cat", b"-1", b"1.5", *HOSTILE_CLASSES])
def test_class_that_is_no_index(folder, text):
    write_tar(folder / "validation-1.tar", [("x.png", png(0)), ("x.cls", text)])
    with pytest.raises(ShardError, match=r"the .cls of x.png in .*validation-1.tar should be a class index, and is b"):
        val_set(folder, on_error="mask")[3]


def write_header(path, **fields):
    """The first member of a tar file gets other fields of its header, by their place in it."""
    data = bytearray(path.read_bytes())
    for place, value in dict(fields, _148=b" " * 8).items():
        data[int(place[1:]):int(place[1:]) + len(value)] = value
    data[148:156] = b"%06o\0 " % sum(data[:512])
    path.write_bytes(data)


@pytest.mark.parametrize("size", [
    b"77777777777\0", b"-0000001000\0", b"\x80" + b"\xff" * 11, b"\xff" * 11 + b"\x00", b"\x80\0\0\0" + b"\x7f" * 8,
])
@pytest.mark.parametrize("kind", [b"0", b"S", b"x", b"L", b"K", b"g"])
def test_headers_that_claim_any_size(folder, size, kind):
    write_header(folder / "validation-0.tar", _124=size, _156=kind)
    with pytest.raises(ShardError, match=r"validation-0.tar:? (is damaged|holds 2 samples|sample 000 lacks)"):
        val_set(folder)[0]


@pytest.mark.parametrize("step", [-512, -1024, -1536, -2048])
def test_headers_that_lead_back(tmp_path, step):
    """To a header that was read before, and so on without an end."""
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for name in ("0.png", "0.cls"):
            entry = tarfile.TarInfo(name)
            entry.size, entry.pax_headers = 700, dict(comment="a size could stand here")
            tar.addfile(entry, io.BytesIO(bytes(700)))
    data = bytearray(path.read_bytes())
    record = f"16 size={step:07}\n".encode()
    place = data.rfind(b"comment=") // 512 * 512
    data[place:place + 512] = record.ljust(512, b"\0")
    data[place - 512 + 124:place - 512 + 136] = b"%011o\0" % len(record)
    data[place - 512 + 148:place - 512 + 156] = b" " * 8
    data[place - 512 + 148:place - 512 + 156] = b"%06o\0 " % sum(data[place - 512:place])
    path.write_bytes(data)
    with open(path, "rb") as file, pytest.raises(ShardError, match="damaged or cut off in sample 1: invalid header"):
        shards.index_shard(file, "a.tar")


def test_a_shard_that_the_system_cannot_read_is_not_called_damaged(folder, server, monkeypatch, copies):
    def fail(*_, **__):
        raise OSError(errno.EIO, "Input/output error")

    for module, name in ((tarfile, "open"), (os, "pread")):
        dataset = val_set(server.url)
        with monkeypatch.context() as patch:
            patch.setattr(module, name, fail)
            with pytest.raises(ShardError, match=r"validation-0.tar cannot be read: Input/output error$"):
                dataset[0]
        assert copies() == ["validation-0.tar"]


@pytest.mark.parametrize("listed, given, most, source", [
    (9, None, 9, "num_classes of _info.json"),
    (9, 20, 9, "num_classes of _info.json"),
    (None, 8, 8, "the number of classes of the model"),
    (None, None, None, None),
])
def test_class_beyond_those_that_there_are(folder, listed, given, most, source):
    write_info(folder, read_info(folder), **({} if listed is None else dict(num_classes=listed)))
    dataset = val_set(folder, on_error="mask", most_classes=given)
    assert dataset.num_classes == listed
    if most is None:
        assert dataset[9][1] == 9
        return
    assert dataset[most - 1][1] == most - 1
    complaint = rf"00{most}.png in .*tar is of class {most}, which must be below {most}, {source}$"
    with pytest.raises(ShardError, match=complaint) as error:
        dataset[most]
    assert isinstance(error.value, ShardClassError) == (listed is None), "of the model, which a flag may change"


@pytest.mark.parametrize("number", [0, -1, 2.5, "many", True, 10**9])
def test_number_of_classes_that_is_none(folder, number):
    write_info(folder, read_info(folder), num_classes=number)
    with pytest.raises(ShardError, match=f"num_classes should be a number of at least 1, and is {number!r}"):
        val_set(folder)


def test_classes_have_the_names_in_the_list(folder, server):
    """In Unicode NFC; where a network's names are given, they have its numbers, and it may have more classes."""
    names = [f"cla\u0308ss {i}" for i in range(10)]
    write_info(folder, read_info(folder), classes=names)
    network = [f"cl\u00e4ss {i}" for i in range(9, -1, -1)]
    for root in (folder, server.url):
        dataset = val_set(root)
        assert dataset.classes == network[::-1] and dataset.num_classes == 10 and dataset[3][1] == 3
        dataset = val_set(root, classes=[*network, "more"])
        assert dataset.classes == [*network, "more"] and dataset.num_classes == 11 and dataset[3][1] == 6
        assert dataset.notes == (f"no images in {root} of 1 of the network's 11 classes: more",)
        with pytest.raises(UserError, match=r"has classes that the network has no class for: cl.ss 0; did you mean"):
            val_set(root, classes=network[:-1])


@pytest.mark.parametrize("names", [7, [], ["a", 1], ["a", "a"], ["\u00e4", "a\u0308"], ["a", "b", "c"]])
def test_names_of_classes_that_are_none(folder, names):
    write_info(folder, read_info(folder), classes=names, **(dict(num_classes=2) if names == ["a", "b", "c"] else {}))
    with pytest.raises(ShardError, match="classes should be a list of names, one for each class and no two the same"):
        val_set(folder)


def test_shard_that_shrinks_while_it_is_open(folder):
    dataset = val_set(folder)
    dataset[0]
    cut(4000)(folder / "validation-0.tar")
    with pytest.raises(ShardError, match=r"2.png in .*validation-0.tar was cut off while it was read"):
        dataset[2]


def test_list_of_shards_with_mistakes(folder, tmp_path):
    with pytest.raises(UserError, match="has 16 images, fewer than one batch of 32"):
        loader_of(train_set(folder), batch_size=32)
    good = read_info(folder)["validation"]
    for splits, others in (({}, "none"), ({"test": good, "dev": good}, "dev, test")):
        write_info(folder, splits)
        with pytest.raises(UserError, match=rf"_info.json lists no split val or validation; it lists {others}$"):
            val_set(folder)
    for splits in ({"val": {"name": "val"}}, {"val": {**good, "num_samples": 11}}, {"val": 3}, [],
                   {"val": {**good, "shard_lengths": [10]}}, {"val": {**good, "sha256": ["0"]}},
                   {"val": {**good, "shard_lengths": [11, -1, 0, 0]}}, {"val": {**good, "shard_lengths": ["x"] * 4}}):
        write_info(folder, splits)
        with pytest.raises(UserError, match=r"_info.json should list, for a split val or validation, filenames, as"):
            val_set(folder)
    for name in ("/etc/passwd", "../validation-0.tar", "a/../../b.tar"):
        write_info(folder, {"val": {**good, "filenames": [name, *good["filenames"][1:]]}})
        with pytest.raises(UserError, match=r"_info.json lists a shard outside of its folder"):
            val_set(folder)
    write_info(folder, {"val": {**good, "alt_label": "label_12k"}})
    with pytest.raises(UserError, match=r"takes classes from JSON \(label_12k\); write them as .cls instead"):
        val_set(folder)
    write_info(folder, {"val": good})
    (folder / "validation-2.tar").unlink()
    with pytest.raises(UserError, match=r"lacks shards that _info.json lists: validation-2.tar$"):
        val_set(folder)
    (folder / "_info.json").write_text("{")
    with pytest.raises(UserError, match=r"_info.json should list"):
        val_set(folder)
    (folder / "_info.json").unlink()
    with pytest.raises(UserError, match=r"has no _info.json"):
        val_set(folder)
    with pytest.raises(UserError, match="does not exist"):
        val_set(tmp_path / "nowhere")
    with pytest.raises(UserError, match="none was given"):
        val_set(None)


HUGE = 10**30
HOSTILE_LISTS = [
    b"[" * 100_000, b'{"splits": ' * 100_000, b'{"splits": {"val": ' + b"9" * 10_000 + b"}}", b"\xff", b"null",
    b'"splits"',
    *(json.dumps({"splits": {"val": dict(
        dict(num_samples=1, filenames=["a.tar"], shard_lengths=[1]), **changes
    )}}).encode() for changes in (
        dict(num_samples=True, shard_lengths=[True]), dict(shard_lengths=[1.0]), dict(shard_lengths=["1"]),
        dict(num_samples=HUGE, shard_lengths=[HUGE]), dict(num_samples=10**8, shard_lengths=[10**8]),
        dict(num_samples=math.inf, shard_lengths=[math.inf]), dict(num_samples=math.nan, shard_lengths=[math.nan]),
        dict(num_samples=2 * 10**9, shard_lengths=[10**7] * 200, filenames=["a.tar"] * 200),
        dict(filenames=[None]), dict(filenames=[["a.tar"]]), dict(filenames=[""]),
        dict(filenames=["."]), dict(filenames=["a\0.tar"]), dict(filenames=["\ud800.tar"]), dict(filenames=["a" * 300]),
        dict(filenames=["a\n.tar"]), dict(sha256=[""]), dict(sha256=["0" * 7]), dict(sha256=["x" * 64]),
        dict(sha256=[3]), dict(sha256="0"), dict(sha256={"0": "0"}), dict(shard_bytes=[-1]), dict(shard_bytes=["1"]),
        dict(shard_bytes=[HUGE]), dict(shard_bytes=[1, 1]), dict(shard_bytes=7),
    )),
]


@pytest.mark.parametrize("content", HOSTILE_LISTS, ids=range(len(HOSTILE_LISTS)))
def test_any_list_of_shards_gives_one_line(folder, server, content):
    (folder / "_info.json").write_bytes(content)
    for root in (folder, server.url):
        with pytest.raises(ShardError, match=r"/_info.json (should list|lists no split)") as error:
            val_set(root)
        assert "\n" not in str(error.value) and len(str(error.value)) < 1000


def test_a_list_that_never_ends(folder, server, monkeypatch):
    for module in (remote, shard_list):
        monkeypatch.setattr(module, "MOST_IN_MEMORY", 100)
    with pytest.raises(ShardError, match=r"_info.json is larger than a list of shards may be"):
        val_set(folder)
    with pytest.raises(ShardError, match=r"_info.json cannot be fetched: its 0.0 MB are more than"):
        val_set(server.url)


def test_a_shard_of_another_size_than_the_list_says(folder, server, copies):
    splits = read_info(folder)
    size = (folder / "validation-0.tar").stat().st_size
    splits["validation"]["shard_bytes"] = [size, None, size, size]
    write_info(folder, splits)
    with open(folder / "validation-0.tar", "ab") as file:
        file.write(bytes(512))  # which no pass over the headers would find
    with pytest.raises(ShardError, match=rf"validation-0.tar has {size + 512} bytes, not the {size} that the list"):
        val_set(folder)[0]
    with pytest.raises(ShardError, match=rf"cannot be fetched: the server has {size + 512} bytes, not {size}"):
        val_set(server.url)[0]
    assert val_set(folder)[3][1] == val_set(server.url)[3][1] == 3 and copies() == ["validation-1.tar"]


def test_list_of_shards_by_its_other_name(folder):
    (folder / "_info.json").rename(folder / "info.json")
    assert len(val_set(folder)) == 10


def test_local_shard_that_goes_after_the_start(folder):
    dataset = val_set(folder, on_error="mask")
    (folder / "validation-0.tar").unlink()
    with pytest.raises(ShardError, match=r"validation-0.tar cannot be opened: No such file"):
        dataset[0]


# --- by HTTP ----------------------------------------------------------------------------------------------------------


def test_a_shard_is_fetched_when_it_is_needed_and_once(folder, server, copies):
    dataset = val_set(server.url)
    assert not copies()
    dataset[0]
    assert copies() == ["validation-0.tar"] and server.seen["validation-0.tar"] == 1
    (folder / "validation-0.tar").unlink()
    assert val_set(server.url)[1][1] == 1


def test_workers_fetch_a_shard_once(tmp_path, server, copies):
    """The transfer takes long enough that both workers ask for the shard before it is there."""
    (tmp_path / "data set").mkdir()
    write_shards(tmp_path / "data set", {"val": (16,)})
    server.delay = 0.3
    loader = loader_of(val_set(server.url), train=False, batch_size=1, num_workers=2)
    assert read_all(loader)[1].tolist() == list(range(16))
    assert server.seen["val-0.tar"] == 1 and copies() == ["val-0.tar"]


@pytest.mark.parametrize("name", ["_info.json", "validation-0.tar"])
def test_a_transfer_that_breaks_is_tried_again(folder, server, copies, name):
    server.cut[name] = 2
    assert val_set(server.url)[0][1] == 0 and server.seen[name] == 3
    server.cut[name] = 3
    (folder / "other").mkdir()
    write_shards(folder / "other")
    with pytest.raises(ShardError, match=rf"other/{name} cannot be fetched: the server stopped after \d+ of \d+ bytes"):
        val_set(f"{server.url}/other", on_error="mask")[0]
    assert copies() == ["validation-0.tar"]


def test_what_a_killed_process_left_is_no_shard(folder, server, tmp_path, copies):
    val_set(server.url)[0]
    cache = tmp_path / "hub" / "shards"
    copy = next(cache.glob("*.shard"))
    copy.with_suffix(".part").write_bytes(copy.read_bytes()[:700])
    copy.unlink()
    assert val_set(server.url)[0][1] == 0
    assert copies() == ["validation-0.tar"] and not list(cache.glob("*.part"))


def test_a_server_that_refuses_and_one_that_is_gone(folder, server):
    dataset = val_set(server.url, on_error="mask")
    (folder / "validation-0.tar").unlink()
    with pytest.raises(ShardError, match=r"validation-0.tar cannot be fetched: HTTP Error 404: .*; see that"):
        dataset[0]
    (folder / "_info.json").unlink()
    with pytest.raises(UserError, match=r"http.* has no _info.json"):
        val_set(server.url)
    server.shutdown()
    server.server_close()
    loader = loader_of(dataset, train=False, batch_size=1, num_workers=1)
    assert re.fullmatch(r"http.*/validation-0.tar cannot be fetched: .*refused>; see that .*", complaint_of(loader))
    with pytest.raises(UserError, match=r"_info.json cannot be fetched: .*refused"):
        val_set(server.url)


def test_a_server_that_is_overloaded_is_asked_again(folder, server, monkeypatch):
    answers = iter([503, 429])
    send_head = Handler.send_head

    def busy(self):
        status = next(answers, None)
        return send_head(self) if status is None else self.send_error(status)

    monkeypatch.setattr(Handler, "send_head", busy)
    assert len(val_set(server.url)) == 10


def test_hashes_are_checked(folder, server, copies):
    write_shards(folder, hashes=True)
    assert val_set(server.url)[0][1] == 0
    # another shard in its place: the list says so, and the copy no longer serves
    write_tar(folder / "validation-0.tar", [member for i in range(3) for member in (
        (f"{i}.png", png(i)), (f"{i}.cls", b"8"))])
    splits = read_info(folder)
    splits["validation"]["sha256"][:2] = sha256_of(folder / "validation-0.tar"), "0" * 64
    write_info(folder, splits)
    with pytest.raises(ShardError, match=r"validation-1.tar is not the file whose sha256"):
        val_set(server.url, on_error="mask")[3]
    assert val_set(server.url)[0][1] == 8
    assert copies() == ["validation-0.tar"] * 2


def test_a_copy_that_does_not_fit_the_list_is_not_kept(folder, server, copies):
    """Otherwise a shard that is mended on the server would stay broken here."""
    good = (folder / "validation-0.tar").read_bytes()
    wrong_count(folder / "validation-0.tar")
    with pytest.raises(ShardError, match="holds 2 samples"):
        val_set(server.url)[0]
    assert not copies()
    (folder / "validation-0.tar").write_bytes(good)
    assert val_set(server.url)[2][1] == 2


@pytest.mark.parametrize("hashes", [True, False])
def test_a_copy_that_rots_is_fetched_again_by_the_next_run(folder, server, tmp_path, hashes):
    """In an image, where no header shows it."""
    write_shards(folder, hashes=hashes)
    val_set(server.url)[0]
    copy = next((tmp_path / "hub" / "shards").glob("*.shard"))
    whole = copy.read_bytes()
    rotten = bytearray(whole)
    rotten[600] ^= 1
    copy.write_bytes(rotten)
    dataset = val_set(server.url)
    assert [dataset[i][1] for i in range(3)] == [0, 1, 2]
    assert copy.read_bytes() == whole and server.seen["validation-0.tar"] == 2


def test_signatures_are_sent_with_each_name_and_never_shown(folder, server, copies):
    """With hashes, another signature finds the same copies."""
    write_shards(folder, hashes=True)
    signed = server.url.replace("//", "//user:secret@")
    for number in range(2):
        dataset = val_set(f"{signed}/?secret={number}")
        assert dataset[0][1] == 0
    assert set(server.paths) == {f"/data%20set/_info.json?secret={number}" for number in range(2)} | {
        "/data%20set/validation-0.tar?secret=0"}
    assert copies() == ["validation-0.tar"]
    (folder / "validation-1.tar").unlink()
    with pytest.raises(ShardError, match=r"http://\*\*\*@.*/validation-1.tar\?\*\*\* cannot be fetched") as error:
        dataset[3]
    assert "secret" not in f"{error.value} {dataset.source.folder} {dataset.name(0)}"
    with pytest.raises(ShardError, match="password or signature is not kept: give the whole address again"):
        val_set(remote.public(f"{signed}/?secret=0"))


def test_a_folder_has_no_hash(folder, server):
    with pytest.raises(ShardError, match=r"#sha256=12345678: a folder has no hash"):
        val_set(f"{server.url}#sha256=12345678")


def test_the_cache_can_be_bounded(folder, server, tmp_path):
    cache = tmp_path / "cache"
    cache.mkdir()
    (cache / "of the user.tar").write_bytes(b"x" * 50_000)
    write_shards(folder, {"val": (2, 2, 2, 2)})
    size = (folder / "val-0.tar").stat().st_size
    dataset = val_set(server.url, reading=Reading(shard_cache=ShardCache(cache, 2.5 * size / 1e9)))
    for index in (0, 2, 0, 4):  # of shards 0, 1, 0, 2
        dataset.source._open.clear()
        assert dataset[index][1] == index
        time.sleep(0.02)
    assert sorted(path.name[:5] for path in cache.glob("*.shard")) == ["val-0", "val-2"]
    assert server.seen["val-0.tar"] == 1
    small = Reading(shard_cache=ShardCache(cache, 1e-9))
    everything = loader_of(val_set(server.url, reading=small), train=False, num_workers=2)
    assert read_all(everything)[1].tolist() == list(range(8))
    assert len(list(cache.glob("*.shard"))) == 1 and (cache / "of the user.tar").exists()


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_slow_server_is_waited_for_while_shards_arrive(folder, server, num_workers):
    """A batch of four shards takes twice as long as a run waits for data that do not come."""
    write_shards(folder, {"val": (1, 1, 1, 1)})
    server.delay = 1.2
    data = loader_of(val_set(server.url), train=False, num_workers=num_workers)
    data.timeout = 2
    assert read_all(data)[1].tolist() == [0, 1, 2, 3]


def test_a_cache_that_cannot_be_written(folder, server, tmp_path):
    (tmp_path / "file").touch()
    dataset = val_set(server.url, reading=Reading(shard_cache=ShardCache(tmp_path / "file")))
    with pytest.raises(ShardCacheError, match=r"validation-0.tar cannot be kept in .*file: File exists$"):
        dataset[0]


def test_names_are_quoted_not_interpreted(tmp_path, server):
    root = tmp_path / "data set"
    root.mkdir()
    name = "pipe:touch x; a b#1?.tar"
    write_tar(root / name, [("0.png", png(0)), ("0.cls", b"4")])
    write_info(root, {"val": dict(num_samples=1, filenames=[name], shard_lengths=[1])})
    for place in (root, server.url):
        assert val_set(place)[0][1] == 4


def test_without_the_rest_of_the_repository(folder, tmp_path):
    """The sequence alone, as another project would use it."""
    source = open_shards(folder, ["train"], load_image, tmp_path)
    assert [target for _, target in source] == list(range(16))
    assert read_split(LocalFolder(folder), ["validation"]).lengths == LENGTHS["validation"]
