"""The weights that the repository ships: loaded by timm and by models.load, and never from a network."""
import pickle
import socket
import warnings

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file
from timm.data import resolve_data_config

import models
from helpers import ROOT

NAMES = ["biformer_nano", "debiformer_nano"]
SYNSETS = ("n01440764", "n02102040", "n02979186", "n03000684", "n03028079", "n03394916", "n03417042", "n03425413",
           "n03445777", "n03888257")  # fmt: skip
CHURCH = SYNSETS.index("n03028079")


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    """No connection, and no warning, which nothing here is a reason for."""

    def refuse(*arguments, **_):
        raise AssertionError(f"a connection was asked for: {arguments}")

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def saved(name):
    return load_file(ROOT / "weights" / f"{name}.safetensors")


def as_in_file(network, name, without=()):
    """Whether each weight of a network is the file's, exactly, and float32 where it is a float."""
    state, halves = network.state_dict(), saved(name)
    assert {value.dtype for value in state.values()} == {torch.float32, torch.int64}
    return all(state[k].equal(halves[k].to(state[k].dtype)) for k in state if not k.startswith(tuple(without)))


@pytest.mark.parametrize("name", NAMES)
def test_files_are_small_and_finite(name):
    weights = saved(name)
    assert {value.dtype for value in weights.values()} == {torch.float16, torch.int64}
    assert all(value.isfinite().all() for value in weights.values() if value.is_floating_point())
    counters = {key for key, value in weights.items() if value.dtype == torch.int64}
    assert {key.rpartition(".")[2] for key in counters} == {"num_batches_tracked"}
    assert (ROOT / "weights" / f"{name}.safetensors").stat().st_size < 5e6


@pytest.mark.parametrize("name", [*NAMES, "biformer_nano.imagenette"])
def test_timm_loads_them_exactly(name):
    network = timm.create_model(name, pretrained=True)
    assert network.num_classes == 10 and as_in_file(network, name.partition(".")[0])
    config = network.pretrained_cfg
    assert config["label_names"] == SYNSETS and tuple(config["label_descriptions"]) == SYNSETS
    assert config["label_descriptions"]["n03028079"] == "church" and config["state_dict"] is None
    data = resolve_data_config(model=network)
    assert (data["input_size"], data["crop_pct"]) == ((3, 160, 160), 0.875)
    assert len(pickle.dumps(config)) < 3000


@pytest.mark.parametrize("name", NAMES)
def test_another_number_of_classes_has_a_fresh_classifier(name):
    network = timm.create_model(name, pretrained=True, num_classes=5)
    assert network.head.fc.weight.shape[0] == 5 and as_in_file(network, name, without=["head.fc"])
    bare = timm.create_model(name, pretrained=True, num_classes=0).eval()
    assert bare(torch.zeros(1, 3, 64, 64)).shape == (1, bare.num_features) and as_in_file(bare, name)


@pytest.mark.parametrize("name", NAMES)
def test_features_only(name):
    maps = timm.create_model(name, pretrained=True, features_only=True).eval()(torch.zeros(1, 3, 64, 64))
    expected = timm.create_model(name, pretrained=True).eval().forward_intermediates(torch.zeros(1, 3, 64, 64))[1]
    torch.testing.assert_close(maps, expected)


@pytest.mark.parametrize("name", NAMES)
def test_one_channel_is_the_sum_of_three_in_float32(name):
    network = timm.create_model(name, pretrained=True, in_chans=1)
    three = saved(name)["stem.conv1.weight"].float()
    assert network.stem.conv1.weight.equal(three.sum(1, keepdim=True))


def test_timm_lists_them():
    listed = timm.list_models(pretrained=True)
    assert {f"{name}.imagenette" for name in NAMES} <= set(listed)
    assert all(timm.is_model_pretrained(name) for name in NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_untrained_they_have_the_classes_of_their_weights_too(name):
    """As timm has it: the default config has the number."""
    network = timm.create_model(name)
    assert network.num_classes == 10 and not as_in_file(network, name)


@pytest.mark.parametrize("name", NAMES)
def test_the_file_alone_says_what_it_is(name):
    network, transform = models.load(ROOT / "weights" / f"{name}.safetensors")
    expected = timm.create_model(name, pretrained=True)
    torch.testing.assert_close(network.state_dict(), expected.state_dict(), rtol=0, atol=0)
    for key in ("label_names", "label_descriptions", "input_size", "crop_pct", "num_classes"):
        assert network.pretrained_cfg[key] == expected.pretrained_cfg[key], key
    photo = Image.open(ROOT / "docs" / "church.jpg")
    assert network(transform(photo)[None]).argmax().item() == CHURCH


def test_weights_of_other_classes_are_not_named_by_theirs(tmp_path):
    network = timm.create_model("biformer_nano", num_classes=10)
    torch.save(network.state_dict(), tmp_path / "own.pth")
    overlay = dict(file=str(tmp_path / "own.pth"))
    for other in (timm.create_model("biformer_nano", pretrained=True, pretrained_cfg_overlay=overlay),
                  models.load(tmp_path / "own.pth", model="biformer_nano")[0]):
        torch.testing.assert_close(other.state_dict(), network.state_dict(), rtol=0, atol=0)
        assert not other.pretrained_cfg.get("label_names") and not other.pretrained_cfg.get("label_descriptions")


def test_a_missing_file_is_named(tmp_path):
    overlay = dict(file=str(tmp_path / "biformer_nano.safetensors"))
    with pytest.raises(RuntimeError, match=r"biformer_nano\.safetensors: no such checkpoint file"):
        timm.create_model("biformer_nano", pretrained=True, pretrained_cfg_overlay=overlay)
