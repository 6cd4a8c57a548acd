import errno
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
import zipfile
from concurrent.futures import wait
from functools import partial
from pathlib import Path

import pytest
import torch

from helpers import ROOT
from helpers.hostile import Hostile
from storage.weights import read_checkpoint
from training import checkpoints
from training.checkpoints import (
    CheckpointStore,
    is_intact,
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


@pytest.fixture
def store(tmp_path):
    return CheckpointStore(tmp_path / "run", keep=2)


def save(store, step, content=None):
    """Save a checkpoint, and wait until it is written."""
    store.save(step, content or state(step))
    store.finish()


def state(step):
    return dict(model=dict(w=torch.full((1000,), float(step))), step=step)


def test_the_newest_are_kept(store):
    assert store.newest_intact() is None and not store.holds_run()
    for step in (3, 6, 9):
        save(store, step)
    assert store.steps() == [6, 9] and store.newest_intact() == 9 and store.holds_run()
    assert read_checkpoint(str(store.last))["step"] == 9
    save(store, 9)
    assert store.steps() == [6, 9]


def test_no_damage_makes_reading_fail(store):
    """Whatever bit is wrong, of whatever part of the file, the one before is found."""
    save(store, 3)
    save(store, 6, dict(step=6))
    data = store.path(6).read_bytes()
    verdicts = set()
    for position in range(0, len(data), 7):
        flipped = bytearray(data)
        flipped[position] ^= 1 << position % 8
        store.path(6).write_bytes(flipped)
        verdicts.add(is_intact(store.path(6)))
    assert verdicts == {True, False}  # True: of bytes that say nothing


def test_a_hostile_file_is_not_called_damaged(store):
    save(store, 3)
    torch.save({"model": Hostile(store.folder / "made")}, store.path(6))
    with pytest.raises(UserError, match="refused, since loading it would run code"):
        store.newest_intact()
    assert store.steps() == [3, 6] and not (store.folder / "made").exists()


def test_what_the_system_cannot_read_is_not_called_damaged(store, monkeypatch):
    save(store, 3)
    real = open

    def stale(path, *arguments, **kwargs):
        if path == store.path(3):
            raise OSError(116, "Stale file handle")
        return real(path, *arguments, **kwargs)

    monkeypatch.setattr("builtins.open", stale)
    with pytest.raises(UserError, match="cannot be read: Stale file handle"):
        store.newest_intact()
    assert store.steps() == [3]


@pytest.mark.parametrize("error", [MemoryError(), OSError(errno.EIO, "Input/output error")])
@pytest.mark.parametrize("place", [(zipfile.ZipFile, "testzip"), (torch, "load")])
def test_short_memory_and_a_failed_read_are_no_damage(store, monkeypatch, error, place):
    def fail(*arguments, **kwargs):
        raise error

    for step in (3, 6):
        save(store, step)
    monkeypatch.setattr(*place, fail)
    with pytest.raises(UserError, match=r"06\.pth.* cannot .*read.*: (out of memory|Input/output error)"):
        store.newest_intact()
    assert store.steps() == [3, 6]


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: path.symlink_to("/dev/zero")], ids=["pipe", "device"])
def test_what_could_be_read_for_ever_is_no_checkpoint(store, make):
    store.folder.mkdir()
    make(store.path(3))
    with pytest.raises(UserError, match=r"checkpoint-00000003\.pth is no file"):
        store.newest_intact()


def test_a_folder_that_is_in_the_way_or_gone_is_told_in_one_line(store):
    save(store, 3)
    store.last.unlink()
    store.last.mkdir()
    with pytest.raises(UserError, match=r"/last\.pth: Is a directory; the last checkpoint is .*03"), store.locked():
        store.newest_intact()
    with pytest.raises(UserError, match=r"log\.txt: No such file or directory; no checkpoint was"), store.locked():
        shutil.rmtree(store.folder)
        (store.folder / "log.txt").touch()
    with pytest.raises(FileNotFoundError), store.locked():  # of other files it knows nothing
        (store.folder.parent / "nowhere").read_text()


def test_a_file_system_without_links(store, monkeypatch):
    def refuse(*arguments):
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr(Path, "symlink_to", refuse)
    save(store, 3)
    save(store, 6)
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
    assert store.steps() == [] and store.newest_intact() is None


def test_killed_between_a_checkpoint_and_the_link_to_it(store):
    save(store, 3)
    save_checkpoint(store.path(6), state(6))
    assert store.newest_intact() == 6 and read_checkpoint(str(store.last))["step"] == 6


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
        save(store, step)
    path = store.path(6)
    data = bytearray(path.read_bytes())
    damage(data)
    path.write_bytes(data)
    assert store.newest_intact() == 3
    assert f"{path} is damaged" in capsys.readouterr().out
    assert store.steps() == [3] and path.with_suffix(".pth.damaged").exists()
    store.path(3).write_bytes(b"")
    for _ in range(2):  # a launcher that tries again must not start a new run
        with pytest.raises(UserError, match=r"no checkpoint in .* is intact"):
            store.newest_intact()


@pytest.mark.parametrize("size", [0, 2000, 4096, 5000])
def test_what_cannot_be_written_leaves_the_last(store, size):
    """At whatever byte the writing ends."""
    save(store, 3)
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limit[1]))
    try:
        with pytest.raises(UserError, match=r"cannot write .*06.pth: File too large; the last checkpoint is .*03.pth"):
            save(store, 6)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert store.newest_intact() == 3 and read_checkpoint(str(store.last))["step"] == 3
    assert {p.name for p in store.folder.iterdir()} == {"checkpoint-00000003.pth", "last.pth"}


