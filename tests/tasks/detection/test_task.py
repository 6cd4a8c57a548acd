"""tasks/detection/task.py: losses by name, what a run starts from, and what it says about mistakes."""
import re

import pytest
import timm
import torch

import main as program
from helpers.objects import CLASSES, read_annotations, write_annotations, write_objects
from models.detection import DETECTORS, load_detector
from models.segmentation import semantic_fpn
from tasks.detection import options
from tasks.detection.options import DetectionSettings
from tasks.detection.task import DetectionTask
from training import parsing
from training.distributed import Distributed
from training.precision import Precision

SMALL = ["--task", "detection", "--model", "biformer_nano", "--fpn_channels", "16", "--short_side", "64",
         "--long_side", "96", "--batch_size", "2", "--num_workers", "0", "--device", "cpu"]
HEAD = ["--head_channels", "32"]
LOSSES = dict(
    mask_rcnn={"loss_classifier", "loss_box_reg", "loss_mask", "loss_objectness", "loss_rpn_box_reg"},
    cascade_mask_rcnn={"loss_objectness", "loss_rpn_box_reg"} | {
        f"loss_{name}_{stage}" for name in ("classifier", "box_reg", "mask") for stage in range(3)
    },
    retinanet={"classification", "bbox_regression"},
)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_objects(tmp_path_factory.mktemp("objects"))


def words(data, *argv):
    head = [] if "retinanet" in argv else HEAD
    return [*SMALL, *head, "--data_path", str(data), *map(str, argv)]


def task_of(data, *argv, splits=("train",)):
    task = DetectionTask(parsing.parse(DetectionSettings, words(data, *argv)), Distributed(torch.device("cpu")),
                         Precision())
    for split in splits:
        task.dataset(split)
    return task


def network_of(data, *argv):
    return task_of(data, *argv).network()


def detector(name="mask_rcnn", num_classes=3, **kwargs):
    if name != "retinanet":
        kwargs = dict(head_channels=32) | kwargs
    return DETECTORS[name]("biformer_nano", num_classes, **{"channels": 16, **kwargs})


def saved(network, path, **more):
    torch.save(dict(model=network.state_dict(), **more), path)
    return path


def complaint(capfd, data, *argv):
    """What a run that does not start says, in one line, and its exit code."""
    code = program.main(words(data, *argv))
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    return code, lines[0]


