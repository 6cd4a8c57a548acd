"""Label maps by scripts/make_label_maps.py, and whole runs that train on them."""
import json
import re
import shutil

import numpy as np
import pytest
import timm
import torch
import yaml
from PIL import Image
from torch import nn

import main as program
from helpers.photos import write_photos
from scripts import make_label_maps
from tasks.classification.token_labels import TokenTargets, label_map_path, read_label_map
from utils import UserError

RESULT = re.compile(r"\* Acc@1 (\d+\.\d{3}) Acc@5 \d+\.\d{3} loss (\d+\.\d{3})")
SMALL = ["--data_set", "image_folder", "--input_size", "64", "--batch_size", "4", "--num_workers", "0",
         "--device", "cpu"]
SHORT = ["--warmup_epochs", "0", "--lr", "1e-2", "--log_every", "2"]
SMALL_DEBIFORMER = ["--model", "debiformer_tiny", "--model_kwargs", "depths=(1,1,1,1)", "dims=(32,64,96,128)",
                    "num_groups=(1,1,1,1)"]


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """13 training and 7 validation images of three classes, one of which lies deeper."""
    root = write_photos(tmp_path_factory.mktemp("photos"), train=13, val=7)
    deeper = root / "train" / "class1" / "deeper"
    deeper.mkdir()
    (root / "train" / "class1" / "4.png").rename(deeper / "4.more.png")
    return root


def teacher(name, **kwargs):
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=3, **kwargs).eval()


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("teacher") / "teacher.pth"
    torch.save(teacher("test_resnet").state_dict(), path)
    return path


