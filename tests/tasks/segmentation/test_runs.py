"""Runs of main.py that train and evaluate a segmenter: exact resume, several processes, logs, reports."""
import csv
import json
import math
import re

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import main as program
import models
from helpers.launch import launch, signal_after
from helpers.run_state import differences
from helpers.segments import CLASSES, write_segments
from models import segmentation
from scripts import predict
from storage.weights import WeightsError
from training.data.images import load_image
from training.signals import EXIT_RESUME

pytestmark = pytest.mark.slow

# Of every part but UPerNet, which is six times as large: a head of another width, dropout, stochastic depth, EMA
# weights, accumulation, all of the augmentation.
COMMAND = ["--task", "segmentation", "--model", "biformer_nano", "--head", "semantic_fpn", "--head_channels", "64",
           "--input_size", "32", "--short_side", "48", "--long_side", "160", "--batch_size", "2", "--update_freq", "2",
           "--num_workers", "0", "--device", "cpu", "--epochs", "2", "--warmup_epochs", "0", "--lr", "0.2",
           "--model_ema_eval", "--log_every", "1", "--sched", "poly", "--decay_groups", "layernorm"]
EVALUATION = ["--eval", "--num_workers", "0", "--device", "cpu"]


@pytest.fixture(scope="module")
def segments(tmp_path_factory):
    return write_segments(tmp_path_factory.mktemp("segments"), train=9, val=5)


def train(segments, folder, *arguments):
    return program.main([*COMMAND, "--data_path", str(segments), "--output_dir", str(folder), *map(str, arguments)])


