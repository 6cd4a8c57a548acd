import argparse
import hashlib
import multiprocessing
import os
import resource
import subprocess
import sys
import threading
import time
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn

from helpers import ROOT
from helpers.hostile import Hostile
from helpers.web import served
from training.checkpoints import (
    CheckpointStore,
    fetch,
    is_whole,
    load_weights,
    model_weights,
    read_checkpoint,
    save_checkpoint,
)
from utils import UserError


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
    state = {"model": Hostile(victim)}
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


def fetch_and_report(url, start, found):
    start.wait(30)
    found.put(fetch(url).read_bytes())


@pytest.mark.skipif(sys.platform != "linux", reason="forks")
def test_processes_that_ask_at_once_download_once(tmp_path, monkeypatch):
    """As the ranks of a run do; each would else wait for as many copies over one line."""
    content, requests = os.urandom(1000), []

    class Slow(BaseHTTPRequestHandler):
        def do_GET(self):
            requests.append(self.path)
            time.sleep(0.5)
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_):
            pass

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    context = multiprocessing.get_context("fork")
    start, found = context.Barrier(4), context.Queue()
    with ThreadingHTTPServer(("127.0.0.1", 0), Slow) as server:
        url = f"http://127.0.0.1:{server.server_port}/weights.pth"
        ranks = [context.Process(target=fetch_and_report, args=(url, start, found), daemon=True) for _ in range(4)]
        for rank in ranks:
            rank.start()
        threading.Thread(target=server.serve_forever, daemon=True).start()
        assert [found.get(timeout=60) for _ in ranks] == [content] * 4
        server.shutdown()
    for rank in ranks:
        rank.join(10)
    assert requests == ["/weights.pth"]
    assert sorted(path.suffix for path in (tmp_path / "checkpoints").iterdir()) == [".lock", ".pth"]


