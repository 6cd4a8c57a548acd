"""Robustness: accuracy by set, corruption errors by hand and by the paper, and `main.py --eval` on whole folders."""
import csv
from statistics import mean

import numpy as np
import pytest
import timm
import torch
from PIL import Image

import main as program
import models  # noqa: F401, registers our models with timm
from datasets import Reading, build_dataset
from helpers.evaluation import SMALL, evaluate, write_weights
from helpers.launch import launch
from helpers.robustness import write_images, write_sets
from tasks.classification import robustness
from tasks.classification.images import ImagePipeline
from tasks.classification.robustness import ALEXNET, ALEXNET_CLEAN, RobustnessAccuracy
from training.data.robustness import CORRUPTIONS, Part, set_classes
from training.distributed import Distributed
from training.precision import Precision

CPU = torch.device("cpu")
# Of ResNet-50, in CORRUPTIONS' order: table 1 of https://arxiv.org/abs/1903.12261; relative errors, its appendix.
RESNET50_CLEAN, RESNET50_MCE, RESNET50_RELATIVE_MCE = 23.9, 76.7, 105.0
RESNET50 = (80, 82, 83, 75, 89, 78, 80, 78, 75, 66, 57, 71, 85, 77, 77)
RESNET50_RELATIVE = (104, 107, 107, 97, 126, 107, 110, 101, 97, 79, 62, 89, 146, 111, 132)


def part(name, count=4, **kwargs):
    return Part(name, kwargs.pop("part", ""), None, np.array([b"x"] * count), np.zeros((count, 1), np.int32), **kwargs)


def accuracy_of(parts, logits, targets):
    evaluator = RobustnessAccuracy(CPU, Precision(), parts)
    evaluator.count(torch.as_tensor(logits, dtype=torch.float32), torch.as_tensor(targets))
    evaluator.compute(Distributed(CPU))
    return evaluator.by_part


def one_hot(*order):
    """Logits that put these classes first, in this order, and of the others the last ones."""
    logits = torch.linspace(-1, 0, 1000)
    for rank, index in enumerate(order):
        logits[index] = 10 - rank
    return logits


def test_any_of_the_right_classes_counts():
    logits = torch.stack([one_hot(3), one_hot(5), one_hot(7), one_hot(9, 8, 6, 4, 3)])
    found = accuracy_of([part("imagenet_real")], logits, [[0, 3, 5], [0, 3, 5], [0, 3, 5], [0, 3, -1]])
    assert found[0]["acc1"] == 50.0 and found[0]["acc5"] == 75.0 and found[0]["images"] == 4


def test_a_network_chooses_among_the_classes_of_the_set():
    """Class 0 is none of ImageNet-A's: the next probable one is its answer; in other sets it is wrong."""
    allowed = set_classes("imagenet_a")
    logits = one_hot(0, allowed[3]).repeat(2, 1)
    found = accuracy_of([part("imagenet_a"), part("imagenet_sketch")], logits, [[0, allowed[3]], [1, allowed[3]]])
    assert found[0]["acc1"] == 100.0 and found[1]["acc1"] == 0.0 and found[1]["acc5"] == 100.0
    expected = torch.nn.functional.cross_entropy(logits[:1, list(allowed)], torch.tensor([3])).item()
    assert found[0]["loss"] == pytest.approx(expected, rel=1e-4)  # in float32


def test_images_that_were_not_read_count_nowhere():
    found = accuracy_of([part("imagenet_a"), part("imagenet_r")], torch.zeros(3, 1000), [[-1, -1], [-1, -1], [1, 1]])
    assert list(found) == [1] and found[1]["images"] == 1


def test_corruption_errors_are_the_papers():
    """The two rows of ResNet-50 go together by AlexNet's errors: from CE follows the error, and from it relative CE."""
    errors = {name: [ce / 100 * ALEXNET[name]] * 5 for name, ce in zip(CORRUPTIONS, RESNET50, strict=True)}
    ce = robustness.corruption_errors(errors)
    assert mean(ce.values()) == pytest.approx(RESNET50_MCE, abs=0.5)  # of rounded numbers
    relative = robustness.relative_errors(errors, RESNET50_CLEAN / 100)
    for name, expected in zip(CORRUPTIONS, RESNET50_RELATIVE, strict=True):
        # the paper's CE are rounded to 1, its clean error to 0.1
        rounding = (0.5 * ALEXNET[name] + 0.05) / (ALEXNET[name] - ALEXNET_CLEAN) + 0.5
        assert abs(relative[name] - expected) <= rounding, name
    assert mean(relative.values()) == pytest.approx(RESNET50_RELATIVE_MCE, abs=1)
    of_alexnet = robustness.corruption_errors({name: [error] for name, error in ALEXNET.items()})
    assert list(of_alexnet.values()) == pytest.approx([100.0] * 15)


