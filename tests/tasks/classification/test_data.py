"""The data of a run of classification: what is evaluated, how classes are numbered, what is held out, what is said."""
import json
import re
import shutil
from pathlib import Path

import pytest
import timm
import torch
from timm.data import ImageNetInfo

import main as program
from helpers.photos import write_photos
from helpers.run_state import differences
from scripts import make_shards
from tasks.classification.options import ClassificationSettings
from tasks.classification.task import ClassificationTask
from training import parsing
from training.distributed import Distributed
from training.precision import Precision

MODEL = ["--model", "biformer_nano", "--input_size", "32", "--batch_size", "4", "--num_workers", "0", "--device", "cpu"]
SHORT = ["--epochs", "1", "--warmup_epochs", "0", "--lr", "1e-2", "--repeated_aug", "false"]


def run(*arguments, code=0):
    assert program.main([*MODEL, *map(str, arguments)]) == code


def train(*arguments, code=0):
    run(*SHORT, *arguments, code=code)


def task_of(*arguments, rank=0):
    settings = parsing.parse(ClassificationSettings, [*MODEL[:-2], *map(str, arguments)])
    return ClassificationTask(settings, Distributed(torch.device("cpu"), rank, 2), Precision())


def paths(dataset):
    return [path for path, _ in dataset.source.samples]


@pytest.fixture
def data(tmp_path):
    return write_photos(tmp_path / "data", train=18, val=9)


@pytest.fixture
def flat(tmp_path, data):
    """Class folders right in the data folder."""
    (data / "train").rename(tmp_path / "flat")
    return tmp_path / "flat"


@pytest.fixture
def favour(tmp_path):
    """A checkpoint of so many classes that takes every image for one of them."""

    def favour(num_classes, favourite, **entries):
        weights = timm.create_model("biformer_nano", num_classes=num_classes).state_dict()
        weights["head.fc.bias"][favourite] += 100
        torch.save(dict(model=weights, **entries), tmp_path / "favour.pth")
        return tmp_path / "favour.pth"

    return favour


# --- what is said -----------------------------------------------------------------------------------------------------


def test_what_is_left_out_is_said_once_by_one_process(data, capsys):
    for split in ("train", "val"):
        (data / split / "class0" / "0.heic").touch()
        (data / split / "class1" / ".ipynb_checkpoints").mkdir()
    for rank in (0, 1):
        task = task_of("--data_path", data, rank=rank)
        for split in ("train", "val", "val"):
            task.dataset(split)
        said = capsys.readouterr().out.splitlines()
        assert said == ([] if rank else [f"left out 1 file in {data}/{split} that is no image: 1 .heic"
                                         for split in ("train", "val")])


def test_one_class_is_nothing_to_learn(data, tmp_path, favour, capfd):
    for split in ("train", "val"):
        for name in ("class0", "class2"):
            shutil.rmtree(data / split / name)
    make_shards.main([str(data), str(tmp_path / "shards")])
    for source in (["--data_path", data], ["--data_path", data, "--nb_classes", "1000"]):
        train(*source, "--output_dir", tmp_path / "out", code=1)
        assert "error: the training set has one class, class1: there is nothing to learn\n" in capfd.readouterr().err
    rename_classes(tmp_path / "shards", None)
    train("--data_set", "wds/x", "--data_path", tmp_path / "shards", "--output_dir", tmp_path / "out", code=1)
    assert "error: the training set has one class: there is nothing to learn\n" in capfd.readouterr().err
    assert not (tmp_path / "out").exists()
    task = task_of("--data_path", data, "--eval", "--resume", favour(1, 0))
    assert len(task.dataset("val")) == 3, "to evaluate on one class is another matter"


# --- numbers of classes -----------------------------------------------------------------------------------------------


def evaluation_of(capfd, *arguments):
    """(Acc@1, number of images, all that is printed) of an evaluation."""
    run("--eval", *arguments)
    out = capfd.readouterr().out
    accuracy, images = re.search(r"Acc@1 ([\d.]+)", out), re.search(r"on (\d+) \w+ images", out)
    return float(accuracy.group(1)), int(images.group(1)), out


