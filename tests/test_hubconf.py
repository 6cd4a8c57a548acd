from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent


def test_models_through_torch_hub():
    model = torch.hub.load(str(ROOT), "biformer_nano", source="local", num_classes=3).eval()
    assert model(torch.randn(1, 3, 32, 32)).shape == (1, 3)
