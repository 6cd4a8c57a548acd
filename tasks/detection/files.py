"""Files in COCO's format: annotations, and results; what is wrong in them is named in one line."""
import json
from collections import Counter
from collections.abc import Collection
from pathlib import Path
from typing import Any

from utils import UserError, one_line

from .masks import is_id, is_number, problem_of_mask, tidy

_PARTS = ("images", "annotations", "categories")


def read_annotations(path: Path, check_each: bool = True) -> dict[str, Any]:
    """The content of a file of annotations in COCO's format.

    Args:
        path: The file.
        check_each: Whether to check each annotation, by `problem_of_annotation`. Otherwise a file without them is read
            as well, such as those of COCO's test images.

    Raises:
        UserError: It cannot be read, or is no such file; the first image, category or annotation that is wrong is
            named by its index.
    """
    data = _read_json(path)
    if isinstance(data, list):
        raise UserError(f"{path}: it is a list, as detections are, and annotations have {', '.join(_PARTS)}")
    if not isinstance(data, dict):
        raise UserError(f"{path}: it is no annotations in COCO's format")
    if not check_each:
        data.setdefault("annotations", [])
    if missing := [part for part in _PARTS if part not in data]:
        raise UserError(f"{path}: it has no {' and no '.join(missing)}")
    for part in _PARTS:
        if not isinstance(data[part], list) or not all(isinstance(entry, dict) for entry in data[part]):
            raise UserError(f"{path}: its {part} are no list of objects")
    for part in ("images", "categories"):
        _check_ids(path, part, data[part])
    for index, category in enumerate(data["categories"]):
        if not isinstance(category.get("name"), str):
            raise UserError(f"{path}: entry {index} of its categories has no name")
    images, categories = ({entry["id"] for entry in data[part]} for part in ("images", "categories"))
    for index, entry in enumerate(data["annotations"] if check_each else []):
        if problem := problem_of_annotation(entry, images, categories):
            raise UserError(f"{path}: entry {index} of its annotations {problem}")
    return data


def read_detections(path: Path) -> list[dict]:
    """The content of a file of detections in COCO's format of results.

    Raises:
        UserError: It cannot be read, or is no such file; the first entry that is wrong is named by its index.
    """
    data = _read_json(path)
    if not isinstance(data, list):
        is_other = isinstance(data, dict) and any(part in data for part in _PARTS)
        hint = "; it holds annotations" if is_other else ""
        raise UserError(f"{path}: it is no list, as detections in COCO's format are{hint}")
    for index, entry in enumerate(data):
        if problem := _problem_of_detection(entry):
            raise UserError(f"{path}: entry {index} {problem}")
    return data


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except RecursionError as error:
        raise UserError(f"{path}: it is no COCO file: lists lie in lists too deep to read") from error
    except ValueError as error:  # bytes that are no text, too
        raise UserError(f"{path}: it is no JSON: {one_line(error)}") from error


def _check_ids(path: Path, part: str, entries: list[dict]):
    """Raises UserError where there is no entry, or one has no id, or that of another."""
    if not entries:
        raise UserError(f"{path}: it has no {part}: their list is empty")
    for index, entry in enumerate(entries):
        if not is_id(entry.get("id")):
            raise UserError(f"{path}: entry {index} of its {part} has no id that is an integer of 64 bits")
    number, times = Counter(entry["id"] for entry in entries).most_common(1)[0]
    if times > 1:
        raise UserError(f"{path}: {times} of its {part} have the id {number}")


def problem_of_annotation(entry: dict, images: Collection[int], categories: Collection[int]) -> str | None:
    """What is wrong with an annotation among images and categories of these ids, apart from its mask: "has ..."."""
    for key, known, part in (("image_id", images, "images"), ("category_id", categories, "categories")):
        if not is_id(entry.get(key)):
            return f"has no {key} that is an integer of 64 bits"
        if entry[key] not in known:
            return f"has the {key} {entry[key]}, which is not among the {part}"
    if problem := _problem_of_box(entry.get("bbox")):
        return problem
    area = entry.get("area")  # which some tools write as null
    if area is not None and not (is_number(area) and area >= 0):
        return f"has the area {area!r}, which is no number of at least 0"
    if entry.get("iscrowd") not in (None, 0, 1):
        return f"has the iscrowd {entry['iscrowd']!r}, which is neither 0 nor 1"
    return None


def _problem_of_detection(entry: Any) -> str | None:
    if not isinstance(entry, dict):
        return "is no object with image_id, category_id, score and bbox or segmentation"
    for key in ("image_id", "category_id"):
        if not is_id(entry.get(key)):
            return f"has no {key} that is an integer of 64 bits"
    if "score" not in entry:
        return "has no score"
    if not is_number(entry["score"]):
        return f"has the score {entry['score']!r}, which is no finite number"
    if not entry.get("bbox") and not entry.get("segmentation"):
        return "has neither bbox nor segmentation"
    problem = _problem_of_box(entry["bbox"]) if entry.get("bbox") else None
    if problem or not entry.get("segmentation"):
        return problem
    is_empty = "has polygons of less than three points alone"
    return problem_of_mask(entry["segmentation"]) or (None if tidy(entry["segmentation"]) else is_empty)


def _problem_of_box(box: Any) -> str | None:
    if not isinstance(box, list) or len(box) != 4 or not all(map(is_number, box)):
        return "has no bbox of four finite numbers"
    return f"has a bbox of negative size, {box[2]:g} x {box[3]:g}" if min(box[2:]) < 0 else None