def test_some_synsets_of_imagenet_are_evaluated_by_its_numbers(data, favour, capfd):
    """Ten folders of ImageNet and weights of 1000 classes gave an accuracy of 0."""
    synsets = dict(class0="n01440764", class1="n02102040", class2="n03888257")
    for split in ("train", "val"):
        for name, synset in synsets.items():
            (data / split / name).rename(data / split / synset)
    (data / "val" / "n02102040" / "1.png").unlink()
    weights = favour(1000, ImageNetInfo().label_names().index("n02102040"))
    accuracy, images, out = evaluation_of(capfd, "--data_path", data, "--resume", weights, "--nb_classes", 1000)
    assert images == 8 and accuracy == pytest.approx(100 * 2 / 8, abs=1e-3)
    assert "3 class folders are synsets of ImageNet: numbered as its 1000 classes, 0 is n01440764 and 701" in out
    task = task_of("--data_path", data, "--eval", "--load_release", "--model", "biformer_tiny")
    assert set(targets_of(task.dataset("val"))) == {0, 217, 701} and task.num_classes == 1000
    own = task_of("--data_path", data)  # a network of the folders' three classes
    assert set(targets_of(own.dataset("train"))) == {0, 1, 2} and own.num_classes == 3


def test_training_from_published_weights_of_other_classes_says_so(data, capfd):
    task = task_of("--data_path", data, "--load_release", "--model", "biformer_nano")
    task.dataset("train")
    assert task.network().num_classes == 3
    told = "the published biformer_nano has 10 classes, not 3: the classifier is re-initialised"
    assert told in capfd.readouterr().out


def targets_of(dataset):
    return [target for _, target in dataset.source.samples]


def test_synsets_are_packed_by_their_numbers(data, tmp_path):
    for split in ("train", "val"):
        for name, synset in dict(class0="n01440764", class1="n02102040", class2="n03888257").items():
            (data / split / name).rename(data / split / synset)
    assert make_shards.main([str(data), str(tmp_path / "shards"), "--nb_classes", "1000"]) == 0
    task = task_of("--data_set", "wds/x", "--data_path", tmp_path / "shards")
    assert {target for _, target in task.dataset("val").source} == {0, 217, 701} and task.num_classes == 1000


@pytest.fixture
def numbered(data):
    """Folders 9, 10 and 11."""
    for split in ("train", "val"):
        for i, name in enumerate(("9", "10", "11")):
            (data / split / f"class{i}").rename(data / split / name)
    return data


def test_integer_folders_are_evaluated_by_their_order(numbered, favour, capfd):
    (numbered / "val" / "10" / "1.png").unlink()
    weights = favour(3, 1)
    accuracy, images, out = evaluation_of(capfd, "--data_path", numbered, "--resume", weights)
    assert images == 8 and accuracy == pytest.approx(100 * 2 / 8, abs=1e-3) and "class folders" not in out
    out = evaluation_of(capfd, "--data_path", numbered, "--resume", favour(1000, 1), "--nb_classes", 1000)[2]
    assert "3 class folders, for a network of 1000 classes: numbered in order, 0 is 9 and 2 is 11" in out


def test_a_run_that_numbered_integer_folders_by_their_letters(numbered, tmp_path, favour, capfd):
    """It is not resumed, and evaluated by its own numbers."""
    train("--data_path", numbered, "--output_dir", tmp_path / "run")
    checkpoint = torch.load(tmp_path / "run" / "last.pth", weights_only=True)
    assert checkpoint["classes"] == ["9", "10", "11"]
    torch.save({**checkpoint, "classes": ["10", "11", "9"]}, tmp_path / "old.pth")
    train("--data_path", numbered, "--output_dir", tmp_path / "out", "--resume", tmp_path / "old.pth", "--epochs", 2,
          code=1)
    assert "was trained on the same classes in another order: number 0 was '10', and is '9' here" \
        in capfd.readouterr().err
    (numbered / "val" / "10" / "1.png").unlink()
    weights = favour(3, 0, classes=["10", "11", "9"])
    accuracy, images, out = evaluation_of(capfd, "--data_path", numbered, "--resume", weights)
    assert images == 8 and accuracy == pytest.approx(100 * 2 / 8, abs=1e-3) and "warning" not in out


