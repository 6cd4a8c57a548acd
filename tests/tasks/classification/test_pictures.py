"""Pictures of batches: what the network is trained on, and what its evaluation said."""
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data.mixup import Mixup

import main as program
from helpers.run_state import differences
from tasks.classification import pictures
from tasks.classification.pictures import draw_grid, target_titles
from tasks.classification.task import ClassificationTask

SMALL = ["--model", "biformer_nano", "--input_size", "32", "--batch_size", "4", "--device", "cpu", "--epochs", "1",
         "--warmup_epochs", "0", "--lr", "1e-2", "--repeated_aug", "false"]


def run(photos, folder, *arguments):
    return program.main([*SMALL, "--data_path", str(photos), "--output_dir", str(folder), *map(str, arguments)])


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_the_picture_shows_what_the_network_is_trained_on_and_changes_nothing(photos, tmp_path, monkeypatch, workers):
    trained, drawn = [], []
    network, grid = ClassificationTask.network, pictures.draw_grid

    def watched(task):
        model = network(task)
        model.register_forward_pre_hook(lambda m, inputs: trained.append(inputs[0].clone()) if m.training else None)
        return model

    monkeypatch.setattr(ClassificationTask, "network", watched)
    monkeypatch.setattr(pictures, "draw_grid", lambda images, *a: drawn.append(images) or grid(images, *a))
    for name, *arguments in (("plain",), ("shown", "--show_batch", tmp_path / "batch.png")):
        trained.clear()
        assert run(photos, tmp_path / name, "--num_workers", workers, *arguments) == 0
    checked, *trained = trained
    assert len(checked) == 2 and not checked.any(), "zeros, before the run begins"
    assert len(trained) == 3 and torch.equal(drawn[1], torch.cat(trained))
    assert differences(tmp_path / "plain", tmp_path / "shown") == []
    assert Image.open(tmp_path / "batch.png").size[0] == 4 * 128 + 5 * 4


def test_files_that_cannot_be_a_picture(photos, tmp_path, capfd):
    assert run(photos, tmp_path / "run", "--show_batch", "batch.txt") == 2
    assert capfd.readouterr().err == "error: --show_batch must end in .png or .jpg, got batch.txt\n"
    (tmp_path / "file").touch()
    assert run(photos, tmp_path / "run", "--num_workers", "0", "--show_batch", tmp_path / "file" / "a.jpg") == 1
    assert capfd.readouterr().err == f"error: cannot write {tmp_path}/file/a.jpg: File exists\n"


def test_images_are_shown_as_they_were_before_normalisation():
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)
    pixels = torch.randint(0, 256, (2, 3, 40, 130), dtype=torch.uint8)
    images = (pixels / 255 - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    grid = draw_grid(images, [("a", "b"), ("c", "d")], mean, std)
    assert np.array_equal(grid[4:44, 4:134], pixels[0].permute(1, 2, 0).numpy())
    assert (grid[44:70, 4:134] < 128).any(), "there is a title"


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
def test_titles_name_what_was_mixed_and_how_much(smoothing):
    """Class names may be of any script and length."""
    names = ["cat", "dog", "\u732b" * 200, "\x1b[31m"]
    assert target_titles(torch.tensor([0, 1]), names, None) == [("cat", ""), ("dog", "")]
    mixup = Mixup(mixup_alpha=1.0, label_smoothing=smoothing, num_classes=4)
    mixup._params_per_batch = lambda: (0.7, False)
    images, targets = mixup(torch.zeros(4, 3, 8, 8), torch.tensor([0, 1, 2, 0]))
    titles = target_titles(targets, names, mixup)
    if smoothing < 1:
        assert titles[0] == ("cat", "") and titles[1] == ("0.70 dog", "0.30 " + names[2])
    draw_grid(images, titles, (0.5,) * 3, (0.5,) * 3)


def test_names_with_line_breaks_are_shown_on_one_line(photos, tmp_path, capfd):
    """In the pictures of training images and of evaluations."""
    shutil.copytree(photos, tmp_path / "data")
    for split in ("train", "val"):
        (tmp_path / "data" / split / "class0").rename(tmp_path / "data" / split / "a\nb")
    shown = ["--show_batch", tmp_path / "batch.png", "--num_workers", "0"]
    assert run(tmp_path / "data", tmp_path / "run", *shown) == 0
    images = torch.zeros(2, 3, 128, 128)
    one_line = draw_grid(images, [("a\nb", "c"), ("d", "e\x1b\n")], (0.5,) * 3, (0.5,) * 3)
    assert one_line.shape == draw_grid(images, [("a", "c"), ("d", "e")], (0.5,) * 3, (0.5,) * 3).shape
