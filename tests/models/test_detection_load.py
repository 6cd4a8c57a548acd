"""models.detection.load: the detectors of runs and published ones are built again as they were; and mistakes."""
import pytest
import timm
import torch
from PIL import Image

from models import load as load_classifier
from models.detection import DETECTORS, DetectorRecipe, load, to_tensor
from models.segmentation import semantic_fpn
from storage.weights import MismatchError, WeightsError

NANO = "biformer_nano"
SAID = dict(task="detection", model=NANO, model_kwargs=dict(topk=1), fpn_channels=16, head_channels=32,
            extra_norms=False, freeze_batch_norm=False, short_side=64, long_side=96)


def make(detector, **kwargs):
    """A detector with random statistics and biases too, lest any be equal in two networks."""
    torch.manual_seed(0)
    width = {} if detector == "retinanet" else dict(head_channels=32)
    network = DETECTORS[detector](NANO, num_classes=3, channels=16, short=64, long=96, **width, **kwargs)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return network.eval()


def write_run(path, network, kind, **said):
    """The checkpoint of a run; `said` replaces what it says, and leaves out what is "absent"."""
    args = {**SAID, "detector": kind, **said}
    args = {name: value for name, value in args.items() if value != "absent"}
    torch.save(dict(model=network.state_dict(), classes=["cat", "dog", "emu"], args=args), path)
    return path


def published(network):
    """In mmdetection's layout, where the names of the pyramid and the proposals tell a published detector."""
    names = {"backbone.body.": "backbone.", "backbone.fpn.": "neck.", "rpn.head.conv.0.0.": "rpn_head.rpn_conv.",
             "rpn.head.cls_logits.": "rpn_head.rpn_cls.", "rpn.head.bbox_pred.": "rpn_head.rpn_reg."}
    found = {}
    for name, value in network.state_dict().items():
        prefix = next((ours for ours in names if name.startswith(ours)), "")
        found[names.get(prefix, "") + name.removeprefix(prefix)] = value
    return found


@pytest.mark.parametrize("detector", DETECTORS)
def test_a_run_is_built_as_it_was(detector, tmp_path):
    """What it finds in an image is the same, number for number; by what the checkpoint says alone."""
    source = make(detector, topk=1, extra_norms=False, freeze_batch_norm=False)
    network, transform = load(write_run(tmp_path / "best.pth", source, detector))
    assert not network.training and network.classes == ["cat", "dog", "emu"] and network.num_classes == 3
    assert (network.transform.short, network.transform.long) == (64, 96)
    assert network.backbone.extra_norms is None and not network.backbone.freeze_batch_norm
    image = Image.effect_noise((70, 50), 90).convert("RGB")
    with torch.inference_mode():
        expected, = source([transform(image)])
        found, = network([transform(image)])
    assert len(expected["boxes"]) and found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


@pytest.mark.parametrize("detector", DETECTORS)
def test_published_weights_show_detector_widths_and_classes(detector, tmp_path):
    source = make(detector)
    assert source.backbone.extra_norms is not None
    torch.save(dict(state_dict=published(source), meta={}), tmp_path / "p.pth")
    network, _ = load(tmp_path / "p.pth", model=NANO)
    assert type(network) is type(source) and network.classes is None and network.num_classes == 3
    assert (network.transform.short, network.transform.long) == (800, 1333)
    assert all(torch.equal(value, source.state_dict()[name]) for name, value in network.state_dict().items())
    with pytest.raises(WeightsError, match=r"p\.pth does not say which model its backbone is; name it: load\("):
        load(tmp_path / "p.pth")
    with pytest.raises(WeightsError, match="timm knows no model 'nano'"):
        load(tmp_path / "p.pth", model="nano")
    torch.save(make(detector, extra_norms=False).state_dict(), tmp_path / "bare.pth")
    assert load(tmp_path / "bare.pth", model=NANO)[0].backbone.extra_norms is None


def test_widths_in_mmdetections_names():
    weights = {
        "neck.lateral_convs.0.conv.weight": torch.zeros(24, 8, 1, 1),
        "rpn_head.rpn_cls.weight": torch.zeros(3, 24, 1, 1),
        "roi_head.bbox_head.0.fc_cls.weight": torch.zeros(81, 48),
        "roi_head.bbox_head.1.fc_cls.weight": torch.zeros(81, 48),
    }
    recipe = DetectorRecipe.of(weights, "p.pth", NANO)
    assert recipe == DetectorRecipe(NANO, "cascade_mask_rcnn", 80, None, {}, 24, 48, False)
    weights = {
        "neck.lateral_convs.0.conv.weight": torch.zeros(24, 8, 1, 1),
        "backbone.extra_norms.1.weight": torch.zeros(8),
        "bbox_head.retina_cls.weight": torch.zeros(9 * 20, 24, 3, 3),
        "bbox_head.retina_reg.weight": torch.zeros(9 * 4, 24, 3, 3),
    }
    recipe = DetectorRecipe.of(weights, "p.pth", NANO)
    assert recipe == DetectorRecipe(NANO, "retinanet", 20, None, {}, 24, None, True)


