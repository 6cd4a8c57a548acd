"""tasks/segmentation/task.py: losses by name, what a run starts from, and what it says about mistakes."""
import re

import pytest
import timm
import torch
import torch.nn.functional as F

import main as program
from helpers.segments import CLASSES, write_segments
from models.segmentation import HEADS, EvalSize, semantic_fpn, upernet
from tasks.segmentation import options
from tasks.segmentation.labels import IGNORE
from tasks.segmentation.losses import pixel_loss
from tasks.segmentation.options import SegmentationSettings
from tasks.segmentation.task import SegmentationTask
from training import parsing
from training.distributed import Distributed
from training.precision import Precision

SMALL = ["--task", "segmentation", "--model", "biformer_nano", "--head", "semantic_fpn", "--input_size", "32",
         "--short_side", "48", "--long_side", "160", "--batch_size", "2", "--num_workers", "0", "--device", "cpu"]


@pytest.fixture(scope="module")
def segments(tmp_path_factory):
    return write_segments(tmp_path_factory.mktemp("segments"))


def task_of(segments, *argv):
    settings = parsing.parse(SegmentationSettings, [*SMALL, "--data_path", str(segments), *map(str, argv)])
    return SegmentationTask(settings, Distributed(torch.device("cpu")), Precision())


def network_of(segments, *argv):
    task = task_of(segments, *argv)
    task.dataset("train")
    return task.network()


def complaint(capfd, segments, *argv):
    """What a run that does not start says, in one line, and its exit code."""
    code = program.main([*SMALL, "--data_path", str(segments), *map(str, argv)])
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    return code, lines[0]


# --- loss -------------------------------------------------------------------------------------------------------------


def test_the_loss_is_a_mean_over_all_pixels():
    """Those without a label count as 0; logits come at the size of the labels."""
    logits = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    labels = torch.randint(3, (2, 16, 20), generator=torch.Generator().manual_seed(1)).byte()
    labels[0, :8] = IGNORE
    large = F.interpolate(logits, (16, 20), mode="bilinear", align_corners=False).log_softmax(dim=1)
    places = [(b, y, x) for b in range(2) for y in range(16) for x in range(20) if labels[b, y, x] < 3]
    expected = -sum(large[b, int(labels[b, y, x]), y, x] for b, y, x in places) / (2 * 16 * 20)
    torch.testing.assert_close(pixel_loss(logits, labels), expected)
    assert pixel_loss(logits, torch.full_like(labels, IGNORE)) == 0


def test_losses_have_names_and_the_auxiliary_one_its_weight(segments):
    task = task_of(segments, "--head", "upernet", "--aux_weight", "0.25")
    loader = task.loader(task.dataset("train"), train=True)
    network = task.network()
    images, labels = next(iter(loader))
    assert images.shape == (2, 3, 32, 32) and labels.shape == (2, 32, 32) and labels.dtype == torch.uint8
    task.train_mode(network)
    loss, parts = task.loss(network, (images, labels))
    assert parts.keys() == {"decode", "aux"} and not any(part.requires_grad for part in parts.values())
    torch.testing.assert_close(loss.detach(), parts["decode"] + 0.25 * parts["aux"])
    loss.backward()
    assert all(parameter.grad is not None for parameter in network.parameters())


def test_images_are_normalised_as_the_model_takes_them(segments):
    """The mean of the images, which fills what a crop leaves, is 0 to the rounding of a pixel."""
    task = task_of(segments, "--input_size", "128", "--scale_ratio", "0.5", "0.5", "--photometric", "false")
    images, labels = next(iter(task.loader(task.dataset("train"), train=True)))
    is_padding = (images.abs() < 0.5 / 255 / 0.22).all(dim=1)
    assert is_padding[:, -1].all() and (labels[is_padding] == IGNORE).all() and not is_padding[:, :8, :8].any()


# --- what a run starts from -------------------------------------------------------------------------------------------


def saved(network, path, **more):
    torch.save(dict(model=network.state_dict(), **more), path)
    return path


def test_a_classifier_gives_the_backbone(segments, tmp_path, capsys):
    classifier = timm.create_model("biformer_nano", num_classes=10)
    network = network_of(segments, "--finetune", saved(classifier, tmp_path / "c.pth"))
    body = network.backbone.body.state_dict()
    assert all(torch.equal(value, classifier.state_dict()[name]) for name, value in body.items())
    assert capsys.readouterr().out.splitlines() == [
        f"{tmp_path}/c.pth: {len(body)} tensors of the backbone are loaded",
        f"{tmp_path}/c.pth: not needed, and left out: norm (5), head (2)",
        f"{tmp_path}/c.pth: not there, and newly initialised: backbone.extra_norms (8), neck (16), decode_head (44)",
    ]