CLASSES = ["class0", "class1", "class2", "class3"]


@pytest.mark.parametrize("way", ["--resume", "--finetune"])
@pytest.mark.parametrize("asked", [[], ["--nb_classes", 6]])
def test_a_folder_that_lacks_a_class_is_evaluated_by_the_checkpoints_names(data, favour, tmp_path, capfd, way, asked):
    """It was refused, or with --nb_classes numbered in order: a wrong accuracy."""
    shutil.rmtree(data / "val" / "class0")
    (data / "val" / "class1" / "1.png").unlink()
    weights = favour(6 if asked else 4, 1, classes=CLASSES)
    report = ["--report", tmp_path / "report"]
    accuracy, images, out = evaluation_of(capfd, "--data_path", data, way, weights, *asked, *report)
    assert images == 5 and accuracy == pytest.approx(100 * 2 / 5, abs=1e-3)
    assert out.count(f"no images in {data}/val of 2 of the network's 4 classes: class0, class3\n") == 1
    assert "warning" not in out and "numbered in order" not in out


def test_a_folder_without_a_class_in_the_checkpoint_is_one_line(data, favour, capfd):
    (data / "val" / "class1").rename(data / "val" / "Class1")
    run("--eval", "--data_path", data, "--resume", favour(4, 1, classes=CLASSES), code=1)
    complaint = f"{data}/val has folders that the network has no class for: Class1; did you mean class1"
    assert capfd.readouterr().err.startswith(f"error: {complaint}")


def rename_classes(shards, classes):
    """Have the list of shards call the classes so, or not at all."""
    info = json.loads((shards / "_info.json").read_text())
    named = {} if classes is None else dict(classes=classes)
    others = {key: value for key, value in info.items() if key != "classes"}
    (shards / "_info.json").write_text(json.dumps(others | named))


@pytest.fixture
def shards(data, tmp_path):
    """The flags of shards of three classes."""
    assert make_shards.main([str(data), str(tmp_path / "shards")]) == 0
    return ["--data_set", "wds/x", "--data_path", tmp_path / "shards"]


def test_shards_and_checkpoints_of_no_names_are_evaluated_as_ever(data, favour, tmp_path, capfd):
    shutil.rmtree(data / "val" / "class2")
    accuracy, images, out = evaluation_of(capfd, "--data_path", data, "--resume", favour(2, 1, classes=7))
    assert images == 6 and accuracy == 50 and "no images" not in out
    assert make_shards.main([str(data), str(tmp_path / "shards"), "--splits", "val"]) == 0
    rename_classes(tmp_path / "shards", None)
    weights = favour(2, 1, classes=["class1", "class0"])
    shards = ["--data_set", "wds/x", "--data_path", tmp_path / "shards"]
    assert evaluation_of(capfd, *shards, "--resume", weights)[:2] == (50, 6)


def test_shards_are_evaluated_by_the_checkpoints_names(data, favour, tmp_path, capfd):
    """As the folder that they were packed from; without a remark, their numbers were taken for the network's."""
    (data / "val" / "class2" / "2.png").unlink()
    shutil.rmtree(data / "val" / "class0")
    assert make_shards.main([str(data), str(tmp_path / "shards"), "--splits", "val"]) == 0
    weights = ["--resume", favour(4, 1, classes=["class3", "class2", "class1", "class0"])]
    folder = evaluation_of(capfd, "--data_path", data, *weights, "--report", tmp_path / "report")
    shards = evaluation_of(capfd, "--data_set", "wds/x", "--data_path", tmp_path / "shards", *weights, "--report",
                           tmp_path / "of shards")
    assert shards[:2] == folder[:2] == (40, 5) and "warning" not in shards[2]
    assert f"no images in {tmp_path}/shards of 2 of the network's 4 classes: class3, class0\n" in shards[2]
    for name in ("classes.csv", "confusion.csv"):
        assert (tmp_path / "of shards" / name).read_text() == (tmp_path / "report" / name).read_text()
    rename_classes(tmp_path / "shards", ["class1", "other"])
    run("--eval", "--data_set", "wds/x", "--data_path", tmp_path / "shards", *weights, code=1)
    complaint = f"{tmp_path}/shards has classes that the network has no class for: other; its classes are class3, "
    assert complaint in capfd.readouterr().err


