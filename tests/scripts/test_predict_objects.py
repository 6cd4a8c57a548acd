"""scripts/predict.py on detectors: what is printed, drawn and written is what the network finds; and mistakes."""
import contextlib
import io
import json
import sys

import numpy as np
import pytest
import torch
from faster_coco_eval import COCO
from PIL import Image

from models.detection import DETECTORS, load
from scripts import predict
from scripts.prediction import objects, whole
from tasks.colours import colours_of
from tasks.detection.drawing import draw_objects
from tasks.pictures import write_picture

NANO = "biformer_nano"
SAID = dict(task="detection", model=NANO, model_kwargs=dict(topk=1), fpn_channels=32, head_channels=64,
            extra_norms=None, freeze_batch_norm=True, short_side=64, long_side=96)


def make(kind, num_classes=3):
    """A detector that is sure of what it finds, which a random one is not."""
    torch.manual_seed(0)
    width = {} if kind == "retinanet" else dict(head_channels=64)
    network = DETECTORS[kind](NANO, num_classes, channels=32, short=64, long=96, topk=1, **width)
    for name, layer in network.named_modules():
        if isinstance(layer, torch.nn.Conv2d) and name.startswith("head."):
            torch.nn.init.kaiming_normal_(layer.weight)
        if name.endswith(".cls_score"):
            torch.nn.init.normal_(layer.weight, std=0.1 if kind == "mask_rcnn" else 0.5)
    if kind == "retinanet":
        torch.nn.init.normal_(network.head.classification_head.cls_logits.weight, std=0.035)
    return network


def write_run(path, kind, **entries):
    said = SAID | dict(detector=kind)
    torch.save(dict(model=make(kind).state_dict(), classes=["cat", "dog", "emu"], args=said) | entries, path)
    return path


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("run") / "best.pth", "mask_rcnn")


@pytest.fixture
def photos(tmp_path):
    """Photographs of three sizes, one of them turned by its EXIF orientation."""
    (tmp_path / "photos" / "deep").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name, size in (("a.jpg", (50, 70)), ("deep/a.png", (96, 64)), ("b.jpg", (31, 90))):
        image = Image.fromarray(rng.integers(0, 255, (*size, 3), np.uint8))
        exif = image.getexif()
        exif[0x0112] = 6 if name == "b.jpg" else 1
        image.save(tmp_path / "photos" / name, exif=exif)
    return tmp_path / "photos"


def run(capfd, *arguments):
    capfd.readouterr()
    code = predict.main([*map(str, arguments), "--num_workers", "0", "--device", "cpu"])
    return code, *capfd.readouterr()


def opened(file):
    with contextlib.redirect_stdout(io.StringIO()):
        return COCO(str(file))


@pytest.mark.parametrize("kind", DETECTORS)
def test_what_is_found_is_printed_drawn_and_written(kind, photos, tmp_path, capfd):
    checkpoint, output = write_run(tmp_path / "c.pth", kind), tmp_path / "found"
    code, out, err = run(capfd, "--checkpoint", checkpoint, photos, "--output", output, "--topk", "2", "--score", "0.4")
    assert code == 0 and err == ""
    network, transform = load(checkpoint)
    coco, lines = opened(output / "detections.json"), out.splitlines()
    assert [category["name"] for category in coco.dataset["categories"]] == ["cat", "dog", "emu"]
    names = ["a.jpg", "b.jpg", "deep/a.png"]
    assert [image["file_name"] for image in coco.dataset["images"]] == names and len(lines) == 3
    for line, image in zip(lines, coco.dataset["images"], strict=True):
        upright = transform(Image.open(photos / image["file_name"]))
        assert (image["height"], image["width"]) == upright.shape[1:]
        with torch.inference_mode():
            found, = network([upright])
        kept = found["scores"] > 0.4
        assert 2 < kept.sum() < len(kept), "some are above, and not all"
        found = {name: value[kept].numpy() for name, value in found.items()}
        first, second = (f"{network.classes[found['labels'][i] - 1]} {100 * found['scores'][i]:.1f} %" for i in (0, 1))
        assert line == f"{photos / image['file_name']}: {first}, {second} and {kept.sum() - 2} more"
        entries = coco.imgToAnns[image["id"]]
        assert [x["category_id"] for x in entries] == found["labels"].tolist()
        assert np.abs(np.array([x["score"] for x in entries]) - found["scores"]).max() < 1e-5
        corners = np.array([[x, y, x + w, y + h] for x, y, w, h in (x["bbox"] for x in entries)])
        assert np.abs(corners - found["boxes"]).max() < 0.02
        for i, entry in enumerate(entries):
            assert ("segmentation" in entry) == (kind != "retinanet") and entry["iscrowd"] == 0
            area = entry["bbox"][2] * entry["bbox"][3]
            if kind != "retinanet":
                mask = coco.annToMask(entry)
                assert np.array_equal(mask, found["masks"][i])
                area = mask.sum()
            assert abs(entry["area"] - area) <= 0.01 * area + 0.1
        pixels = (upright * 255).round().byte().permute(1, 2, 0).numpy()
        expected = draw_objects(
            pixels, found["boxes"], [network.classes[i - 1] for i in found["labels"]], found["scores"].tolist(),
            found.get("masks"), colours_of(found["labels"]),
        )
        write_picture(tmp_path / "expected.jpg", expected)
        drawn = (output / image["file_name"]).with_suffix(".jpg")
        assert drawn.read_bytes() == (tmp_path / "expected.jpg").read_bytes()
        assert (expected != pixels).any(axis=2).mean() > 0.1


