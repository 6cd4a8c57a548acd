"""Runs of main.py that train and evaluate a detector: exact resume, several processes, logs, reports."""
import csv
import json
import math
import re
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import main as program
from helpers.launch import launch, signal_after
from helpers.objects import CLASSES, read_annotations, write_annotations, write_objects
from helpers.run_state import differences
from models import detection
from scripts import score_detections
from training.signals import EXIT_RESUME

pytestmark = pytest.mark.slow

# Of every part: masks, sizes and crops that are drawn, stochastic depth, EMA weights, accumulation.
COMMAND = ["--task", "detection", "--model", "biformer_nano", "--fpn_channels", "16", "--head_channels", "32",
           "--short_side", "64", "--long_side", "96", "--multi_scale", "--batch_size", "2", "--update_freq", "2",
           "--num_workers", "0", "--device", "cpu", "--epochs", "2", "--warmup_epochs", "0", "--lr", "0.2",
           "--model_ema_eval", "--log_every", "1", "--decay_groups", "layernorm"]
EVALUATION = ["--eval", "--num_workers", "0", "--device", "cpu"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_objects(tmp_path_factory.mktemp("objects"), train=9, val=5)


def train(data, folder, *arguments):
    return program.main([*COMMAND, "--data_path", str(data), "--output_dir", str(folder), *map(str, arguments)])


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    assert train(data, folder) == 0
    return folder


@pytest.fixture(scope="module")
def finder(trained, tmp_path_factory):
    """The checkpoint of a run that finds objects: of random boxes, the classes are as likely as the background."""
    checkpoint = torch.load(trained / "last.pth", weights_only=True)
    bias = checkpoint["model"]["roi_heads.box_predictor.cls_score.bias"]
    bias[0] -= 3
    path = tmp_path_factory.mktemp("finder") / "finder.pth"
    torch.save(checkpoint, path)
    return path


def records(folder):
    return [json.loads(line) for line in (folder / "log.txt").read_text().splitlines()]


# --- training ---------------------------------------------------------------------------------------------------------


def test_the_log_has_losses_by_name_and_scores_by_class(trained):
    first, last = records(trained)
    assert (first["epoch"], last["epoch"], last["step"]) == (0, 1, 4)
    names = ("loss_classifier", "loss_box_reg", "loss_mask", "loss_objectness", "loss_rpn_box_reg")
    for record in (first, last):
        assert record["train_loss"] == pytest.approx(sum(record[f"train_{name}"] for name in names))
        for group in ("val", "ema"):
            of_classes = [record[f"{group}_box_AP/{name}"] for name in CLASSES]
            assert math.isclose(record[f"{group}_box_AP"], np.mean(of_classes), abs_tol=1e-9)
            assert record[f"{group}_images"] == 5 and f"{group}_mask_AP50" in record
    best = torch.load(trained / "best.pth", weights_only=True)
    values = [record["val_mask_AP"] for record in records(trained)]
    assert best["epoch"] == values.index(max(values)) and best["classes"] == list(CLASSES)


def test_a_detector_of_boxes_alone_is_best_by_these(data, tmp_path, capfd):
    arguments = [x for x in COMMAND if x not in ("--head_channels", "32")]
    assert program.main([*arguments, "--detector", "retinanet", "--data_path", str(data), "--max_steps", "1",
                         "--output_dir", str(tmp_path)]) == 0
    out = capfd.readouterr().out
    line = next(line for line in out.splitlines() if line.startswith("epoch 0 [1/1]"))
    loss, scores, boxes = map(float, re.search(
        r"loss ([\d.]+) \(classification ([\d.]+), bbox_regression ([\d.]+)\)", line
    ).groups())
    assert loss == pytest.approx(scores + boxes, abs=2e-4)
    assert "* box_AP 0.000 of the network on 5 val images" in out and "best: box_AP 0.000 after epoch 0" in out
    network, _ = detection.load(tmp_path / "last.pth")
    weights = torch.load(tmp_path / "last.pth", weights_only=True)["model"]
    assert all(torch.equal(value, weights[name]) for name, value in network.state_dict().items())


def test_pictures_are_in_tensorboard(trained):
    events = EventAccumulator(str(trained / "tensorboard"), size_guidance=dict(images=0)).Reload()
    assert set(events.Tags()["images"]) == {"ema/detections"}
    assert {"train/loss_mask", "val/mask_AP", "val/box_AP/red"} <= set(events.Tags()["scalars"])


@pytest.mark.parametrize("step", [1, 2, 3])
def test_a_run_that_is_stopped_resumes_exactly(data, trained, tmp_path, step):
    with signal_after(step):
        assert train(data, tmp_path) == EXIT_RESUME
    assert program.main(["--config", str(tmp_path / "args.yaml"), "--output_dir", str(tmp_path), "--auto_resume",
                         "--num_workers", "1", "--device", "cpu"]) == 0
    assert differences(trained, tmp_path) == []


@pytest.mark.long
@pytest.mark.distributed
def test_two_processes_train_and_resume_exactly(data, tmp_path):
    """From the middle of the first epoch."""
    command = [*COMMAND, "--data_path", data, "--batch_size", 1]
    launch(*command, "--output_dir", tmp_path / "whole", "--save_every_steps", 1, "--keep_checkpoints", 9)
    first = tmp_path / "whole" / "checkpoint-00000001.pth"
    out = launch(*command, "--output_dir", tmp_path / "half", "--resume", first)
    assert f"resuming from {first}: epoch 0, step 1 of 2" in out
    assert differences(tmp_path / "whole", tmp_path / "half") == []


def test_other_annotations_within_an_epoch_are_refused(tmp_path, capfd):
    """Its rest would be of other objects."""
    data = write_objects(tmp_path / "data")
    folder = tmp_path / "run"
    assert train(data, folder, "--save_every_steps", 1, "--update_freq", 1, "--max_steps", 3, "--disable_eval") == 0
    content = read_annotations(data, "train")
    content["annotations"][0]["bbox"][2] -= 1
    write_annotations(data, "train", content)
    capfd.readouterr()
    first = folder / "checkpoint-00000002.pth"
    again = ["--update_freq", 1, "--max_steps", 3, "--disable_eval", "--resume", first]
    assert train(data, tmp_path / "again", *again) == 1
    assert "written in the middle of an epoch, has trained on images of other names" in capfd.readouterr().err


def test_a_picture_of_the_first_images_changes_nothing(data, trained, tmp_path):
    assert train(data, tmp_path / "run", "--show_batch", tmp_path / "batch.png") == 0
    assert differences(trained, tmp_path / "run") == []
    assert Image.open(tmp_path / "batch.png").width == 2 * 320 + 4


def test_bad_images_are_skipped_and_counted(tmp_path, capfd):
    """In training another is taken, in an evaluation it does not count; so are annotations that cannot be right."""
    data = write_objects(tmp_path / "data")
    for split in ("train", "val"):
        path = data / f"{split}2017" / "1.png"
        path.write_bytes(path.read_bytes()[:200])
        content = read_annotations(data, split)
        content["annotations"][0]["bbox"] = [0, 0, -1, 5]
        write_annotations(data, split, content)
    arguments = ["--epochs", 1, "--update_freq", 1]
    assert train(data, tmp_path / "a", *arguments) == 1
    assert "annotation 1 has a bbox of negative size" in capfd.readouterr().err
    assert train(data, tmp_path / "b", *arguments, "--skip_bad_images") == 0
    out = capfd.readouterr().out
    assert "instances_train2017.json: 6 images, 17 objects; left out: 1 bad annotation" in out
    assert "instances_val2017.json: 4 images, 11 objects; left out: 1 bad annotation" in out
    for split in ("train", "val"):
        assert f"skipped 1 image that could not be read: {data}/{split}2017/1.png" in out
    assert "of the network on 3 val images" in out


# --- evaluation -------------------------------------------------------------------------------------------------------


def score(capfd, checkpoint, *arguments):
    """The line of results of an evaluation, and the lines before it."""
    assert program.main([*EVALUATION, "--resume", str(checkpoint), *map(str, arguments)]) == 0
    lines = [line for line in capfd.readouterr().out.splitlines() if line.strip()]
    place = next(index for index, line in enumerate(lines) if line.startswith("* "))
    return lines[place], lines[:place]


def test_an_evaluation_takes_all_from_the_run(trained, capfd):
    last, lines = score(capfd, trained / "last.pth")
    record = records(trained)[-1]
    assert last == (f"* mask_AP {record['val_mask_AP']:.3f} box_AP {record['val_box_AP']:.3f} of the network on 5 val "
                    "images")
    assert "evaluated at a shorter side of 64 and a longer one of at most 96" in lines
    assert [lines.index("mask:") - len(lines), lines.index("box:") - len(lines)] == [-26, -13]
    value = record["val_box_AP"] / 100
    assert lines[-12] == f" Average Precision  (AP) @[ IoU=0.50:0.95 | area=   all | maxDets=100 ] = {value:.3f}"


def test_scores_do_not_depend_on_the_batch(finder, capfd):
    found = {score(capfd, finder, "--batch_size", size)[0] for size in (1, 2, 5)}
    assert len(found) == 1 and "box_AP 0.000" not in found.pop()


@pytest.mark.distributed
def test_two_processes_have_the_score_of_one(finder, tmp_path, capfd):
    """To the last digit, by the same detections."""
    files = [tmp_path / "one.json", tmp_path / "two.json"]
    line, _ = score(capfd, finder, "--detections", files[0])
    out = launch(*EVALUATION, "--resume", finder, "--detections", files[1])
    assert line in out.splitlines()
    one, two = (sorted(json.loads(file.read_text()), key=json.dumps) for file in files)
    assert one == two and len(one) > 50 and {entry["image_id"] for entry in one} == {1, 11, 21, 31, 41}


def test_a_file_of_detections_has_the_same_score(data, finder, tmp_path, capfd):
    line, lines = score(capfd, finder, "--detections", tmp_path / "d.json", "--report", tmp_path / "report")
    for kind, place in (("segm", -25), ("bbox", -12)):
        arguments = ["--annotations", data / "annotations/instances_val2017.json", "--detections", tmp_path / "d.json"]
        assert score_detections.main([*map(str, arguments), "--iou_type", kind]) == 0
        printed = capfd.readouterr().out.splitlines()
        assert printed[-12:] == lines[place:][:12] and printed[0].startswith("5 images, 15 objects (0 crowds), ")
    with open(tmp_path / "report" / "classes.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["class"] for row in rows] == list(CLASSES) and sum(int(row["objects"]) for row in rows) == 15
    mean = np.mean([float(row["mask_AP"]) for row in rows])
    assert mean == pytest.approx(float(line.split()[2]), abs=1e-3)


def test_images_without_annotations_are_detected_in_and_not_scored(data, finder, tmp_path, capfd):
    """As COCO's test-dev, whose file has no annotations at all. A run that would score them says so at its start."""
    content = read_annotations(data, "val")
    del content["annotations"]
    file = tmp_path / "image_info.json"
    file.write_text(json.dumps(content))
    shutil.copytree(data / "val2017", tmp_path / "data/test2017")
    asked = [*EVALUATION, "--resume", str(finder), "--val_json", str(file), "--split", "test", "--data_path",
             str(tmp_path / "data")]
    assert program.main(asked) == 1
    error = f"error: {file} has no object to find in its images; --eval --detections FILE writes what is found unscored"
    assert capfd.readouterr().err.startswith(error)
    asked += ["--detections", str(tmp_path / "d.json")]
    assert program.main(asked) == 0
    assert "no object to find: nothing is scored, of the network on 5 test images" in capfd.readouterr().out
    assert {entry["image_id"] for entry in json.loads((tmp_path / "d.json").read_text())} == {1, 11, 21, 31, 41}


def test_a_place_that_cannot_be_written_to_is_told_at_once(finder, tmp_path, capfd):
    (tmp_path / "file").write_text("")
    assert program.main([*EVALUATION, "--resume", str(finder), "--detections", str(tmp_path / "file" / "d.json")]) == 1
    captured = capfd.readouterr()
    assert captured.err.startswith(f"error: cannot write to {tmp_path}/file: ") and "* mask_AP" not in captured.out
    assert program.main([*EVALUATION, "--resume", str(finder), "--detections", str(tmp_path)]) == 1
    assert "is a folder" in capfd.readouterr().err


def test_a_broken_network_is_told(trained, tmp_path, capfd):
    checkpoint = torch.load(trained / "last.pth", weights_only=True)
    checkpoint["model"]["backbone.fpn.fpn_convs.0.conv.weight"].fill_(3e38)  # finite, and no output is
    torch.save(checkpoint, tmp_path / "broken.pth")
    assert program.main([*EVALUATION, "--resume", str(tmp_path / "broken.pth")]) == 1
    assert "the outputs of the network are NaN or infinite" in capfd.readouterr().err


def test_the_training_images_are_evaluated_as_they_are(finder, capfd):
    last, _ = score(capfd, finder, "--split", "train")
    assert last.endswith("of the network on 9 train images")


def test_the_network_of_a_run_is_loaded(data, finder):
    network, transform = detection.load(finder)
    assert not network.training and network.classes == list(CLASSES)
    weights = torch.load(finder, weights_only=True)["model"]
    assert all(torch.equal(value, weights[name]) for name, value in network.state_dict().items())
    with torch.inference_mode():
        found, = network([transform(Image.open(data / "val2017/0.png"))])
    assert found["masks"].shape[1:] == (64, 76) and len(found["scores"]) > 5
