import json

import pytest

from scripts import plot_logs


def write(folder, epochs):
    folder.mkdir()
    lines = [json.dumps(dict(epoch=epoch, train_loss=loss, val_acc1=accuracy)) for epoch, loss, accuracy in epochs]
    (folder / "log.txt").write_text("\n".join(lines) + "\n")
    return folder


def test_curves_are_those_of_the_logs(tmp_path):
    resumed = write(tmp_path / "resumed", [(0, 2.0, 20), (1, 1.8, 30), (1, 1.7, 31), (2, 1.5, 40)])
    other = write(tmp_path / "other", [(0, 2.2, 10)])
    loss, accuracy = plot_logs.draw([resumed, other]).axes
    assert [line.get_label() for line in loss.lines] == ["resumed", "other"]
    assert loss.lines[0].get_xydata().tolist() == [[1, 2.0], [2, 1.7], [3, 1.5]]
    assert accuracy.lines[0].get_ydata().tolist() == [20, 31, 40]


def test_writes_a_picture(tmp_path):
    plot_logs.main([str(write(tmp_path / "run", [(0, 2.0, 20)])), "--output", str(tmp_path / "curves.png")])
    assert (tmp_path / "curves.png").stat().st_size > 1000


@pytest.mark.parametrize("content", [None, ""])
def test_mistakes_are_explained(tmp_path, content, capsys):
    if content is not None:
        (tmp_path / "log.txt").write_text(content)
    with pytest.raises(SystemExit):
        plot_logs.main([str(tmp_path)])
    assert "log" in capsys.readouterr().err
