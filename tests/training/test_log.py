"""training/log.py: log.txt, curves and pictures of a run."""
import json
import os
import sys
from pathlib import Path

import pytest
import torch

from training.distributed import Distributed
from training.log import RunLog, open_log
from training.options import WandbOptions
from training.run import Clock
from utils import UserError

ALONE = Distributed(torch.device("cpu"))


def test_run_log(tmp_path):
    log = open_log(tmp_path, Clock(epoch_length=3, total=6), WandbOptions(), {})
    log.scalars("train", dict(loss=1.0), 3)
    log.epoch(dict(epoch=0, train_loss=1.0))
    log.epoch(dict(epoch=1, train_loss=0.5))
    lines = [json.loads(line) for line in (tmp_path / "log.txt").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [0, 1]
    assert list((tmp_path / "tensorboard").glob("events*"))
    RunLog(None).epoch({})


def test_without_tensorboard_there_are_no_curves(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    log = open_log(tmp_path, Clock(epoch_length=3, total=6), WandbOptions(), {})
    log.scalars("train", dict(loss=1.0), 1)
    log.epoch(dict(epoch=0))
    log.close()
    assert capsys.readouterr().out.count("pip install tensorboard\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["log.txt"]


class Shown:
    """A `training.trackers.Tracker` that remembers."""

    def __init__(self):
        self.values, self.drawn, self.closed = [], [], False

    def close(self):
        self.closed = True

    def scalars(self, values, step):
        self.values.append((values, step))

    def picture(self, name, pixels, step):
        self.drawn.append((name, step))


def test_pictures_of_evaluations_cost_a_long_run_little_and_are_there_at_its_end(monkeypatch):
    """Of three epochs, the first takes a second, the second a minute; the last one is drawn whatever it takes."""
    tracker, now = Shown(), [0.0]
    monkeypatch.setattr("training.log.time.monotonic", lambda: now[0])
    log = RunLog(None, trackers=[tracker])
    for step, seconds in ((3, 1), (6, 60), (9, 1)):
        now[0] += seconds
        log.evaluations(dict(val=dict(acc1=1.0), ema=dict(acc1=2.0)), lambda: dict(confusion=None), step)
    assert tracker.drawn == [("ema/confusion", 6)]
    assert tracker.values[-2:] == [({"val/acc1": 1.0}, 9), ({"ema/acc1": 2.0}, 9)]
    log.close()
    assert tracker.drawn == [("ema/confusion", 6), ("ema/confusion", 9)] and tracker.closed
    silent = RunLog(None)
    silent.evaluations(dict(val={}), lambda: pytest.fail("drawn for nobody"), 1)
    silent.close()


def test_trackers_are_closed_whatever_fails():
    class Broken(Shown):
        def close(self):
            super().close()
            raise OSError("no space")

    trackers = [Broken(), Shown(), Broken()]
    log = RunLog(None, trackers=trackers)
    log.evaluations(dict(val={}), lambda: 1 / 0, 1)
    with pytest.raises(OSError, match="no space"):
        log.close()
    assert all(tracker.closed for tracker in trackers)


def test_nothing_is_drawn_after_a_fault():
    tracker = Shown()
    with pytest.raises(KeyError, match="the fault"), RunLog(None, trackers=[tracker]) as log:
        log.evaluations(dict(val={}), lambda: pytest.fail("drawn after a fault"), 1)
        raise KeyError("the fault")
    assert tracker.closed


def test_a_resumed_log_forgets_what_comes_again(tmp_path):
    """Also half a line, and a line of a run that went further."""
    (tmp_path / "log.txt").write_text('{"epoch": 0, "a": 1}\n{"epoch": 1, "a": 2}\n{"epoch": 2, "a": 3}\n{"epoch": 0')
    log = RunLog(tmp_path, epoch=1)
    log.epoch(dict(epoch=1, a=5))
    log.close()
    assert (tmp_path / "log.txt").read_text() == '{"epoch": 0, "a": 1}\n{"epoch": 1, "a": 5}\n'


RECORD = '{"epoch": 0, "a": 1}\n'


@pytest.mark.parametrize("line", [
    b"[]", b"3", b"{}", b'{"epoch": "x"}', b'{"epoch": null}', b"\x00\xff\x80", b"a note", b'{"epoch": ' + b"1" * 5000,
    b"[" * 10**5,
])
def test_what_is_no_record_is_moved_out_of_the_log(tmp_path, line, capsys):
    """With one line that says so; nothing of it is lost, and a second time it joins the first."""
    file, aside = tmp_path / "log.txt", tmp_path / "log.txt.damaged"
    for number in (1, 2):
        file.write_bytes(line + b"\n\n" + RECORD.encode() + b'{"epoch": 1}')
        RunLog(tmp_path, epoch=1)
        assert file.read_text() == RECORD and aside.read_bytes() == (line + b"\n") * number
        said = f"{file}: 1 line without the record of an epoch, moved to {aside}\n"
        assert capsys.readouterr().out == said


def test_a_whole_log_is_not_written_again(tmp_path, monkeypatch):
    (tmp_path / "log.txt").write_text(RECORD)
    monkeypatch.setattr("training.log.replace_file", lambda *_: pytest.fail("written again"))
    RunLog(tmp_path, epoch=1)
    assert [path.name for path in tmp_path.iterdir()] == ["log.txt"]


def test_a_last_line_without_its_end_does_not_run_into_the_next(tmp_path):
    (tmp_path / "log.txt").write_text(RECORD.strip())
    RunLog(tmp_path, epoch=1).epoch(dict(epoch=1))
    assert (tmp_path / "log.txt").read_text() == RECORD + '{"epoch": 1}\n'


@pytest.mark.parametrize("make", [
    Path.mkdir, os.mkfifo, lambda path: path.symlink_to("/dev/zero"), lambda path: path.symlink_to(path.name),
], ids=["folder", "pipe", "device", "circle"])
def test_a_log_that_is_no_file(tmp_path, make):
    make(tmp_path / "log.txt")
    with pytest.raises(UserError, match=r"log\.txt is no file$"):
        RunLog(tmp_path)
