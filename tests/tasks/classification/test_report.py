"""Reports of evaluations: every image once and in order, figures by class, a confusion matrix that can be read."""
import csv
import shutil
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.metrics import confusion_matrix as sklearns
from sklearn.metrics import precision_recall_fscore_support

import main as program
import models  # noqa: F401, registers our models with timm
from datasets import build_dataset
from helpers.evaluation import SMALL, evaluate, write_weights
from scripts import make_shards
from tasks import confusion
from tasks.classification.report import class_rows
from tasks.confusion import confusion_figure, confusion_matrix


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return write_weights(tmp_path_factory.mktemp("weights") / "weights.pth", num_classes=3)


def rows_of(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_a_report_of_a_folder(photos, weights, tmp_path, capfd):
    assert evaluate(weights, "--data_path", photos, "--report", tmp_path / "a" / "b") == 0
    out = capfd.readouterr().out
    folder = tmp_path / "a" / "b"
    assert {p.name for p in folder.iterdir()} == {"predictions.csv", "classes.csv", "confusion.csv", "confusion.png"}
    rows = rows_of(folder / "predictions.csv")
    images = sorted((photos / "val").rglob("*.png"))
    assert [row["image"] for row in rows] == [str(path) for path in images]
    assert [row["true_class"] for row in rows] == [path.parent.name for path in images]
    sums = [sum(float(row[f"probability_{rank}"]) for rank in (1, 2, 3)) for row in rows]
    assert sums == pytest.approx([1] * 7, abs=1e-5)
    hits = sum(row["true_class"] == row["class_1"] for row in rows)
    assert f"* Acc@1 {100 * hits / len(rows):.3f}" in out

    names = ["class0", "class1", "class2"]
    expected = sklearns([row["true_class"] for row in rows], [row["class_1"] for row in rows], labels=names)
    table = rows_of(folder / "confusion.csv")
    assert [row["true class"] for row in table] == names
    assert [[int(row[name]) for name in names] for row in table] == expected.tolist()
    assert [row["images"] for row in rows_of(folder / "classes.csv")] == ["3", "2", "2"]
    assert f"report: {folder}, mean accuracy of the classes " in out


def test_figures_by_class():
    """Of four classes, the third never predicted, the last without images."""
    targets, top = np.array([0, 0, 1, 2, -1]), np.array([[0, 1], [1, 0], [1, 2], [3, 0], [0, 1]])
    rows = class_rows(confusion_matrix(targets, top[:, 0], 4), targets, top, ["a", "b", "c", "d"])
    assert rows == [
        ["a", 2, 50.0, 100.0, 100.0, 50.0, 66.667],
        ["b", 1, 100.0, 100.0, 50.0, 100.0, 66.667],
        ["c", 1, 0.0, 0.0, "", 0.0, 0.0],
        ["d", 0, "", "", 0.0, "", 0.0],
    ]


def test_figures_by_class_are_scikit_learns():
    """In percent, to three places; of seven classes, one has no image, and one no prediction."""
    generator = np.random.default_rng(0)
    targets, top = generator.integers(0, 6, 200), generator.permuted(np.tile(np.arange(7), (200, 1)), axis=1)[:, :5]
    top[top[:, 0] == 2, 0] = 3
    rows = class_rows(confusion_matrix(targets, top[:, 0], 7), targets, top, list("abcdefg"))
    expected = precision_recall_fscore_support(targets, top[:, 0], labels=range(7), zero_division=np.nan)
    figures = np.array([[row[4], row[5], row[6], row[1]] for row in rows], object)
    figures[figures == ""] = np.nan
    scale = np.array([100, 100, 100, 1])
    np.testing.assert_allclose(figures.astype(float), np.stack(expected, axis=1) * scale, rtol=0, atol=5.1e-4)


def test_a_report_needs_no_other_package(photos, weights, tmp_path, monkeypatch):
    """Where scikit-learn is not installed, it is not half a report."""
    monkeypatch.setitem(sys.modules, "sklearn", None)
    monkeypatch.setitem(sys.modules, "sklearn.metrics", None)
    assert evaluate(weights, "--data_path", photos, "--report", tmp_path) == 0
    assert {p.name for p in tmp_path.iterdir()} == {"predictions.csv", "classes.csv", "confusion.csv", "confusion.png"}


def test_images_that_were_skipped_are_listed(photos, weights, tmp_path, capfd):
    shutil.copytree(photos / "val", tmp_path / "data" / "val")
    bad = tmp_path / "data" / "val" / "class1" / "1.png"
    bad.write_text("no image")
    arguments = ["--data_path", tmp_path / "data", "--report", tmp_path / "report", "--skip_bad_images"]
    assert evaluate(weights, *arguments) == 0
    rows = rows_of(tmp_path / "report" / "predictions.csv")
    assert len(rows) == 7 and [row["image"] for row in rows if row["error"]] == [str(bad)]
    assert sum(int(row["images"]) for row in rows_of(tmp_path / "report" / "classes.csv")) == 6


def test_images_of_shards_and_of_the_digits_have_names_too(photos, weights, tmp_path, capfd):
    assert make_shards.main([str(photos), str(tmp_path / "shards"), "--size", "4"]) == 0
    arguments = ["--data_set", "wds/photos", "--data_path", tmp_path / "shards", "--report", tmp_path / "report"]
    assert evaluate(weights, *arguments) == 0
    rows = rows_of(tmp_path / "report" / "predictions.csv")
    assert len({row["image"] for row in rows}) == 7 and len({row["true_class"] for row in rows}) == 3
    for row in rows:
        shard, _, member = row["image"].partition("/")
        with tarfile.open(tmp_path / "shards" / shard) as archive:
            label = Path(member).with_suffix(".cls").name
            assert f"class{archive.extractfile(label).read().decode()}" == row["true_class"]
    assert build_dataset("digits", None, "val").names() == [str(index) for index in range(360)]


def test_without_matplotlib_all_but_the_picture_is_written(photos, weights, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(confusion, "can_draw", lambda: False)
    assert evaluate(weights, "--data_path", photos, "--report", tmp_path) == 0
    assert "no confusion.png is drawn: pip install matplotlib\n" in capfd.readouterr().out
    assert {p.name for p in tmp_path.iterdir()} == {"predictions.csv", "classes.csv", "confusion.csv"}


def test_what_cannot_be_reported(photos, weights, tmp_path, capfd):
    (tmp_path / "file").touch()
    assert evaluate(weights, "--data_path", photos, "--report", tmp_path / "file") == 1
    out, err = capfd.readouterr()
    assert err == f"error: cannot write to {tmp_path}/file: File exists\n" and "Acc@1" not in out
    assert program.main([*SMALL, "--data_path", str(photos), "--report", str(tmp_path)]) == 2
    assert capfd.readouterr().err == "error: --report is of an evaluation: it needs --eval\n"


@pytest.mark.parametrize("count", [3, 10, 1000])
def test_a_confusion_matrix_can_be_drawn(count):
    """Of few classes with names, which may hold what matplotlib takes for formulas or terminals obey."""
    names = [f"$x_{{ \x1b {index}" for index in range(count)]
    figure = confusion_figure(np.eye(count, dtype=np.int64), names)
    pixels = confusion.as_pixels(figure)
    assert pixels.dtype == np.uint8 and pixels.ndim == 3 and pixels.shape[0] > min(count, 1000)
    labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert (names[-1].replace("\x1b", r"\x1b") in labels) == (count <= 60)
    assert (len(figure.axes[0].texts) == count**2) == (count <= 20)
    Image.fromarray(pixels)