def make(photos, output, weights, *arguments):
    arguments = ["--data_path", photos, "--output", output, "--model", "test_resnet", "--checkpoint", weights,
                 "--input_size", 96, "--batch_size", 5, "--num_workers", 0, "--device", "cpu", *arguments]
    return make_label_maps.main([str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def maps(photos, weights, tmp_path_factory):
    output = tmp_path_factory.mktemp("maps")
    assert make(photos, output, weights) == 0
    return output


def test_maps_are_made_of_the_images_of_training(photos, weights, tmp_path, capsys):
    """Of class folders without train too; what is left out is said, and classes in another order are."""
    root = tmp_path / "flat"
    shutil.copytree(photos / "train", root)
    for name in ("._0.png", "notes.txt"):
        (root / "class0" / name).write_bytes(b"text")
    exif = Image.Exif()
    exif[0x0112] = 6
    picture = Image.open(root / "class0" / "0.png")
    picture.save(root / "class0" / "0.png", exif=exif)
    state = torch.load(weights, weights_only=True)
    torch.save(dict(model=state, classes=["class1", "class0", "class2"]), tmp_path / "teacher.pth")
    maps = {}
    for transpose in ("true", "false"):
        maps[transpose] = tmp_path / transpose
        assert make(root, maps[transpose], tmp_path / "teacher.pth", "--exif_transpose", transpose) == 0
        out = capsys.readouterr().out
        assert f"left out 1 file in {root} that is no image: 1 .txt\n" in out
        assert f"13 images in {root}, 0 of which" in out
        assert "warning: " in out and "was trained on the same classes in another order: number 0 was 'class1'" in out
    upright, stored = (read_label_map(maps[name] / "class0" / "0.pt", 3) for name in ("true", "false"))
    assert not torch.equal(upright, stored)
    assert torch.equal(*(read_label_map(maps[name] / "class0" / "3.pt", 3) for name in ("true", "false")))


# --- what the teacher says --------------------------------------------------------------------------------------------


def test_the_mean_of_a_linear_teacher_is_its_prediction():
    model, images = teacher("test_resnet"), torch.randn(2, 3, 96, 96)
    with torch.no_grad():
        logits = make_label_maps.dense_logits(model, images)
        assert logits.shape == (2, 3, 3, 3)
        torch.testing.assert_close(logits.mean(dim=(2, 3)), model(images))


@pytest.mark.parametrize("global_pool", ["token", "avg"])
def test_a_plain_vision_transformer(global_pool):
    """Its classifier at every patch, without the class token; with what comes between pooling and classifier."""
    model, images = teacher("test_vit", img_size=64, global_pool=global_pool), torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        logits = make_label_maps.dense_logits(model, images)
        patches = model.forward_features(images)[:, model.num_prefix_tokens :]
        expected = model.head(model.fc_norm(patches)).transpose(1, 2).unflatten(2, (4, 4))
    torch.testing.assert_close(logits, expected)


def test_a_teacher_that_holds_maps_channels_last():
    model, images = teacher("swin_tiny_patch4_window7_224", img_size=64), torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        logits = make_label_maps.dense_logits(model, images)
        expected = model.head.fc(model.forward_features(images)).permute(0, 3, 1, 2)
    torch.testing.assert_close(logits, expected)


def test_tokens_that_are_no_square_map():
    class Odd(nn.Module):
        def forward_features(self, images):
            return images.new_zeros(1, 5, 8)

    with pytest.raises(UserError, match="5 tokens, which are no square map"):
        make_label_maps.dense_logits(Odd(), torch.zeros(1, 3, 32, 32))


@pytest.mark.parametrize("num_classes,topk", [(40, 5), (6, 5), (4, 5)])
def test_label_maps_keep_the_teachers_probabilities(num_classes, topk):
    """Classes that are left out count as 0 in training; the others then have the teacher's probabilities."""
    logits = 3 * torch.randn(2, num_classes, 4, 4) + 7
    maps = make_label_maps.label_maps(logits, topk)
    assert maps.shape == (2, 2, min(topk, num_classes), 4, 4) and maps.dtype == torch.float16
    side = (2 * torch.arange(4) + 1) / 4 - 1
    points = torch.stack(torch.meshgrid(side, side, indexing="xy"), dim=-1).expand(2, 4, 4, 2)
    found = TokenTargets(maps, points).scores(num_classes, 4, 4).softmax(dim=1)
    classes = maps[:, 1].long()
    assert torch.equal(classes, logits.topk(len(classes[0]), dim=1).indices)
    torch.testing.assert_close(found.gather(1, classes), logits.softmax(dim=1).gather(1, classes), atol=2e-3, rtol=0)


def test_many_classes_are_stored_in_float32():
    logits = torch.zeros(1, 3001, 1, 1)
    logits[0, 3000] = 1
    assert make_label_maps.label_maps(logits, 1)[0, 1].item() == 3000


# --- the script -------------------------------------------------------------------------------------------------------


def test_maps_lie_as_their_images_do(photos, weights, maps):
    images = [path.relative_to(photos / "train") for path in sorted((photos / "train").rglob("*.png"))]
    assert {path for path in maps.rglob("*") if path.is_file()} == {label_map_path(maps, image) for image in images}
    model = teacher("test_resnet")
    model.load_state_dict(torch.load(weights))
    for image in (images[0], images[-1]):
        pixels = Image.open(photos / "train" / image).resize((96, 96), Image.Resampling.BICUBIC)
        x = torch.from_numpy(np.array(pixels)).permute(2, 0, 1)[None] / 255
        config = model.pretrained_cfg
        x = (x - torch.tensor(config["mean"]).view(3, 1, 1)) / torch.tensor(config["std"]).view(3, 1, 1)
        with torch.no_grad():
            expected = make_label_maps.label_maps(make_label_maps.dense_logits(model, x), 5)[0]
        path = label_map_path(maps, image)
        torch.testing.assert_close(read_label_map(path, 3), expected, atol=2e-2, rtol=1e-2)
        assert path.stat().st_size < 5000, "the file holds more than its own map"


def test_it_resumes_where_it_was_interrupted(photos, weights, maps, capfd):
    kept, lost = sorted(maps.rglob("*.pt"))[:2]
    before = kept.stat().st_mtime_ns, torch.load(lost)
    lost.unlink()
    assert make(photos, maps, weights) == 0
    assert "12 of which have a map" in (out := capfd.readouterr().out) and "made 1 maps of (2, 3, 3, 3)" in out
    assert kept.stat().st_mtime_ns == before[0]
    torch.testing.assert_close(torch.load(lost), before[1])
    assert make(photos, maps, "nowhere.pth") == 0, "there is nothing left to ask the teacher"


@pytest.mark.parametrize(
    "arguments,message",
    [
        (["--model", "test_resnett"], "did you mean test_resnet"),
        (["--checkpoint", "nowhere.pth"], "no such checkpoint"),
        (["--data_path", "nowhere"], "does not exist"),
        (["--input_size", "1"], None),
    ],
)
def test_mistakes_are_explained(photos, weights, tmp_path, arguments, message, capfd):
    code = make(photos, tmp_path, weights, *arguments)
    if message is None:
        assert code == 0
    else:
        assert code in (1, 2) and message in capfd.readouterr().err


def test_published_weights_of_other_classes(photos, tmp_path, capfd):
    assert make_label_maps.main(["--data_path", str(photos), "--output", str(tmp_path), "--model", "test_resnet"]) == 1
    message = "have 1000 classes, the data has 3; give a teacher of these classes by --checkpoint"
    assert message in capfd.readouterr().err


def test_maps_among_the_class_folders_are_refused(photos, weights, capfd):
    """The folder of maps was a class without images."""
    assert make(photos, photos / "train" / "maps", weights) == 2
    assert f"{photos}/train/maps lies among the class folders of {photos}/train and would be" in capfd.readouterr().err
    assert not (photos / "train" / "maps").exists()


def test_two_images_of_one_name(tmp_path, weights, capfd):
    for name in ("a.png", "a.jpg"):
        (tmp_path / "train" / "x").mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 40)).save(tmp_path / "train" / "x" / name)
    assert make(tmp_path, tmp_path / "maps", weights) == 1
    assert "2 images share the name of a in x; rename them" in capfd.readouterr().err


