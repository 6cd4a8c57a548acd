"""scripts/plot_logs.py: curves, and mistakes."""
import json
import sys

import pytest

from scripts import plot_logs


def write(folder, epochs):
    folder.mkdir()
    entries = (dict(epoch=epoch, train_loss=loss, val_acc1=accuracy) for epoch, loss, accuracy in epochs)
    held = ({name: value for name, value in entry.items() if value is not None} for entry in entries)
    (folder / "log.txt").write_text("".join(json.dumps(entry) + "\n" for entry in held))
    return folder


def test_curves_are_those_of_the_logs(tmp_path):
    one = write(tmp_path / "one", [(0, 2.0, 20), (1, 1.7, 31), (2, 1.5, 40)])
    other = write(tmp_path / "other", [(0, 2.2, 10)])
    loss, accuracy = plot_logs.draw([one, other]).axes
    assert [line.get_label() for line in loss.lines] == ["one", "other"]
    assert loss.lines[0].get_xydata().tolist() == [[0, 2.0], [1, 1.7], [2, 1.5]]
    assert accuracy.lines[0].get_ydata().tolist() == [20, 31, 40]


def test_segmenters_have_curves_of_miou(tmp_path):
    """Labelled by head and model; an evaluation of NaN leaves a gap."""
    folder = tmp_path / "run"
    folder.mkdir()
    entries = [dict(epoch=0, train_loss=2.0, val_mIoU=20.5), dict(epoch=1, train_loss=1.0, val_mIoU=None),
               dict(epoch=2, train_loss=0.5), dict(epoch=3, train_loss=0.4, val_mIoU=30.5)]
    (folder / "log.txt").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    (folder / "args.yaml").write_text("model: biformer_nano\nhead: upernet\n")
    loss, scores = plot_logs.draw([folder]).axes
    assert scores.lines[0].get_xydata().tolist() == [[0, 20.5], [3, 30.5]] and scores.get_ylabel() == "mIoU (%)"
    assert loss.lines[0].get_label() == "upernet_biformer_nano"


def test_a_run_of_one_epoch_has_its_epoch_for_a_tick(tmp_path):
    """And none between epochs, which there are not."""
    loss, _ = plot_logs.draw([write(tmp_path / "run", [(0, 2.0, 20)])]).axes
    low, high = loss.get_xlim()
    assert [tick for tick in loss.get_xticks() if low <= tick <= high] == [0]


def test_curves_are_labelled_by_the_model(tmp_path):
    """With the folder's name where runs share a model, with its path where runs share both."""
    runs = []
    for place, model in (("x/20261101-1", "vit"), ("x/20261101-2", "bvit_5m"), ("y/20261101-2", "bvit_5m"),
                         ("x/20261101-3", "bvit_5m"), ("x/lost", None), ("x/torn", "{")):
        (tmp_path / place).parent.mkdir(exist_ok=True)
        runs.append(write(tmp_path / place, [(0, 2.0, 20)]))
        if model is not None:
            (runs[-1] / "args.yaml").write_text(f"model: {model}\n")
    loss, _ = plot_logs.draw(runs).axes
    assert [line.get_label() for line in loss.lines] == [
        "vit", f"bvit_5m ({runs[1]})", f"bvit_5m ({runs[2]})", "bvit_5m (20261101-3)", "lost", "torn",
    ]


def test_without_matplotlib_one_line_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(SystemExit) as end:
        plot_logs.main([str(write(tmp_path / "run", [(0, 2.0, 20)]))])
    error = capsys.readouterr().err
    assert end.value.code == 1 and error.startswith("error: ") and error.endswith("; pip install matplotlib\n")
    assert error.count("\n") == 1


def test_paths_begin_at_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path / "run", [(0, 2.0, 20)])
    plot_logs.main(["~/run", "--output=~/curves.png"])
    assert (tmp_path / "curves.png").exists()


def test_a_run_without_evaluation_has_its_loss_drawn(tmp_path):
    never, later = ([(0, 2.0, None), (1, 1.7, accuracy)] for accuracy in (None, 31))
    runs = [write(tmp_path / "never", never), write(tmp_path / "later", later)]
    loss, accuracy = plot_logs.draw(runs).axes
    assert [line.get_xydata().tolist() for line in loss.lines] == [[[0, 2.0], [1, 1.7]]] * 2
    assert [line.get_xydata().tolist() for line in accuracy.lines] == [[], [[1, 31]]]
    plot_logs.main([str(tmp_path / "never"), "--output", str(tmp_path / "curves.png")])
    assert (tmp_path / "curves.png").exists()


def test_writes_a_picture(tmp_path):
    plot_logs.main([str(write(tmp_path / "run", [(0, 2.0, 20)])), "--output", str(tmp_path / "curves.png")])
    assert (tmp_path / "curves.png").stat().st_size > 1000


@pytest.mark.parametrize("content, complaint", [
    (None, "no log at"), ("", "holds no train_loss and no val_acc1"), ('{"epoch": 0}\n', "holds no train_loss and no"),
])
def test_mistakes_are_explained(tmp_path, content, complaint, capsys):
    if content is not None:
        (tmp_path / "log.txt").write_text(content)
    with pytest.raises(SystemExit):
        plot_logs.main([str(tmp_path)])
    assert complaint in capsys.readouterr().err.splitlines()[-1]