def test_fine_tuning_on_shards_of_other_classes_begins_with_a_new_classifier(shards, favour, tmp_path, capfd):
    weights = favour(3, 1, classes=["class0", "class1", "other"])
    train(*shards, "--finetune", weights, "--output_dir", tmp_path / "run")
    reason = "was trained on other classes: 'other', where the data has 'class2'"
    assert f"{weights} {reason}: the classifier is re-initialised\n" in capfd.readouterr().out
    checkpoint = torch.load(tmp_path / "run" / "last.pth", weights_only=True)
    assert checkpoint["classes"] == ["class0", "class1", "class2"]


def test_a_run_on_shards_resumes_where_their_classes_are_the_same(shards, tmp_path, capfd):
    """One from before they had names too."""
    rename_classes(tmp_path / "shards", None)
    train(*shards, "--output_dir", tmp_path / "run")
    assert torch.load(tmp_path / "run" / "last.pth", weights_only=True)["classes"] is None
    rename_classes(tmp_path / "shards", ["a", "b", "c"])
    again = ["--auto_resume", "--output_dir", tmp_path / "run", "--epochs"]
    train(*shards, *again, 2)
    assert torch.load(tmp_path / "run" / "last.pth", weights_only=True)["classes"] == ["a", "b", "c"]
    rename_classes(tmp_path / "shards", ["a", "b", "d"])
    train(*shards, *again, 3, code=1)
    assert "was trained on other classes: 'c', where the data has 'd'" in capfd.readouterr().err


# --- what is written --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("asked", [[], ["--output_dir", "run1"], ["--output_dir", "."], ["--output_dir", "class0/run"],
                                   ["--output_dir", "../run", "--show_batch", "class0/shown.png"]])
def test_a_run_among_the_class_folders_is_refused(flat, monkeypatch, capfd, asked):
    """It could be neither resumed nor evaluated: it was a class without images."""
    monkeypatch.chdir(flat)
    before = sorted(flat.rglob("*"))
    train("--data_path", ".", "--val_split", 0.2, *asked, code=2)
    written = " ".join(asked[-2:]) or "outputs, where a run writes without --output_dir,"
    complaint = f"{written} lies among the class folders of . and would be taken for a class: take a folder elsewhere\n"
    assert capfd.readouterr().err == f"error: {complaint}" and sorted(flat.rglob("*")) == before


def test_a_report_among_the_class_folders_is_refused(data, favour, capfd):
    """Its confusion matrix was an image of one more class."""
    evaluation = ["--eval", "--data_path", data, "--resume", favour(3, 1), "--report"]
    run(*evaluation, data / "val" / "report", code=2)
    complaint = f"--report {data}/val/report lies among the class folders of {data}/val and would be taken for a class"
    assert complaint in capfd.readouterr().err and not (data / "val" / "report").exists()
    run(*evaluation, data / "report")
    assert (data / "report" / "classes.csv").exists()


# --- what is held out -------------------------------------------------------------------------------------------------


@pytest.fixture
def held_out_run(flat, tmp_path):
    """A run that held out a third of each class's six images, by seed 5."""
    train("--data_path", flat, "--val_split", 0.33, "--seed", 5, "--output_dir", tmp_path / "run")
    return tmp_path / "run"


def test_a_part_of_the_training_images_is_held_out(flat, held_out_run, capfd):
    record = json.loads((held_out_run / "log.txt").read_text())
    assert record["step"] == 3, "12 of 18 images"
    capfd.readouterr()
    last = ["--data_path", flat, "--resume", held_out_run / "last.pth", "--seed", 5]
    accuracy, images, out = evaluation_of(capfd, *last, "--val_split", 0.33)
    assert images == 6 and accuracy == pytest.approx(record["val_acc1"], abs=1e-3) and "warning" not in out
    assert out.count(f"held out for validation: 6 of the 18 images in {flat}, 0.33 of each class by seed 5\n") == 1
    assert evaluation_of(capfd, *last, "--val_split", 0.33, "--split", "train")[1] == 12
    for part in (["--val_split", 0.5], ["--val_split", 0.33, "--seed", 6]):
        assert "may have been trained on" in evaluation_of(capfd, *last, *part)[2]