# --- batches and losses -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DETECTORS)
def test_losses_have_names_and_their_sum_is_trained(data, name):
    task = task_of(data, "--detector", name)
    images, targets = batch = next(iter(task.loader(task.dataset("train"), train=True)))
    assert task.count(batch) == len(images) == len(targets) == 2
    assert all(image.dtype == torch.uint8 and min(image.shape[1:]) <= 64 for image in images)
    assert all(("masks" in target) == (name != "retinanet") for target in targets)
    network = task.network()
    seen = []
    network.backbone.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].shape))
    task.train_mode(network)
    loss, parts = task.loss(network, batch)
    assert parts.keys() == LOSSES[name] and not any(part.requires_grad for part in parts.values())
    torch.testing.assert_close(loss.detach(), sum(parts.values()))
    loss.backward()
    without = [name for name, parameter in network.named_parameters() if parameter.grad is None]
    assert not without, without
    # They come as large as they are to be, and are padded.
    height, width = (max(image.shape[axis] for image in images) for axis in (1, 2))
    assert seen == [(2, 3, -(-height // 32) * 32, -(-width // 32) * 32)]


def test_batches_are_of_one_orientation(data):
    task = task_of(data)
    loader = task.loader(task.dataset("train"), train=True)
    assert len(loader) == 3
    for epoch in range(3):
        loader.set_epoch(epoch)
        shapes = [{image.shape[2] >= image.shape[1] for image in images} for images, _ in loader]
        assert len(shapes) == 3 and all(len(shape) == 1 for shape in shapes)


def test_what_a_run_is_tried_out_with(data):
    for name in DETECTORS:
        task = task_of(data, "--detector", name)
        network = task.network()
        task.check_input(network)
        before = {key: value.clone() for key, value in network.state_dict().items()}
        task.train_mode(network)
        loss, _ = task.loss(network, task.dummy_batch(2, train=True))
        assert loss.isfinite() and task.input_description == "images of 3 x 64 x 85"
        assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items() if "body" in key)


def test_batch_norms_of_the_backbone_keep_their_statistics_unless_asked(data):
    for asked, expected in (("true", False), ("false", True)):
        network = network_of(data, "--freeze_batch_norm", asked)
        network.train()
        norms = [m for m in network.backbone.body.modules() if isinstance(m, torch.nn.BatchNorm2d)]
        assert norms and all(norm.training == expected for norm in norms)


def test_options_reach_the_network(data):
    network = network_of(data, "--model_kwargs", "num_regions=4", "padding=published", "--extra_norms", "false")
    assert network.backbone.extra_norms is None and network.backbone.out_channels == 16
    assert network.backbone.body.stages[0].blocks[0].attn.num_regions == 4
    assert (network.transform.short, network.transform.long) == (64, 96)
    assert not network.transform.resize_in_training
    modules = network_of(data, "--drop_path", 0.2).modules()
    assert max(module.drop_prob for module in modules if hasattr(module, "drop_prob")) == pytest.approx(0.2)


def test_options_name_what_there_is():
    """They are read before torch is imported, and so have names of their own."""
    assert set(options.DETECTORS) == set(DETECTORS)


# --- what a run starts from -------------------------------------------------------------------------------------------


def test_a_classifier_gives_the_backbone(data, tmp_path, capsys):
    classifier = timm.create_model("biformer_nano", num_classes=10)
    network = network_of(data, "--finetune", saved(classifier, tmp_path / "c.pth"))
    body = network.backbone.body.state_dict()
    assert all(torch.equal(value, classifier.state_dict()[name]) for name, value in body.items())
    assert f"{tmp_path}/c.pth: {len(body)} tensors of the backbone are loaded" in capsys.readouterr().out


@pytest.mark.parametrize("name", DETECTORS)
def test_a_detector_gives_all_but_other_classes(data, tmp_path, capsys, name):
    source = detector(name)
    path = saved(source, tmp_path / "d.pth", classes=list(CLASSES))
    network = network_of(data, "--detector", name, "--finetune", path)
    assert all(torch.equal(x, source.state_dict()[key]) for key, x in network.state_dict().items())
    assert capsys.readouterr().out.endswith(f"{path}: all is loaded\n")
    source = detector(name, num_classes=7)
    network = network_of(data, "--detector", name, "--finetune", saved(source, path))
    assert "has another number of classes: the classifiers are re-initialised" in capsys.readouterr().out
    weights = source.state_dict()
    kept = {key for key, x in network.state_dict().items() if x.shape == weights[key].shape}
    assert all(torch.equal(network.state_dict()[key], weights[key]) for key in kept)
    lost = set(weights) - kept
    assert lost and all(re.search(r"cls_score|bbox_pred|mask_fcn_logits|cls_logits", key) for key in lost)


@pytest.mark.parametrize("name,kwargs", [
    ("retinanet", {}), ("mask_rcnn", dict(head_channels=24)), ("mask_rcnn", dict(channels=8)),
])
def test_another_detector_gives_the_backbone(data, tmp_path, capsys, name, kwargs):
    source = detector(name, **kwargs)
    network = network_of(data, "--finetune", saved(source, tmp_path / "d.pth"))
    body = network.backbone.body.state_dict()
    assert all(torch.equal(x, source.backbone.body.state_dict()[key]) for key, x in body.items())
    out = capsys.readouterr().out
    assert "tensors of the backbone are loaded" in out
    assert re.search(r"newly initialised: .*backbone\.fpn \(16\), rpn", out)


def test_a_segmenter_gives_the_backbone(data, tmp_path, capsys):
    source = semantic_fpn("biformer_nano", num_classes=3)
    network = network_of(data, "--finetune", saved(source, tmp_path / "s.pth"))
    key = "extra_norms.0.weight"
    assert torch.equal(network.backbone.state_dict()[key], source.backbone.state_dict()[key])
    assert "not needed, and left out: neck (16), decode_head (44)" in capsys.readouterr().out


def test_weights_that_do_not_fit_start_nothing(data, tmp_path, capfd):
    path = saved(timm.create_model("resnet18"), tmp_path / "x.pth")
    code, line = complaint(capfd, data, "--finetune", path)
    assert code == 1 and line.startswith(f"error: {path}: the checkpoint does not fit biformer_nano: ")
    assert line.endswith("; --model must name the model of the weights")


@pytest.mark.parametrize("other", [
    lambda: timm.create_model("biformer_nano"), lambda: semantic_fpn("biformer_nano", num_classes=3),
])
def test_only_a_detector_is_evaluated(data, tmp_path, capfd, other):
    path = saved(other(), tmp_path / "x.pth")
    code, line = complaint(capfd, data, "--eval", "--resume", path)
    assert (code, line) == (1, f"error: {path} holds no detector; start from it with --finetune, and train")


def test_a_detector_is_no_classifier(data, tmp_path, capfd):
    path = saved(detector(), tmp_path / "d.pth")
    for arguments in (["--finetune"], ["--eval", "--resume"]):
        asked = ["--task", "classification", "--model", "biformer_nano", "--data_set", "digits", *arguments, str(path)]
        assert program.main([*asked, "--device", "cpu", "--num_workers", "0"]) == 1
        assert capfd.readouterr().err == (f"error: {path} holds a detector, and no classifier; --task detection trains "
                                          "and evaluates it\n")


def test_a_published_detector_is_evaluated(data, tmp_path, capsys):
    """In mmdetection's layout, whose classes have no names."""
    source = detector()
    published = {re.sub(r"^backbone\.body\.", "backbone.", key): x for key, x in source.state_dict().items()}
    torch.save(dict(state_dict=published, meta={}), tmp_path / "p.pth")
    task = task_of(data, "--eval", "--finetune", tmp_path / "p.pth", splits=("val",))
    network = task.network()
    task.load(network, str(tmp_path / "p.pth"))
    assert all(torch.equal(x, source.state_dict()[key]) for key, x in network.state_dict().items())
    load_detector(network, published)


def test_classes_of_another_data_set(data, tmp_path, capfd):
    path = saved(detector(), tmp_path / "d.pth", classes=["blue", "green", "red"])
    code, line = complaint(capfd, data, "--eval", "--resume", path)
    assert code == 1 and line.startswith(f"error: {path} was trained on ")


def test_the_splits_have_the_same_classes(tmp_path, capfd):
    data = write_objects(tmp_path)
    content = read_annotations(data, "val")
    content["categories"][0]["name"] = "crimson"
    write_annotations(data, "val", content)
    code, line = complaint(capfd, data)
    assert code == 1
    assert line == "error: the validation set must have the training set's classes, but lacks red and adds crimson"


# --- mistakes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments,message", [
    (["--model", "deit_tiny_patch16_224"], "deit_tiny_patch16_224 has maps at strides 16, and a backbone needs"),
    (["--model", "biformer_nan"], "unknown model 'biformer_nan'; did you mean biformer_nano"),
    (["--model_kwargs", "num_regions=0"], "biformer_nano cannot be built: "),
    (["--detector", "yolo"], "--detector: invalid choice: 'yolo'"),
    (["--eval"], "--eval needs weights: --resume CHECKPOINT"),
    (["--finetune", "a", "--load_release"], "--resume, --finetune and --load_release are mutually exclusive"),
    (["--short_side", "200"], "--short_side 200 is above --long_side 96"),
    (["--short_side", "8"], "--short_side must be at least 32"),
    (["--layer_decay", "0.9"], "--layer_decay is for classifiers alone"),
    (["--report", "x"], "--report is of an evaluation: it needs --eval"),
    (["--detections", "x.json"], "--detections is of an evaluation: it needs --eval"),
    (["--compile"], "--compile is not for detectors"),
    (["--cuda_graph"], "--cuda_graph is for classifiers alone"),
    (["--best_metric", "acc1"], "--best_metric must be one of mask_AP, box_AP, "),
    (["--detector", "retinanet", "--best_metric", "mask_AP"], "--best_metric mask_AP: --detector retinanet finds no"),
    (["--mixup", "0.8"], "unknown flag --mixup"),
])
def test_a_wrong_command_line_is_one_line(data, capfd, arguments, message):
    code, line = complaint(capfd, data, *arguments)
    assert code == 2 and line.startswith(f"error: {message}")


