"""configs/segmentation: the published runs, and the table of them in docs/segmentation.md."""
import re

import pytest
import torch
from torch import nn

import main as program
from helpers import ROOT
from helpers.documents import DOCUMENTS, section
from models.segmentation import HEADS
from optim_factory import create_optimizer, scaled_lr

# As published: peak learning rate, global batch, weight decay, what has none, schedule and its last learning rate,
# steps, steps of warm-up and its first learning rate as a share of the peak, drop path, rounding of sides.
PUBLISHED = {
    "semantic_fpn_biformer_small_80k": (2e-4, 32, 1e-4, "none", "cosine", 2e-12, 80_000, 1000, 0.1, 0.15, "stretch"),
    "semantic_fpn_biformer_base_80k": (2e-4, 32, 1e-4, "none", "cosine", 2e-12, 80_000, 1000, 0.1, 0.3, "stretch"),
    "upernet_biformer_small_160k": (6e-5, 16, 0.01, "layernorm", "poly", 0, 160_000, 1500, 1e-6, 0.3, "none"),
    "upernet_biformer_base_160k": (6e-5, 16, 0.01, "layernorm", "poly", 0, 160_000, 1500, 1e-6, 0.4, "none"),
    "semantic_fpn_debiformer_small_320k": (
        5e-5, 8, 1e-4, "none", "cosine", 1e-10, 320_000, 9000, 0.1, 0.15, "stretch"
    ),
    "semantic_fpn_debiformer_base_160k": (
        1e-4, 16, 1e-4, "none", "cosine", 1e-10, 160_000, 3000, 0.1, 0.4, "stretch"
    ),
    "upernet_debiformer_small_160k": (6e-5, 16, 0.01, "layernorm", "poly", 0, 160_000, 3000, 2e-6, 0, "stretch"),
    "upernet_debiformer_base_160k": (6e-5, 16, 0.01, "layernorm", "poly", 0, 160_000, 3000, 1e-6, 0.4, "stretch"),
    "upernet_vitaev2_s_160k": (6e-5, 16, 0.01, "layernorm", "poly", 0, 160_000, 1500, 1e-6, 0.2, "pad"),
}
ADE20K = 20_210  # training images


def settings_of(name):
    return program.parse(["--config", str(ROOT / "configs" / "segmentation" / f"{name}.yaml"), "--data_path", "x"])[1]


def test_there_is_a_recipe_for_each_published_run():
    assert {path.stem for path in (ROOT / "configs" / "segmentation").glob("*_*k.yaml")} == set(PUBLISHED)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_recipe_is_the_published_run(name):
    lr, batch, decay, groups, sched, last_lr, steps, warmup, first, drop_path, rounding = PUBLISHED[name]
    settings = settings_of(name)
    optimizer, schedule = settings.optimizer, settings.schedule
    assert optimizer.recipe_batch == batch and batch % settings.loader.batch_size == 0
    assert scaled_lr(optimizer.lr, batch) == pytest.approx(lr)
    assert (optimizer.opt, optimizer.weight_decay, optimizer.decay_groups) == ("adamw", decay, groups)
    assert (schedule.sched, schedule.max_steps, schedule.poly_power) == (sched, steps, 1)
    assert not settings.ema.model_ema and optimizer.clip_grad is None
    assert (settings.model.drop_path, settings.test.test_rounding) == (drop_path, rounding)
    assert name.startswith(f"{settings.model.head}_{settings.model.model}_")
    assert settings.augmentation.input_size == settings.test.short_side == 512 and settings.test.long_side == 2048
    assert settings.augmentation.scale_ratio == [0.5, 2.0] and settings.augmentation.photometric

    clock = program.Clock(ADE20K // batch, schedule.total_steps(ADE20K // batch))
    rates = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=lr)
    built = program.create_schedule(schedule, clock, lr).build(rates)

    def rate(step):
        built.step_update(step)
        return rates.param_groups[0]["lr"]

    assert rate(0) == pytest.approx(first * lr) and rate(warmup) == pytest.approx(lr, rel=0.03)
    assert rate(steps) == pytest.approx(last_lr, abs=1e-14)
    if sched == "poly":
        assert rate(steps // 2) == pytest.approx(lr / 2)


def test_only_layer_norms_and_position_tables_do_not_decay():
    """Batch norms and biases decay, as published."""
    network = HEADS["upernet"]("debiformer_tiny", num_classes=3, depths=(1, 1, 1, 1))
    optimizer = create_optimizer(network, "adamw", 1e-4, 0.01, decay_groups="layernorm")
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    without = {names[id(p)] for group in optimizer.param_groups if not group["weight_decay"] for p in group["params"]}
    norms = {name for name, module in network.named_modules() if isinstance(module, nn.LayerNorm)}
    expected = {name for name in names.values() if name.rpartition(".")[0] in norms or name.endswith("bias_table")}
    assert without == expected and any("extra_norms" in name for name in without)
    assert any(name.endswith("bias_table") for name in without)


def test_the_guide_lists_them():
    rows = re.findall(r"^\| \[yaml\]\(\.\./configs/segmentation/(\w+)\.yaml\) \| (\w+) \| (\w+) \| (\d+) \| ([\d,]+) \|"
                      r" ?([\d.]*) \| ?([\d.]*) \|$", section(DOCUMENTS["docs/segmentation.md"], "Recipes"), re.M)
    assert [row[0] for row in rows] == list(PUBLISHED)
    for name, model, head, batch, steps, miou, several in rows:
        settings = settings_of(name)
        assert (settings.model.model, settings.model.head) == (model, head)
        assert int(batch) == settings.optimizer.recipe_batch
        assert int(steps.replace(",", "")) == settings.schedule.max_steps
        text = " ".join((ROOT / "configs" / "segmentation" / f"{name}.yaml").read_text().replace("#", "").split())
        published = re.search(r"([\d.]+) mIoU published", text)
        assert (published.group(1) if published else "") == miou
        assert (not several) or f"{several} with --test_scales 0.5 0.75 1 1.25 1.5 1.75 --test_flip" in text