def test_a_run_resumes_with_the_same_part_held_out(flat, held_out_run, tmp_path, capfd):
    again = ["--data_path", flat, "--epochs", 2, "--resume", held_out_run / "last.pth", "--output_dir", tmp_path / "a"]
    for part, held_out in ((["--seed", 0], "0.33 of each class by seed 0"),
                           (["--val_split", 0.5], "0.5 of each class by seed 5"),
                           (["--val_split", "null", "--disable_eval"], "nothing")):
        train(*again, *part, code=1)
        error = capfd.readouterr().err
        assert f"was trained with 0.33 of each class by seed 5 held out for validation, here it is {held_out};" in error
        assert error.endswith("; give --val_split and --seed as in that run, or fine-tune from it with --finetune\n")
    train(*again)
    # it evaluates the epoch that it comes from again
    loss, again = (json.loads((folder / "log.txt").read_text().splitlines()[0])["val_loss"]
                   for folder in (held_out_run, tmp_path / "a"))
    assert loss == again


LEAK = "may have been trained on {} images held out for validation"


def add_photographs(flat):
    """Six more in each class, of which two are held out, by seed 5; before, two of the old ones were."""
    for folder in flat.iterdir():
        for path in list(folder.iterdir()):
            shutil.copy(path, path.with_stem(f"new{path.stem}"))


def test_a_run_whose_images_changed_may_have_trained_on_those_held_out_now(flat, held_out_run, tmp_path, capfd):
    """Every later start and evaluation says so: what it has seen, it has seen."""
    before = set(paths(task_of("--data_path", flat, "--val_split", 0.33, "--seed", 5).dataset("val")))
    add_photographs(flat)
    now = set(paths(task_of("--data_path", flat, "--val_split", 0.33, "--seed", 5).dataset("val")))
    new = len(now - before)
    assert new and len(before) == 6 and len(now) == 12
    line = LEAK.format(f"{new} of the 12")
    capfd.readouterr()
    last = held_out_run / "last.pth"
    for epochs, name in ((2, "second"), (3, "third")):
        assert f"warning: {last} {line}\n" in evaluation_of(capfd, "--resume", last, "--data_path", flat)[2]
        train("--resume", last, "--data_path", flat, "--epochs", epochs, "--output_dir", tmp_path / name)
        assert capfd.readouterr().out.count(f" {line}\n") == 1
        last = tmp_path / name / "last.pth"


def test_images_that_were_always_held_out_are_evaluated_without_a_warning(flat, held_out_run, capfd):
    """Some of them, or what is left of them."""
    last = held_out_run / "last.pth"
    assert "may have" not in evaluation_of(capfd, "--resume", last, "--val_split", 0.17)[2]
    for path in paths(task_of("--data_path", flat, "--val_split", 0.33, "--seed", 5).dataset("train")):
        Path(path).unlink()
    assert "may have" not in evaluation_of(capfd, "--resume", last)[2]


def test_shards_do_not_tell_what_of_them_was_held_out(flat, held_out_run, tmp_path, capfd):
    assert make_shards.main([str(flat), str(tmp_path / "shards"), "--val_split", "0.33"]) == 0
    last = held_out_run / "last.pth"
    _, _, out = evaluation_of(capfd, "--resume", last, "--data_set", "wds/x", "--data_path", tmp_path / "shards")
    assert f"warning: {last} was trained on a part of a folder: shards do not tell whether on these images\n" in out


