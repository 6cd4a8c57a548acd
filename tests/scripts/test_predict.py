"""scripts/predict.py: what is printed is what the network says, of any checkpoint; and mistakes."""
import csv

import pytest
import timm
import torch

import main as program
from datasets import build_transform, load_image
from scripts import predict
from tasks.networks import model_data_config


@pytest.fixture(scope="module")
def trained(photos, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    command = ["--model", "biformer_nano", "--input_size", "32x48", "--batch_size", "2", "--num_workers", "0",
               "--device", "cpu", "--epochs", "1", "--warmup_epochs", "0", "--lr", "1e-2", "--model_kwargs", "topk=1",
               "--data_path", str(photos), "--output_dir", str(folder)]
    assert program.main(command) == 0
    return folder / "last.pth"


def run(capfd, *arguments):
    capfd.readouterr()
    code = predict.main([*map(str, arguments), "--num_workers", "0", "--device", "cpu"])
    out, err = capfd.readouterr()
    return code, out, err


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
    torch.save(timm.create_model("biformer_nano").state_dict(), tmp_path / "bare.pth")
    code, _, err = run(capfd, "--checkpoint", tmp_path / "bare.pth", photos)
    assert code == 2 and "does not say which model it belongs to; give --model" in err
    code, out, _ = run(capfd, "--checkpoint", tmp_path / "bare.pth", "--model", "biformer_nano", photos,
                       "--input_size", "32", "--topk", "1000")
    assert code == 0 and "golden retriever" in out
    torch.save(timm.create_model("biformer_nano", num_classes=7).state_dict(), tmp_path / "seven.pth")
    code, out, _ = run(capfd, "--checkpoint", tmp_path / "seven.pth", "--model", "biformer_nano", photos,
                       "--input_size", "32", "--nb_classes", "7")
    assert code == 0 and len(out.splitlines()) == 20


def test_what_is_not_finite(photos, trained, tmp_path, capfd):
    image = sorted((photos / "val").rglob("*.*"))[0]
    for value, message in ((float("nan"), "weights are NaN or infinite, head.fc.weight first"),
                           (3e38, f"{image}: the outputs of the network are NaN or infinite")):
        checkpoint = torch.load(trained, weights_only=True)
        checkpoint["model"]["head.fc.weight"].fill_(value)
        torch.save(checkpoint, tmp_path / "bad.pth")
        code, out, err = run(capfd, "--checkpoint", tmp_path / "bad.pth", image)
        assert code == 1 and out == "" and err.endswith(f"{message}\n") and err.count("\n") == 1


def test_what_cannot_be_read(trained, tmp_path, capfd):
    (tmp_path / "broken.jpg").write_bytes(b"no image")
    (tmp_path / "empty").mkdir()
    for message, *arguments in (
        ("nowhere: no such file or folder", tmp_path / "nowhere", "--checkpoint", trained),
        ("no image in", tmp_path / "empty", "--checkpoint", trained),
        ("cannot read", tmp_path, "--checkpoint", trained),
        ("give --checkpoint FILE, or --model NAME", tmp_path),
        ("unknown model 'resnet1'", tmp_path, "--model", "resnet1"),
        ("no such checkpoint file", tmp_path, "--checkpoint", "nowhere.pth"),
    ):
        code, _, err = run(capfd, *arguments)
        assert code in (1, 2) and message in err and len(err.splitlines()) == 1


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
