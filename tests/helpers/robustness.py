"""Small copies of the robustness sets, in the layouts in which they are downloaded."""
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from timm.data import ImageNetInfo

from training.data.robustness import CORRUPTIONS, set_classes

# Class folders of the validation images; the numbers in the names of their images, by folder.
VAL = {"n01440764": [1], "n04404412": [2], "n02109525": [3]}


def write_images(
    folder: Path, classes: Sequence[str], names: Sequence[str] = ("a.JPEG", "b.JPEG"), size: tuple[int, int] = (40, 48)
):
    """Images of noise, of (height, width), in class folders."""
    for class_name in classes:
        (folder / class_name).mkdir(parents=True, exist_ok=True)
        for name in names:
            seed = zlib.crc32(f"{class_name}/{name}".encode())
            pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8)
            Image.fromarray(pixels).save(folder / class_name / name)


def write_val(folder: Path):
    """Validation images in class folders, with ImageNet's names."""
    for class_name, numbers in VAL.items():
        write_images(folder, [class_name], [f"ILSVRC2012_val_{number:08d}.JPEG" for number in numbers])


def write_sets(root: Path) -> Path:
    """All of them below `root`, which is returned."""
    synsets = ImageNetInfo().label_names()
    write_val(root / "val")
    for selection, names in (("matched-frequency", ("a.jpeg", "b.jpeg")), ("threshold0.7", ("a.jpeg",)),
                             ("top-images", ("a.jpeg",))):
        write_images(root / f"imagenetv2-{selection}-format-val", ["0", "2", "10", "999"], names)
    for name in ("imagenet_a", "imagenet_r"):
        allowed = set_classes(name)
        write_images(root / name.replace("_", "-"), [synsets[i] for i in (allowed[0], allowed[7], allowed[-1])])
        (root / name.replace("_", "-") / "README.txt").write_text("of the archive")
    write_images(root / "sketch", [synsets[i] for i in (0, 500, 999)])
    for corruption in CORRUPTIONS:
        for severity in range(1, 6):
            write_val(root / "ImageNet-C" / corruption / str(severity))
    return root