def test_fine_tuning_on_what_a_run_may_have_trained_on(flat, held_out_run, tmp_path, capfd):
    """Of other photographs nothing is said, whatever was held out of them."""
    capfd.readouterr()
    best = held_out_run / "best.pth"
    arguments = ["--data_path", flat, "--seed", 5, "--finetune", best, "--output_dir"]
    train(*arguments, tmp_path / "same", "--val_split", 0.33)
    assert "may have" not in capfd.readouterr().out
    train(*arguments, tmp_path / "more", "--val_split", 0.5)
    assert f"warning: {best} {LEAK.format('3 of the 9')}\n" in capfd.readouterr().out
    more = tmp_path / "more" / "best.pth"
    assert f"warning: {more} {LEAK.format('3 of the 9')}\n" in evaluation_of(capfd, "--resume", more)[2], "it still may"
    train(*arguments, tmp_path / "seed", "--val_split", 0.5, "--seed", 6)
    then, now = (
        set(paths(task_of("--data_path", flat, "--val_split", share, "--seed", seed).dataset("val")))
        for share, seed in ((0.33, 5), (0.5, 6))
    )
    seen = f"{len(now - then)} of the 9"
    assert now & then and f"warning: {best} {LEAK.format(seen)}\n" in capfd.readouterr().out, "by another seed"
    for folder in flat.iterdir():
        for path in list(folder.iterdir()):
            path.rename(path.with_stem(f"new{path.stem}"))
    train(*arguments, tmp_path / "others", "--val_split", 0.5)
    assert "may have" not in capfd.readouterr().out


def test_runs_from_before_their_images_were_noted_are_read_as_ever(flat, held_out_run, tmp_path, capfd):
    checkpoint = torch.load(held_out_run / "last.pth", weights_only=True)
    del checkpoint["held_out_images"]
    torch.save(checkpoint, tmp_path / "old.pth")
    add_photographs(flat)
    capfd.readouterr()
    train("--resume", tmp_path / "old.pth", "--epochs", 2, "--output_dir", tmp_path / "again")
    assert "may have" not in capfd.readouterr().out + evaluation_of(capfd, "--resume", tmp_path / "old.pth")[2]


def test_the_same_images_elsewhere_are_the_same(flat, held_out_run, tmp_path, capfd):
    shutil.copytree(flat, tmp_path / "elsewhere" / "train")
    last = ["--resume", held_out_run / "last.pth", "--data_path", tmp_path / "elsewhere", "--val_split", 0.33]
    assert "warning" not in evaluation_of(capfd, *last)[2]
    assert "warning" in evaluation_of(capfd, *last, "--seed", 6)[2]


@pytest.mark.slow
def test_a_run_with_images_held_out_resumes_bit_for_bit(flat, tmp_path, capfd):
    command = ["--data_path", flat, "--val_split", 0.33, "--epochs", 2, "--save_every_steps", 2]
    for folder in ("whole", "resumed"):
        train(*command, "--output_dir", tmp_path / folder, "--keep_checkpoints", 9)
    for name in ("last.pth", *(f"checkpoint-0000000{step}.pth" for step in (3, 4, 6))):
        (tmp_path / "resumed" / name).unlink()  # killed after two steps
    train(*command, "--output_dir", tmp_path / "resumed", "--auto_resume")
    assert "checkpoint-00000002.pth: epoch 0, step 2 of 3\n" in capfd.readouterr().out
    assert differences(tmp_path / "whole", tmp_path / "resumed") == []


def test_every_process_and_every_start_holds_out_the_same(flat):
    parts = {}
    for rank in (0, 1):
        task = task_of("--data_path", flat, "--val_split", 0.2, rank=rank)
        parts[rank] = [paths(task.dataset(split)) for split in ("train", "val")]
    assert parts[0] == parts[1] and len(parts[0][1]) == 3
    assert task.held_out.rule == "0.2 of each class by seed 0" and len(task.held_out.images) == 3


def test_training_images_without_val_are_told_of_val_split(flat, data, capfd):
    advice = "; --val_split 0.1 holds a tenth of the training images out instead\n"
    train("--data_path", flat, code=1)
    error = capfd.readouterr().err
    assert f"{flat} has no folder val: expected val/CLASS/IMAGE, found class0, class1, class2" in error
    assert error.endswith(advice)
    flat.rename(data / "train")
    train("--data_path", data, "--val_split", 0.1, code=1)
    assert capfd.readouterr().err.endswith("was to be held out; --val_split null evaluates on that folder\n")
    shutil.rmtree(data / "val")
    train("--data_path", data, code=1)
    assert capfd.readouterr().err.endswith(advice)