def test_an_image_that_cannot_be_read(photos, weights, tmp_path, capfd):
    for i in range(3):
        (tmp_path / "train" / f"class{i}").mkdir(parents=True)
        (tmp_path / "train" / f"class{i}" / "a.png").write_bytes(next((photos / "train").glob("*/*.png")).read_bytes())
    (tmp_path / "train" / "class1" / "a.png").write_bytes(b"no image")
    assert make(tmp_path, tmp_path / "maps", weights) == 1
    assert "not an image; remove it, or pass --skip_bad_images" in capfd.readouterr().err
    assert make(tmp_path, tmp_path / "maps", weights, "--skip_bad_images") == 0
    assert "skipped 1 image that" in (out := capfd.readouterr().out) and "made 2 maps" in out
    assert len(list((tmp_path / "maps").rglob("*.pt"))) == 2


# --- training ---------------------------------------------------------------------------------------------------------


def run(*arguments):
    return program.main([str(argument) for argument in arguments])


@pytest.mark.slow
@pytest.mark.parametrize("model", [["--model", "biformer_nano"], SMALL_DEBIFORMER], ids=["biformer", "debiformer"])
def test_train_resume_and_evaluate_as_a_plain_model(photos, maps, tmp_path, model, capfd):
    training = [*SMALL, *SHORT, *model, "--data_path", photos, "--token_label", maps, "--output_dir", tmp_path / "run"]
    assert run(*training, "--epochs", "1") == 0
    assert run(*training, "--epochs", "2", "--auto_resume") == 0
    records = [json.loads(line) for line in (tmp_path / "run" / "log.txt").read_text().splitlines()]
    assert [record["epoch"] for record in records] == [0, 1]
    saved = torch.load(tmp_path / "run" / "last.pth", weights_only=True)
    assert "token_head.weight" in saved["model"] and "token_head.weight" in saved["model_ema"]
    capfd.readouterr()
    assert run(*SMALL, *model, "--data_path", photos, "--eval", "--resume", tmp_path / "run" / "last.pth") == 0
    acc1, loss = map(float, RESULT.search(capfd.readouterr().out).groups())
    assert acc1 == pytest.approx(records[1]["val_acc1"], abs=1e-3)
    assert loss == pytest.approx(records[1]["val_loss"], abs=2e-3)
    assert run("--config", tmp_path / "run" / "args.yaml", "--auto_resume", "false", "--eval", "--resume",
               tmp_path / "run" / "last.pth") == 0
    assert yaml.safe_load((tmp_path / "run" / "args.yaml").read_text())["token_label"] == str(maps)


