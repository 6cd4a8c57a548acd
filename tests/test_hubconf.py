from pathlib import Path

import timm
import torch

import hubconf
import models  # noqa: F401

ROOT = Path(__file__).resolve().parent.parent


def test_models_through_torch_hub():
    model = torch.hub.load(str(ROOT), "biformer_nano", source="local", num_classes=3).eval()
    assert model(torch.randn(1, 3, 32, 32)).shape == (1, 3)


def test_every_model_is_offered():
    for name in timm.list_models():
        entrypoint = timm.model_entrypoint(name)
        if entrypoint.__module__.startswith("models."):
            assert getattr(hubconf, name) is entrypoint
