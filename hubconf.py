"""Entry points for torch.hub: `torch.hub.load("OWNER/REPOSITORY", "biformer_small")`, keywords as in timm."""
import importlib
from pathlib import Path

dependencies = ["torch", "timm"]

for _name in ("models", "ops", "storage"):
    _file = importlib.import_module(_name).__file__
    if _file is None or Path(_file).resolve().parent != Path(__file__).resolve().parent / _name:
        raise ImportError(
            f"this project has a package {_name!r} of its own ({_file}), which hides the one that the networks are in; "
            "Python can hold one of them"
        )

from models.biformer import (  # noqa: E402, F401
    biformer_base,
    biformer_nano,
    biformer_small,
    biformer_stl,
    biformer_stl_nchw,
    biformer_tiny,
)
from models.bvit import bvit_5m, bvit_22m  # noqa: E402, F401
from models.debiformer import (  # noqa: E402, F401
    debi_base,
    debi_small,
    debi_tiny,
    debiformer_base,
    debiformer_nano,
    debiformer_small,
    debiformer_tiny,
)
from models.vitae import (  # noqa: E402, F401
    vitae_6m,
    vitae_13m,
    vitae_b,
    vitae_h,
    vitae_l,
    vitae_s,
    vitae_tiny,
)
from models.vitaev2 import vitaev2_48m, vitaev2_b, vitaev2_s  # noqa: E402, F401
