"""scripts/predict.py: what is printed is what the network says, of any checkpoint; and mistakes."""
import argparse
import csv
import io
import os
import re
import sys

import numpy as np
import pytest
import timm
import torch
from PIL import Image

import main as program
from datasets import build_transform
from helpers import ROOT
from scripts import make_label_maps, make_shards, plot_logs, predict
from scripts.prediction import classifier, images
from tasks.networks import model_data_config
from training.data.images import load_image


@pytest.fixture(scope="module")
def trained(photos, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    command = ["--model", "biformer_nano", "--input_size", "32x48", "--batch_size", "2", "--num_workers", "0",
               "--device", "cpu", "--epochs", "1", "--warmup_epochs", "0", "--lr", "1e-2", "--model_kwargs", "topk=1",
               "--data_path", str(photos), "--output_dir", str(folder)]
    assert program.main(command) == 0
    return folder / "last.pth"


# Said before the first prediction, on standard error.
EVALUATED = r"^evaluated at \d+ x \d+, crop .*\n"


def run(capfd, *arguments):
    capfd.readouterr()
    code = predict.main([*map(str, arguments), "--num_workers", "0", "--device", "cpu"])
    out, err = capfd.readouterr()
    return code, out, re.sub(EVALUATED, "", err, count=1, flags=re.MULTILINE)


def write_images(folder, *names):
    for name in names:
        with open(os.path.join(os.fsencode(folder), os.fsencode(name)), "wb") as file:
            Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(file, "png")


def rows_of(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def with_classes(trained, path, classes, **args):
    """The checkpoint `trained`, as if it had been trained on other classes."""
    checkpoint = torch.load(trained, weights_only=True)
    torch.save(dict(checkpoint, classes=classes, args=checkpoint["args"] | args), path)
    return path


def test_a_run_of_ours(photos, trained, tmp_path, capfd):
    """Its model, image size and classes are the checkpoint's; what is printed is what the network says of the image."""
    image = sorted((photos / "val").rglob("*.*"))[0]
    code, out, _ = run(capfd, "--checkpoint", trained, image, photos / "train", "--output", tmp_path / "p.csv",
                       "--topk", "2")
    assert code == 0 and out.startswith(f"{image}: class")
    with open(tmp_path / "p.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    images = sorted((photos / "train").rglob("*.*"))
    assert [row["image"] for row in rows] == [str(image), *map(str, images)]

    model = timm.create_model("biformer_nano", num_classes=3, topk=1).eval()
    model.load_state_dict(torch.load(trained, weights_only=True)["model"])
    config = model_data_config("biformer_nano")
    keys = ("mean", "std", "interpolation", "crop_pct")
    transform = build_transform(train=False, input_size=(32, 48), **{key: config[key] for key in keys})
    pixels = torch.as_tensor(transform(load_image(image)), dtype=torch.float32) / 255
    mean, std = (torch.tensor(config[key])[:, None, None] for key in ("mean", "std"))
    probabilities = model(((pixels - mean) / std)[None]).softmax(1)[0]
    value, index = probabilities.max(0)
    assert rows[0]["class_1"] == f"class{index}"
    assert float(rows[0]["probability_1"]) == pytest.approx(value.item(), abs=1e-5)
    assert "class_2" in rows[0] and "class_3" not in rows[0]


def test_weights_that_do_not_say_what_they_belong_to(photos, tmp_path, capfd):
    torch.save(timm.create_model("biformer_nano", num_classes=1000).state_dict(), tmp_path / "bare.pth")
    code, _, err = run(capfd, "--checkpoint", tmp_path / "bare.pth", photos)
    assert code == 2 and "does not say which model it belongs to; give --model" in err
    code, out, _ = run(capfd, "--checkpoint", tmp_path / "bare.pth", "--model", "biformer_nano", photos,
                       "--input_size", "32", "--topk", "1000")
    assert code == 0 and "golden retriever" in out
    torch.save(timm.create_model("biformer_nano", num_classes=7).state_dict(), tmp_path / "seven.pth")
    code, out, _ = run(capfd, "--checkpoint", tmp_path / "seven.pth", "--model", "biformer_nano", photos,
                       "--input_size", "32", "--nb_classes", "7")
    assert code == 0 and len(out.splitlines()) == 20


TEN = ("tench, English springer, cassette player, chain saw, church, French horn, garbage truck, gas pump, golf ball, "
       "parachute")


@pytest.mark.parametrize("model", [None, "biformer_nano", "debiformer_nano"])
def test_the_repositorys_own_weights(model, capfd, monkeypatch):
    """Of biformer_nano where nothing is named; standard error says whose they are, and what they know."""
    monkeypatch.setattr("socket.socket.connect", None)
    photo = ROOT / "docs" / "church.jpg"
    code, out, err = run(capfd, photo, *([] if model is None else ["--model", model]), "--topk", "2")
    assert code == 0 and out.startswith(f"{photo}: church ") and out.count("%") == 2
    assert err == f"{model or 'biformer_nano'}'s own weights, for 10 classes: {TEN}\n"


def test_a_run_on_the_same_classes_is_named_as_they_are(trained, tmp_path, capfd):
    """By what the folders stand for, in the file of the weights too; other names stay."""
    photo = ROOT / "docs" / "church.jpg"
    code, out, _ = run(capfd, photo, "--checkpoint", ROOT / "weights" / "biformer_nano.safetensors")
    assert code == 0 and out.startswith(f"{photo}: church ")
    names = ["n03028079", "n03394916", "n03417042"]
    _, out, _ = run(capfd, photo, "--checkpoint", with_classes(trained, tmp_path / "three.pth", names))
    assert all(name in out for name in names)


def test_classes_that_a_run_does_not_tell_are_counted(trained, tmp_path, capfd):
    """As those of a run on shards: neither their names nor their number."""
    write_images(tmp_path, "a.png")
    checkpoint = with_classes(trained, tmp_path / "shards.pth", None)
    code, out, _ = run(capfd, "--checkpoint", checkpoint, tmp_path / "a.png")
    assert code == 0 and all(f" {name} " in out for name in "012") and " 3 " not in out
    code, _, err = run(capfd, "--checkpoint", checkpoint, tmp_path / "a.png", "--nb_classes", "7")
    assert code == 1 and "does not fit biformer_nano with 7 classes" in err and err.count("\n") == 1


def test_the_ema_weights_of_a_run_whose_best_metric_is_theirs(trained, tmp_path, capfd):
    write_images(tmp_path, "a.png")
    checkpoint = torch.load(trained, weights_only=True)
    checkpoint["model_ema"] = {k: v + 1 for k, v in checkpoint["model"].items()}
    torch.save(dict(checkpoint, best={"ema_acc1": 50.0}), tmp_path / "best.pth")
    arguments = ["--checkpoint", tmp_path / "best.pth", tmp_path / "a.png"]
    code, by_default, err = run(capfd, *arguments)
    note = f"{tmp_path}/best.pth: the EMA weights are taken, since the run's best metric is ema_acc1\n"
    assert code == 0 and err == note
    _, ema, err = run(capfd, *arguments, "--model_key", "model_ema")
    _, own, _ = run(capfd, *arguments, "--model_key", "model")
    assert by_default == ema != own and err == ""


def test_a_checkpoint_of_timms_that_holds_its_ema_weights_alone(trained, tmp_path, capfd):
    write_images(tmp_path, "a.png")
    weights = torch.load(trained, weights_only=True)["model"]
    torch.save(dict(arch="biformer_nano", state_dict_ema=weights), tmp_path / "ema.pth")
    code, _, err = run(capfd, "--checkpoint", tmp_path / "ema.pth", tmp_path / "a.png", "--model", "biformer_nano")
    assert code == 0 and f"{tmp_path}/ema.pth: the EMA weights are taken, as timm takes them\n" in err


def test_what_is_not_finite(photos, trained, tmp_path, capfd):
    image = sorted((photos / "val").rglob("*.*"))[0]
    for value, message in ((float("nan"), "weights are NaN or infinite, head.fc.weight first"),
                           (3e38, f"{image}: the outputs of the network are NaN or infinite")):
        checkpoint = torch.load(trained, weights_only=True)
        checkpoint["model"]["head.fc.weight"].fill_(value)
        torch.save(checkpoint, tmp_path / "bad.pth")
        code, out, err = run(capfd, "--checkpoint", tmp_path / "bad.pth", image)
        assert code == 1 and out == "" and err.endswith(f"{message}\n") and err.count("\n") == 1


def test_mistakes_are_one_line(trained, tmp_path, capfd):
    image = tmp_path / "a.png"
    write_images(tmp_path, "a.png")
    (tmp_path / "empty").mkdir()
    for message, *arguments in (
        ("nowhere: no such file or folder", tmp_path / "nowhere", "--checkpoint", trained),
        ("no image in", tmp_path / "empty", "--checkpoint", trained),
        ("the published weights of biformer_nano have 10 classes, not 3", image, "--nb_classes", "3"),
        ("unknown model 'resnet1'", image, "--model", "resnet1"),
        ("no such checkpoint file", image, "--checkpoint", "nowhere.pth"),
    ):
        code, _, err = run(capfd, *arguments)
        assert code in (1, 2) and message in err and len(err.splitlines()) == 1


def test_size_crop_and_interpolation_are_told_beside_the_predictions(trained, tmp_path, capfd):
    write_images(tmp_path, "a.png")
    arguments = ["--checkpoint", str(trained), str(tmp_path / "a.png"), "--num_workers", "0", "--device", "cpu"]
    for more, line in (([], "evaluated at 32 x 48, crop 0.875, bicubic\n"),
                       (["--input_size", "16"], "evaluated at 16 x 16, crop 0.875, bicubic\n"),
                       (["--use_test_size"], "evaluated at 160 x 160, crop 0.875, bicubic\n")):
        assert predict.main([*arguments, *more]) == 0
        out, err = capfd.readouterr()
        assert err == line and len(out.splitlines()) == 1


def test_images_that_are_too_small_for_a_network_are_one_line(tmp_path, capfd):
    write_images(tmp_path, "a.png")
    torch.save(timm.create_model("convnext_atto", num_classes=2).state_dict(), tmp_path / "w.pth")
    given = ["--checkpoint", tmp_path / "w.pth", "--model", "convnext_atto", tmp_path / "a.png", "--input_size"]
    assert run(capfd, *given, "32")[0] == 0
    code, out, err = run(capfd, *given, "16")
    assert code == 2 and out == "" and err.startswith("error: convnext_atto cannot take images of 3 x 16 x 16: ")
    assert err.count("\n") == 1


def test_a_folder_without_an_image_is_named_beside_others_too(trained, tmp_path, capfd):
    write_images(tmp_path, "a.png")
    (tmp_path / "empty").mkdir()
    code, out, err = run(capfd, "--checkpoint", trained, tmp_path / "empty", tmp_path / "a.png")
    assert code == 0 and len(out.splitlines()) == 1
    assert err.startswith(f"no image in {tmp_path}/empty; endings are ") and err.count("\n") == 1


@pytest.mark.parametrize("script", [predict, plot_logs, make_label_maps, make_shards])
def test_help_tells_every_default(script, monkeypatch):
    asked = []
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", lambda self, argv: asked.append(self) or sys.exit())
    with pytest.raises(SystemExit):
        script.main([])
    flags = [action for action in asked[0]._actions if action.default not in (None, False, argparse.SUPPRESS)]
    assert flags and not [action.dest for action in flags if "(default: " not in (action.help or "")]


def test_images_in_a_folder_are_those_that_training_takes(tmp_path, capfd):
    for name in ("b.jfif", "._b.jpg", ".Trash/c.jpg", "a.jpg", "deep/d.PNG", "e.heic"):
        (tmp_path / "photos" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "photos" / name).touch()
    (tmp_path / "photos" / "deep" / "loop").symlink_to("..")
    (tmp_path / "photos" / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "f.webp").touch()
    hidden = tmp_path / "photos" / "._b.jpg"
    found = predict.find_images([tmp_path / "photos", hidden])
    names = [str(path.relative_to(tmp_path / "photos")) for path in found]
    assert names == ["a.jpg", "b.jfif", "deep/d.PNG", "link/f.webp", "._b.jpg"], "what was named is taken"
    assert capfd.readouterr().err == f"left out 1 file in {tmp_path}/photos that is no image: 1 .heic\n"


def test_images_as_timms_validation_takes_them(capfd):
    checkpoint = dict(args=dict(task="classification", model="resnet18.a1_in1k", input_size=64, crop_pct=0.5))
    for use_test_size, expected in ((True, ((288, 288), 1.0)), (False, (64, 0.5))):
        arguments = argparse.Namespace(model=None, nb_classes=None, input_size=None, use_test_size=use_test_size)
        recipe = classifier.recipe_of(checkpoint, arguments)
        assert (recipe.input_size, recipe.crop_pct) == expected
    with pytest.raises(SystemExit):
        run(capfd, "x.png", "--use_test_size", "--input_size", "32")
    assert "mutually exclusive" in capfd.readouterr().err


def test_classes_without_a_name_are_numbers(trained, tmp_path, capfd):
    """As those of a run whose --nb_classes were more than its folders."""
    write_images(tmp_path, "a.png")
    checkpoint = with_classes(trained, tmp_path / "one.pth", ["cat"], nb_classes=3)
    code, out, _ = run(capfd, "--checkpoint", checkpoint, tmp_path / "a.png")
    assert code == 0 and all(f" {name} " in out for name in ("cat", "1", "2"))


def test_an_unreadable_image_is_listed_and_the_others_are_predicted(trained, tmp_path, capfd):
    write_images(tmp_path, "a.png", "c.png")
    (tmp_path / "b.jpg").write_bytes(b"no image")
    code, out, err = run(capfd, "--checkpoint", trained, tmp_path, "--topk", "9", "--output", tmp_path / "p.csv")
    message = f"cannot read {tmp_path}/b.jpg: not an image"
    assert code == 1 and err == f"{message}\nerror: 1 of 3 images could not be read\n"
    assert [line.partition(": ")[0] for line in out.splitlines()] == [f"{tmp_path}/{name}.png" for name in "ac"]
    first, bad, last = rows_of(tmp_path / "p.csv")
    assert first["class_3"] and "class_4" not in first and first["error"] == last["error"] == ""
    assert bad["error"] == message and bad["class_1"] == bad["probability_3"] == "" and bad["image"].endswith("b.jpg")


def test_file_names_in_bytes_on_an_ascii_terminal(trained, tmp_path, monkeypatch):
    write_images(tmp_path, b"\xff.png", "\u00e9.png", "a\x1b[31m\n.png")
    terminal = io.TextIOWrapper(io.BytesIO(), "ascii", write_through=True)
    monkeypatch.setattr(sys, "stdout", terminal)
    arguments = ["--checkpoint", trained, tmp_path, "--output", tmp_path / "p.csv", "--device", "cpu"]
    assert predict.main([*map(str, arguments), "--num_workers", "0"]) == 0
    names = [line.split(b": ")[0].split(b"/")[-1] for line in terminal.buffer.getvalue().splitlines()]
    assert sorted(names) == [rb"\udcff.png", rb"\xe9.png", rb"a\x1b[31m\n.png"]
    names = [row["image"].rpartition("/")[2] for row in rows_of(tmp_path / "p.csv")]
    assert sorted(names) == sorted(["\\udcff.png", "\u00e9.png", "a\x1b[31m\n.png"])


def test_escape_sequences_in_class_names_are_shown_and_not_obeyed(trained, tmp_path, capfd):
    write_images(tmp_path, "a.png")
    checkpoint = with_classes(trained, tmp_path / "three.pth", ["\x1b[2J", "a\nb", "=1+1"])
    code, out, _ = run(capfd, "--checkpoint", checkpoint, tmp_path / "a.png", "--output", tmp_path / "p.csv")
    assert code == 0 and len(out.splitlines()) == 1 and "\\x1b[2J" in out and "a\\nb" in out
    (row,) = rows_of(tmp_path / "p.csv")
    assert {row[f"class_{rank}"] for rank in (1, 2, 3)} == {"\x1b[2J", "a\nb", "'=1+1"}


def test_an_output_that_cannot_be_written_is_noticed_first(trained, tmp_path, capfd, monkeypatch):
    write_images(tmp_path, "a.png")
    monkeypatch.setattr(predict, "load_network", lambda args: pytest.fail("the network was loaded"))
    for output, message in (
        (tmp_path, f"cannot write {tmp_path}: it is a folder, and a table needs a file"),
        (tmp_path / "a.png" / "p.csv", f"cannot write {tmp_path}/a.png/p.csv: "),
        ("/dev/null", "cannot write /dev/null: it is a device, and a table needs a file"),
    ):
        code, _, err = run(capfd, "--checkpoint", trained, tmp_path, "--output", output)
        assert code == 1 and err.startswith(f"error: {message}") and len(err.splitlines()) == 1


def test_ctrl_c_keeps_what_was_predicted(trained, tmp_path, capfd, monkeypatch):
    write_images(tmp_path, "a.png", "b.png", "c.png")
    load = images.load_image

    def load_two(path, exif_transpose):
        if path.name == "c.png":
            raise KeyboardInterrupt
        return load(path)

    monkeypatch.setattr(images, "load_image", load_two)
    arguments = ["--checkpoint", trained, tmp_path, "--batch_size", "1", "--output", tmp_path / "p.csv"]
    code, _, err = run(capfd, *arguments)
    # one batch is always loaded ahead
    assert code == 130 and err == "error: interrupted after 1 of 3 images\n"
    assert [row["image"].rpartition("/")[2] for row in rows_of(tmp_path / "p.csv")] == ["a.png"]
    (tmp_path / "a.png").rename(tmp_path / "d.png")
    (tmp_path / "b.png").unlink()
    code, _, err = run(capfd, *arguments)
    assert code == 130 and err.endswith("\nerror: interrupted\n") and len(rows_of(tmp_path / "p.csv")) == 1
    assert not list(tmp_path.glob(".*"))


def test_memory_that_runs_out_is_one_line(trained, tmp_path, capfd, monkeypatch):
    def fail(args):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    write_images(tmp_path, "a.png")
    monkeypatch.setattr(predict, "load_network", fail)
    code, _, err = run(capfd, "--checkpoint", trained, tmp_path)
    assert code == 1 and err.startswith("error: out of memory (") and err.endswith("; lower --batch_size\n")


def test_an_image_that_is_named_twice_comes_once(trained, tmp_path, capfd, monkeypatch):
    write_images(tmp_path, "a.png", "b.png")
    monkeypatch.chdir(tmp_path)
    code, out, _ = run(capfd, "--checkpoint", trained, "b.png", tmp_path, "./b.png")
    assert code == 0 and [line.partition(":")[0] for line in out.splitlines()] == ["b.png", f"{tmp_path}/a.png"]


def test_a_progress_bar_for_a_terminal_alone(trained, tmp_path, capfd, monkeypatch):
    write_images(tmp_path, "a.png")
    assert run(capfd, "--checkpoint", trained, tmp_path)[2] == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert " 0/1 [" in run(capfd, "--checkpoint", trained, tmp_path)[2]