def test_nothing_may_be_found(trained, photos, tmp_path, capfd):
    code, out, _ = run(capfd, "--checkpoint", trained, photos / "a.jpg", "--score", "1", "--output", tmp_path / "found")
    assert code == 0 and out == f"{photos}/a.jpg: nothing found\n"
    written = json.loads((tmp_path / "found" / "detections.json").read_text())
    assert len(written["images"]) == 1 and written["annotations"] == []
    assert Image.open(tmp_path / "found" / "a.jpg").size == (70, 50)


def test_without_an_output_nothing_is_written(trained, photos, tmp_path, capfd):
    before = sorted(tmp_path.rglob("*"))
    code, out, _ = run(capfd, "--checkpoint", trained, photos)
    assert code == 0 and len(out.splitlines()) == 3 and sorted(tmp_path.rglob("*")) == before


def test_an_unreadable_image_is_named_and_the_others_are_predicted(trained, photos, tmp_path, capfd):
    (photos / "aa.jpg").write_bytes(b"no image")
    code, out, err = run(capfd, "--checkpoint", trained, photos, "--output", tmp_path / "found")
    assert code == 1 and len(out.splitlines()) == 3
    assert err == f"cannot read {photos}/aa.jpg: not an image\nerror: 1 of 4 images could not be read\n"
    written = json.loads((tmp_path / "found" / "detections.json").read_text())
    assert [(x["id"], x["file_name"]) for x in written["images"]] == [(1, "a.jpg"), (3, "b.jpg"), (4, "deep/a.png")]
    assert {x["image_id"] for x in written["annotations"]} == {1, 3, 4}
    assert [x["id"] for x in written["annotations"]] == list(range(1, len(written["annotations"]) + 1))


def test_ctrl_c_keeps_what_was_predicted(trained, photos, tmp_path, capfd, monkeypatch):
    read = whole.load_image

    def read_two(path, exif_transpose):
        if path.name == "a.png":
            raise KeyboardInterrupt
        return read(path, exif_transpose)

    monkeypatch.setattr(whole, "load_image", read_two)
    output = tmp_path / "found"
    code, out, err = run(capfd, "--checkpoint", trained, photos, "--output", output)
    done = len(out.splitlines())
    assert code == 130 and done >= 1 and err == f"error: interrupted after {done} of 3 images\n"
    written = json.loads((output / "detections.json").read_text())
    assert [x["file_name"] for x in written["images"]] == ["a.jpg", "b.jpg"][:done] and written["annotations"]
    assert len(list(output.glob("*.jpg"))) == done and not list(output.glob(".*"))
    code, _, err = run(capfd, "--checkpoint", trained, photos / "deep", "--output", output)
    assert code == 130 and err == "error: interrupted\n"
    assert json.loads((output / "detections.json").read_text()) == written, "not replaced by one of no images"


def test_ctrl_c_while_a_line_is_printed(trained, photos, tmp_path, capfd, monkeypatch):
    """The generator waits then, and is closed, though others refer to it and a progress bar would not close it."""
    def interrupt(text):
        raise KeyboardInterrupt

    kept = []

    def keep(*arguments):
        kept.append(objects.predict(*arguments))
        return kept[0]

    monkeypatch.setitem(predict.WHOLE, "detection", keep)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setattr(predict, "print_line", interrupt)
    code, _, _ = run(capfd, "--checkpoint", trained, photos, "--output", tmp_path / "found")
    assert code == 130
    written = json.loads((tmp_path / "found" / "detections.json").read_text())
    assert [x["file_name"] for x in written["images"]] == ["a.jpg"]