def test_no_data_is_told(capfd):
    assert program.main([*SMALL]) == 2
    assert capfd.readouterr().err == "error: --data_path is missing: the folder of images and annotations\n"


@pytest.mark.parametrize("change,message", [
    (lambda x: x["annotations"][1].update(bbox=[0, 0, -5, 5]),
     r"\S+json: annotation 2 has a bbox of negative size, -5 x 5; correct it, or pass --skip_bad_images$"),
    (lambda x: x["annotations"][1].update(segmentation=[]),
     None),
    (lambda x: [y.update(segmentation=[]) for y in x["annotations"]],
     r"\S+json has boxes and no masks; --detector retinanet learns boxes alone$"),
    (lambda x: x["images"][0].update(width=200),
     r"\S+0\.png: is 76 x 64, and its annotations \(image 1\) are of 200 x 64; correct it, or pass --skip_bad_images$"),
])
def test_bad_annotations_are_told(tmp_path, capfd, change, message):
    data = write_objects(tmp_path)
    content = read_annotations(data, "train")
    change(content)
    write_annotations(data, "train", content)
    if message is None:
        assert task_of(data).classes == list(CLASSES)
        assert "17 objects; left out: 1 object without a mask" in capfd.readouterr().out
    else:
        code, line = complaint(capfd, data)
        assert code == 1 and re.match(f"error: {message}", line)


@pytest.mark.parametrize("device,sync,expected", [("cuda", True, True), ("cuda", False, False), ("cpu", True, False)])
def test_batch_norms_are_of_all_processes_on_gpus(data, capsys, device, sync, expected):
    task = task_of(data, "--sync_bn", sync, "--detector", "cascade_mask_rcnn")
    task.distributed = Distributed(torch.device(device), 0, 2)
    norms = [m for m in task.network().modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm)]
    assert {type(m).__name__ for m in norms} == ({"SyncBatchNorm"} if expected else {"BatchNorm2d"})
    told = "batch norms are of each process alone" in capsys.readouterr().out
    assert told == (device == "cpu" and sync)


def test_help_shows_the_flags_of_detection(capsys):
    with pytest.raises(SystemExit):
        program.main(["--task", "detection", "--help"])
    out = capsys.readouterr().out
    assert "--detector" in out and "--multi_scale" in out and "--short_side" in out and "--mixup" not in out
