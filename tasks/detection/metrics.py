"""Average precision of a detector, as COCO computes it, over the images of all processes."""
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from training.distributed import Distributed
from training.task import refusal
from utils import UserError, count

from ..errors import UnfitImageError
from .data import Sample
from .masks import encode
from .scores import BOX, MASK, Score, score

# Parts of a detector whose outputs are looked at, beside its predictors; these see every pixel of the maps.
_PARTS = ("rpn.head", "head")


@dataclass(frozen=True)
class Truth:
    """What an evaluation is scored against.

    Args:
        content: COCO-format annotations.
        category_ids: The category of each label, from label 1 on.
        has_objects: Whether there is anything to find; otherwise no score is defined.
    """

    content: dict[str, Any]
    category_ids: Sequence[int]
    has_objects: bool = True


@dataclass
class Shown:
    """An image of an evaluation, to be shown: uint8 (3, H, W), its id, and what was detected."""

    image: torch.Tensor
    id: int
    found: dict[str, torch.Tensor]


class DetectionScores:
    """A `training.task.Evaluator` of batches that are lists of `Sample`.

    Each image is seen by itself: what is found in it depends neither on the batch nor on the number of processes.

    Args:
        truth: The annotations and categories; None where nothing is to be computed.
        with_masks: Whether masks are found.
        device: Where images are counted.
        shown: Which of this process's images to keep, by their places among them, in order.

    Attributes:
        shown: Those.
        scores: Of boxes, and of masks; after `compute`, on the main process.
        detections: In COCO's format of results; after `compute`, on the main process those of all.
    """

    def __init__(self, truth: Truth | None, with_masks: bool, device: torch.device, shown: Sequence[int] = ()):
        self.truth, self.with_masks, self.places = truth, with_masks, set(shown)
        # Images, and those among them of which an output is not finite.
        self.images = torch.zeros(2, dtype=torch.int64, device=device)
        self.detections, self.ids, self.seen, self.shown = [], [], 0, []
        self.scores: list[Score] = []

    def update(self, network: torch.nn.Module, batch: list[Sample]):
        """Detect the objects in the images of a batch."""
        for sample in batch:
            if sample.id is not None:
                self._detect(network, sample)
            self.seen += 1

    def _detect(self, network: torch.nn.Module, sample: Sample):
        height, width = sample.image.shape[1:]
        message = f"the network cannot take an image of {height} x {width} pixels"
        with refusal(UnfitImageError, message), watch_outputs(network) as problems:
            found, = network([sample.image.float() / 255])
        self.images += torch.tensor([1, bool(problems)], device=self.images.device)
        self.ids.append(sample.id)
        if self.truth is not None:
            self.detections += as_entries(found, sample.id, self.truth.category_ids)
        if self.seen in self.places:
            found = {name: value.cpu() for name, value in found.items()}
            self.shown.append(Shown(sample.image.cpu(), sample.id, found))

    def compute(self, distributed: Distributed) -> dict[str, float]:
        """"mask_AP" and "box_AP" in percent, with parts of them by overlap, size and class, and "images".

        All of them are NaN where an output was, or where nothing is to be found.

        Raises:
            UserError: There was no image, or no image with an object.
        """
        images, not_finite = distributed.sum(self.images).tolist()
        if images == 0:
            raise UserError("there was no image to evaluate")
        gathered = distributed.gather_objects((self.detections, self.ids))
        results = None
        if gathered is not None:
            self.detections = [entry for detections, _ in gathered for entry in detections]
            ids = [id for _, of_process in gathered for id in of_process]
            kinds = [MASK, BOX] if self.with_masks else [BOX]
            self.scores = [score(self.truth.content, self.detections, kind, ids) for kind in kinds]
            results = {name: value for found in self.scores for name, value in flat(found).items()}
        results = distributed.broadcast_object(results)
        if self.truth.has_objects and math.isnan(results["box_AP"]):
            raise UserError(f"no object in the {count(images, 'image')} to evaluate")
        return dict(dict.fromkeys(results, float("nan")) if not_finite else results, images=images)


def flat(found: Score) -> dict[str, float]:
    """A score in percent: "box_AP", "box_AP50", "box_AP75", "box_AP_of_size/small", "box_AR/100", "box_AP/NAME"..."""
    values = {name: 100 * value for name, value in found.values.items()}
    kind = found.kind
    return {
        **{f"{kind}_{name}": values[name] for name in ("AP", "AP50", "AP75")},
        **{f"{kind}_AP_of_size/{size}": values[f"AP_{size}"] for size in ("small", "medium", "large")},
        **{f"{kind}_AR/{most}": values[f"AR{most}"] for most in (1, 10, 100)},
        **{f"{kind}_AR_of_size/{size}": values[f"AR_{size}"] for size in ("small", "medium", "large")},
        **{f"{kind}_AP/{name}": 100 * value for name, _, value, _ in found.classes},
    }


@contextmanager
def watch_outputs(network: torch.nn.Module) -> Iterator[list[str]]:
    """A list that gets the names of a detector's parts whose outputs are NaN or infinite: of such, nothing is detected.
    """
    problems = []

    def look(name: str, outputs: Any):
        if not all(x.isfinite().all() for x in _tensors(outputs)):
            problems.append(name)

    handles = [
        module.register_forward_hook(lambda module, inputs, outputs, name=name: look(name, outputs))
        for name, module in network.named_modules() if name in _PARTS or name.endswith("_predictor")
    ]
    try:
        yield problems
    finally:
        for handle in handles:
            handle.remove()


def _tensors(outputs: Any) -> Iterator[torch.Tensor]:
    """The tensors in a part's outputs."""
    if isinstance(outputs, torch.Tensor):
        yield outputs
        return
    for value in outputs.values() if isinstance(outputs, dict) else outputs:
        yield from _tensors(value)


def as_entries(found: dict[str, torch.Tensor], image_id: int, category_ids: Sequence[int]) -> list[dict[str, Any]]:
    """Detections of an image in COCO's format of results, best first.

    Args:
        found: As a detector returns them.
        image_id: The image's.
        category_ids: The category of each label, from label 1 on.
    """
    boxes = found["boxes"].double()
    boxes = torch.cat([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], dim=1).tolist()
    rows = zip(boxes, found["scores"].tolist(), found["labels"].tolist(), strict=True)
    entries = [
        dict(image_id=image_id, category_id=category_ids[label - 1], bbox=box, score=value)
        for box, value, label in rows
    ]
    if "masks" in found:
        for entry, mask in zip(entries, encode(found["masks"].cpu().numpy()), strict=True):
            entry["segmentation"] = mask
    return entries
