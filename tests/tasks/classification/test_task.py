"""tasks/classification/task.py: the losses that settings ask for, the loaders, and messages about names."""
import pytest
import timm
import torch
import torch.nn.functional as F
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch import nn

from helpers.photos import write_noise
from tasks.classification.options import ClassificationSettings
from tasks.classification.task import ClassificationTask
from training import parsing
from training.distributed import Distributed
from training.precision import Precision


def task_of(*argv, rank=0):
    """The task of a command line, on the CPU, in one of two processes or alone."""
    small = ["--model", "biformer_nano", "--input_size", "32", "--batch_size", "4", "--num_workers", "0"]
    settings = parsing.parse(ClassificationSettings, [*small, *map(str, argv)])
    return ClassificationTask(settings, Distributed(torch.device("cpu"), rank, 1 + bool(rank)), Precision())


@pytest.fixture
def folder(tmp_path):
    return write_noise(tmp_path)


def criterion_of(folder, *argv):
    task = task_of("--data_set", "image_folder", "--data_path", folder, *argv)
    task.dataset("train")
    task.network()
    return task.criterion


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_label_losses_are_timms(folder, smoothing):
    """To rounding in float64, the gradient too; what mixup has smoothed is not smoothed again."""
    targets = torch.tensor([0, 1, 2, 3])
    soft = F.one_hot(targets, 5).double() * 0.7 + 0.06
    plain = criterion_of(folder, "--smoothing", smoothing, "--mixup", 0, "--cutmix", 0)
    mixing = criterion_of(folder, "--smoothing", smoothing)
    assert plain.mixup is None and mixing.mixup.label_smoothing == smoothing and mixing.mixup.num_classes == 2
    for ours, timms, labels in (
        (plain.loss, LabelSmoothingCrossEntropy(smoothing), targets), (mixing.loss, SoftTargetCrossEntropy(), soft),
    ):
        logits = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
        losses = [loss(logits, labels) for loss in (ours, timms)]
        torch.testing.assert_close(*losses, rtol=1e-14, atol=0)
        torch.testing.assert_close(*(torch.autograd.grad(loss, logits)[0] for loss in losses), rtol=1e-12, atol=1e-15)
        assert type(ours) is nn.CrossEntropyLoss


@pytest.mark.parametrize("mixup", [0, 0.8])
def test_classes_of_a_folder_are_balanced_by_their_images(folder, mixup):
    """Of 10 images in two classes, 3 in the first; where more classes are asked for, those have no weight."""
    for path in sorted((folder / "train" / "ant").iterdir())[3:]:
        path.rename(folder / "train" / "bee" / f"moved-{path.name}")
    flags = ["--class_weights", "balanced", "--mixup", mixup, "--cutmix", 0]
    criterion = criterion_of(folder, *flags, "--nb_classes", 3)
    assert criterion.loss.weight.tolist() == pytest.approx([10 / 6, 10 / 14, 0])
    assert criterion.loss.label_smoothing == (0 if mixup else 0.1) and bool(criterion.mixup) == bool(mixup)
    logits, targets = torch.randn(2, 3), torch.tensor([0, 0])
    assert criterion.loss(logits, targets) != criterion_of(folder, "--nb_classes", 3).loss(logits, targets)


def test_random_erasing_is_for_training_alone(folder):
    """In the loaders of one task: all training images are erased, and evaluation is as without."""
    batches = {}
    for prob in (0, 1):
        task = task_of("--data_set", "image_folder", "--data_path", folder, "--reprob", prob, "--remode", "const")
        for split in ("train", "val"):
            loader = task.loader(task.dataset(split), train=split == "train")
            batches[split, prob] = torch.cat([images for images, _ in loader])
    assert torch.equal(batches["val", 0], batches["val", 1])
    changed = (batches["train", 0] != batches["train", 1]).flatten(1)
    assert changed.any(1).all() and (batches["train", 1].flatten(1)[changed] == 0).all()


def test_a_batch_of_zeros_is_like_one_of_the_loaders(folder):
    task = task_of("--data_set", "image_folder", "--data_path", folder)
    images, targets = next(iter(task.loader(task.dataset("train"), train=True)))
    zeros, indices = task.dummy_batch(4, train=True)
    assert (zeros.shape, zeros.dtype, indices.shape, indices.dtype) == (
        images.shape, images.dtype, targets.shape, targets.dtype
    )


@pytest.mark.parametrize("rank", [0, 1])
def test_the_main_process_alone_says_what_weights_are_loaded(folder, tmp_path, capfd, rank):
    """That a classifier is re-initialised, that a class has no images, and that EMA weights are taken."""
    model = timm.create_model("biformer_nano", num_classes=3)
    checkpoint = dict(model=model.state_dict(), model_ema={k: v + 1 for k, v in model.state_dict().items()})
    torch.save(dict(checkpoint, classes=["cat", "dog", "elk"]), tmp_path / "three.pth")
    data = ["--data_set", "image_folder", "--data_path", folder]
    task = task_of(*data, "--finetune", tmp_path / "three.pth", rank=rank)
    task.dataset("train")
    task.network()
    model = timm.create_model("biformer_nano", num_classes=3)
    checkpoint = dict(model=model.state_dict(), model_ema={k: v + 1 for k, v in model.state_dict().items()})
    run = dict(task="classification", model="biformer_nano", input_size=32)
    torch.save(dict(checkpoint, args=run, classes=["ant", "bee", "cat"], best=dict(ema_acc1=1.0)),
               tmp_path / "ema.pth")
    for asked, added in ([], 1), (["--model_key", "model"], 0), (["--model_key", "model_ema"], 1):
        task = task_of(*data, "--eval", "--resume", tmp_path / "ema.pth", *asked, rank=rank)
        task.dataset("val")
        network = task.network()
        task.load(network, str(tmp_path / "ema.pth"))
        assert torch.equal(network.head.fc.bias, model.head.fc.bias + added)
    lines = capfd.readouterr().out.splitlines()
    if rank:
        assert lines == []
    else:
        reason = "was trained on 3 classes, the data has 2, without 'cat', 'dog', 'elk' and with 'ant', 'bee' added"
        assert f"{tmp_path}/three.pth {reason}: the classifier is re-initialised" in lines
        assert lines.count(f"no images in {folder}/val of 1 of the network's 3 classes: cat") == 3
        note = f"{tmp_path}/ema.pth: the EMA weights are taken, since the run's best metric is ema_acc1"
        assert lines.count(note) == 1


def test_fine_tuning_to_renamed_classes_begins_with_a_new_classifier(folder, tmp_path, capfd):
    """The frozen backbone is the checkpoint's; where the names are the same, so is the classifier."""
    model = timm.create_model("biformer_nano", num_classes=2)
    for name in ("ant", "wasp"):
        torch.save(dict(model=model.state_dict(), classes=[name, "bee"]), tmp_path / f"{name}.pth")
        task = task_of("--data_set", "image_folder", "--data_path", folder, "--freeze_backbone", "--finetune",
                       tmp_path / f"{name}.pth")
        task.dataset("train")
        network = task.network()
        assert torch.equal(network.head.fc.weight, model.head.fc.weight) == (name == "ant")
        assert torch.equal(network.stem.conv1.weight, model.stem.conv1.weight)
        assert network.head.fc.weight.requires_grad and not network.stem.conv1.weight.requires_grad
    said = [line for line in capfd.readouterr().out.splitlines() if "re-initialised" in line]
    reason = "was trained on other classes: 'wasp', where the data has 'ant'"
    assert said == [f"{tmp_path}/wasp.pth {reason}: the classifier is re-initialised"]
