"""Intersection over union of a segmenter, and the confusion matrix that it follows from."""
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from training.distributed import Distributed
from utils import UserError, count

from .inference import Inference
from .labels import IGNORE


class Sample(NamedTuple):
    """An image to evaluate.

    Args:
        views: uint8 (3, h, w), at each size that it is seen at.
        labels: uint8 (H, W) class indices and `IGNORE`; empty for an image that could not be read.
    """

    views: list[torch.Tensor]
    labels: torch.Tensor


@dataclass
class Shown:
    """An image of an evaluation, to be shown: uint8 (3, h, w), its labels and the predicted ones, (H, W)."""

    image: torch.Tensor
    labels: torch.Tensor
    predicted: torch.Tensor


def confusion_matrix(labels: torch.Tensor, predicted: torch.Tensor, num_classes: int) -> torch.Tensor:
    """int64 (true, predicted) counts of labelled pixels.

    Args:
        labels: (H, W) class indices and `IGNORE`.
        predicted: (H, W) class indices.
        num_classes: Their number.
    """
    known = labels != IGNORE
    cells = labels[known].long() * num_classes + predicted[known]
    return torch.bincount(cells, minlength=num_classes**2).view(num_classes, num_classes)


class Scores(NamedTuple):
    """What follows from a confusion matrix, in percent; NaN where it is not defined.

    Args:
        iou: Intersection over union of each class: pixels predicted correctly, of all labelled or predicted so.
        accuracy: Of each class, the share of its labelled pixels that is predicted correctly.
        miou, macc: Means of these over the classes for which they are defined.
        aacc: The share of all labelled pixels that is predicted correctly.
    """

    iou: np.ndarray
    accuracy: np.ndarray
    miou: float
    macc: float
    aacc: float


def scores(matrix: np.ndarray) -> Scores:
    """The scores of int64 (true, predicted) counts of pixels."""
    hits, true, predicted = np.diag(matrix), matrix.sum(axis=1), matrix.sum(axis=0)
    with np.errstate(invalid="ignore"):  # 0 / 0, which is not defined
        iou, accuracy = 100 * hits / (true + predicted - hits), 100 * hits / true
        aacc = float(100 * hits.sum() / np.float64(matrix.sum()))
    return Scores(iou, accuracy, _mean(iou), _mean(accuracy), aacc)


def _mean(values: np.ndarray) -> float:
    defined = values[~np.isnan(values)]
    return float(defined.mean()) if len(defined) else float("nan")


class SegmentationScores:
    """A `training.task.Evaluator` of batches that are lists of `Sample`.

    Each image is evaluated by itself: its score depends neither on the batch nor on the number of processes. One with
    an output that is not finite is in no count.

    Args:
        inference: How labels are predicted.
        classes: Names of the classes.
        device: Where the counts are kept.
        shown: Which of this process's images to keep, by their places among them, in order.

    Attributes:
        shown: Those.
        matrix: (true, predicted) counts of all processes, after `compute`.
    """

    def __init__(
        self, inference: Inference, classes: Sequence[str], device: torch.device, shown: Sequence[int] = ()
    ):
        self.inference, self.classes, self.places = inference, list(classes), set(shown)
        self.counts = torch.zeros(len(classes), len(classes), dtype=torch.int64, device=device)
        # Images, and those among them of which an output is not finite.
        self.images = torch.zeros(2, dtype=torch.int64, device=device)
        self.seen, self.shown = 0, []

    def update(self, network: torch.nn.Module, batch: list[Sample]):
        """Count the images of a batch."""
        for sample in batch:
            if sample.labels.numel():
                self._count(network, sample)
            self.seen += 1

    def _count(self, network: torch.nn.Module, sample: Sample):
        predicted = self.inference.labels(network, sample.views, tuple(sample.labels.shape))
        is_finite = bool(predicted[0, 0] >= 0)
        self.images += torch.tensor([1, not is_finite], device=self.images.device)
        if not is_finite:
            return
        self.counts += confusion_matrix(sample.labels, predicted, len(self.classes))
        if self.seen in self.places:
            self.shown.append(Shown(*(x.cpu() for x in (sample.views[0], sample.labels, predicted))))

    def compute(self, distributed: Distributed) -> dict[str, float]:
        """"mIoU", "mAcc", "aAcc", of each class "IoU/NAME", in percent, and "images"; all NaN where an output was none.

        Raises:
            UserError: There was no image, or none with a label.
        """
        self.matrix = distributed.sum(self.counts).cpu().numpy()
        images, not_finite = distributed.sum(self.images).tolist()
        if images == 0:
            raise UserError("there was no image to evaluate")
        if not self.matrix.any() and not not_finite:
            raise UserError(f"no pixel of the {count(images, 'image')} to evaluate has a label")
        found = scores(self.matrix)
        of_classes = {f"IoU/{name}": value for name, value in zip(self.classes, found.iou.tolist(), strict=True)}
        results = dict(mIoU=found.miou, mAcc=found.macc, aAcc=found.aacc, images=images, **of_classes)
        return dict(dict.fromkeys(results, float("nan")), images=images) if not_finite else results
