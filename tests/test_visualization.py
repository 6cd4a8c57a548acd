"""The code of docs/visualization.md runs as written, for every family, on untrained networks and a small photograph."""
import re
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

import models  # noqa: F401
from helpers import ROOT
from helpers.documents import DOCUMENTS, section

GRAD_CAM = section(DOCUMENTS["docs/visualization.md"], "Heat maps of any network: Grad-CAM")
CODE, CODE_OF_BVIT = re.findall(r"^```python\n(.*?)^```", GRAD_CAM, re.M | re.S)
HEIGHT, WIDTH = 64, 96


def replaced(code, old, new):
    assert code.count(old) == 1, f"the page has no single {old!r}"
    return code.replace(old, new)


@pytest.fixture
def clone(tmp_path, monkeypatch):
    """The working folder: a clone's root, as far as the code needs it."""
    (tmp_path / "docs").mkdir()
    shutil.copy(ROOT / "docs/church.jpg", tmp_path / "docs")
    monkeypatch.chdir(tmp_path)


def run(name, layers=None):
    """The variables of the page's code after it ran for a network, untrained, on a small image."""
    code = replaced(CODE, 'timm.create_model("biformer_nano", pretrained=True)', f"timm.create_model({name!r})")
    code = replaced(code, "(320, 224)", f"({WIDTH}, {HEIGHT})")
    if layers:
        code = replaced(code, "layers, to_map = network.stages[2:], None\n", layers)
    torch.manual_seed(0)
    variables = {}
    exec(code, variables)
    return variables


def check(heat_maps, count):
    assert len(heat_maps) == count
    for heat in heat_maps:
        assert heat.shape == (HEIGHT, WIDTH) and np.isfinite(heat).all()
        assert heat.min() == 0 and heat.max() > 0.99  # it is scaled to this range, unless it is 0 everywhere
    assert Image.open("docs/gradcam.jpg").size == (count * WIDTH, HEIGHT)


@pytest.mark.slow  # importing the package takes 3 s
@pytest.mark.usefixtures("clone")
@pytest.mark.parametrize("name,count", [
    ("biformer_nano", 2), ("debiformer_nano", 2), ("vitae_tiny", 1), ("vitaev2_s", 2),
])
def test_heat_maps_of_networks_with_stages(name, count):
    pytest.importorskip("pytorch_grad_cam")
    check(run(name)["heat_maps"], count)


@pytest.mark.slow
@pytest.mark.usefixtures("clone")
def test_heat_map_after_a_block():
    """It is that of the stage where the block is the stage's last."""
    pytest.importorskip("pytorch_grad_cam")
    ways = re.findall(r"`\[(network\.stages\[i\]\.blocks\[j\])\]`.*`(lambda x: .*?)`", GRAD_CAM)
    (layer, to_map), = ways
    layer = layer.replace("[i]", "[2]").replace("[j]", "[-1]")
    after_block = run("biformer_nano", f"layers, to_map = [{layer}], {to_map}\n")["heat_maps"]
    check(after_block, count=1)
    np.testing.assert_allclose(after_block[0], run("biformer_nano")["heat_maps"][0], atol=1e-5)


@pytest.mark.slow
@pytest.mark.usefixtures("clone")
@pytest.mark.parametrize("name", ["bvit_5m", "vitae_b"])
def test_heat_map_of_plain_networks(name):
    pytest.importorskip("pytorch_grad_cam")
    code = CODE_OF_BVIT
    if name == "vitae_b":
        code = replaced(code, "[network.blocks[-1].norm1]", "[network.blocks[-1]]")
    variables = run(name, code)
    check(variables["heat_maps"], count=1)
    network, images = variables["network"], variables["images"]
    tokens, (expected,) = network.forward_intermediates(images, [len(network.blocks) - 1], norm=True)
    torch.testing.assert_close(variables["to_map"](tokens), expected)


def test_the_picture_is_small_and_of_two_heat_maps():
    path = ROOT / "docs/gradcam.jpg"
    assert path.stat().st_size < 60_000 and Image.open(path).size == (640, 224)