def test_a_download_where_files_cannot_be_locked(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(37, "No locks available")

    monkeypatch.setattr("fcntl.lockf", refuse)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", lambda url, path, **_: Path(path).write_text(url))
    assert fetch("https://a.example/x.pth").read_text() == "https://a.example/x.pth"


def test_download(tmp_path, monkeypatch):
    """Two files of one name at different addresses are two files in the cache."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", lambda url, path, **_: torch.save({"url": url}, path))
    assert read_checkpoint("https://a.org/content")["url"] == "https://a.org/content"
    assert read_checkpoint("https://b.org/content")["url"] == "https://b.org/content"

    def refuse(url, path, **_):
        raise OSError("unreachable")

    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)
    assert read_checkpoint("https://a.org/content")["url"] == "https://a.org/content"
    with pytest.raises(UserError, match=r"https://c.org/x.pth: cannot be downloaded \(unreachable\)"):
        read_checkpoint("https://c.org/x.pth")


def test_a_bad_download_is_not_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", lambda url, path, **_: Path(path).write_text("no"))
    with pytest.raises(UserError, match="not a PyTorch checkpoint"):
        read_checkpoint("https://a.org/c.pth")
    monkeypatch.setattr(torch.hub, "download_url_to_file", lambda url, path, **_: torch.save({"epoch": 1}, path))
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


def test_a_download_is_compared_with_its_hash(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "cache"))
    torch.save({"epoch": 1}, tmp_path / "c.pth")
    digest = hashlib.sha256((tmp_path / "c.pth").read_bytes()).hexdigest()
    with served(tmp_path) as server:
        url = f"{server}/c.pth"
        assert read_checkpoint(f"{url}#sha256={digest}")["epoch"] == 1
        with pytest.raises(UserError, match=r"cannot be downloaded .*invalid hash value"):
            read_checkpoint(f"{url}#sha256={digest[::-1]}")


# --- the checkpoints of a run ---------------------------------------------------------------------------------------


@pytest.fixture
def store(tmp_path):
    return CheckpointStore(tmp_path / "run", keep=2)


def state(step):
    return dict(model=dict(w=torch.full((1000,), float(step))), step=step)


def test_the_newest_are_kept(store):
    assert store.newest_whole() is None and not store.holds_run()
    for step in (3, 6, 9):
        store.save(step, state(step))
    assert store.steps() == [6, 9] and store.newest_whole() == 9 and store.holds_run()
    assert read_checkpoint(str(store.last))["step"] == 9
    store.save(9, state(9))
    assert store.steps() == [6, 9]


def test_no_damage_makes_reading_fail(store):
    """Whatever bit is wrong, of whatever part of the file, the one before is found."""
    store.save(3, state(3))
    store.save(6, dict(step=6))
    data = store.path(6).read_bytes()
    verdicts = set()
    for position in range(0, len(data), 7):
        flipped = bytearray(data)
        flipped[position] ^= 1 << position % 8
        store.path(6).write_bytes(flipped)
        verdicts.add(is_whole(store.path(6)))
    assert verdicts == {True, False}  # True: of bytes that say nothing


def test_what_the_system_cannot_read_is_not_called_damaged(store, monkeypatch):
    store.save(3, state(3))
    real = open

    def stale(path, *arguments, **kwargs):
        if path == store.path(3):
            raise OSError(116, "Stale file handle")
        return real(path, *arguments, **kwargs)

    monkeypatch.setattr("builtins.open", stale)
    with pytest.raises(UserError, match="cannot be read: Stale file handle"):
        store.newest_whole()
    assert store.steps() == [3]


def test_a_file_system_without_links(store, monkeypatch):
    def refuse(*arguments):
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr(Path, "symlink_to", refuse)
    store.save(3, state(3))
    store.save(6, state(6))
    assert read_checkpoint(str(store.last))["step"] == 6


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    store = CheckpointStore(tmp_path / "file")
    with pytest.raises(UserError, match=r"cannot write to .*file: File exists"), store.locked():
        pass


def test_files_of_others_are_left_alone(store):
    store.folder.mkdir()
    for name in ("checkpoint-best.pth", "checkpoint-299.pth"):
        (store.folder / name).write_bytes(b"")
    assert store.steps() == [] and store.newest_whole() is None


def test_killed_between_a_checkpoint_and_the_link_to_it(store):
    store.save(3, state(3))
    save_checkpoint(store.path(6), state(6))
    assert store.newest_whole() == 6 and read_checkpoint(str(store.last))["step"] == 6


def damage_tensors(data):
    data[len(data) // 2] ^= 1


def damage_directory(data):
    data[-40] ^= 255


def truncate(data):
    del data[len(data) // 2 :]


def empty(data):
    data.clear()


@pytest.mark.parametrize("damage", [damage_tensors, damage_directory, truncate, empty])
def test_a_damaged_newest_is_set_aside(store, damage, capsys):
    """One bit of a tensor too, which torch.load would not notice."""
    for step in (3, 6):
        store.save(step, state(step))
    path = store.path(6)
    data = bytearray(path.read_bytes())
    damage(data)
    path.write_bytes(data)
    assert store.newest_whole() == 3
    assert f"{path} is damaged" in capsys.readouterr().out
    assert store.steps() == [3] and path.with_suffix(".pth.damaged").exists()
    store.path(3).write_bytes(b"")
    for _ in range(2):  # a launcher that tries again must not start anew
        with pytest.raises(UserError, match=r"no checkpoint in .* is whole"):
            store.newest_whole()


@pytest.mark.parametrize("size", [0, 2000, 4096, 5000])
def test_what_cannot_be_written_leaves_the_last(store, size):
    """At whatever byte the writing ends."""
    store.save(3, state(3))
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limit[1]))
    try:
        with pytest.raises(UserError, match=r"cannot write .*06.pth: File too large; the last checkpoint is .*03.pth"):
            store.save(6, state(6))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert store.newest_whole() == 3 and read_checkpoint(str(store.last))["step"] == 3
    assert {p.name for p in store.folder.iterdir()} == {"checkpoint-00000003.pth", "last.pth"}


def test_what_a_killed_run_left_half_written_is_swept_up(store):
    store.save(3, state(3))
    half = store.folder / ".checkpoint-00000006.pth.abc"
    half.write_bytes(b"half")
    with store.locked():
        assert not half.exists() and store.steps() == [3]


def test_two_runs_do_not_share_a_folder(store):
    code = (
        "import sys, pathlib, checkpoints\n"
        "with checkpoints.CheckpointStore(pathlib.Path(sys.argv[1])).locked(): print('mine')"
    )
    other = partial(
        subprocess.run, [sys.executable, "-c", code, str(store.folder)], cwd=ROOT, capture_output=True, text=True
    )
    with store.locked():
        refused = other()
    assert refused.returncode == 1 and "another run is writing to" in refused.stderr
    assert other().stdout == "mine\n"
