import subprocess
import sys

import pytest
import timm
import torch

import hubconf
import models  # noqa: F401
from helpers import ROOT


def test_models_through_torch_hub():
    model = torch.hub.load(str(ROOT), "biformer_nano", source="local", num_classes=3).eval()
    assert model(torch.randn(1, 3, 32, 32)).shape == (1, 3)


@pytest.mark.slow
def test_a_project_with_packages_of_the_same_names(tmp_path):
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "__init__.py").touch()
    script = f"import models, torch; torch.hub.load({str(ROOT)!r}, 'biformer_nano', source='local')"
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1
    assert f"ImportError: this project has a package 'models' of its own ({tmp_path}" in done.stderr


def test_every_model_is_offered():
    for name in timm.list_models():
        entrypoint = timm.model_entrypoint(name)
        if entrypoint.__module__.startswith("models."):
            assert getattr(hubconf, name) is entrypoint