def test_a_segmenter_gives_all_but_other_classifiers(segments, tmp_path, capsys):
    source = semantic_fpn("biformer_nano", num_classes=3)
    network = network_of(segments, "--finetune", saved(source, tmp_path / "s.pth", classes=list(CLASSES)))
    assert all(torch.equal(x, source.state_dict()[name]) for name, x in network.state_dict().items())
    assert capsys.readouterr().out == f"{tmp_path}/s.pth: all is loaded\n"
    names = ["sky", "sea", "sand"]
    network = network_of(segments, "--finetune", saved(source, tmp_path / "s.pth", classes=names))
    same = {name: torch.equal(x, source.state_dict()[name]) for name, x in network.state_dict().items()}
    assert {name for name, is_same in same.items() if not is_same} == {"decode_head.conv_seg.weight"}
    assert "was trained on other classes" in (out := capsys.readouterr().out)
    assert out.endswith(": the classifiers are re-initialised\n")
    source = semantic_fpn("biformer_nano", num_classes=7)
    network_of(segments, "--finetune", saved(source, tmp_path / "s.pth"))
    assert "has another number of classes: the classifiers are re-initialised" in capsys.readouterr().out


def test_a_segmenter_with_another_head_gives_the_backbone(segments, tmp_path, capsys):
    """With its extra norms; also in the published layout, and of a file that holds the backbone alone."""
    source = upernet("biformer_nano", num_classes=3)
    torch.nn.init.normal_(source.backbone.extra_norms[0].weight)
    weights = source.state_dict()
    published = {name.replace("backbone.body.", "backbone."): x for name, x in weights.items()}
    alone = {name: x for name, x in weights.items() if name.startswith("backbone.")}
    for content in (dict(model=weights), dict(state_dict=published, meta={}), alone):
        torch.save(content, tmp_path / "u.pth")
        network = network_of(segments, "--finetune", tmp_path / "u.pth")
        assert all(torch.equal(x, network.state_dict()[name]) for name, x in alone.items())
        out = capsys.readouterr().out
        assert f"{len(alone)} tensors of the backbone are loaded" in out
        assert "not there, and newly initialised: neck (16), decode_head (44)" in out
    assert "left out" not in out


def test_a_head_of_another_width_is_not_taken(segments, tmp_path, capfd):
    """Nor is it evaluated as another."""
    source = semantic_fpn("biformer_nano", num_classes=3, head_channels=24)
    path = saved(source, tmp_path / "s.pth")
    network = network_of(segments, "--finetune", path)
    assert torch.equal(network.backbone.extra_norms[0].weight, source.backbone.extra_norms[0].weight)
    assert "newly initialised: neck (16), decode_head (44)" in capfd.readouterr().out
    network = network_of(segments, "--finetune", path, "--head_channels", 24)
    assert capfd.readouterr().out == f"{path}: all is loaded\n"
    code, line = complaint(capfd, segments, "--eval", "--resume", path)
    assert code == 1 and "does not fit" in line and "decode_head" in line


@pytest.mark.parametrize("other", [lambda: timm.create_model("resnet18"), lambda: upernet("resnet18")])
def test_weights_that_do_not_fit_start_nothing(segments, tmp_path, capfd, other):
    path = saved(other(), tmp_path / "x.pth")
    code, line = complaint(capfd, segments, "--finetune", path)
    assert code == 1 and re.match(rf"error: {path}: the checkpoint does not fit biformer_nano: ", line)
    assert line.endswith("; --model must name the model of the weights")


def test_a_classifier_cannot_be_evaluated(segments, tmp_path, capfd):
    path = saved(timm.create_model("biformer_nano"), tmp_path / "c.pth")
    code, line = complaint(capfd, segments, "--eval", "--resume", path)
    assert code == 1
    assert line == f"error: {path} holds no segmenter; start from it with --finetune, and train"


@pytest.mark.parametrize("names", [["blue", "green", "red"], ["red", "green"]])
def test_an_evaluation_with_other_numbers_is_refused(segments, tmp_path, capfd, names):
    """Whose table would have wrong names."""
    path = saved(semantic_fpn("biformer_nano", num_classes=len(names)), tmp_path / "s.pth", classes=names)
    code, line = complaint(capfd, segments, "--eval", "--finetune", path)
    assert code == 1 and line.startswith(f"error: {path} was trained on ") and "instead of" not in line


def test_a_segmenter_is_no_classifier(segments, tmp_path, capfd):
    path = saved(semantic_fpn("biformer_nano", num_classes=3), tmp_path / "s.pth")
    for arguments in (["--finetune"], ["--eval", "--resume"]):
        words = ["--task", "classification", "--model", "biformer_nano", "--data_set", "digits", *arguments, str(path)]
        assert program.main([*words, "--device", "cpu", "--num_workers", "0"]) == 1
        assert capfd.readouterr().err == (f"error: {path} holds a segmenter, and no classifier; --task segmentation "
                                          "trains and evaluates it\n")