@pytest.fixture(scope="module")
def trained(segments, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    assert train(segments, folder) == 0
    return folder


def records(folder):
    return [json.loads(line) for line in (folder / "log.txt").read_text().splitlines()]


# --- training ---------------------------------------------------------------------------------------------------------


def test_the_log_has_losses_by_name_and_scores_by_class(trained):
    first, last = records(trained)
    assert (first["epoch"], last["epoch"], last["step"]) == (0, 1, 4)
    for record in (first, last):
        assert record["train_loss"] == record["train_decode"] > 0
        for group in ("val", "ema"):
            scores = [record[f"{group}_IoU/{name}"] for name in CLASSES]
            assert math.isclose(record[f"{group}_mIoU"], np.mean(scores)) and record[f"{group}_images"] == 5
            assert {f"{group}_mAcc", f"{group}_aAcc"} <= record.keys()
    best = torch.load(trained / "best.pth", weights_only=True)
    values = [record["val_mIoU"] for record in records(trained)]
    assert best["epoch"] == values.index(max(values))
    assert best["classes"] == list(CLASSES)


def test_several_losses_are_logged_by_name(segments, tmp_path, capfd):
    assert train(segments, tmp_path / "run", "--head", "upernet", "--max_steps", 1, "--model_ema", "false") == 0
    line = next(line for line in capfd.readouterr().out.splitlines() if line.startswith("epoch 0 [1/1]"))
    loss, decode, aux = map(float, re.search(r"loss ([\d.]+) \(decode ([\d.]+), aux ([\d.]+)\)", line).groups())
    assert math.isclose(loss, decode + 0.4 * aux, rel_tol=1e-3)
    (record,) = records(tmp_path / "run")
    assert math.isclose(record["train_loss"], record["train_decode"] + 0.4 * record["train_aux"], rel_tol=1e-5)


def test_overlays_are_in_tensorboard(trained):
    events = EventAccumulator(str(trained / "tensorboard"), size_guidance=dict(images=0)).Reload()
    assert set(events.Tags()["images"]) == {"ema/overlays"}
    assert {"train/decode", "val/mIoU", "val/IoU/red"} <= set(events.Tags()["scalars"])


def test_it_learns_colours(trained):
    """In four steps: each class has a colour of its own, and by chance a third of the pixels would be right."""
    assert records(trained)[-1]["val_mIoU"] > 50


@pytest.mark.parametrize("step", [1, 2, 3])
def test_a_run_that_is_stopped_resumes_exactly(segments, trained, tmp_path, step):
    with signal_after(step):
        assert train(segments, tmp_path) == EXIT_RESUME
    assert program.main(["--config", str(tmp_path / "args.yaml"), "--output_dir", str(tmp_path), "--auto_resume",
                         "--num_workers", "1", "--device", "cpu"]) == 0
    assert differences(trained, tmp_path) == []


@pytest.mark.long
@pytest.mark.distributed
def test_two_processes_train_and_resume_exactly(segments, tmp_path):
    """From the middle of the first epoch."""
    command = [*COMMAND, "--data_path", segments, "--batch_size", 1, "--input_size", 64]
    launch(*command, "--output_dir", tmp_path / "whole", "--save_every_steps", 1, "--keep_checkpoints", 9)
    first = tmp_path / "whole" / "checkpoint-00000001.pth"
    out = launch(*command, "--output_dir", tmp_path / "half", "--resume", first)
    assert f"resuming from {first}: epoch 0, step 1 of 2" in out
    assert differences(tmp_path / "whole", tmp_path / "half") == []


def test_evaluations_are_as_often_as_asked_for(segments, tmp_path):
    """And of the last epoch always."""
    assert train(segments, tmp_path / "run", "--epochs", 4, "--eval_every", 3) == 0
    assert ["val_mIoU" in record for record in records(tmp_path / "run")] == [False, False, True, True]


def test_another_global_batch_than_the_recipes_is_told(segments, tmp_path, capfd):
    assert train(segments, tmp_path / "a", "--max_steps", 1, "--recipe_batch", 16, "--disable_eval") == 0
    assert ("the recipe is for a global batch of 16, this run has 4: its learning rate is 0.25 times what it would be "
            "there, and a step sees 0.25 times as many images") in capfd.readouterr().out
    assert train(segments, tmp_path / "b", "--max_steps", 1, "--recipe_batch", 4, "--disable_eval") == 0
    assert "the recipe is for" not in capfd.readouterr().out


def test_a_picture_of_the_first_images_changes_nothing(segments, trained, tmp_path):
    assert train(segments, tmp_path / "run", "--show_batch", tmp_path / "batch.png") == 0
    assert differences(trained, tmp_path / "run") == []
    assert Image.open(tmp_path / "batch.png").width == 2 * 320 + 4


# --- evaluation -------------------------------------------------------------------------------------------------------


def score(capfd, trained, *arguments):
    """The last line of an evaluation, and the lines before it."""
    assert program.main([*EVALUATION, "--resume", str(trained / "last.pth"), *map(str, arguments)]) == 0
    *lines, last = [line for line in capfd.readouterr().out.splitlines() if line.strip()]
    return last, lines


def test_an_evaluation_takes_all_from_the_run(trained, capfd):
    last, lines = score(capfd, trained)
    record = records(trained)[-1]
    assert last == (f"* mIoU {record['val_mIoU']:.3f} mAcc {record['val_mAcc']:.3f} aAcc {record['val_aAcc']:.3f} "
                    "of the network on 5 val images")
    assert "evaluated at a shorter side of 48 and a longer one of at most 160" in lines
    assert [line.split()[0] for line in lines[-4:]] == ["class", *CLASSES]
    assert f"{record['val_IoU/red']:.3f}" in lines[-3]


@pytest.mark.parametrize("arguments", [
    [], ["--crop", "32", "--stride", "20"], ["--test_scales", "0.5", "1", "1.5", "--test_flip"],
    ["--test_rounding", "stretch"], ["--test_rounding", "pad"],
])
def test_scores_do_not_depend_on_the_batch(trained, capfd, arguments):
    assert len({score(capfd, trained, *arguments, "--batch_size", size)[0] for size in (1, 2, 5)}) == 1


@pytest.mark.distributed
def test_two_processes_have_the_score_of_one(trained, tmp_path, capfd):
    """To the last digit: the counts of pixels are whole numbers."""
    arguments = ["--test_scales", "1", "1.5", "--test_flip"]
    score(capfd, trained, *arguments, "--report", tmp_path / "one")
    launch(*EVALUATION, "--resume", trained / "last.pth", *arguments, "--report", tmp_path / "two")
    one, two = ((tmp_path / name / "confusion.csv").read_text() for name in ("one", "two"))
    assert one == two and sum(map(int, one.splitlines()[1].split(",")[1:])) > 0


def test_a_report_has_the_confusion_matrix(segments, trained, tmp_path, capfd):
    last, _ = score(capfd, trained, "--report", tmp_path / "report")
    assert last == f"report: {tmp_path}/report"
    with open(tmp_path / "report" / "confusion.csv", newline="") as file:
        titles, *rows = csv.reader(file)
    matrix = np.array([[int(cell) for cell in row[1:]] for row in rows])
    assert titles == ["true class", *CLASSES] and [row[0] for row in rows] == list(CLASSES)
    labels = np.concatenate([
        np.asarray(Image.open(path)).ravel() for path in (segments / "annotations" / "validation").iterdir()
    ])
    assert matrix.sum(axis=1).tolist() == np.bincount(labels, minlength=4)[1:].tolist()
    with open(tmp_path / "report" / "classes.csv", newline="") as file:
        table = list(csv.DictReader(file))
    iou = matrix[0, 0] / (matrix[0].sum() + matrix[:, 0].sum() - matrix[0, 0])
    assert table[0]["class"] == "red" and float(table[0]["IoU"]) == round(100 * iou, 3)
    assert Image.open(tmp_path / "report" / "confusion.png").size > (300, 300)


def test_a_broken_network_is_told(segments, trained, tmp_path, capfd):
    checkpoint = torch.load(trained / "last.pth", weights_only=True)
    checkpoint["model"]["decode_head.conv_seg.bias"].fill_(3e38)  # finite, and no output is
    checkpoint["model"]["decode_head.conv_seg.weight"].fill_(3e38)
    torch.save(checkpoint, tmp_path / "broken.pth")
    assert program.main([*EVALUATION, "--resume", str(tmp_path / "broken.pth")]) == 1
    assert "the outputs of the network are NaN or infinite" in capfd.readouterr().err


# --- what the checkpoint is good for ----------------------------------------------------------------------------------


def first_image(segments):
    return load_image(segments / "images" / "validation" / "0.png")


def test_the_network_of_a_run_is_loaded(segments, trained):
    network, transform = segmentation.load(trained / "last.pth")
    assert not network.training and network.classes == list(CLASSES)
    pixels = transform(first_image(segments))
    assert min(pixels.shape[1:]) == 48
    weights = torch.load(trained / "last.pth", weights_only=True)["model"]
    assert all(torch.equal(value, weights[name]) for name, value in network.state_dict().items())
    assert network(pixels[None]).shape[:2] == (1, 3)
    averaged, _ = segmentation.load(trained / "last.pth", weights="model_ema")
    assert not torch.equal(averaged.decode_head.conv_seg.weight, network.decode_head.conv_seg.weight)


def test_a_checkpoint_of_another_task_is_refused(trained, tmp_path):
    with pytest.raises(WeightsError, match=r"is no classifier, but of the task segmentation: load it by models\.seg"):
        models.load(trained / "last.pth")
    torch.save(dict(model={}, args=dict(task="classification", model="biformer_nano")), tmp_path / "c.pth")
    with pytest.raises(WeightsError, match="is not the checkpoint of a run that trains a segmenter"):
        segmentation.load(tmp_path / "c.pth")


def predicted(capfd, *arguments):
    code = predict.main([*map(str, arguments), "--num_workers", "0", "--device", "cpu"])
    return code, *capfd.readouterr()


def test_label_maps_are_written(segments, trained, tmp_path, capfd):
    """With the values of the label files; they are what the network says."""
    folder = segments / "images" / "validation"
    code, out, _ = predicted(capfd, "--checkpoint", trained / "last.pth", folder, "--output", tmp_path)
    assert code == 0 and len(out.splitlines()) == 5
    network, transform = segmentation.load(trained / "last.pth")
    image = first_image(segments)
    pixels = transform(image)[None]
    with torch.inference_mode():
        logits = torch.nn.functional.interpolate(network(pixels), pixels.shape[2:], mode="bilinear")
        logits = torch.nn.functional.interpolate(logits, image.size[::-1], mode="bilinear")
    expected = logits[0].argmax(dim=0).numpy() + 1
    written = Image.open(tmp_path / "labels" / "0.png")
    assert written.mode == "P" and (np.asarray(written) == expected).mean() > 0.999
    overlay = np.asarray(Image.open(tmp_path / "overlays" / "0.jpg"))
    assert overlay.shape == (*image.size[::-1], 3)
    shares = {CLASSES[i - 1]: (expected == i).mean() for i in range(1, 4)}
    name, share = out.splitlines()[0].rpartition("0.png: ")[2].split(", ")[0].removesuffix(" %").split(" ")
    assert name == max(shares, key=shares.get) and abs(float(share) - 100 * shares[name]) < 0.2


def test_a_published_segmenter_predicts(segments, trained, tmp_path, capfd):
    """As at the sizes of the published recipes; what it has been trained on is not known."""
    weights = torch.load(trained / "last.pth", weights_only=True)["model"]
    published = {name.replace("backbone.body.", "backbone."): value for name, value in weights.items()}
    torch.save(dict(state_dict=published), tmp_path / "p.pth")
    image, maps = segments / "images" / "validation" / "0.png", tmp_path / "maps"
    code, _, err = predicted(capfd, "--checkpoint", tmp_path / "p.pth", image)
    assert code == 2 and err.endswith("p.pth does not say which model its backbone is; give --model\n")
    model = ("--model", "biformer_nano")
    code, out, _ = predicted(capfd, "--checkpoint", tmp_path / "p.pth", *model, image, "--output", maps)
    assert code == 0 and re.search(r"0\.png: [123] \d", out)
    assert Image.open(maps / "labels" / "0.png").size == Image.open(image).size


def test_a_prediction_says_nothing_but_predictions_on_standard_output(segments, trained, tmp_path, capfd):
    """Of the EMA weights, and of a checkpoint from before a flag of today."""
    checkpoint = torch.load(trained / "last.pth", weights_only=True)
    checkpoint["best"] = dict(ema_mIoU=60.0)
    del checkpoint["args"]["test_flip"]
    torch.save(checkpoint, tmp_path / "c.pth")
    code, out, err = predicted(capfd, "--checkpoint", tmp_path / "c.pth", segments / "images" / "validation" / "0.png")
    assert code == 0 and len(out.splitlines()) == 1 and "the EMA weights are taken" in err


def test_mistakes_of_a_prediction_are_one_line(segments, trained, tmp_path, capfd):
    image = segments / "images" / "validation" / "0.png"
    (tmp_path / "bad.png").write_bytes(b"no image")
    for arguments, message in (
        ([image, "--model", "biformer_nano"], "error: --model: a segmenter is what its checkpoint says"),
        ([image, segments / "images" / "training" / "0.png"], "error: .* would be written to one file, 0.png"),
    ):
        code, _, err = predicted(capfd, "--checkpoint", trained / "last.pth", *arguments, "--output", tmp_path / "out")
        assert code in (1, 2) and len(err.splitlines()) == 1
        assert re.match(message, err)
    code, out, err = predicted(capfd, "--checkpoint", trained / "last.pth", tmp_path / "bad.png", image)
    assert code == 1 and "cannot read" in err and "0.png: " in out