def test_corruption_errors_by_hand():
    """Of two corruptions with five severities: Σ error / Σ AlexNet's error."""
    errors = dict(fog=[0.5, 0.6, 0.7, 0.8, 0.9], snow=[0.2, 0.2, 0.2, 0.2, 0.7])
    ce = robustness.corruption_errors(errors)
    assert ce["fog"] == pytest.approx(100 * 3.5 / (5 * 0.819324)) and ce["snow"] == pytest.approx(100 * 1.5 / 4.33408)
    relative = robustness.relative_errors(errors, clean=0.1)
    assert relative["fog"] == pytest.approx(100 * (3.5 - 5 * 0.1) / (5 * 0.819324 - 5 * 0.43478))


# --- main.py ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return write_sets(tmp_path_factory.mktemp("sets"))


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return write_weights(tmp_path_factory.mktemp("weights") / "weights.pth", num_classes=1000)


def hits_of(weights, dataset):
    """By part, which images a network names right, computed one by one."""
    network = timm.create_model("biformer_nano", num_classes=1000, checkpoint_path=str(weights)).eval()
    parts, hits = dataset.source.parts, {}
    mean_, std = (torch.tensor(network.pretrained_cfg[key])[:, None, None] for key in ("mean", "std"))
    for image, (number, *labels) in (dataset[i] for i in range(len(dataset))):
        with torch.no_grad():
            logits = network(((torch.as_tensor(image) / 255 - mean_) / std)[None])[0]
        allowed = set_classes(parts[number].set) or range(1000)
        answer = max(allowed, key=lambda i: logits[i])
        hits.setdefault(number, []).append(answer in labels)
    return hits


def test_all_sets_by_one_command(root, weights, tmp_path, capfd):
    """The table is that of images evaluated one by one."""
    assert evaluate(weights, "--data_set", "robustness", "--data_path", root, "--report", tmp_path / "report") == 0
    out = capfd.readouterr().out
    with open(tmp_path / "report" / "robustness.csv", newline="", encoding="utf-8") as file:
        table = list(csv.DictReader(file))
    assert [row["part"] for row in table if row["set"] == "imagenet_c"] == [*CORRUPTIONS, "mean"]
    assert len(table) == 1 + 3 + 3 + 1 + 16 and all(f"* {row['set']}" in out for row in table)
    assert "imagenet_v2 has 8, 4, 4 images where the whole set has 10,000" in out

    cropped = ImagePipeline("biformer_nano", 32, crop_pct=1.0)
    assert f"ImageNet-C, which is cropped already, at {cropped.description}" in out
    transform, reading = ImagePipeline("biformer_nano", 32).transform(), Reading(cropped=cropped.transform())
    dataset = build_dataset("robustness", root, "val", transform, reading=reading)
    hits = hits_of(weights, dataset)
    by_name = {(row["set"], row["part"]): row for row in table}
    errors = {}
    for number, values in hits.items():
        own = dataset.source.parts[number]
        if own.severity is None:
            assert float(by_name[own.set, own.name]["acc1"]) == pytest.approx(100 * mean(values), abs=1e-3)
        else:
            errors.setdefault(own.name, []).append(1 - mean(values))
    for name, values in errors.items():
        row = by_name["imagenet_c", name]
        assert float(row["ce"]) == pytest.approx(100 * sum(values) / (5 * ALEXNET[name]), abs=1e-3)
        assert [float(row[f"error_{i}"]) for i in range(1, 6)] == pytest.approx([100 * v for v in values], abs=1e-3)
    mce = mean(100 * sum(values) / 5 / ALEXNET[name] for name, values in errors.items())
    assert float(by_name["imagenet_c", "mean"]["ce"]) == pytest.approx(mce, abs=1e-3) and f"mCE {mce:.2f}" in out
    assert "relative mCE" in out


