"""Where a run writes, and which checkpoint it resumes from."""
import json
import os
import re
from pathlib import Path

import pytest
import torch

from training.checkpoints import CheckpointStore, FolderInUseError
from training.distributed import Distributed
from training.options import CheckpointOptions
from training.resuming import LostCheckpointsError, NoFolderError, find_start, open_store
from utils import UserError


@pytest.fixture
def store(tmp_path):
    return CheckpointStore(tmp_path / "run", keep=2)


def state(step):
    return dict(model=dict(w=torch.full((1000,), float(step))), step=step)


def save(store, step, content=None):
    """Save a checkpoint, and wait until it is written."""
    store.save(step, content or state(step))
    store.finish()


def test_a_folder_of_its_own(monkeypatch):
    store = open_store(CheckpointOptions(keep_checkpoints=5), "biformer_tiny", started=0)
    assert store.folder.parent == Path("outputs/biformer_tiny") and store.keep == 5
    assert re.fullmatch(r"\d{8}-\d{6}-000000", store.folder.name)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    with pytest.raises(NoFolderError, match="torchrun restarted the run"):
        open_store(CheckpointOptions(), "biformer_tiny", started=0)


def test_runs_that_start_in_one_second_have_folders_of_their_own():
    folders = [open_store(CheckpointOptions(), "x", started).folder for started in (10**18, 10**18 + 1000)]
    assert folders[0] != folders[1] and folders[0].name[:15] == folders[1].name[:15]


def test_the_folder_of_another_run(store):
    save(store, 3)
    folder = str(store.folder)
    with pytest.raises(FolderInUseError, match="already holds a run"):
        open_store(CheckpointOptions(output_dir=folder), "x", started=0)
    assert open_store(CheckpointOptions(output_dir=folder, auto_resume=True), "x", 0).steps() == [3]
    assert open_store(CheckpointOptions(output_dir=folder, resume=str(store.last)), "x", 0).steps() == [3]


def test_a_run_that_began_in_the_folder_since(store):
    """Two runs that start at once find the same new folder empty; the second overwrites nothing."""
    late = open_store(CheckpointOptions(output_dir=str(store.folder)), "x", started=0)
    with store.locked():
        save(store, 3)
    with pytest.raises(FolderInUseError, match="already holds a run"), late.locked():
        pass
    assert store.steps() == [3]


# --- what a run resumes from ------------------------------------------------------------------------------------------

ALONE = Distributed(torch.device("cpu"))


def start(store, **options):
    return find_start(CheckpointOptions(output_dir=str(store.folder), auto_resume=True, **options), store, ALONE)


def test_a_whole_last_checkpoint_is_resumed_where_the_others_are_gone(store, capsys):
    save(store, 6, dict(state(6), total_steps=6))
    data = store.last.read_bytes()
    store.path(6).unlink()
    store.last.unlink()
    store.last.write_bytes(data)
    assert start(store) == store.path(6) and store.last.samefile(store.path(6))
    assert "holds no checkpoint but last.pth, of step 6" in capsys.readouterr().out


def write_log(store, epochs, *others):
    lines = [*(json.dumps(dict(epoch=epoch)) for epoch in range(epochs)), *others]
    (store.folder / "log.txt").write_text("".join(f"{line}\n" for line in lines))


@pytest.mark.parametrize("left", ["best.pth", "last.pth", "log.txt"])
def test_a_run_whose_checkpoints_are_gone_is_not_begun_again(store, left):
    save(store, 6)
    store.save_best(6)
    store.finish()
    write_log(store, 2)
    for path in store.folder.iterdir():
        if path.name != left:
            path.unlink()
    with pytest.raises(LostCheckpointsError, match=rf"has no checkpoint-\*.pth any more, but a run's {left}"):
        start(store)
    assert os.path.lexists(store.folder / left)


def test_a_run_that_was_killed_before_its_first_checkpoint(store):
    """It saves every three epochs, and has logged two."""
    store.folder.mkdir()
    write_log(store, 2)
    assert start(store, save_every=3) is None
    with pytest.raises(LostCheckpointsError, match=r"log\.txt"):
        start(store, save_every=2)


def test_lines_that_are_no_epochs_are_no_run(store):
    store.folder.mkdir()
    write_log(store, 0, "3", "[]", "half a li")
    assert start(store) is None


def test_a_checkpoint_that_is_a_link_to_itself(store):
    store.folder.mkdir()
    store.last.symlink_to(store.last.name)
    options = CheckpointOptions(output_dir=str(store.folder), resume=str(store.last))
    with pytest.raises(UserError, match="no such checkpoint file"):
        find_start(options, open_store(options, "x", 0), None)
