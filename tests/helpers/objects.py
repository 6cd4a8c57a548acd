"""Small images of coloured shapes and COCO-format annotations of them, for tests of detection."""
import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

CLASSES = ("red", "green", "blue")
# Their ids, which are no whole row of numbers in COCO either.
IDS = (3, 7, 8)


def write_objects(root: Path, train: int = 6, val: int = 4, number: int = 3) -> Path:
    """COCO's layout at `root` with so many training and validation images, `number` objects in each; returns `root`.

    Each object is an ellipse or a rectangle in the colour of its class, on a dark ground. Sides are 64 to 109 pixels,
    every third image is taller than wide. Segmentations are polygons.
    """
    rng = np.random.default_rng(0)
    (root / "annotations").mkdir(parents=True, exist_ok=True)
    for split, images in (("train", train), ("val", val)):
        (root / f"{split}2017").mkdir(exist_ok=True)
        content = dict(images=[], annotations=[], categories=[
            dict(id=id, name=name) for id, name in zip(IDS, CLASSES, strict=True)
        ])
        for i in range(images):
            height, width = 64 + 9 * (i % 3), 76 + 11 * (i % 4)
            if i % 3 == 2:
                height, width = width, height
            pixels, entries = _shapes(rng, height, width, number)
            Image.fromarray(pixels).save(root / f"{split}2017" / f"{i}.png")
            content["images"].append(dict(id=10 * i + 1, file_name=f"{i}.png", height=height, width=width))
            for entry in entries:
                content["annotations"].append(dict(entry, id=len(content["annotations"]) + 1, image_id=10 * i + 1))
        write_annotations(root, split, content)
    return root


def write_annotations(root: Path, split: str, content: dict[str, Any]) -> Path:
    """Write the annotations of a split; returns the file."""
    path = root / "annotations" / f"instances_{split}2017.json"
    path.write_text(json.dumps(content))
    return path


def read_annotations(root: Path, split: str) -> dict[str, Any]:
    """The annotations of a split, to be changed and written again."""
    return json.loads((root / "annotations" / f"instances_{split}2017.json").read_text())


def _shapes(
    rng: np.random.Generator, height: int, width: int, number: int
) -> tuple[np.ndarray, list[dict[str, Any]]]:
    """(height, width, 3) uint8 pixels, and annotations of the shapes in them, side by side."""
    pixels = rng.integers(0, 60, (height, width, 3), np.uint8)
    y, x = np.mgrid[:height, :width] + 0.5
    entries = []
    for place, index in enumerate(rng.integers(0, len(CLASSES), number).tolist()):
        left, right = place * width / number + 2, (place + 1) * width / number - 2
        top, bottom = rng.uniform(2, height * 0.3), rng.uniform(height * 0.6, height - 2)
        if rng.random() < 0.5:
            angles = np.linspace(0, 2 * np.pi, 24, endpoint=False)
            corners = np.stack([
                (left + right) / 2 + (right - left) / 2 * np.cos(angles),
                (top + bottom) / 2 + (bottom - top) / 2 * np.sin(angles),
            ], axis=1)
            inside = ((2 * x - left - right) / (right - left)) ** 2 + ((2 * y - top - bottom) / (bottom - top)) ** 2 < 1
        else:
            corners = np.array([[left, top], [right, top], [right, bottom], [left, bottom]])
            inside = (x > left) & (x < right) & (y > top) & (y < bottom)
        pixels[inside, index] += 160
        entries.append(dict(
            category_id=IDS[index], bbox=[left, top, right - left, bottom - top], area=float(inside.sum()), iscrowd=0,
            segmentation=[corners.ravel().round(2).tolist()],
        ))
    return pixels, entries
