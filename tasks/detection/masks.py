"""Masks of objects as COCO's format holds them: polygons, or run lengths of pixels."""
import sys
from collections.abc import Mapping
from typing import Any

import numpy as np
from faster_coco_eval.core import mask as coco

# Coordinates of the smallest polygon. COCO has a few of two points, which no pixel lies in.
_FEWEST = 6


# --- what is wrong with them ------------------------------------------------------------------------------------------


def is_id(value: Any) -> bool:
    """Whether a value of a JSON is a whole number of 64 bits."""
    return isinstance(value, int) and not isinstance(value, bool) and -(2**63) <= value < 2**63


def is_number(value: Any) -> bool:
    """Whether a value of a JSON is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def problem_of_mask(segmentation: Any) -> str | None:
    """What is wrong with polygons or run lengths, "has ..."; faster-coco-eval trusts much of what it reads."""
    if isinstance(segmentation, list):
        is_right = all(_points(polygon) is not None for polygon in segmentation)
        return None if is_right else "has a polygon that is no list of numbers, x and y in turn"
    if not isinstance(segmentation, dict) or not {"size", "counts"} <= segmentation.keys():
        return "has a segmentation that is neither polygons nor an object with size and counts"
    size = segmentation["size"]
    if not isinstance(size, list | tuple) or len(size) != 2 or not all(is_id(x) and x > 0 for x in size):
        return "has a mask whose size is not its height and width"
    pixels = _pixels(segmentation["counts"])
    if pixels is None:
        return "has a mask whose counts are no run lengths"
    is_right = pixels == size[0] * size[1]
    return None if is_right else f"has a mask of {size[0]} x {size[1]} pixels, and counts of {pixels}"


def _points(polygon: Any) -> np.ndarray | None:
    """(N, 2) points of a polygon in a JSON; None where it is none. As fast as COCO's million of polygons needs it."""
    if not isinstance(polygon, list) or len(polygon) % 2 or not set(map(type, polygon)) <= {int, float}:
        return None
    try:
        points = np.array(polygon, np.float64).reshape(-1, 2)
    except OverflowError:  # of an integer
        return None
    return points if np.isfinite(points).all() else None


def _pixels(counts: Any) -> int | None:
    """How many pixels run lengths cover, in a list or in COCO's compressed form; None where they are none.

    A compressed length is one character or more, each 48 more than 6 bits: one that says whether another follows, and
    five of the number, lowest first, whose highest is the sign. From the fourth on it is what it is longer than the
    last but one.
    """
    if isinstance(counts, list):
        return sum(counts) if all(is_id(x) and x >= 0 for x in counts) else None
    if not isinstance(counts, str | bytes):
        return None
    text = counts.encode("utf-8", "surrogatepass") if isinstance(counts, str) else counts
    digits = np.frombuffer(text, np.uint8).astype(np.int64) - 48
    if not digits.size:
        return 0
    is_last = (digits & 32) == 0
    if digits.min() < 0 or digits.max() > 63 or not is_last[-1]:
        return None
    ends = np.flatnonzero(is_last)
    starts = np.concatenate([[0], ends[:-1] + 1])
    lengths = ends - starts + 1
    if lengths.max() > 7:  # more than 34 bits, which no image has pixels for
        return None
    places = np.arange(digits.size) - np.repeat(starts, lengths)
    runs = np.add.reduceat((digits & 31) << 5 * places, starts)
    runs -= np.where(digits[ends] & 16, 1 << 5 * lengths, 0)
    for chain in (runs[1::2], runs[2::2]):
        chain[:] = np.cumsum(chain)
    return int(runs.sum()) if runs.min() >= 0 else None


def problem_of_size(segmentation: Any, size: tuple[int, int] | None) -> str | None:
    """Why a mask cannot be laid over an image of (height, width); None where it can.

    Of a polygon far outside of it, COCO's tools would fill all of the memory.
    """
    if size is None:
        return "has a mask, and the annotations do not say the height and width of its image"
    height, width = size
    if isinstance(segmentation, list):
        side = max(height, width)
        extents = ((min(polygon, default=0), max(polygon, default=0)) for polygon in segmentation)
        is_near = all(-side <= low and high <= 2 * side for low, high in extents)
        return None if is_near else f"has a polygon far outside of its image of {width} x {height}"
    if tuple(segmentation["size"]) == size:
        return None
    height, width = segmentation["size"]
    return f"has a mask of {height} x {width} pixels, and its image has {size[0]} x {size[1]}"


def size_of(image: Mapping[str, Any]) -> tuple[int, int] | None:
    """(height, width) of an image of annotations; None where they do not say. Some tools write 640.0."""
    size = image.get("height"), image.get("width")
    return tuple(map(int, size)) if all(is_number(x) and x > 0 and x == int(x) for x in size) else None


# --- what they are ----------------------------------------------------------------------------------------------------


def tidy(segmentation: Any) -> Any:
    """A segmentation without polygons of less than three points; None where nothing is left, or there is none."""
    if isinstance(segmentation, list):
        segmentation = [polygon for polygon in segmentation if len(polygon) >= _FEWEST]
    return segmentation or None


def compressed(segmentation: Any, size: tuple[int, int]) -> dict[str, Any]:
    """What `tidy` returns, of an image of (height, width), in COCO's compressed run lengths."""
    if isinstance(segmentation, list):
        return coco.merge(coco.frPyObjects(segmentation, *size))
    return coco.frPyObjects(segmentation, *size) if isinstance(segmentation["counts"], list) else segmentation


def rasterize(segmentation: Any, height: int, width: int) -> np.ndarray:
    """(height, width) bool of what `tidy` returns, by COCO's rules of which pixels a polygon covers."""
    return coco.decode(compressed(segmentation, (height, width))).astype(bool)


def encode(masks: np.ndarray) -> list[dict[str, Any]]:
    """(N, H, W) bool masks as compressed run lengths, which JSON can hold."""
    runs = (coco.encode(np.asfortranarray(mask, np.uint8)) for mask in masks)  # one at a time, of large photographs
    return [dict(size=list(map(int, run["size"])), counts=_text(run["counts"])) for run in runs]


def _text(counts: bytes | str) -> str:
    return counts.decode() if isinstance(counts, bytes) else counts
