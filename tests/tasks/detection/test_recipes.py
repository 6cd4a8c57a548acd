"""configs/detection: the published runs, and the table of them in docs/detection.md."""
import re

import pytest
import torch
from torch import nn

import main as program
from helpers import ROOT
from helpers.documents import DOCUMENTS, section
from models.detection import DETECTORS
from optim_factory import create_optimizer, scaled_lr

# As published: peak learning rate, global batch, epochs, weight decay, what has none, steps of warm-up, drop path,
# whether batch norms keep their statistics, and whether sizes are drawn.
PUBLISHED = {
    "mask_rcnn_biformer_small_1x": (1e-4, 16, 12, 0.05, "layernorm", 500, 0.2, True, False),
    "mask_rcnn_biformer_base_1x": (1e-4, 16, 12, 0.05, "layernorm", 500, 0.3, True, False),
    "retinanet_biformer_small_1x": (1e-4, 16, 12, 1e-4, "none", 500, 0.2, True, False),
    "retinanet_biformer_base_1x": (1e-4, 16, 12, 1e-4, "none", 500, 0.3, True, False),
    "mask_rcnn_debiformer_tiny_1x": (1e-4, 16, 12, 0.05, "layernorm", 500, 0.1, False, False),
    "mask_rcnn_debiformer_small_1x": (5e-5, 8, 12, 0.05, "layernorm", 1500, 0.2, False, False),
    "mask_rcnn_debiformer_base_1x": (2.5e-5, 8, 12, 0.05, "layernorm", 5000, 0.3, False, False),
    "retinanet_debiformer_tiny_1x": (1e-4, 16, 12, 1e-4, "layernorm", 500, 0.1, False, False),
    "retinanet_debiformer_small_1x": (1e-4, 16, 12, 1e-4, "layernorm", 500, 0, False, False),
    "retinanet_debiformer_base_1x": (1e-4, 16, 12, 1e-4, "layernorm", 500, 0, False, False),
    "mask_rcnn_vitaev2_s_1x": (1e-4, 16, 12, 0.045, "layernorm", 500, 0.1, False, True),
    "mask_rcnn_vitaev2_s_3x": (1e-4, 16, 36, 0.05, "layernorm", 500, 0.1, False, True),
    "cascade_mask_rcnn_vitaev2_s_1x": (1e-4, 16, 12, 0.045, "layernorm", 500, 0.1, False, True),
    "cascade_mask_rcnn_vitaev2_s_3x": (1e-4, 16, 36, 0.05, "layernorm", 500, 0.1, False, True),
}
COCO = 117_266  # training images


def settings_of(name):
    return program.parse(["--config", str(ROOT / "configs" / "detection" / f"{name}.yaml"), "--data_path", "x"])[1]


def test_there_is_a_recipe_for_each_published_run():
    assert {path.stem for path in (ROOT / "configs" / "detection").glob("*.yaml")} == set(PUBLISHED)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_recipe_is_the_published_run(name):
    lr, batch, epochs, decay, groups, warmup, drop_path, freezes, multi_scale = PUBLISHED[name]
    settings = settings_of(name)
    optimizer, schedule, model = settings.optimizer, settings.schedule, settings.model
    assert optimizer.recipe_batch == batch and batch % settings.loader.batch_size == 0
    assert scaled_lr(optimizer.lr, batch) == pytest.approx(lr)
    assert (optimizer.opt, optimizer.weight_decay, optimizer.decay_groups) == ("adamw", decay, groups)
    assert optimizer.clip_grad is None and optimizer.opt_betas is None and not settings.ema.model_ema
    assert (model.drop_path, model.freeze_batch_norm) == (drop_path, freezes)
    assert (model.fpn_channels, model.head_channels, model.extra_norms) == (256, 1024, None)
    assert name.startswith(f"{model.detector}_{model.model}_")
    assert (settings.size.short_side, settings.size.long_side, settings.augmentation.hflip) == (800, 1333, 0.5)
    assert settings.augmentation.multi_scale == multi_scale and settings.evaluation.eval_every == 1

    epoch = COCO // batch
    clock = program.Clock(epoch, schedule.total_steps(epoch))
    assert clock.epochs == epochs
    rates = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=lr)
    built = program.create_schedule(schedule, clock, lr).build(rates)

    def rate(step):
        built.step_update(step)
        return rates.param_groups[0]["lr"]

    first, second = (8, 11) if epochs == 12 else (27, 33)
    assert rate(0) == pytest.approx(lr / 1000) and rate(warmup // 2) == pytest.approx(lr / 2, rel=0.01)
    assert rate(warmup) == rate(first * epoch - 1) == pytest.approx(lr)
    assert rate(first * epoch) == rate(second * epoch - 1) == pytest.approx(lr / 10)
    assert rate(second * epoch) == rate(clock.total - 1) == pytest.approx(lr / 100)


def test_only_layer_norms_and_position_tables_do_not_decay():
    """Batch norms and biases decay, those of the heads too."""
    network = DETECTORS["cascade_mask_rcnn"]("debiformer_tiny", 3, depths=(1, 1, 1, 1), channels=32, head_channels=64)
    optimizer = create_optimizer(network, "adamw", 1e-4, 0.05, decay_groups="layernorm")
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    without = {names[id(p)] for group in optimizer.param_groups if not group["weight_decay"] for p in group["params"]}
    norms = {name for name, module in network.named_modules() if isinstance(module, nn.LayerNorm)}
    expected = {name for name in names.values() if name.rpartition(".")[0] in norms or name.endswith("bias_table")}
    assert without == expected and any("extra_norms" in name for name in without)
    assert any(name.endswith("bias_table") for name in without)


def test_the_guide_lists_them():
    rows = re.findall(r"^\| \[yaml\]\(\.\./configs/detection/(\w+)\.yaml\) \| (\w+) \| ([\w -]+) \| (\d+) \| (\dx) \| "
                      r"?([\d.]*) ?(?:\(([\d.]+)\) )?\| ?([\d.]*) ?(?:\(([\d.]+)\) )?\| [\d.]+ M \|$",
                      section(DOCUMENTS["docs/detection.md"], "Recipes"), re.M)
    assert [row[0] for row in rows] == list(PUBLISHED)
    for name, model, method, batch, schedule, box, box_again, mask, mask_again in rows:
        settings = settings_of(name)
        assert settings.model.model == model and settings.optimizer.recipe_batch == int(batch)
        assert settings.model.detector == method.lower().replace("-", "").replace(" ", "_")
        assert settings.schedule.epochs == 12 * int(schedule[0])
        text = " ".join((ROOT / "configs" / "detection" / f"{name}.yaml").read_text().replace("#", "").split())
        published = f"{box} box AP and {mask} mask AP published" if mask else f"{box} box AP published"
        assert (published if box else "no result was published") in text
        again = f"{box_again} and {mask_again} in a second run" if mask_again else f"{box_again} in a second run"
        assert (again in text) == bool(box_again)
