"""COCO's average precision and recall of boxes and masks.

faster-coco-eval computes them. What it is given are copies, in which nothing is left to its conventions: objects are
numbered from 1, since it takes one whose id is 0 for none, and the area of a detection is that of what is scored.
"""
import math
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from faster_coco_eval import COCO, COCOeval_faster
from faster_coco_eval.core import mask as masks

from utils import UserError, count, some

from ..tables import write_csv
from .masks import compressed, problem_of_mask, problem_of_size, size_of, tidy

BOX, MASK = "box", "mask"
_TYPES = {BOX: "bbox", MASK: "segm"}
# What each value is: precision rather than recall, over which IoU, area and number of detections in an image.
_VALUES = {
    "AP": (True, None, "all", 100), "AP50": (True, 0.5, "all", 100), "AP75": (True, 0.75, "all", 100),
    "AP_small": (True, None, "small", 100), "AP_medium": (True, None, "medium", 100),
    "AP_large": (True, None, "large", 100),
    "AR1": (False, None, "all", 1), "AR10": (False, None, "all", 10), "AR100": (False, None, "all", 100),
    "AR_small": (False, None, "small", 100), "AR_medium": (False, None, "medium", 100),
    "AR_large": (False, None, "large", 100),
}


@dataclass(frozen=True)
class Score:
    """COCO's scores of boxes or masks, fractions from 0 to 1; NaN where there is no object to find.

    Args:
        kind: `BOX` or `MASK`.
        values: AP, AP50, AP75, AP_small, AP_medium, AP_large, AR1, AR10, AR100, AR_small, AR_medium and AR_large.
        classes: Of each category in order of their ids: name, objects without crowds, AP and AP50.
    """

    kind: str
    values: dict[str, float]
    classes: list[tuple[str, int, float, float]]

    def lines(self) -> list[str]:
        """The twelve lines that pycocotools prints; -1.000 stands for NaN."""
        return [_line(self.values[key], *described) for key, described in _VALUES.items()]


def _line(value: float, is_precision: bool, iou: float | None, area: str, most: int) -> str:
    title, short = ("Average Precision", "(AP)") if is_precision else ("Average Recall", "(AR)")
    ious = "0.50:0.95" if iou is None else f"{iou:.2f}"
    shown = -1.0 if math.isnan(value) else value
    return f" {title:<18} {short} @[ IoU={ious:<9} | area={area:>6} | maxDets={most:>3} ] = {shown:.3f}"


def check_detections(detections: list[dict], annotations: dict[str, Any], kind: str):
    """Check that detections belong to annotations, and have what is scored: masks of `MASK`, of `BOX` either.

    Raises:
        UserError: Detections are of images or categories that the annotations do not have, or lack masks or boxes, or
            a mask has another size than its image.
    """
    for key, part in (("image_id", "images"), ("category_id", "categories")):
        known = {entry["id"] for entry in annotations[part]}
        numbers = [entry[key] for entry in detections if entry[key] not in known]
        if numbers:
            ids = some([str(number) for number in sorted(set(numbers))])
            raise UserError(f"{count(len(numbers), 'detection')} of {part} that the annotations do not have, with the "
                            f"{key} {ids}")
    keys = ("segmentation",) if kind == MASK else ("bbox", "segmentation")
    lacking = [index for index, entry in enumerate(detections) if not any(_has(entry, key) for key in keys)]
    if lacking:
        raise UserError(f"no {' and no '.join(keys)} in {len(lacking)} of {count(len(detections), 'detection')}, the "
                        f"first of them entry {lacking[0]}; a {kind} cannot be scored without")
    sizes = {image["id"]: size_of(image) for image in annotations["images"]}
    for index, entry in enumerate(detections):
        is_read = kind == MASK or not _has(entry, "bbox")
        if is_read and (problem := problem_of_size(entry["segmentation"], sizes[entry["image_id"]])):
            raise UserError(f"entry {index} of the detections, of image {entry['image_id']}, {problem}")


def _has(entry: dict, key: str) -> bool:
    """Whether an entry has a box or a mask; [] stands for none, as in COCO's own tools."""
    value = entry.get(key)
    return value is not None and len(value) > 0


def score(
    annotations: dict[str, Any], detections: list[dict], kind: str, images: Collection[int] | None = None
) -> Score:
    """The scores of detections as COCO computes them; images without detections count.

    Nothing is printed, and the arguments are left as they are.

    Args:
        annotations: As of `files.read_annotations`. Where one lacks `iscrowd` it is no crowd, and where it lacks `area`
            it has that of its box. The ids of annotations are not read.
        detections: As of `files.read_detections`. `BOX` takes the box of a mask where an entry has none of its own.
        kind: `BOX` or `MASK`.
        images: Ids of the images to score, rather than all; detections and annotations of others do not count.

    Raises:
        UserError: The detections do not belong to the annotations, `images` are not among them, or of `MASK` an object
            that is no crowd has no mask, or one that is none.
    """
    check_detections(detections, annotations, kind)
    known = {image["id"]: image for image in annotations["images"]}
    if unknown := sorted(set(images or ()) - known.keys()):
        raise UserError(f"{count(len(unknown), 'image')} to score that the annotations do not have, with the ids "
                        f"{some([str(number) for number in unknown])}")
    chosen = known if images is None else {number: known[number] for number in set(images)}
    # Their other keys are of no use here.
    categories = sorted((dict(id=x["id"], name=x["name"]) for x in annotations["categories"]), key=lambda x: x["id"])
    sizes = {number: size_of(image) for number, image in chosen.items()}
    names = {entry["id"] for entry in categories}
    objects = [x for x in annotations["annotations"] if x["image_id"] in sizes and x["category_id"] in names]
    truth = [_object(entry, kind, sizes) for entry in objects]
    found = [_found(entry, kind, sizes) for entry in detections if entry["image_id"] in sizes]
    precision, recall, params = _evaluate(sizes, categories, truth, found, kind)
    numbers = Counter(entry["category_id"] for entry in truth if not entry["iscrowd"])
    values = {key: _value(precision, recall, params, described) for key, described in _VALUES.items()}
    classes = [
        (entry["name"], numbers[entry["id"]], *(
            _value(precision[:, :, k, None], recall[:, k, None], params, _VALUES[key]) for key in ("AP", "AP50")
        ))
        for k, entry in enumerate(categories)
    ]
    return Score(kind, values, classes)