@pytest.mark.distributed
def test_processes_share_the_sets(root, weights, tmp_path):
    """Each image once: the table is that of one process, the last digit of a sum apart."""
    asked = ["--data_set", "robustness", "--data_path", root, "--report"]
    assert evaluate(weights, *asked, tmp_path / "one") == 0
    launch(*SMALL, "--eval", "--resume", weights, *asked, tmp_path / "two")
    one, two = ((tmp_path / folder / "robustness.csv").read_text() for folder in ("one", "two"))
    assert one == two and len(one.splitlines()) == 25


def test_some_corruptions_have_no_mean(weights, tmp_path, capfd):
    """Nor are errors relative to those without corruption, where these images are missing."""
    for severity in range(1, 6):
        write_images(tmp_path / "fog" / str(severity), ["n01440764"])
    assert evaluate(weights, "--data_set", "imagenet_c", "--data_path", tmp_path) == 0
    out = capfd.readouterr().out
    assert "* imagenet_c fog " in out and "mCE" not in out and "relative" not in out


def test_one_set(root, weights, capfd):
    assert evaluate(weights, "--data_set", "imagenet_a", "--data_path", root / "imagenet-a") == 0
    out = capfd.readouterr().out
    assert "on 6 images" in out and out.count("* imagenet") == 1


def test_images_that_are_cropped_already_are_not_cropped_again(tmp_path, weights, capfd):
    """As their authors evaluate them: 224 pixels stay as they are; `--crop_pct` decides otherwise."""
    for severity in range(1, 6):
        write_images(tmp_path / "fog" / str(severity), ["n01440764"], size=(64, 64))
    pipeline = ImagePipeline("biformer_nano", 64)
    reading = Reading(cropped=ImagePipeline("biformer_nano", 64, crop_pct=1.0).transform())
    dataset = build_dataset("imagenet_c", tmp_path, "val", pipeline.transform(), reading=reading)
    with Image.open(dataset.name(0)) as image:
        assert (np.asarray(dataset[0][0]) == np.asarray(image).transpose(2, 0, 1)).all()
    asked = ["--data_set", "imagenet_c", "--data_path", tmp_path, "--crop_pct", "0.9"]
    assert evaluate(weights, *asked) == 0
    out = capfd.readouterr().out
    assert "evaluated at 32 x 32, crop 0.9, bicubic\n" in out


def test_weights_of_nan_are_no_result(root, weights, tmp_path, capfd):
    state = torch.load(weights, weights_only=True)
    state["head.fc.bias" if "head.fc.bias" in state else "head.bias"][:] = 3e38
    torch.save({key: value * 1e20 if "head" in key else value for key, value in state.items()}, tmp_path / "large.pth")
    assert evaluate(tmp_path / "large.pth", "--data_set", "imagenet_v2", "--data_path", root) == 1
    assert "NaN or infinite" in capfd.readouterr().err


@pytest.mark.parametrize(("arguments", "error"), [
    (["--data_set", "imagenet_a", "--nb_classes", "10"], "10 classes were asked for, fewer than the 1000"),
    (["--data_set", "imagenet_a", "--split", "test"], "--data_set imagenet_a has no split test"),
    (["--data_set", "imagenet_b"], "unknown data set 'imagenet_b'"),
    (["--data_set", "imagenet_c", "--val_split", "0.1"], "--val_split is for folders of images"),
])
def test_mistakes(root, weights, capfd, arguments, error):
    assert evaluate(weights, "--data_path", root, *arguments) in (1, 2)
    assert error in capfd.readouterr().err


def test_they_are_not_trained_on(root, capfd):
    assert program.main(["--data_set", "imagenet_a", "--data_path", str(root), "--model", "biformer_nano"]) == 2
    assert "--data_set imagenet_a is to be evaluated: it needs --eval" in capfd.readouterr().err


def test_a_network_of_other_classes_is_refused(root, tmp_path, capfd):
    torch.save(timm.create_model("biformer_nano", num_classes=10).state_dict(), tmp_path / "ten.pth")
    assert evaluate(tmp_path / "ten.pth", "--data_set", "imagenet_a", "--data_path", root) == 1
    assert "the checkpoint does not fit biformer_nano with 1000 classes" in capfd.readouterr().err
