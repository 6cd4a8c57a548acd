"""What a user is told to do about an error of this task, from the command line down to the module that raises it."""
import json

import pytest
import timm
import torch

import main as program
import models  # noqa: F401, registers our models with timm
from helpers.photos import write_photos
from helpers.web import served
from scripts import make_shards

SMALL = ["--model", "biformer_nano", "--input_size", "32", "--batch_size", "4", "--device", "cpu"]
SHORT = ["--epochs", "1", "--warmup_epochs", "0", "--lr", "1e-2", "--disable_eval"]


@pytest.fixture
def complaint(capfd, tmp_path):
    """Exit code, and the one line that a command line ends with."""

    def complaint(*arguments, num_workers=0):
        output = ["--output_dir", tmp_path / "out", "--num_workers", num_workers]
        code = program.main([str(argument) for argument in (*SMALL, *SHORT, *output, *arguments)])
        lines = capfd.readouterr().err.splitlines()
        assert len(lines) == 1 and lines[0].startswith("error: ")
        return code, lines[0].removeprefix("error: ")

    return complaint


@pytest.fixture
def data(tmp_path):
    return write_photos(tmp_path / "data", train=13, val=7)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_an_unreadable_image(complaint, data, num_workers):
    path = data / "train" / "class1" / "1.png"
    path.write_bytes(b"text")
    told = complaint("--data_path", data, "--repeated_aug", "false", num_workers=num_workers)
    assert told == (1, f"cannot read {path}: not an image; remove it, or pass --skip_bad_images")


def test_an_unreadable_image_in_a_shard(complaint, data, tmp_path, capfd):
    """Which cannot be removed."""
    assert make_shards.main([str(data), str(tmp_path / "shards"), "--size", "100"]) == 0
    capfd.readouterr()
    path = tmp_path / "shards" / "train-000000.tar"
    path.write_bytes(path.read_bytes().replace(b"PNG", b"xyz"))
    code, text = complaint("--data_set", "wds/x", "--data_path", tmp_path / "shards")
    assert code == 1 and text.startswith("cannot read 000000")
    assert text.endswith(f".png in {path}: not an image; pass --skip_bad_images, or make the shards again without it")


def test_cifar_that_is_missing(complaint, tmp_path):
    code, text = complaint("--data_set", "CIFAR10", "--data_path", tmp_path)
    assert code == 1 and text.startswith(f"CIFAR10 is not in {tmp_path}, or incomplete; unpack https://")
    assert text.endswith(" there; or pass --download")


def test_fewer_classes_than_the_data_holds(complaint, data):
    code, text = complaint("--data_path", data, "--nb_classes", "2")
    assert code == 2
    assert text == "2 classes were asked for, fewer than the 3 that the data holds; raise --nb_classes, or leave it out"


def test_an_unknown_policy(complaint, data):
    code, text = complaint("--data_path", data, "--aa", "nonsense")
    assert code == 2 and text.startswith("unknown augmentation policy 'nonsense'; choose from rand, ")
    assert text.endswith("; --aa takes timm's policies, or none")


def test_weights_that_cannot_be_downloaded(complaint, data, monkeypatch):
    def offline(*_, **__):
        raise RuntimeError("no route to host")

    monkeypatch.setattr(timm, "create_model", offline)
    told = complaint("--data_path", data, "--load_release")
    assert told == (1, "biformer_nano cannot be built: no route to host; --finetune takes a file of weights")


def test_weights_that_no_program_can_download(complaint, data):
    """No Python is told to who types a command."""
    code, text = complaint("--data_path", data, "--model", "bvit_5m", "--load_release")
    assert code == 1 and text.startswith("no program can download the weights of bvit_5m: get them by hand, from ")
    assert text.endswith("/Broad_ViT; --finetune takes a file of weights")
    teacher = ["--distillation_type", "soft", "--teacher_model", "bvit_5m", "--nb_classes", "1000"]
    code, text = complaint("--data_path", data, *teacher)
    assert code == 1 and text.endswith("/Broad_ViT; --teacher_path takes a file of weights")