def _object(entry: dict, kind: str, sizes: dict[int, tuple[int, int] | None]) -> dict:
    """A copy of an annotation with what is scored alone, complete.

    A crowd without a mask is ignored all over its box: it is where detections are not to be held against a network.

    Args:
        entry: An annotation.
        kind: `BOX` or `MASK`.
        sizes: Height and width of each image.

    Raises:
        UserError: A mask is to be scored, and there is none.
    """
    left, top, width, height = box = [float(x) for x in entry["bbox"]]
    copy = dict(
        image_id=entry["image_id"], category_id=entry["category_id"], bbox=box,
        area=float(width * height if entry.get("area") is None else entry["area"]),
        iscrowd=int(entry.get("iscrowd") or 0),
    )
    if kind == BOX:
        return copy
    segmentation = entry.get("segmentation")
    problem = problem_of_mask(segmentation) if segmentation else None
    segmentation = None if problem else tidy(segmentation)
    if segmentation is None and copy["iscrowd"]:
        right, bottom = left + width, top + height
        segmentation = [[left, top, left, bottom, right, bottom, right, top]]
    if segmentation is None:
        problem = problem or "has no segmentation, and masks are to be scored"
    if problem := problem or problem_of_size(segmentation, sizes[entry["image_id"]]):
        raise UserError(f"the annotation of id {entry.get('id')}, of image {entry['image_id']}, {problem}")
    return dict(copy, segmentation=segmentation)


def _found(entry: dict, kind: str, sizes: dict[int, tuple[int, int] | None]) -> dict:
    """A copy of a detection with what is scored alone, and its area.

    Where masks are scored the box of an entry is left out: by it COCO's own tools would take the area, and a mask would
    be small, medium or large as its box is. A later mmdetection leaves it out too.

    Args:
        entry: A detection.
        kind: `BOX` or `MASK`.
        sizes: Height and width of each image.
    """
    copy = dict(
        image_id=int(entry["image_id"]), category_id=int(entry["category_id"]), score=float(entry["score"]), iscrowd=0
    )
    if kind == BOX and _has(entry, "bbox"):
        box = [float(x) for x in entry["bbox"]]
        return dict(copy, bbox=box, area=box[2] * box[3])
    mask = compressed(tidy(entry["segmentation"]), sizes[entry["image_id"]])
    area = float(masks.area(mask))
    if kind == BOX:  # with the area of the mask, as in COCO's own tools
        return dict(copy, bbox=masks.toBbox(mask).tolist(), area=area)
    return dict(copy, segmentation=mask, area=area)


def _evaluate(
    sizes: dict[int, tuple[int, int] | None], categories: list[dict], truth: list[dict], found: list[dict], kind: str
) -> tuple[np.ndarray, np.ndarray, Any]:
    """Precision (T, R, K, A, M) and recall (T, K, A, M) over IoU, recall, category, area and number of detections, -1
    where there is no object; and the parameters of COCO that name these.
    """
    images = [
        dict(id=number, **(dict(height=size[0], width=size[1]) if size else {})) for number, size in sizes.items()
    ]
    both = []
    for entries in (truth, found):
        numbered = [dict(entry, id=index) for index, entry in enumerate(entries, 1)]
        both.append(COCO(dict(images=images, categories=categories, annotations=numbered), print_function=_say_nothing))
    evaluation = COCOeval_faster(*both, _TYPES[kind], print_function=_say_nothing)
    evaluation.evaluate()
    evaluation.accumulate()
    return evaluation.eval["precision"], evaluation.eval["recall"], evaluation.params


def _say_nothing(*_: Any):
    pass


def _value(precision: np.ndarray, recall: np.ndarray, params: Any, described: tuple) -> float:
    """The mean over what is defined; NaN where nothing is."""
    is_precision, iou, area, most = described
    a, m = params.areaRngLbl.index(area), params.maxDets.index(most)
    cells = (precision if is_precision else recall)[..., a, m]
    if iou is not None:
        cells = cells[np.isclose(params.iouThrs, iou)]
    defined = cells[cells > -1]
    return float(defined.mean()) if defined.size else math.nan


# --- tables -----------------------------------------------------------------------------------------------------------


def write_classes(path: Path, scores: Sequence[Score]):
    """Write a table by class, in percent: class, objects, box_AP, box_AP50, mask_AP, mask_AP50.

    Cells are empty where a score is not defined, and where boxes or masks were not scored.

    Args:
        path: The CSV file.
        scores: Of boxes, of masks, or both, of the same annotations.

    Raises:
        UserError: It cannot be written.
    """
    held = {score.kind: score.classes for score in scores}
    rows: list[list[Any]] = [["class", "objects", *(f"{kind}_{key}" for kind in (BOX, MASK) for key in ("AP", "AP50"))]]
    for k, (name, number, *_) in enumerate(scores[0].classes):
        values = [value for kind in (BOX, MASK) for value in (held[kind][k][2:] if kind in held else (math.nan,) * 2)]
        rows.append([name, number, *("" if math.isnan(value) else f"{100 * value:.3f}" for value in values)])
    write_csv(path, rows)