@pytest.mark.parametrize("words, complaint", [
    (["--val_split", "0"], "--val_split must be above 0 and below 1, got 0.0"),
    (["--val_split", "1"], "--val_split must be above 0 and below 1, got 1.0"),
    (["--val_split", "0.1", "--data_set", "CIFAR10"],
     "--val_split is for folders of images; CIFAR10 has a val split of its own"),
    (["--split", "test"], "--split test is for --eval; training evaluates on val"),
    (["--split", "dev", "--eval"], "choose from"),
])
def test_splits_that_make_no_sense(data, words, complaint, capfd):
    run("--data_path", data, *words, code=2)
    assert complaint in capfd.readouterr().err


# --- which split is evaluated -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["folders", "shards"])
def test_any_split_is_evaluated(data, tmp_path, favour, kind, capfd):
    shutil.copytree(data / "val", data / "test")
    (data / "test" / "class1" / "1.png").unlink()
    if kind == "shards":
        make_shards.main([str(data), str(tmp_path / "shards"), "--splits", "train", "val", "test"])
    source = ["--data_path", data] if kind == "folders" else ["--data_set", "wds/x", "--data_path", tmp_path / "shards"]
    weights = ["--resume", favour(3, 1)]
    expected = dict(train=(18, 100 / 3), val=(9, 100 / 3), test=(8, 100 * 2 / 8))
    for split, (number, share) in expected.items():
        accuracy, images, out = evaluation_of(capfd, *source, *weights, "--split", split)
        assert f"of the network on {number} {split} images\n" in out
        assert images == number and accuracy == pytest.approx(share, abs=1e-3)
    assert evaluation_of(capfd, *source, *weights)[1] == 9
    dataset = task_of(*source, *weights, "--eval", "--split", "train").dataset("train")
    assert torch.equal(dataset[0, 1][0], dataset[0, 2][0]), "nothing is augmented"


def test_a_split_that_is_not_there_is_one_line(data, tmp_path, favour, capfd):
    make_shards.main([str(data), str(tmp_path / "shards")])
    evaluation = ["--eval", "--resume", favour(3, 1), "--split", "test"]
    for source, complaint in (
        (["--data_path", data], "has no folder test: expected test/CLASS/IMAGE, found train, val\n"),
        (["--data_set", "wds/x", "--data_path", tmp_path / "shards"], "lists no split test; it lists train, val\n"),
        (["--data_set", "digits"], "digits has no split test; its splits are train and val\n"),
    ):
        capfd.readouterr()
        run(*evaluation, *source, code=1)
        assert capfd.readouterr().err.endswith(complaint)


def test_without_val_all_images_are_advised_to_be_evaluated(flat, favour, capfd):
    """Holding out a part of them was advised alone, of which a run that never saw these images has no need."""
    run("--eval", "--data_path", flat, "--resume", favour(3, 1), code=1)
    assert capfd.readouterr().err.endswith(
        "found class0, class1, class2; --split train evaluates on all of these images, --val_split and --seed as of a "
        "run on those that it held out\n")
    assert evaluation_of(capfd, "--data_path", flat, "--resume", favour(3, 1), "--split", "train")[1] == 18
    train("--data_path", flat, code=1)
    advice = "--val_split 0.1 holds a tenth of the training images out instead\n"
    assert capfd.readouterr().err.endswith(f"found class0, class1, class2; {advice}")


def test_the_folder_of_a_split_is_no_data_folder(data, favour, capfd):
    run("--eval", "--data_path", data / "val", "--resume", favour(3, 1), code=1)
    complaint = "is the folder of one split, with no folder val in it: give the folder above it"
    assert capfd.readouterr().err == f"error: {data}/val {complaint}, {data}\n"
    train("--data_path", data / "train", code=1)
    assert capfd.readouterr().err == f"error: {data}/train {complaint}, {data}\n"
