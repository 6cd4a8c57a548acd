"""Images are prepared as timm prepares them, and as the settings say."""
import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_data_config

from tasks.classification.options import ClassificationSettings
from tasks.classification.task import ClassificationTask
from training import flags
from training.distributed import Distributed
from training.precision import Precision


def task_of(*argv):
    settings = flags.parse(ClassificationSettings, ["--data_set", "digits", *argv])
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
