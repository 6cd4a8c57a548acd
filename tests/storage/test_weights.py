"""storage/weights.py: checkpoints of many kinds, from files and URLs, and nothing run that is in them."""
import argparse
import errno
import os
import subprocess
import sys
import zipfile
from collections import Counter

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn

from helpers import ROOT
from helpers.hostile import Hostile, forged_array
from storage.weights import (
    DamagedFileError,
    HostileFileError,
    UnreadableError,
    WeightsError,
    WeightsKeyError,
    class_difference,
    default_weights,
    fetch,
    load_weights,
    read_checkpoint,
    read_file,
    to_safetensors,
    unwrap,
)


def test_published_checkpoint_with_its_command_line(tmp_path):
    torch.save({"model": {"w": torch.ones(1)}, "args": argparse.Namespace(lr=1)}, tmp_path / "c.pth")
    assert read_checkpoint(str(tmp_path / "c.pth"))["args"].lr == 1


@pytest.mark.parametrize("value", [
    np.float64(1.5), np.float32(2), np.float16(2), np.int64(-3), np.uint8(4), np.bool_(True), np.complex64(1j),
    np.str_("a word"), np.longdouble(2), np.arange(6).reshape(2, 3), np.array([0.5, 2]), np.array(["a", "bc"]),
    np.array(3), np.array([b"a"]), np.array([1, 2], ">f4"), np.asfortranarray(np.arange(6.0).reshape(2, 3)),
], ids=repr)
@pytest.mark.parametrize("name", ["numpy._core", "numpy.core"])
def test_numbers_of_numpy_are_plain_data(tmp_path, value, name):
    """As NumPy 2 writes them, and NumPy 1."""
    torch.save({"model": {"w": torch.ones(1)}, "best_acc": value}, tmp_path / "c.pth")
    with zipfile.ZipFile(tmp_path / "c.pth") as old, zipfile.ZipFile(tmp_path / "d.pth", "w") as new:
        for entry in old.namelist():
            new.writestr(entry, old.read(entry).replace(b"numpy._core", name.encode()))
    found = read_checkpoint(str(tmp_path / "d.pth"))
    assert type(found["best_acc"]) is type(value) and np.array_equal(found["best_acc"], value)
    assert found["best_acc"].dtype == value.dtype and found["best_acc"].flags.writeable == value.flags.writeable
    assert unwrap(found)["w"].equal(torch.ones(1))


def test_hostile_objects_in_an_array_of_numpy_are_refused(tmp_path):
    victim = tmp_path / "made_by_the_pickle"
    for value in (np.array([Hostile(victim), None]), np.array([(1, Hostile(victim))], dtype="i4,O")):
        torch.save({"model": {"w": torch.ones(1)}, "best_acc": value}, tmp_path / "c.pth")
        with pytest.raises(HostileFileError, match=r"refused, since loading it would run code \(.*mkdir"):
            read_checkpoint(str(tmp_path / "c.pth"))
    assert not victim.exists()


def test_arrays_are_found_wherever_they_lie(tmp_path):
    """In the state of a generator too, which is a tuple."""
    circle = [np.arange(2)]
    circle.append(circle)
    state, counts = np.random.RandomState(3).get_state(), Counter(a=2)
    shared = np.arange(3)
    content = dict(args=argparse.Namespace(mean=np.ones(3)), dtype=np.dtype("f4"), both=[shared, (shared,)])
    torch.save(dict(content, model={"w": torch.ones(1)}, state=state, circle=circle, counts=counts), tmp_path / "c.pth")
    found = read_checkpoint(str(tmp_path / "c.pth"))
    assert np.array_equal(found["state"][1], state[1]) and found["state"][0] == "MT19937"
    assert found["args"].mean.tolist() == [1, 1, 1] and found["dtype"] == np.float32 and found["counts"] == counts
    assert found["both"][0] is found["both"][1][0] and found["circle"][1] is found["circle"]
    assert found["circle"][0].tolist() == [0, 1]


