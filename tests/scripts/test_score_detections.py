"""scripts/score_detections.py: what it prints and writes, and mistakes."""
import json
import subprocess
import sys

import pytest

from helpers import ROOT
from scripts import score_detections

SQUARE = [0, 0, 10, 10]
MASK = dict(size=[40, 50], counts=[0, *[10, 30] * 9, 10, 1630])  # of that square


@pytest.fixture
def files(tmp_path):
    """Two dogs and a crowd in three images, and two detections in one, of which the better is wrong."""
    entry = dict(category_id=3, bbox=SQUARE, area=100, segmentation=MASK, iscrowd=0)
    objects = [dict(entry, id=1, image_id=1), dict(entry, id=2, image_id=2), dict(entry, id=3, image_id=3, iscrowd=1)]
    annotations = dict(
        images=[dict(id=i, height=40, width=50) for i in (1, 2, 3)], annotations=objects,
        categories=[dict(id=3, name="dog"), dict(id=5, name="cat")],
    )
    found = [dict(image_id=1, category_id=3, bbox=[30, 20, 10, 10], score=0.9),
             dict(image_id=1, category_id=3, bbox=SQUARE, score=0.8)]
    (tmp_path / "truth.json").write_text(json.dumps(annotations))
    write(tmp_path, found)
    return annotations, found


def write(folder, found):
    (folder / "found.json").write_text(json.dumps(found))


def run(folder, *arguments):
    paths = ["--annotations", folder / "truth.json", "--detections", folder / "found.json"]
    return score_detections.main([str(x) for x in (*paths, *arguments)])


def fails(capsys, folder, *arguments):
    """The one line of a mistake."""
    assert run(folder, *arguments) == 1
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1
    return err.removeprefix("error: ").removesuffix("\n")


def test_prints_what_is_scored_and_twelve_lines(tmp_path, files, capsys):
    """Half of the dogs are found, behind one that is none: 51 of 101 recalls have a precision of 1/2."""
    assert run(tmp_path) == 0
    out, err = capsys.readouterr()
    first, second, *lines = out.splitlines()
    assert first == "3 images, 3 objects (1 crowd), 2 detections"
    assert second == "2 images without detections, counted too"
    assert len(lines) == 12 and err == ""
    assert lines[0] == " Average Precision  (AP) @[ IoU=0.50:0.95 | area=   all | maxDets=100 ] = 0.252"
    assert lines[8] == " Average Recall     (AR) @[ IoU=0.50:0.95 | area=   all | maxDets=100 ] = 0.500"
    assert lines[5] == " Average Precision  (AP) @[ IoU=0.50:0.95 | area= large | maxDets=100 ] = -1.000"


def test_images_all_of_which_have_detections_need_no_word(tmp_path, files, capsys):
    write(tmp_path, [dict(files[1][1], image_id=i) for i in (1, 2, 3)])
    assert run(tmp_path) == 0
    out = capsys.readouterr().out.splitlines()
    assert len(out) == 13 and out[1].endswith("= 1.000")


def test_no_detections_are_scored(tmp_path, files, capsys):
    write(tmp_path, [])
    assert run(tmp_path) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[:2] == ["3 images, 3 objects (1 crowd), 0 detections", "3 images without detections, counted too"]
    assert out[2].endswith("= 0.000")


def test_masks_and_the_table_by_class(tmp_path, files, capsys):
    """As a program of its own, from another folder."""
    write(tmp_path, [dict(files[1][1], segmentation=MASK, image_id=i, bbox=[30, 20, 1, 1]) for i in (1, 2)])
    command = [sys.executable, ROOT / "scripts" / "score_detections.py", "--annotations", "truth.json", "--detections",
               "found.json", "--iou_type", "segm", "--classes", "tables/classes.csv"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == ""
    lines = done.stdout.splitlines()
    assert lines[2].endswith("= 1.000") and lines[-1] == "by class: tables/classes.csv"
    assert (tmp_path / "tables" / "classes.csv").read_text().splitlines() == [
        "class,objects,box_AP,box_AP50,mask_AP,mask_AP50", "dog,2,,,100.000,100.000", "cat,0,,,,",
    ]
    assert run(tmp_path, "--classes", tmp_path / "boxes.csv") == 0
    assert (tmp_path / "boxes.csv").read_text().splitlines()[1] == "dog,2,0.000,0.000,,"


def test_masks_are_scored_where_detections_have_them(tmp_path, files, capsys):
    message = fails(capsys, tmp_path, "--iou_type", "segm", "--classes", tmp_path / "classes.csv")
    assert message == (f"{tmp_path}/found.json, scored by {tmp_path}/truth.json: no segmentation in 2 of 2 detections, "
                       "the first of them entry 0; a mask cannot be scored without")
    assert not (tmp_path / "classes.csv").exists()


def test_detections_of_other_images(tmp_path, files, capsys):
    write(tmp_path, [dict(files[1][0], image_id=i) for i in (9, 1, 8, 9)])
    assert fails(capsys, tmp_path).endswith(
        ": 3 detections of images that the annotations do not have, with the image_id 8, 9"
    )


def test_files_that_are_wrong(tmp_path, files, capsys):
    write(tmp_path, [files[1][0], dict(files[1][1], score=None)])
    assert fails(capsys, tmp_path) == f"{tmp_path}/found.json: entry 1 has the score None, which is no finite number"
    assert "it is no list, as detections" in fails(capsys, tmp_path, "--detections", tmp_path / "truth.json")
    assert "it is a list, as detections are" in fails(capsys, tmp_path, "--annotations", tmp_path / "found.json")
    assert fails(capsys, tmp_path, "--annotations", tmp_path / "none.json") == (
        f"cannot read {tmp_path}/none.json: No such file or directory"
    )
    write(tmp_path, files[1])
    assert fails(capsys, tmp_path, "--classes", tmp_path) == (
        f"cannot write {tmp_path}: it is a folder, and a table needs a file"
    )


@pytest.mark.parametrize("arguments", [[], ["--iou_type", "keypoints"]])
def test_a_wrong_command_line(tmp_path, files, arguments):
    with pytest.raises(SystemExit) as end:
        run(tmp_path, *arguments) if arguments else score_detections.main([])
    assert end.value.code == 2


def test_paths_begin_at_home(tmp_path, files, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert score_detections.main(["--annotations=~/truth.json", "--detections=~/found.json", "--classes=~/c.csv"]) == 0
    assert (tmp_path / "c.csv").exists()