@pytest.mark.parametrize("kind,layer", [
    ("mask_rcnn", "backbone.fpn.fpn_convs.0.conv.weight"), ("mask_rcnn", "rpn.head.cls_logits.weight"),
    ("mask_rcnn", "roi_heads.box_predictor.bbox_pred.weight"),
    ("cascade_mask_rcnn", "roi_heads.stages.1.mask_predictor.mask_fcn_logits.weight"),
    ("retinanet", "head.regression_head.bbox_reg.weight"),
])
def test_outputs_that_are_not_finite_are_one_line(kind, layer, photos, tmp_path, capfd):
    path = write_run(tmp_path / "c.pth", kind)
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["model"][layer].fill_(3e38)
    torch.save(checkpoint, path)
    code, out, err = run(capfd, "--checkpoint", path, photos / "a.jpg")
    assert code == 1 and out == ""
    assert err == f"error: {photos}/a.jpg: the outputs of the network are NaN or infinite\n"


def test_mistakes_are_one_line(trained, photos, tmp_path, capfd):
    image = photos / "a.jpg"
    (tmp_path / "file").touch()
    for message, *arguments in (
        ("error: --model: a detector is what its checkpoint says", image, "--model", NANO),
        ("error: --nb_classes and --input_size: a detector is what", image, "--nb_classes", 3, "--input_size", 64),
        (f"error: --output {tmp_path}/p.csv: of a detector it is a folder, for pictures", image, "--output",
         tmp_path / "p.csv"),
        (f"error: {photos}/out lies in {photos}, among the images: its pictures would be read", photos, "--output",
         photos / "out"),
        (f"error: {image} and {photos}/deep/a.png would be written to one file, a.jpg: predict them apart", image,
         photos / "deep" / "a.png", "--output", tmp_path / "out"),
        (f"error: cannot write to {tmp_path}/file: ", image, "--output", tmp_path / "file"),
        ("error: the checkpoint holds no 'ema'", image, "--model_key", "ema"),
    ):
        code, out, err = run(capfd, "--checkpoint", trained, *arguments)
        assert code in (1, 2) and out == "" and err.startswith(message) and len(err.splitlines()) == 1
    for score in ("1.5", "-0.1", "nan"):
        with pytest.raises(SystemExit):
            run(capfd, "--checkpoint", trained, image, "--score", score)
        assert f"--score must be 0 to 1, got {score}" in capfd.readouterr().err


def test_a_published_detector_predicts_by_the_name_of_its_backbone(photos, tmp_path, capfd):
    """Of 80 classes, which it does not name, as COCO's; of others, by numbers."""
    torch.save(dict(state_dict=make("mask_rcnn", num_classes=80).state_dict()), tmp_path / "p.pth")
    given = ["--checkpoint", tmp_path / "p.pth", photos / "a.jpg", "--score", "0", "--topk", "100"]
    code, _, err = run(capfd, *given)
    assert code == 2 and err.endswith("p.pth does not say which model its backbone is; give --model\n")
    code, _, _ = run(capfd, *given, "--model", NANO, "--output", tmp_path / "found")
    names = [category["name"] for category in opened(tmp_path / "found" / "detections.json").dataset["categories"]]
    assert code == 0 and len(names) == 80
    assert (names[0], names[11], names[12], names[79]) == ("person", "stop sign", "parking meter", "toothbrush")
    torch.save(make("mask_rcnn", num_classes=2).state_dict(), tmp_path / "p.pth")
    code, out, _ = run(capfd, *given, "--model", NANO)
    assert code == 0 and {text.split()[0] for text in out.partition(": ")[2].split(", ")} <= {"1", "2"} and ", " in out


def test_file_names_in_bytes_and_names_of_any_script(photos, tmp_path, capfd):
    path = write_run(tmp_path / "c.pth", "mask_rcnn", classes=["\u732b", "a\nb", "\x1b[2J"])
    (photos / "a.jpg").rename(photos / "\udcff.jpg")
    code, out, _ = run(capfd, "--checkpoint", path, photos / "\udcff.jpg", "--output", tmp_path / "found")
    assert code == 0 and len(out.splitlines()) == 1 and "\x1b" not in out
    written = json.loads((tmp_path / "found" / "detections.json").read_text())
    assert written["images"][0]["file_name"] == "\udcff.jpg"
    assert [category["name"] for category in written["categories"]] == ["\u732b", "a\nb", "\x1b[2J"]
    assert (tmp_path / "found" / "\udcff.jpg").exists()