def test_the_refusal_names_what_is_hostile_alone(tmp_path):
    torch.save({"model": Hostile(tmp_path / "made"), "best_acc": np.float64(1)}, tmp_path / "c.pth")
    with pytest.raises(HostileFileError, match=r"run code \(\w+\.mkdir\); ask"):
        read_checkpoint(str(tmp_path / "c.pth"))


def test_safetensors(tmp_path):
    safetensors.torch.save_file({"w": torch.ones(2)}, tmp_path / "c.safetensors")
    assert read_checkpoint(str(tmp_path / "c.safetensors"))["w"].equal(torch.ones(2))


def test_a_checkpoint_as_safetensors(tmp_path):
    checkpoint = dict(args=dict(task="classification", input_size=[32, 48]), classes=["a", "\u732b"])
    (tmp_path / "c.safetensors").write_bytes(to_safetensors(dict(checkpoint, model={"w": torch.ones(2)})))
    read = read_checkpoint(str(tmp_path / "c.safetensors"))
    assert unwrap(read)["w"].equal(torch.ones(2)) and read.pop("model").keys() == {"w"} and read == checkpoint


@pytest.mark.parametrize("about", ["{", "3", "[1]", "[" * 100_000])
def test_safetensors_with_damaged_metadata(tmp_path, about):
    safetensors.torch.save_file({"w": torch.ones(2)}, tmp_path / "c.safetensors", {"routedvit": about})
    with pytest.raises(WeightsError, match="not a PyTorch checkpoint, or a truncated one"):
        read_checkpoint(str(tmp_path / "c.safetensors"))


@pytest.mark.parametrize("legacy", [False, True])
def test_hostile_pickle_is_refused_and_not_run(tmp_path, legacy):
    victim = tmp_path / "made_by_the_pickle"
    state = {"model": Hostile(victim)}
    torch.save(state, tmp_path / "c.pth", _use_new_zipfile_serialization=not legacy)
    with pytest.raises(HostileFileError, match="refused, since loading it would run code") as error:
        read_checkpoint(str(tmp_path / "c.pth"))
    assert not victim.exists() and "\n" not in str(error.value)
    assert legacy or "mkdir" in str(error.value)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 cut off", b"<html>sign in</html>", b"\x80\x02}q"])
def test_what_is_no_checkpoint(tmp_path, content):
    (tmp_path / "c.pth").write_bytes(content)
    with pytest.raises(WeightsError, match="not a PyTorch checkpoint") as error:
        read_checkpoint(f"{tmp_path}/../{tmp_path.name}/c.pth")
    assert "\n" not in str(error.value)
    assert (tmp_path / "c.pth").read_bytes() == content  # what is the user's stays


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_truncated_checkpoint(tmp_path, suffix):
    path = tmp_path / f"c{suffix}"
    if suffix == ".pth":
        torch.save({"model": {"w": torch.randn(1000)}}, path)
    else:
        safetensors.torch.save_file({"w": torch.randn(1000)}, path)
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(WeightsError, match="truncated"):
        read_checkpoint(str(path))


SHORT_OF_MEMORY = """
import resource, sys, safetensors.torch
from pathlib import Path
from storage.weights import UnreadableError, read_file

size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (size + 2**24,) * 2)
for path, mmap in ((sys.argv[1], False), (sys.argv[1], True), (sys.argv[2], False)):
    try:
        read_file(Path(path), mmap)
    except UnreadableError as error:
        print(error)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="limits memory")
def test_short_memory_says_nothing_about_a_file(tmp_path):
    weights, path, other = {"w": torch.zeros(2**24)}, tmp_path / "c.pth", tmp_path / "c.safetensors"
    torch.save(weights, path)
    safetensors.torch.save_file(weights, other)
    command = [sys.executable, "-c", SHORT_OF_MEMORY, str(path), str(other)]
    lines = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    assert lines == [f"{name}: the system cannot read it: out of memory" for name in (path, path, other)]


@pytest.mark.parametrize("number,is_of_the_file", [
    (errno.EIO, False), (errno.ESTALE, False), (errno.EACCES, False), (errno.EINVAL, True),
])
def test_a_failed_read_says_nothing_about_a_file(tmp_path, monkeypatch, number, is_of_the_file):
    """Damaged offsets in a zip file are the file's own, and an invalid argument."""
    def fail(*_, **__):
        raise OSError(number, os.strerror(number))

    torch.save({"epoch": 1}, tmp_path / "c.pth")
    monkeypatch.setattr(torch, "load", fail)
    with pytest.raises(WeightsError) as error:
        read_checkpoint(str(tmp_path / "c.pth"))
    assert isinstance(error.value, UnreadableError) != is_of_the_file
    assert is_of_the_file or str(error.value).endswith(f"the system cannot read it: {os.strerror(number)}")