def test_what_a_killed_run_left_half_written_is_swept_up(store):
    save(store, 3)
    of_others = {".args.yaml.swp", ".args.yaml.backup-of-mine"}
    for name in (".checkpoint-00000006.pth.abc", ".args.yaml.k3x_81ab", ".log.txt.k3x_81ab", *of_others):
        (store.folder / name).write_bytes(b"half")
    with store.locked():
        assert {p.name for p in store.folder.glob(".*")} == {".lock", *of_others} and store.steps() == [3]


def test_the_lock_of_a_folder_is_not_written_through_a_link(tmp_path):
    others = tmp_path / "of somebody else"
    others.write_bytes(b"precious")
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / ".lock").symlink_to(others)
    with pytest.raises(UserError, match=rf"cannot write to {folder}/.lock: .lock is a symbolic link; remove it"):
        CheckpointStore(folder).locked().__enter__()
    assert others.read_bytes() == b"precious"


@pytest.mark.slow
def test_two_runs_do_not_share_a_folder(store):
    code = (
        "import sys, pathlib; from training import checkpoints\n"
        "with checkpoints.CheckpointStore(pathlib.Path(sys.argv[1])).locked(): print('mine')"
    )
    other = partial(
        subprocess.run, [sys.executable, "-c", code, str(store.folder)], cwd=ROOT, capture_output=True, text=True
    )
    with store.locked():
        for _ in range(2):  # the first one that is refused leaves the name of the holder as it is
            refused = other()
            which = f"(process {os.getpid()} on {socket.gethostname()})"
            assert refused.returncode == 1 and f"another run is writing to {store.folder} {which};" in refused.stderr
    assert other().stdout == "mine\n"


# --- behind the training ----------------------------------------------------------------------------------------------


@pytest.fixture
def held(monkeypatch):
    """Writing waits for this event, and sets that one when it begins."""
    go, begun = threading.Event(), threading.Event()

    def write(path, state):
        begun.set()
        assert go.wait(20)
        save_checkpoint(path, state)

    monkeypatch.setattr(checkpoints, "save_checkpoint", write)
    yield go, begun
    go.set()


def test_a_save_does_not_wait_until_it_is_written(store, held):
    go, begun = held
    content = dict(step=3, model=dict(w=torch.zeros(3)), meter=dict(losses=[1.0]))
    store.save(3, content)
    assert begun.wait(20) and store.has(3) and store.steps() == [] and not store.has(6)
    content["model"]["w"].fill_(1)
    content["meter"]["losses"].append(2.0)
    go.set()
    store.finish()
    saved = read_checkpoint(str(store.path(3)))
    assert saved["model"]["w"].sum() == 0 and saved["meter"] == dict(losses=[1.0])


def test_what_is_being_written_is_awaited_when_the_folder_is_left(store, held):
    go, _ = held
    with store.locked():
        store.save(3, state(3))
        threading.Timer(0.1, go.set).start()
    assert store.steps() == [3]


def test_no_process_is_forked_while_something_is_written(store, held):
    """It would have a copy of the locks that the writing thread held."""
    go, begun = held
    store.save(3, state(3))
    assert begun.wait(20)
    threading.Timer(0.1, go.set).start()
    pid = os.fork()
    if pid == 0:
        os._exit(0 if store.steps() == [3] else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def test_a_handler_that_raises_does_not_cut_the_wait_of_a_fork_short(store, held):
    """As of a wait for data, which forks data loading processes and is given up meanwhile."""
    go, begun = held

    def give_up(*_):
        raise RuntimeError("given up")

    store.save(3, state(3))
    assert begun.wait(20)
    threading.Timer(0.5, go.set).start()
    before = signal.signal(signal.SIGALRM, give_up)
    signal.setitimer(signal.ITIMER_REAL, 0.1)
    try:
        pid = os.fork()
        if pid == 0:
            os._exit(0 if store.steps() == [3] else 1)
    finally:
        signal.signal(signal.SIGALRM, before)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    store.save(6, state(6))
    store.finish()
    assert store.steps() == [3, 6]


@pytest.mark.parametrize("notice", [
    CheckpointStore.finish, CheckpointStore.check, lambda store: store.save(9, state(9)),
    lambda store: store.save_best(6),
])
def test_a_write_that_failed_is_told_once(store, monkeypatch, notice):
    def fail(path, content):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoints, "save_checkpoint", fail)
    store.save(6, state(6))
    wait(store._writer._pending)
    with pytest.raises(UserError, match=r"cannot write .*06.pth: No space left on device; no checkpoint was written"):
        notice(store)
    store.finish()


def test_the_best_is_another_name_of_its_checkpoint(store):
    for step in (3, 6, 9):
        save(store, step)
        if step < 9:
            store.save_best(step)
    store.save_best(6)  # as a run that was resumed there finds it again
    store.finish()
    assert store.best.samefile(store.path(6)) and store.steps() == [6, 9]
    save(store, 12)
    assert store.steps() == [9, 12] and read_checkpoint(str(store.best))["step"] == 6
    assert not list(store.folder.glob(".*"))


def test_the_best_on_a_file_system_where_a_file_has_one_name(store, monkeypatch):
    def refuse(*arguments):
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    save(store, 3)
    store.save_best(3)
    store.finish()
    assert read_checkpoint(str(store.best))["step"] == 3 and not store.best.samefile(store.path(3))
