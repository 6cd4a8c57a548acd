"""What an evaluation says: COCO's lines, AP by class, a file of detections, and pictures of some images."""
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from utils import UserError, replace_file

from ..colours import colours_of
from ..pictures import at_width, prepare_folder, stack
from ..tables import check_output
from .drawing import draw_objects
from .masks import rasterize, tidy
from .metrics import DetectionScores, Shown
from .scores import Score, write_classes

# Images of an evaluation that are shown, and from which score on detections are.
SHOWN, LEAST = 6, 0.3


def prepare(folder: Path | None, file: Path | None):
    """Make the folders of what is written at the end of an evaluation. Raises UserError where that cannot be."""
    if folder is not None:
        prepare_folder(folder)
    if file is not None:
        check_output(file)
        prepare_folder(file.parent)


def print_scores(scores: Sequence[Score]):
    """Print COCO's twelve lines for masks and for boxes."""
    for found in scores:
        print(f"{found.kind}:", *found.lines(), sep="\n")


def write(evaluator: DetectionScores, folder: Path | None, file: Path | None):
    """Write `classes.csv` in a folder, and the detections in a file, where these are asked for.

    Raises:
        UserError: They cannot be written.
    """
    if folder is not None:
        write_classes(folder / "classes.csv", evaluator.scores)
        print(f"report: {folder}")
    if file is not None:
        text = json.dumps(evaluator.detections).encode()
        try:
            replace_file(file, lambda out: out.write(text))
        except OSError as error:
            raise UserError(f"cannot write {file}: {error.strerror}") from error
        print(f"{len(evaluator.detections)} detections: {file}")


def draw_shown(evaluator: DetectionScores, classes: Sequence[str]) -> np.ndarray:
    """A row for each image that is shown, with its annotated objects and with the detected ones; uint8 (H, W, 3)."""
    rows = []
    for shown in evaluator.shown:
        is_drawn = shown.found["scores"] >= LEAST
        found = {name: value[is_drawn] for name, value in shown.found.items()}
        rows.append([_draw(shown.image, objects, classes) for objects in (_annotated(shown, evaluator), found)])
    return stack(rows, ("annotated", "detected"))


def draw_batch(shown: Sequence[tuple[torch.Tensor, dict[str, torch.Tensor]]], classes: Sequence[str]) -> np.ndarray:
    """Training images, uint8 (3, H, W), a row each, as they are and with their objects."""
    rows = [[_fitted(image)[0], _draw(image, target, classes)] for image, target in shown]
    return stack(rows, ("image", "objects"))


def _fitted(image: torch.Tensor) -> tuple[Image.Image, float]:
    """An image as wide as it is shown, and by what its coordinates are multiplied for that."""
    picture = at_width(image.permute(1, 2, 0).cpu().numpy())
    return picture, picture.width / image.shape[2]


def _draw(image: torch.Tensor, objects: dict[str, Any], classes: Sequence[str]) -> Image.Image:
    """An image with objects, drawn at the size at which they are seen."""
    picture, ratio = _fitted(image)
    labels = np.asarray(objects["labels"], np.int64)
    masks = objects.get("masks")
    if masks is not None and len(masks):
        shape = (picture.height, picture.width)
        masks = F.interpolate(torch.as_tensor(masks)[:, None].float(), shape, mode="area")[:, 0] >= 0.5
    return Image.fromarray(draw_objects(
        np.asarray(picture), np.asarray(objects["boxes"]) * ratio, [classes[label - 1] for label in labels],
        objects["scores"].tolist() if "scores" in objects else None, None if masks is None else np.asarray(masks),
        colours_of(labels),
    ))


def _annotated(shown: Shown, evaluator: DetectionScores) -> dict[str, Any]:
    """The annotated objects of an image, in the form of detections."""
    height, width = shown.image.shape[1:]
    entries = [entry for entry in evaluator.truth.content["annotations"] if entry["image_id"] == shown.id]
    labels = {id: label for label, id in enumerate(evaluator.truth.category_ids, start=1)}
    boxes = np.array([entry["bbox"] for entry in entries], np.float64).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    objects = dict(boxes=boxes, labels=[labels[entry["category_id"]] for entry in entries])
    if evaluator.with_masks and entries:
        found = [tidy(entry.get("segmentation")) for entry in entries]
        empty = np.zeros((height, width), bool)
        objects["masks"] = np.stack([empty if x is None else rasterize(x, height, width) for x in found])
    return objects