def test_the_ema_weights_are_loaded_where_they_were_the_best(tmp_path):
    source = make("retinanet", topk=1, extra_norms=False)
    path = write_run(tmp_path / "c.pth", source, "retinanet")
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["model_ema"] = {name: value + 1 for name, value in checkpoint["model"].items()}
    torch.save(dict(checkpoint, best=dict(ema_AP=3.0)), path)
    name = "head.classification_head.cls_logits.bias"
    own = source.state_dict()[name]
    assert torch.equal(load(path)[0].state_dict()[name], own + 1)
    assert torch.equal(load(path, weights="model")[0].state_dict()[name], own)


@pytest.mark.parametrize("said,message", [
    (dict(task="classification"), "is not the checkpoint of a run that trains a detector"),
    (dict(task="segmentation"), "is not the checkpoint of a run that trains a detector"),
    (dict(detector="yolo"), "is of yolo on biformer_nano, which are not known here"),
    (dict(detector="absent"), "is of None on biformer_nano, which are not known here"),
    (dict(model="nano"), "is of mask_rcnn on nano, which are not known here"),
    (dict(short_side="absent"), "lacks 'short_side'"),
    (dict(fpn_channels="absent"), "lacks 'fpn_channels'"),
    (dict(detector="retinanet"), "lacks 'head.classification_head.cls_logits.weight'"),
    (dict(model_kwargs=dict(depth=3)), r": biformer_nano cannot be built: .*'depth'"),
    (dict(model="vit_tiny_patch16_224", model_kwargs={}), ": vit_tiny_patch16_224 cannot .* backbone needs those"),
    (dict(fpn_channels=24), r"does not fit a detector on biformer_nano with 3 classes: .* instead of"),
])
def test_mistakes_are_one_line(said, message, tmp_path):
    path = write_run(tmp_path / "c.pth", make("mask_rcnn", topk=1, extra_norms=False), "mask_rcnn", **said)
    with pytest.raises(WeightsError, match=message) as error:
        load(path)
    assert "\n" not in str(error.value)


def test_weights_of_other_networks_are_refused(tmp_path):
    for other in (timm.create_model(NANO, num_classes=2), semantic_fpn(NANO, num_classes=2)):
        torch.save(other.state_dict(), tmp_path / "w.pth")
        with pytest.raises(WeightsError, match=r"w\.pth holds no detector: it has neither proposals nor boxes$"):
            load(tmp_path / "w.pth", model=NANO)
    torch.save({"rpn_head.rpn_cls.weight": torch.zeros(1)}, tmp_path / "w.pth")
    with pytest.raises(WeightsError, match=r"w\.pth is of a detector other than mask_rcnn, cascade_"):
        load(tmp_path / "w.pth", model=NANO)
    without_masks = {name: x for name, x in make("mask_rcnn").state_dict().items() if ".mask_" not in name}
    torch.save(without_masks, tmp_path / "w.pth")
    with pytest.raises(MismatchError, match=r"roi_heads\.mask_head\.\S+ is missing"):
        load(tmp_path / "w.pth", model=NANO)


def test_weights_that_are_not_finite(tmp_path):
    source = make("retinanet", topk=1, extra_norms=False)
    source.head.regression_head.bbox_reg.bias.data[0] = float("nan")
    with pytest.raises(WeightsError, match=r"weights are NaN or infinite, head\.regression_head\.bbox_reg\.bias first"):
        load(write_run(tmp_path / "c.pth", source, "retinanet"))


def test_a_classifiers_load_says_which_is_meant(tmp_path):
    path = write_run(tmp_path / "c.pth", make("retinanet"), "retinanet")
    with pytest.raises(WeightsError, match="is no classifier, but of the task detection: load it by "
                                           r"models\.detection\.load$"):
        load_classifier(path)


def test_images_are_turned_upright_or_not(tmp_path):
    image = Image.new("L", (3, 2))
    image.putpixel((0, 0), 255)
    image.getexif()[0x0112] = 6  # a quarter turn clockwise
    upright = torch.zeros(3, 3, 2)
    upright[:, 0, 1] = 1
    assert torch.equal(to_tensor(image), upright)
    source = make("retinanet", topk=1, extra_norms=False)
    path = write_run(tmp_path / "c.pth", source, "retinanet", exif_transpose=False)
    assert torch.equal(load(path)[1](image), upright.rot90(1, (1, 2)))
    with pytest.raises(ValueError, match="greys of more than 8 bits"):
        to_tensor(Image.new("I;16", (3, 2)))