def test_a_backbone_without_gradient_checkpointing(segments, capfd):
    code, line = complaint(capfd, segments, "--model", "dla34", "--grad_checkpointing")
    assert code == 2 and line == "error: dla34 does not support gradient checkpointing"


def test_a_model_without_maps_is_told_as_such(segments, capfd):
    code, line = complaint(capfd, segments, "--model", "resnet18", "--model_kwargs", "features_only=True")
    assert code == 2 and "resnet18 gives no maps, and a backbone needs those at 4, 8, 16 and 32" in line


@pytest.mark.slow
@pytest.mark.parametrize("name", ["maxvit_rmlp_pico_rw_256", "hiera_tiny_224"])
def test_a_backbone_of_one_size_is_refused_before_it_trains(segments, capfd, name):
    code, line = complaint(capfd, segments, "--model", name, "--input_size", 64, "--short_side", 64)
    assert code == 1 and line.startswith("error: the network cannot take an image of 64 x 85 pixels: ")
    assert line.endswith("; --crop shows it in windows of one size, --test_rounding rounds its sides")


def test_other_classes_are_told_in_an_evaluation(segments, tmp_path, capfd):
    network = semantic_fpn("biformer_nano", num_classes=3)
    path = saved(network, tmp_path / "s.pth", classes=["sky", "sea", "sand"])
    assert program.main([*SMALL, "--data_path", str(segments), "--eval", "--finetune", str(path)]) == 0
    assert f"warning: {path} was trained on other classes" in capfd.readouterr().out


# --- mistakes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments,message", [
    (["--model", "deit_tiny_patch16_224"], "deit_tiny_patch16_224 has maps at strides 16, and a backbone needs"),
    (["--model", "biformer_nan"], "unknown model 'biformer_nan'; did you mean biformer_nano"),
    (["--model_kwargs", "num_regions=0"], "biformer_nano cannot be built: "),
    (["--head", "fpn"], "--head: invalid choice: 'fpn'"),
    (["--eval"], "--eval needs weights: --resume CHECKPOINT"),
    (["--finetune", "a", "--load_release"], "--resume, --finetune and --load_release are mutually exclusive"),
    (["--stride", "32"], "--stride needs --crop, the side of the windows"),
    (["--crop", "32", "--stride", "64"], "--stride is above --crop"),
    (["--short_side", "200"], "--short_side 200 is above --long_side 160"),
    (["--test_scales", "0"], "--test_scales must be above 0"),
    (["--layer_decay", "0.9"], "--layer_decay is for classifiers alone"),
    (["--report", "x"], "--report is of an evaluation: it needs --eval"),
    (["--mixup", "0.8"], "unknown flag --mixup"),
    (["--eval_every", "5", "--patience", "3"], "--patience 3 is below --eval_every 5"),
])
def test_a_wrong_command_line_is_one_line(segments, capfd, arguments, message):
    code, line = complaint(capfd, segments, *arguments)
    assert code == 2 and line.startswith(f"error: {message}")


def test_a_batch_of_one_is_refused_where_the_head_pools_to_one_value(segments, capfd):
    code, line = complaint(capfd, segments, "--head", "upernet", "--batch_size", "1")
    assert code == 2 and line.endswith("; give --batch_size 2 or more") and "one at a time" in line


def test_a_model_without_stochastic_depth_is_told(segments, capsys):
    network_of(segments, "--model", "dla34", "--drop_path", "0.2")
    assert capsys.readouterr().out == "dla34 has no stochastic depth: drop path is left out\n"
    network = network_of(segments, "--drop_path", "0.2")
    rates = [module.drop_prob for module in network.modules() if type(module).__name__ == "DropPath"]
    assert max(rates) == pytest.approx(0.2) and capsys.readouterr().out == ""


def test_options_name_what_there_is():
    """They are read before torch is imported, and so have names of their own."""
    assert set(options.HEADS) == set(HEADS)
    pixels = torch.zeros(3, 40, 70, dtype=torch.uint8)
    for rounding in options.ROUNDINGS:
        shape = EvalSize(40, 90, rounding).resized(pixels).shape[1:]
        assert shape == ((64, 96) if rounding == "stretch" else (40, 70))


# --- batch norm over processes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("device,sync,expected", [("cuda", True, True), ("cuda", False, False), ("cpu", True, False)])
def test_batch_norms_are_of_all_processes_on_gpus(segments, capsys, device, sync, expected):
    task = task_of(segments, "--sync_bn", sync)
    task.dataset("train")
    task.distributed = Distributed(torch.device(device), 0, 2)
    network = task.network()
    kinds = {type(m).__name__ for m in network.modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm)}
    assert kinds == ({"SyncBatchNorm"} if expected else {"BatchNorm2d"})
    told = "batch norms are of each process alone" in capsys.readouterr().out
    assert told == (device == "cpu" and sync)
