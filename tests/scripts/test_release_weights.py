"""scripts/release_weights.py: what it writes is read wherever a checkpoint is, and says what it is; and mistakes."""
import json

import pytest
import timm
import torch
from PIL import Image
from safetensors import safe_open

import models
from helpers import ROOT
from scripts import predict, release_weights

CLASSES = ["cat", "dog", "\u732b"]


def write_run(path, task="classification", **changes):
    """A run's checkpoint of a network in whose batch norms there is something."""
    torch.manual_seed(0)
    network = timm.create_model("biformer_nano", num_classes=3, topk=1)
    network(torch.randn(2, 3, 64, 64))
    weights = network.to(memory_format=torch.channels_last).state_dict()
    args = dict(task=task, model="biformer_nano", model_kwargs=dict(topk=1), nb_classes=None, input_size="32x48",
                crop_pct=0.9, exif_transpose=False, data_path="/secret/photos", output_dir="/secret/run")
    ema = {name: value / 2 if value.is_floating_point() else value for name, value in weights.items()}
    content = dict(model=weights, model_ema=ema, optimizer={}, best={"acc1": 1.0}, classes=CLASSES, args=args)
    torch.save(content | changes, path)
    return content | changes


def complaint(capfd, *arguments):
    capfd.readouterr()
    assert release_weights.main([*map(str, arguments)]) == 1
    out, err = capfd.readouterr()
    assert out == "" and err.count("\n") == 1
    return err.removeprefix("error: ").rstrip()


def test_a_run(tmp_path, capfd):
    run, output = write_run(tmp_path / "best.pth"), tmp_path / "new" / "w.safetensors"
    assert release_weights.main([str(tmp_path / "best.pth"), str(output)]) == 0
    assert capfd.readouterr().out == f"{output}: biformer_nano, 3 classes, 2.8 MB\n"
    network, transform = models.load(output)
    for name, value in network.state_dict().items():
        assert value.equal(run["model"][name].half().to(value.dtype) if value.is_floating_point() else
                           run["model"][name]), name
    assert network.norm.num_batches_tracked == 1
    config = network.pretrained_cfg
    assert (config["input_size"], config["crop_pct"], config["label_names"]) == ((3, 32, 48), 0.9, tuple(CLASSES))
    assert transform.transforms[0].keywords == dict(exif_transpose=False)
    kept = timm.create_model("biformer_nano", pretrained=True, topk=1, pretrained_cfg_overlay=dict(file=str(output)))
    torch.testing.assert_close(kept.state_dict(), network.state_dict(), rtol=0, atol=0)
    with pytest.warns(UserWarning, match="was trained with topk=1"):
        timm.create_model("biformer_nano", pretrained=True, pretrained_cfg_overlay=dict(file=str(output)))
    photo = str(ROOT / "docs" / "church.jpg")
    assert predict.main([photo, "--checkpoint", str(output), "--num_workers", "0", "--device", "cpu"]) == 0
    assert "\u732b" in capfd.readouterr().out


@pytest.mark.parametrize("given,size", [("64", (3, 64, 64)), ("64x96", (3, 64, 96))])
def test_another_image_size_in_use(tmp_path, given, size):
    write_run(tmp_path / "best.pth")
    output = tmp_path / "w.safetensors"
    assert release_weights.main([str(tmp_path / "best.pth"), str(output), "--input_size", given]) == 0
    network, transform = models.load(output)
    assert network.pretrained_cfg["input_size"] == size
    assert transform(Image.new("RGB", (200, 100))).shape == size


def test_nothing_else_of_the_run_is_in_the_file(tmp_path):
    write_run(tmp_path / "best.pth")
    contents = set()
    for name in ("a.safetensors", "b.safetensors"):
        assert release_weights.main([str(tmp_path / "best.pth"), str(tmp_path / name)]) == 0
        contents.add((tmp_path / name).read_bytes())
    (content,) = contents
    assert b"secret" not in content
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        (about,) = file.metadata().values()
    assert json.loads(about).keys() == {"args", "classes"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.safetensors", "b.safetensors", "best.pth"]


def test_the_ema_weights_of_a_run_whose_best_metric_is_theirs(tmp_path, capfd):
    run = write_run(tmp_path / "best.pth", best={"ema_acc1": 1.0})
    assert release_weights.main([str(tmp_path / "best.pth"), str(tmp_path / "w.safetensors")]) == 0
    assert "the EMA weights are taken, since the run's best metric is ema_acc1" in capfd.readouterr().out
    network, _ = models.load(tmp_path / "w.safetensors")
    assert network.head.fc.weight.equal(run["model_ema"]["head.fc.weight"].half().float())


@pytest.mark.parametrize("value", [65520.0, float("nan"), float("-inf")])
def test_weights_that_are_not_finite_in_float16(tmp_path, capfd, value):
    run = write_run(tmp_path / "best.pth")
    run["model"]["head.fc.bias"][1] = value
    torch.save(run, tmp_path / "best.pth")
    told = complaint(capfd, tmp_path / "best.pth", tmp_path / "w.safetensors")
    assert told.endswith("weights are NaN or infinite, or would be in float16, head.fc.bias first")
    assert not (tmp_path / "w.safetensors").exists()


def test_mistakes_are_one_line(tmp_path, capfd):
    best, output = tmp_path / "best.pth", tmp_path / "w.safetensors"
    assert complaint(capfd, best, output) == f"{best}: no such checkpoint file"
    run = write_run(best)
    assert complaint(capfd, best, tmp_path / "w.pth") == f"{tmp_path}/w.pth: the file's name must end in .safetensors"
    (tmp_path / "folder.safetensors").mkdir()
    assert complaint(capfd, best, tmp_path / "folder.safetensors").endswith("folder.safetensors: it is a folder")
    write_run(best, task="segmentation")
    assert complaint(capfd, best, output) == f"{best} is no classifier, but of the task segmentation"
    torch.save(run["model"], best)
    assert complaint(capfd, best, output).startswith(f"{best} is no checkpoint of a run of this repository")
    write_run(best, model={"a": torch.zeros(1)})
    assert "the checkpoint does not fit biformer_nano with 3 classes: " in complaint(capfd, best, output)
    assert not output.exists()


def test_what_was_there_stays_where_writing_fails(tmp_path, capfd, monkeypatch):
    write_run(tmp_path / "best.pth")
    (tmp_path / "w.safetensors").write_text("before")

    def full(descriptor):
        raise OSError(28, "No space left on device", "w.safetensors")

    monkeypatch.setattr("os.fsync", full)
    told = complaint(capfd, tmp_path / "best.pth", tmp_path / "w.safetensors")
    assert told == "w.safetensors: No space left on device"
    assert (tmp_path / "w.safetensors").read_text() == "before" and len(list(tmp_path.iterdir())) == 2
