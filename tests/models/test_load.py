"""models.load: the network of a checkpoint and its transform, as they were in the run; and timm's ways to load one."""
import warnings

import pytest
import timm
import torch
from PIL import Image
from timm.data import resolve_data_config

import main as program
import models
from storage.weights import WeightsError
from tasks.classification.images import ImagePipeline
from training.data.images import load_image

KWARGS = ["num_regions=2", "topk=(1,1,1)"]
NAMES = ["class0", "class1", "class2"]


@pytest.fixture(scope="module")
def trained(photos, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    command = ["--model", "biformer_nano", "--input_size", "32x48", "--batch_size", "2", "--num_workers", "0",
               "--device", "cpu", "--epochs", "1", "--warmup_epochs", "0", "--lr", "1e-2", "--crop_pct", "0.8",
               "--data_path", str(photos), "--output_dir", str(folder), "--model_kwargs", *KWARGS]
    assert program.main(command) == 0
    return folder / "last.pth"


def first_image(photos):
    return load_image(sorted((photos / "val").rglob("*.*"))[0])


def expected_logits(photos, trained, key="model"):
    """Of the first image, by evaluation's own pipeline."""
    model = timm.create_model("biformer_nano", num_classes=3, num_regions=2, topk=(1, 1, 1)).eval()
    model.load_state_dict(torch.load(trained, weights_only=True)[key])
    images = ImagePipeline("biformer_nano", (32, 48), crop_pct=0.8)
    pixels = torch.as_tensor(images.transform()(first_image(photos)), dtype=torch.float32) / 255
    mean, std = (torch.tensor(images.config[key])[:, None, None] for key in ("mean", "std"))
    return model(((pixels - mean) / std)[None])


def test_a_run_is_loaded_with_all_that_it_was_trained_with(photos, trained):
    network, transform = models.load(trained)
    assert not network.training and transform(first_image(photos)).shape == (3, 32, 48)
    torch.testing.assert_close(network(transform(first_image(photos))[None]), expected_logits(photos, trained))
    assert network.num_classes == 3 and network.pretrained_cfg["label_names"] == tuple(NAMES)
    config = resolve_data_config(model=network)
    assert (config["input_size"], config["crop_pct"]) == ((3, 32, 48), 0.8)


def test_the_average_of_the_weights_is_loaded(photos, trained):
    network, transform = models.load(str(trained), weights="model_ema")
    logits = network(transform(first_image(photos))[None])
    torch.testing.assert_close(logits, expected_logits(photos, trained, "model_ema"))
    assert not torch.equal(logits, expected_logits(photos, trained))


def test_an_image_of_any_mode_is_taken_upright(trained):
    _, transform = models.load(trained)
    grey = Image.linear_gradient("L")
    turned = grey.rotate(90, expand=True)
    turned.getexif()[0x0112] = 6  # to be turned by a quarter, clockwise
    torch.testing.assert_close(transform(turned), transform(grey.convert("RGB")))
    for mode in ("L", "RGBA", "CMYK", "1", "P"):
        assert transform(grey.convert("RGB").convert(mode)).shape == (3, 32, 48)
    for mode in ("F", "I", "I;16"):  # PIL would clip them
        with pytest.raises(ValueError, match=f"an image of mode {mode} has greys of more than 8 bits"):
            transform(Image.new(mode, (64, 64)))


def test_a_run_that_took_images_as_they_lie(trained, tmp_path):
    checkpoint = torch.load(trained, weights_only=True)
    checkpoint["args"]["exif_transpose"] = False
    torch.save(checkpoint, tmp_path / "lying.pth")
    _, transform = models.load(tmp_path / "lying.pth")
    turned = Image.linear_gradient("L")
    turned.getexif()[0x0112] = 6
    torch.testing.assert_close(transform(turned), transform(Image.linear_gradient("L")))


def test_weights_of_others_are_named(tmp_path):
    model = timm.create_model("resnet10t", num_classes=7)
    torch.save(model.state_dict(), tmp_path / "bare.pth")
    with pytest.raises(ValueError, match=r"bare.pth does not say which model it belongs to; name it: load\(") as error:
        models.load(tmp_path / "bare.pth")
    assert "\n" not in str(error.value)
    network, transform = models.load(tmp_path / "bare.pth", model="resnet10t")
    torch.testing.assert_close(network.state_dict(), model.state_dict(), rtol=0, atol=0)
    assert network.num_classes == 7
    assert transform(Image.new("RGB", (300, 300))).shape == network.pretrained_cfg["input_size"]
    with pytest.raises(ValueError, match="is of the model 'resnet11t', which timm does not know"):
        models.load(tmp_path / "bare.pth", model="resnet11t")
    with pytest.raises(ValueError, match=r"bare\.pth: the checkpoint does not fit biformer_nano with 10 classes: "):
        models.load(tmp_path / "bare.pth", model="biformer_nano")


def test_weights_of_another_model_say_whose_they_are(trained):
    with pytest.raises(ValueError, match=r"and .* more; this is biformer_nano's with 3 classes, num_regions=2, topk="):
        models.load(trained, model="resnet10t")


def test_what_others_mean_by_our_names_is_passed_over(tmp_path):
    model = timm.create_model("resnet10t", num_classes=7)
    others = dict(model="resnet10t", input_size=[3, 64, 64], model_kwargs="x", nb_classes="many")
    torch.save(dict(state_dict=model.state_dict(), args=others, classes=7), tmp_path / "others.pth")
    network, transform = models.load(tmp_path / "others.pth")
    torch.testing.assert_close(network.state_dict(), model.state_dict(), rtol=0, atol=0)
    assert transform(Image.new("RGB", (300, 300))).shape == (3, 176, 176) and network.num_classes == 7


def test_weights_that_are_not_finite_are_refused(trained, tmp_path):
    checkpoint = torch.load(trained, weights_only=True)
    checkpoint["model"]["head.fc.bias"][1] = float("nan")
    torch.save(checkpoint, tmp_path / "nan.pth")
    with pytest.raises(ValueError, match=r"nan.pth: weights are NaN or infinite, head.fc.bias first"):
        models.load(tmp_path / "nan.pth")


def test_classes_that_a_run_does_not_tell_are_counted(trained, tmp_path):
    """A run on shards knows neither their names nor, before it reads them, their number."""
    checkpoint = torch.load(trained, weights_only=True)
    torch.save(dict(checkpoint, classes=None), tmp_path / "shards.pth")
    network, _ = models.load(tmp_path / "shards.pth")
    assert network.num_classes == network.pretrained_cfg["num_classes"] == 3
    assert "label_names" not in network.pretrained_cfg or network.pretrained_cfg["label_names"] is None


def by_ema(trained, path):
    """The checkpoint `trained`, as if its best metric had been the EMA's."""
    checkpoint = torch.load(trained, weights_only=True)
    torch.save(dict(checkpoint, best={"ema_acc1": 50.0}), path)
    return path


def test_a_run_whose_best_metric_is_the_emas_is_loaded_with_its_ema_weights(photos, trained, tmp_path):
    best = by_ema(trained, tmp_path / "best.pth")
    image = first_image(photos)
    for weights, key in ((None, "model_ema"), ("model", "model"), ("model_ema", "model_ema")):
        network, transform = models.load(best, weights=weights)
        torch.testing.assert_close(network(transform(image)[None]), expected_logits(photos, trained, key))
    saved = torch.load(trained, weights_only=True)["model_ema"]
    model = create(best, num_regions=2, topk=(1, 1, 1))
    torch.testing.assert_close(model.state_dict(), saved, rtol=0, atol=0)
    torch.save(dict(torch.load(best, weights_only=True), model_ema=None), best)
    network, _ = models.load(best)
    torch.testing.assert_close(network.state_dict(), torch.load(trained, weights_only=True)["model"], rtol=0, atol=0)


@pytest.mark.parametrize("kwargs", [dict(nonsense=1), dict(topk="x")])
def test_arguments_that_the_model_refuses_are_one_line(trained, tmp_path, kwargs):
    checkpoint = torch.load(trained, weights_only=True)
    checkpoint["args"]["model_kwargs"] = kwargs
    torch.save(checkpoint, tmp_path / "bad.pth")
    with pytest.raises(WeightsError, match=r"bad\.pth: biformer_nano cannot be built with .*=") as error:
        models.load(tmp_path / "bad.pth")
    assert "\n" not in str(error.value)


# --- timm's ways ------------------------------------------------------------------------------------------------------


def create(file, **kwargs):
    overlay = dict(file=str(file), **kwargs.pop("overlay", {}))
    return timm.create_model("biformer_nano", pretrained=True, pretrained_cfg_overlay=overlay, **kwargs).eval()


@pytest.mark.parametrize("kwargs", [dict(num_classes=3), {}, dict(num_classes=3, overlay=dict(num_classes=3))])
def test_timms_overlay_takes_the_classifier_of_the_file(photos, trained, kwargs):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = create(trained, num_regions=2, topk=(1, 1, 1), **kwargs)
    saved = torch.load(trained, weights_only=True)["model"]
    torch.testing.assert_close(model.state_dict(), saved, rtol=0, atol=0)
    config = resolve_data_config(model=model)
    assert (config["input_size"], config["crop_pct"]) == ((3, 32, 48), 0.8)
    assert model.pretrained_cfg["label_names"] == tuple(NAMES) and model.pretrained_cfg["file"] == str(trained)


def test_weights_in_memory_keep_their_classifier_too(trained):
    saved = torch.load(trained, weights_only=True)["model"]
    for kwargs in (dict(num_classes=3), {}):
        overlay = dict(state_dict=saved)
        model = timm.create_model("biformer_nano", pretrained=True, pretrained_cfg_overlay=overlay, **kwargs)
        torch.testing.assert_close(model.state_dict(), saved, rtol=0, atol=0)


def test_weights_of_lightning_have_their_number_of_classes(tmp_path):
    saved = timm.create_model("biformer_nano", num_classes=3).state_dict()
    lightning = {f"model.{name}": value for name, value in saved.items()}
    file = tmp_path / "lightning.ckpt"
    torch.save(dict(state_dict=lightning), file)
    for network in (create(file), models.load(file, model="biformer_nano")[0]):
        torch.testing.assert_close(network.state_dict(), saved, rtol=0, atol=0)


def test_another_number_of_classes_is_a_warning(trained):
    with pytest.warns(UserWarning, match="has 3 classes, and the model 5: its classifier is untrained"):
        model = create(trained, num_classes=5, num_regions=2, topk=(1, 1, 1))
    assert model.num_classes == 5
    saved = torch.load(trained, weights_only=True)["model"]
    assert model.stem.conv1.weight.equal(saved["stem.conv1.weight"])


def test_other_arguments_than_the_runs_are_a_warning(trained):
    """They change no shape, and every result."""
    with pytest.warns(UserWarning, match=r"was trained with num_regions=2, topk=\[1, 1, 1\]"):
        create(trained, num_classes=3)


def test_a_network_without_a_classifier_needs_none(trained):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = create(trained, num_classes=0, num_regions=2, topk=(1, 1, 1))
    saved = torch.load(trained, weights_only=True)["model"]
    assert model.num_classes == 0 and model.stem.conv1.weight.equal(saved["stem.conv1.weight"])


def test_features_of_a_run_need_no_classifier(trained):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = create(trained, features_only=True, num_regions=2, topk=(1, 1, 1))
    assert len(model(torch.zeros(1, 3, 64, 64))) == 4