@pytest.mark.parametrize("mixing", [["--mixup", "0.8", "--cutmix", "1.0"], ["--mixup", "0", "--cutmix", "0"]])
def test_both_classifiers_learn_what_the_maps_say(photos, tmp_path, mixing):
    """Maps that are sure of class 2 everywhere move the biases, from 0: the images' folders do not matter."""
    for image in (photos / "train").rglob("*.png"):
        path = label_map_path(tmp_path / "maps", image.relative_to(photos / "train"))
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(torch.stack([torch.full((1, 3, 3), 9.0), torch.full((1, 3, 3), 2.0)]).half(), path)
    assert run(*SMALL, *SHORT, "--model", "biformer_nano", "--data_path", photos, "--token_label", tmp_path / "maps",
               "--epochs", "1", "--disable_eval", "--output_dir", tmp_path / "run", *mixing) == 0
    saved = torch.load(tmp_path / "run" / "last.pth", weights_only=True)["model"]
    for classifier in ("head.fc", "token_head"):
        bias = saved[f"{classifier}.bias"]
        assert bias[2] > 0 and (bias[:2] < 0).all()


def test_a_run_follows_from_its_seed_whatever_the_workers(photos, maps, tmp_path):
    for workers in (0, 1):
        assert run(*SMALL, *SHORT, "--model", "biformer_nano", "--data_path", photos, "--token_label", maps,
                   "--epochs", "1", "--num_workers", workers, "--disable_eval",
                   "--output_dir", tmp_path / str(workers)) == 0
    here, there = (torch.load(tmp_path / name / "last.pth", weights_only=True)["model"] for name in "01")
    torch.testing.assert_close(here, there, rtol=0, atol=0)


def test_fine_tuning_from_a_plain_model(photos, maps, tmp_path):
    plain = timm.create_model("biformer_nano", num_classes=11)
    torch.save(plain.state_dict(), tmp_path / "plain.pth")
    assert run(*SMALL, *SHORT, "--model", "biformer_nano", "--data_path", photos, "--token_label", maps,
               "--epochs", "1", "--lr", "1e-9", "--min_lr", "0", "--disable_eval", "--finetune", tmp_path / "plain.pth",
               "--output_dir", tmp_path / "run") == 0
    tuned = torch.load(tmp_path / "run" / "last.pth", weights_only=True)["model"]
    name = "stages.2.blocks.0.attn.qkv.weight"
    torch.testing.assert_close(tuned[name], plain.state_dict()[name], atol=1e-4, rtol=0)
    assert tuned["token_head.weight"].shape[0] == tuned["head.fc.weight"].shape[0] == 3


def test_bad_images_are_skipped_and_missing_maps_are_not(photos, maps, tmp_path, capfd):
    for image in (photos / "train").rglob("*.png"):
        copy = tmp_path / image.relative_to(photos)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(image.read_bytes())
    damaged, last = sorted((tmp_path / "train").rglob("*.png"))[1:13:11]
    damaged.write_bytes(b"no image")
    training = [*SMALL, *SHORT, "--model", "biformer_nano", "--data_path", tmp_path, "--epochs", "1", "--disable_eval"]
    training += ["--repeated_aug", "false", "--skip_bad_images", "--token_label"]
    assert run(*training, maps, "--output_dir", tmp_path / "run") == 0
    assert "skipped 1 image that could not be read" in capfd.readouterr().out

    some = tmp_path / "maps"
    for path in maps.rglob("*.pt"):
        copy = some / path.relative_to(maps)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(path.read_bytes())
    lost = label_map_path(some, last.relative_to(tmp_path / "train"))
    lost.unlink()
    assert run(*training, some, "--batch_size", "12", "--output_dir", tmp_path / "other") == 1
    assert f"{lost}: no such label map; make it by scripts/make_label_maps.py" in capfd.readouterr().err


def test_a_folder_without_maps(photos, tmp_path, capfd):
    code = run(*SMALL, "--model", "biformer_nano", "--data_path", photos, "--token_label", tmp_path)
    assert code == 1 and "no such label map" in capfd.readouterr().err


@pytest.mark.parametrize("model", ["bvit_5m", "test_resnet"])
def test_a_model_without_a_token_head(photos, maps, tmp_path, model, capfd):
    code = run(*SMALL, "--model", model, "--data_path", photos, "--token_label", maps)
    message = f"{model} has no token head, as BiFormer has; --token_label needs one"
    assert code == 2 and message in capfd.readouterr().err
