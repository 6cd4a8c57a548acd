"""Images are prepared as timm prepares them, and as the settings say."""
import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_data_config

from tasks.classification.images import ImagePipeline
from tasks.classification.options import ClassificationSettings
from tasks.classification.task import ClassificationTask
from training import parsing
from training.distributed import Distributed
from training.precision import Precision
from utils import UsageError


def task_of(*argv):
    settings = parsing.parse(ClassificationSettings, ["--data_set", "digits", *argv])
    return ClassificationTask(settings, Distributed(torch.device("cpu")), Precision())


def modes_of_evaluation():
    """By each of timm's ways to crop, the first of its pretrained models that is evaluated so."""
    models = {}
    for name in timm.list_pretrained():
        models.setdefault(timm.get_pretrained_cfg(name).crop_mode, name)
    return models


@pytest.mark.parametrize("mode,model", modes_of_evaluation().items())
def test_evaluation_shows_images_as_timm_does(mode, model):
    config = resolve_data_config(pretrained_cfg=timm.get_pretrained_cfg(model).to_dict())
    assert config["crop_mode"] == mode
    size = "x".join(map(str, config["input_size"][1:]))
    ours = task_of("--model", model, "--input_size", size).dataset("val").transform
    theirs = create_transform(**config, use_prefetcher=True)
    pixels = np.random.default_rng(0).integers(0, 256, (90, 140, 3), np.uint8)
    assert torch.equal(ours(Image.fromarray(pixels)), theirs(Image.fromarray(pixels)))


@pytest.mark.parametrize("model,size,crop", [
    ("resnet18.a1_in1k", (288, 288), 1.0), ("resnet10t.c3_in1k", (224, 224), 0.95),
    ("biformer_nano", (160, 160), 0.875),
])
def test_the_test_size_and_crop_of_timms_validation(model, size, crop):
    """Those of a model that has them, of any other its published ones; of both, the crop that was asked for wins."""
    task = task_of("--model", model, "--input_size", "64", "--eval", "--load_release", "--use_test_size")
    assert tuple(task.images.input_size) == size == task.dummy_batch(1, train=False)[0].shape[2:]
    config = resolve_data_config(pretrained_cfg=timm.get_pretrained_cfg(model).to_dict(), use_test_size=True)
    assert config["crop_pct"] == crop and task.images.description == f"{size[0]} x {size[1]}, crop {crop:g}, bicubic"
    theirs = create_transform(**config, use_prefetcher=True)
    pixels = Image.fromarray(np.random.default_rng(0).integers(0, 256, (300, 420, 3), np.uint8))
    assert torch.equal(task.images.transform()(pixels), theirs(pixels))
    asked = task_of("--model", model, "--eval", "--load_release", "--use_test_size", "--crop_pct", "0.5")
    assert asked.images.crop_pct == 0.5


def test_the_test_size_is_for_evaluation():
    with pytest.raises(UsageError, match=r"^--use_test_size is for --eval"):
        task_of("--use_test_size")


def test_an_evaluation_says_how_it_shows_images(capsys):
    task = task_of("--model", "biformer_nano", "--input_size", "32x48", "--crop_pct", "1")
    task.loader(task.dataset("val"), train=False)
    assert capsys.readouterr().out == "evaluated at 32 x 48, crop 1, bicubic\n"
    assert "crop 1 (border)" in ImagePipeline("biformer_nano", 32, 1.0, "border").description


@pytest.mark.parametrize("split", ["train", "val"])
def test_only_an_unknown_policy_is_blamed_on_the_policy(split, monkeypatch):
    def fail(**_):
        raise ValueError("of another kind")

    monkeypatch.setattr("datasets.build_transform", fail)
    with pytest.raises(ValueError, match=r"^of another kind$"):
        task_of().dataset(split)
    told = r"^unknown augmentation policy 'nonsense'" if split == "train" else "of another"
    with pytest.raises(ValueError, match=told):
        task_of("--aa", "nonsense").dataset(split)
