"""The models as ONNX programs, run by another runtime."""
import numpy as np
import onnxruntime
import pytest
import timm
import torch

import models  # noqa: F401, registers them

pytestmark = [
    pytest.mark.compile,
    pytest.mark.skipif(torch.__version__ < (2, 11), reason="shown with PyTorch 2.11 and newer"),
]
LONG = [pytest.param(name, marks=pytest.mark.long) for name in ("debiformer_tiny", "biformer_stl")]


@pytest.mark.parametrize("name", ["biformer_nano", "bvit_5m", "vitaev2_s", *LONG])
def test_exports_to_onnx(name, tmp_path):
    """By the lines of README, for any batch; of one block a stage, since exporters take their time."""
    torch.manual_seed(0)
    depth = dict(depth=2) if name.startswith("bvit") else dict(depths=(1, 1, 1, 1))
    model = timm.create_model(name, num_classes=10, **depth).eval().requires_grad_(False)
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.onnx.export(model, (torch.randn(2, 3, 96, 64),), dynamo=True, dynamic_shapes=({0: batch},))
    program.save(tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    x = torch.randn(5, 3, 96, 64)
    found = session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]
    expected = model(x).numpy()
    assert np.abs(found - expected).max() < 1e-5 * np.abs(expected).max()
