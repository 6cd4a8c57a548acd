"""Backbones in segmentation_models.pytorch and in transformers, by the snippets of docs/segmentation.md."""
import re

import pytest
import timm
import torch

import models  # noqa: F401
from helpers.documents import DOCUMENTS, section

pytestmark = pytest.mark.slow


def snippet(heading, **replaced):
    """The block of Python code in a section, in the checkout's names and with smaller images."""
    (code,) = re.findall(r"^```python\n(.*?)^```", section(DOCUMENTS["docs/segmentation.md"], heading), re.M | re.S)
    for old, new in {"routedvit, ": "", "256": "64", "biformer_tiny": "biformer_nano"}.items():
        assert old in code
        code = code.replace(old, new)
    return code


def run(code):
    torch.manual_seed(0)
    names = {}
    exec(code, names)
    return names


def regions(network):
    return {module.num_regions for module in network.modules() if hasattr(module, "num_regions")}


def test_segmentation_models_pytorch():
    pytest.importorskip("segmentation_models_pytorch")
    names = run(snippet("segmentation_models.pytorch"))
    assert names["loss"].isfinite() and names["model"](names["images"]).shape == (2, 11, 64, 64)
    assert regions(names["model"]) == {8} and all(p.grad is None or p.grad.isfinite().all()
                                                  for p in names["model"].parameters())


@pytest.mark.parametrize("decoder,stride", [("DeepLabV3Plus", 16), ("DeepLabV3", 8), ("PAN", 16)])
def test_decoders_that_ask_for_dilated_stages(decoder, stride):
    smp = pytest.importorskip("segmentation_models_pytorch")
    torch.manual_seed(0)
    model = getattr(smp, decoder)("tu-biformer_nano", encoder_weights=None, classes=3, encoder_output_stride=stride)
    assert model.encoder.model.feature_info.reduction()[-1] == stride
    out = model(torch.randn(2, 3, 128, 128))
    assert out.shape == (2, 3, 128, 128)
    out.square().mean().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    model.encoder.model.load_state_dict(timm.create_model("biformer_nano", features_only=True).state_dict())


def test_transformers():
    pytest.importorskip("transformers")
    names = run(snippet("transformers"))
    assert names["output"].loss.isfinite() and names["output"].logits.shape == (2, 11, 64, 64)
    assert regions(names["model"]) == {8}
    assert all(parameter.grad is not None for parameter in names["model"].backbone.parameters())