def test_damage_is_never_taken_for_a_fault_of_the_system(tmp_path):
    torch.save({"model": {"w": torch.zeros(9)}, "epoch": 1}, tmp_path / "c.pth")
    whole, random = (tmp_path / "c.pth").read_bytes(), np.random.default_rng(0)
    damaged = 0
    for _ in range(200):
        content = bytearray(whole)
        for _ in range(random.integers(1, 4)):
            content[random.integers(len(content))] = random.choice([0, 255, random.integers(256)])
        (tmp_path / "c.pth").write_bytes(content)
        try:
            read_checkpoint(str(tmp_path / "c.pth"), mmap=bool(random.integers(2)))
        except WeightsError as error:
            damaged += 1
            assert not isinstance(error, UnreadableError)
    assert damaged > 50


def test_a_file_in_a_folder_that_may_not_be_entered(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(os, "stat", refuse)
    with pytest.raises(UnreadableError, match="cannot read it: Permission denied"):
        fetch(str(tmp_path / "c.pth"))


@pytest.mark.parametrize("size,is_refused", [(2**27, True), (2**22, False)])
def test_a_file_that_would_fill_memory_is_refused(tmp_path, size, is_refused):
    """Zeros of a thousand times the file's size; a few may be of weights that were not trained."""
    torch.save({"model": {"w": torch.zeros(size // 2, dtype=torch.bfloat16)}}, tmp_path / "c.pth")
    path = tmp_path / "d.pth"
    with zipfile.ZipFile(tmp_path / "c.pth") as old, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as new:
        for entry in old.namelist():
            new.writestr(entry, old.read(entry))
    if not is_refused:
        assert unwrap(read_file(path))["w"].shape == (size // 2,)
        return
    with pytest.raises(HostileFileError, match=r"refused, since its 0\.1 MB unpack to 134\.2 MB; ask its author"):
        read_file(path)


def test_an_array_of_empty_texts_takes_no_memory(tmp_path):
    torch.save({"best_acc": forged_array(np.dtype("S0"), shape=(10**12,))}, tmp_path / "c.pth")
    with pytest.raises(HostileFileError, match="refused, since it holds an array of NumPy of nothing"):
        read_file(tmp_path / "c.pth")


def test_views_of_one_number_take_no_memory(tmp_path):
    torch.save({"model": {"weight": torch.ones(1).expand(10**15), "bias": torch.ones(1)}}, tmp_path / "c.pth")
    weights = unwrap(read_checkpoint(str(tmp_path / "c.pth")))
    with pytest.raises(WeightsError, match=r"weight is \(1000000000000000,\) instead of \(1, 2\)"):
        load_weights(nn.Linear(2, 1), weights)


@pytest.mark.parametrize("convert", [torch.Tensor.to_sparse, lambda tensor: tensor.to("meta")])
def test_tensors_that_are_no_weights_are_named(tmp_path, convert):
    torch.save({"model": {"weight": convert(torch.ones(1, 2)), "bias": torch.ones(1)}}, tmp_path / "c.pth")
    with pytest.raises(WeightsError, match="weight is no dense tensor"):
        load_weights(nn.Linear(2, 1), unwrap(read_checkpoint(str(tmp_path / "c.pth"))))


def test_not_a_dictionary(tmp_path):
    torch.save(torch.ones(3), tmp_path / "c.pth")
    with pytest.raises(WeightsError, match="holds a Tensor, not a checkpoint"):
        read_checkpoint(str(tmp_path / "c.pth"))


def test_missing_checkpoint(tmp_path):
    with pytest.raises(WeightsError, match="no such checkpoint file"):
        read_checkpoint("nowhere.pth")
    with pytest.raises(WeightsError, match="no checkpoint file, but something else"):
        read_checkpoint(str(tmp_path))


def test_weights_that_have_changed_on_the_disk_are_refused(tmp_path):
    """They are as plausible as any others, and of the right shapes: checksums tell, which torch.load passes over."""
    path = tmp_path / "c.pth"
    torch.save({"model": {"w": torch.full((4096,), 1.5)}}, path)
    data = bytearray(path.read_bytes())
    place = data.index(torch.full((64,), 1.5).numpy().tobytes())
    data[place + 2000:place + 2004] = bytes(4)
    path.write_bytes(data)
    assert torch.load(path, weights_only=True)["model"]["w"].sum() == 4095 * 1.5
    with pytest.raises(DamagedFileError, match=r"c\.pth: damaged, its checksums are wrong; fetch it again$"):
        read_checkpoint(str(path))


def test_a_filter_that_trips_over_foreign_weights():
    def filter_fn(weights, model):
        return {"weight": weights["stem.weight"]}

    weights = {"x": torch.ones(1), "weight": torch.ones(1, 1), "bias": torch.ones(1)}
    with pytest.raises(WeightsError, match="x is unknown"):
        load_weights(nn.Linear(1, 1), weights, filter_fn)


def test_unwrap_layouts():
    w = torch.ones(1)
    for checkpoint in ({"model": {"w": w}, "epoch": 1}, {"state_dict": {"module.w": w}}, {"w": w}):
        assert unwrap(checkpoint) == {"w": w}
    both = {"model": {"w": w}, "model_ema": {"w": 2 * w}}
    assert unwrap(both, "model_ema")["w"].item() == 2
    with pytest.raises(WeightsError, match="holds no 'ema'; it holds model, model_ema"):
        unwrap(both, "ema")
    with pytest.raises(WeightsError, match="no weights"):
        unwrap({"epoch": 3})
    with pytest.raises(WeightsError, match="no weights"):
        unwrap({1: w})
    for compiled in ("_orig_mod.module.w", "module._orig_mod.w"):
        assert unwrap({compiled: w}) == {"w": w}


@pytest.mark.parametrize("keys,named", [
    (["net"], "net"), (["model_state_dict", "ema"], "ema and model_state_dict"), (["state_dict_ema"], "state_dict_ema"),
])
def test_weights_under_other_keys_are_named(keys, named):
    checkpoint = {key: {"w": torch.ones(1)} for key in keys}
    checkpoint.update(model="resnet50", optimizer={"state": {}}, args={"lr": 1}, epoch=torch.tensor(3))
    with pytest.raises(WeightsKeyError, match=f"holds weights under {named}; say which"):
        unwrap(checkpoint)
    assert unwrap(checkpoint, keys[0])["w"].equal(torch.ones(1))
    with pytest.raises(WeightsKeyError, match=f"no 'x'; it holds {named.replace(' and', ',')}$"):
        unwrap(checkpoint, "x")


@pytest.mark.parametrize("beside", [{}, {"state_dict": {"w": torch.zeros(1)}}])
def test_the_ema_weights_of_a_checkpoint_of_timms(beside):
    """timm loads them too; `unwrap` alone takes what it is told, or the model's own."""
    checkpoint = {"epoch": 3, "arch": "vitae_tiny", **beside, "state_dict_ema": {"module.w": torch.ones(1)}}
    key, (note,) = default_weights(checkpoint, "/tmp/model_best.pth.tar")
    assert unwrap(checkpoint, key) == {"w": torch.ones(1)}
    assert note == "/tmp/model_best.pth.tar: the EMA weights are taken, as timm takes them"
    assert default_weights({**checkpoint, "state_dict_ema": None}, "x") == (None, [])


def test_bare_weights_may_have_others_beside_them():
    weights = {"weight": torch.ones(1, 2), "bias": torch.ones(1), "extra": {"scale": torch.ones(1)}}
    assert unwrap(weights).keys() == {"weight", "bias"}
    with pytest.raises(WeightsKeyError, match="holds weights under extra; say which"):
        unwrap({"steps": torch.tensor(3), "extra": {"scale": torch.ones(1)}})


@pytest.mark.parametrize("prefix", ["model.", "model._orig_mod.", "module.model."])
def test_the_prefix_of_lightning_is_removed_where_the_network_has_none(prefix):
    model = nn.Linear(2, 1)
    lightning = {"state_dict": {f"{prefix}{name}": torch.ones_like(value) for name, value in model.named_parameters()}}
    load_weights(model, unwrap(lightning | {"pytorch-lightning_version": "2"}))
    assert (model.weight == 1).all() and (model.bias == 1).all()


def test_layers_in_a_model_keep_their_names():
    """A network that holds all of its layers in `self.model` has this prefix itself."""
    network = nn.ModuleDict(dict(model=nn.Linear(2, 1)))
    weights = {name: torch.ones_like(value) for name, value in network.state_dict().items()}
    load_weights(network, unwrap({"model": weights}))
    assert (network["model"].weight == 1).all()


def test_a_prefix_that_some_names_lack_is_kept():
    weights = {"model.weight": torch.ones(1), "head.bias": torch.ones(1)}
    with pytest.raises(WeightsError, match=r"model\.weight is unknown; head\.bias is unknown"):
        load_weights(nn.BatchNorm1d(1, affine=False, track_running_stats=False), weights)


def test_unwrap_copies_nothing():
    weights = {"w": torch.ones(1)}
    for checkpoint in (weights, {"model": weights}, {"state_dict": weights}):
        assert unwrap(checkpoint) is weights


def test_load_weights_names_the_first_mismatches():
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 4))
    weights = {"0.weight": torch.zeros(3, 5), "0.bias": torch.zeros(3), "1.weight": torch.zeros(4, 3)}
    weights["x"] = torch.ones(1)
    with pytest.raises(WeightsError) as error:
        load_weights(model, weights)
    for part in ("1.bias is missing", "x is unknown", "0.weight is (3, 5) instead of (3, 2)"):
        assert part in str(error.value)
    assert "\n" not in str(error.value)


def test_load_weights_with_a_new_classifier():
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 4))
    before = model[1].weight.clone()
    weights = {"0.weight": torch.zeros(3, 2), "0.bias": torch.zeros(3), "1.weight": torch.zeros(9, 3),
               "1.bias": torch.zeros(9)}
    assert load_weights(model, weights, new_classifier=("1",))
    assert model[1].weight.equal(before) and (model[0].weight == 0).all()
    with pytest.raises(WeightsError):
        load_weights(model, weights)


def test_class_difference():
    checkpoint = dict(classes=["cat", "dog"])
    assert class_difference(checkpoint, ["cat", "dog"]) is None
    for others in (7, [7], {"cat": 0}):
        assert class_difference(dict(classes=others), ["cat"]) is None, "others mean their number"
    assert class_difference({}, ["cat"]) is class_difference(checkpoint, None) is None
    assert class_difference(dict(classes=["gro\u0308\u00dfe"]), ["gr\u00f6\u00dfe"]) is None, "Unicode NFD and NFC"
    assert class_difference(checkpoint, ["cat"]) == "was trained on 2 classes, the data has 1, without 'dog'"
    assert class_difference(checkpoint, ["cat", "cow", "dog"]) == (
        "was trained on 2 classes, the data has 3, with 'cow' added")
    assert class_difference(checkpoint, ["cow"]) == (
        "was trained on 2 classes, the data has 1, without 'cat', 'dog' and with 'cow' added")
    assert class_difference(checkpoint, ["cat", "cow"]) == (
        "was trained on other classes: 'dog', where the data has 'cow'")
    seven, renamed = [f"c{i}" for i in range(7)], ["c0", *(f"d{i}" for i in range(6))]
    assert class_difference(dict(classes=seven), renamed) == (
        "was trained on other classes: 'c1', 'c2', 'c3', 'c4', 'c5' and 1 more, "
        "where the data has 'd0', 'd1', 'd2', 'd3', 'd4' and 1 more")
    assert class_difference(checkpoint, ["dog", "cat"]) == (
        "was trained on the same classes in another order: number 0 was 'cat', and is 'dog' here")