def test_published_weights_of_other_classes(complaint, data):
    code, text = complaint("--data_path", data, "--model", "biformer_tiny", "--eval", "--load_release")
    assert code == 1 and text.startswith("the published weights of biformer_tiny have 1000 classes, the data has 3; ")
    assert "fine-tune them first, or give their number with --nb_classes" in text
    code, text = complaint("--data_path", data, "--eval", "--load_release")
    assert code == 1 and "folders that the network has no class for: class0, class1, class2; its classes are n0" in text


@pytest.mark.parametrize("way", ["--finetune", "--eval --resume", "--teacher_path"])
def test_weights_of_another_model(complaint, data, tmp_path, way):
    """Of the same class, so that its name said nothing."""
    weights = timm.create_model("biformer_nano", num_classes=3).state_dict()
    args = dict(task="classification", model="biformer_nano")
    torch.save(dict(model=weights, args=args, classes=["class0", "class1", "class2"]), tmp_path / "nano.pth")
    teacher = ["--distillation_type", "soft", "--teacher_model"] if way == "--teacher_path" else ["--model"]
    code, text = complaint("--data_path", data, *teacher, "biformer_tiny", *way.split(), tmp_path / "nano.pth")
    assert code == 1 and text.startswith("the checkpoint does not fit biformer_tiny with 3 classes: ")
    flag = "--teacher_model" if way == "--teacher_path" else "--model"
    assert text.endswith(f"; this is biformer_nano's with 3 classes; {flag} must name the model of the weights")


def test_weights_of_other_arguments_of_the_model(complaint, data, tmp_path):
    """Which --model would not mend."""
    weights = timm.create_model("biformer_nano", num_classes=3).state_dict()
    torch.save(dict(model={"extra": weights["head.fc.bias"], **weights}, args=dict(model="biformer_nano.x")),
               tmp_path / "other.pth")
    code, text = complaint("--data_path", data, "--finetune", tmp_path / "other.pth")
    assert code == 1 and text.startswith("the checkpoint does not fit biformer_nano with 3 classes: ")
    assert text.endswith("; this is biformer_nano.x's")


def test_a_published_teacher_of_other_classes(complaint, data):
    code, text = complaint("--data_path", data, "--distillation_type", "hard", "--teacher_model", "test_resnet")
    assert code == 1 and "1000 classes, the data has 3" in text
    assert text.endswith("; fine-tune the teacher, and give it with --teacher_path")


@pytest.fixture
def shards(data, tmp_path, capfd):
    assert make_shards.main([str(data), str(tmp_path / "shards")]) == 0
    capfd.readouterr()
    return tmp_path / "shards"


def test_shards_of_more_classes_than_the_model(complaint, shards):
    info = json.loads((shards / "_info.json").read_text())
    del info["num_classes"], info["classes"]
    (shards / "_info.json").write_text(json.dumps(info))
    code, text = complaint("--data_set", "wds/x", "--data_path", shards, "--nb_classes", "2")
    assert code == 1 and "is of class 2, which must be below 2, the number of classes of the model" in text
    assert text.endswith("; see --nb_classes")


def test_a_shard_cache_that_cannot_be_written(complaint, shards, tmp_path):
    (tmp_path / "file").touch()
    with served(shards) as url:
        told = complaint("--data_set", "wds/x", "--data_path", url, "--shard_cache", tmp_path / "file")
    assert told == (1, f"train-000000.tar cannot be kept in {tmp_path / 'file'}: File exists; give a --shard_cache")


def test_a_loss_that_is_lost_names_the_last_checkpoint(complaint, data, tmp_path):
    weights = timm.create_model("biformer_nano", num_classes=3).state_dict()
    weights["head.fc.weight"].fill_(3e38)  # logits overflow
    torch.save(weights, tmp_path / "large.pth")
    code, text = complaint("--data_path", data, "--finetune", tmp_path / "large.pth")
    assert code == 3 and text.startswith("the loss became nan in epoch 0 at step 0, learning rate ")
    assert "; no checkpoint was written yet; try a lower --lr" in text
    assert not list((tmp_path / "out").glob("*.pth"))


@pytest.mark.parametrize("name", ["./foo", "photos/best.pth", ".hidden"])
def test_a_model_that_is_a_file_is_named_as_it_was(complaint, data, name):
    code, text = complaint("--data_path", data, "--model", name)
    assert code == 2 and text.startswith(f"unknown model {name!r}")
