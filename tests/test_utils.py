import argparse
import json
import os
import random
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn

import utils
from utils import Process, RunLog, UserError, load_weights, model_weights, read_checkpoint, save_checkpoint


class Hostile:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_checkpoint_round_trip(tmp_path):
    state = dict(model=dict(w=torch.randn(3)), epoch=2, args=dict(lr=1e-3, scale=[0.1, 1.0]), model_ema=None)
    save_checkpoint(tmp_path / "new" / "c.pth", state)
    again = read_checkpoint(str(tmp_path / "new" / "c.pth"))
    assert again["model"]["w"].equal(state["model"]["w"])
    for key in ("epoch", "args", "model_ema"):
        assert again[key] == state[key]
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["c.pth"]


def test_a_failed_save_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    save_checkpoint(tmp_path / "c.pth", dict(epoch=1))

    def fail(state, file):
        file.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        save_checkpoint(tmp_path / "c.pth", dict(epoch=2))
    assert read_checkpoint(str(tmp_path / "c.pth"))["epoch"] == 1
    assert [p.name for p in tmp_path.iterdir()] == ["c.pth"]


def test_published_checkpoint_with_its_command_line(tmp_path):
    torch.save({"model": {"w": torch.ones(1)}, "args": argparse.Namespace(lr=1)}, tmp_path / "c.pth")
    assert read_checkpoint(str(tmp_path / "c.pth"))["args"].lr == 1


def test_safetensors(tmp_path):
    safetensors.torch.save_file({"w": torch.ones(2)}, tmp_path / "c.safetensors")
    assert read_checkpoint(str(tmp_path / "c.safetensors"))["w"].equal(torch.ones(2))


@pytest.mark.parametrize("legacy", [False, True])
def test_hostile_pickle_is_refused_and_not_run(tmp_path, legacy):
    victim = tmp_path / "made_by_the_pickle"
    state = {"model": Hostile(str(victim))}
    torch.save(state, tmp_path / "c.pth", _use_new_zipfile_serialization=not legacy)
    with pytest.raises(UserError, match="refused, since loading it would run code") as error:
        read_checkpoint(str(tmp_path / "c.pth"))
    assert not victim.exists() and "\n" not in str(error.value)
    assert legacy or "mkdir" in str(error.value)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 cut off", b"<html>sign in</html>", b"\x80\x02}q"])
def test_what_is_no_checkpoint(tmp_path, content):
    (tmp_path / "c.pth").write_bytes(content)
    with pytest.raises(UserError, match="not a PyTorch checkpoint") as error:
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
    with pytest.raises(UserError, match="truncated"):
        read_checkpoint(str(path))


def test_not_a_dictionary(tmp_path):
    torch.save(torch.ones(3), tmp_path / "c.pth")
    with pytest.raises(UserError, match="holds a Tensor, not a checkpoint"):
        read_checkpoint(str(tmp_path / "c.pth"))


def test_missing_checkpoint():
    with pytest.raises(UserError, match="no such checkpoint file"):
        read_checkpoint("nowhere.pth")


def test_download(tmp_path, monkeypatch):
    """Two files of one name at different addresses are two files in the cache."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", lambda url, path: torch.save({"url": url}, path))
    assert read_checkpoint("https://a.org/content")["url"] == "https://a.org/content"
    assert read_checkpoint("https://b.org/content")["url"] == "https://b.org/content"

    def refuse(url, path):
        raise OSError("unreachable")

    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)
    assert read_checkpoint("https://a.org/content")["url"] == "https://a.org/content"
    with pytest.raises(UserError, match=r"https://c.org/x.pth: cannot be downloaded \(unreachable\)"):
        read_checkpoint("https://c.org/x.pth")


def test_a_bad_download_is_not_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", lambda url, path: Path(path).write_text("<html>no</html>"))
    with pytest.raises(UserError, match="not a PyTorch checkpoint"):
        read_checkpoint("https://a.org/c.pth")
    monkeypatch.setattr(torch.hub, "download_url_to_file", lambda url, path: torch.save({"epoch": 1}, path))
    assert read_checkpoint("https://a.org/c.pth")["epoch"] == 1


def test_a_filter_that_trips_over_foreign_weights():
    def filter_fn(weights, model):
        return {"weight": weights["stem.weight"]}

    weights = {"x": torch.ones(1), "weight": torch.ones(1, 1), "bias": torch.ones(1)}
    with pytest.raises(UserError, match="x is unknown"):
        load_weights(nn.Linear(1, 1), weights, filter_fn)


def test_model_weights_layouts():
    w = torch.ones(1)
    for checkpoint in ({"model": {"w": w}, "epoch": 1}, {"state_dict": {"module.w": w}}, {"w": w}):
        assert model_weights(checkpoint) == {"w": w}
    both = {"model": {"w": w}, "model_ema": {"w": 2 * w}}
    assert model_weights(both, "model_ema")["w"].item() == 2
    with pytest.raises(UserError, match="holds no 'ema'; it holds model, model_ema"):
        model_weights(both, "ema")
    with pytest.raises(UserError, match="no weights"):
        model_weights({"epoch": 3})
    with pytest.raises(UserError, match="no weights"):
        model_weights({1: w})


def test_load_weights_names_the_first_mismatches():
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 4))
    weights = {"0.weight": torch.zeros(3, 5), "0.bias": torch.zeros(3), "1.weight": torch.zeros(4, 3)}
    weights["x"] = torch.ones(1)
    with pytest.raises(UserError) as error:
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
    with pytest.raises(UserError):
        load_weights(model, weights)


def test_seed_everything_is_a_function_of_its_arguments():
    def draw(*key):
        utils.seed_everything(*key)
        return random.random(), np.random.rand(), torch.rand(1).item()

    assert draw(0, 1, 2) == draw(0, 1, 2)
    assert len({draw(0, 1, 2), draw(0, 2, 1), draw(1, 1, 2)}) == 3


def test_run_log(tmp_path):
    log = RunLog(tmp_path)
    log.scalars("train", dict(loss=1.0), 3)
    log.epoch(dict(epoch=0, train_loss=1.0))
    log.epoch(dict(epoch=1, train_loss=0.5))
    lines = [json.loads(line) for line in (tmp_path / "log.txt").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [0, 1]
    assert list((tmp_path / "tensorboard").glob("events*"))
    RunLog(None).epoch({})


def test_unknown_device():
    with pytest.raises(UserError, match="--device toaster cannot be used"):
        utils.start_process("toaster")


def test_single_process():
    process = Process(torch.device("cpu"))
    assert process.is_main and not process.is_distributed
    assert process.mean(torch.tensor([2.0])).item() == 2
