"""Weights that come with the repository: `weights/NAME.safetensors`, in a checkout and in the installed package."""
from pathlib import Path
from typing import Any

# Beside `models`, wherever that lies.
_FOLDER = Path(__file__).resolve().parent.parent / "weights"

# Folders of Imagenette, which are synsets of ImageNet, in the order of the classes; and what they show.
_IMAGENETTE = {
    "n01440764": "tench",
    "n02102040": "English springer",
    "n02979186": "cassette player",
    "n03000684": "chain saw",
    "n03028079": "church",
    "n03394916": "French horn",
    "n03417042": "garbage truck",
    "n03425413": "gas pump",
    "n03445777": "golf ball",
    "n03888257": "parachute",
}


def is_shipped(file: str) -> bool:
    """Whether a file of weights is one of the repository's own."""
    return Path(file).parent == _FOLDER


def imagenette_cfg(variant: str) -> dict[str, Any]:
    """Entries of a default config for the repository's own weights of a model; weights/README.md is their card."""
    return dict(
        file=str(_FOLDER / f"{variant}.safetensors"),
        num_classes=10,
        input_size=(3, 160, 160),
        pool_size=(5, 5),
        label_names=tuple(_IMAGENETTE),
        label_descriptions=_IMAGENETTE,
        origin_url=None,  # they are here
        license="other",
        notes=("Tag imagenette: trained on photographs of ImageNet, for non-commercial research and education alone.",),
    )
