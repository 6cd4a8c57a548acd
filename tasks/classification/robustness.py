"""Robustness of ImageNet's classifiers: accuracy by set, and the errors under corruption relative to AlexNet's."""
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import torch
import torch.nn.functional as F
from timm.data.loader import fast_collate

from training.data.robustness import CORRUPTIONS, NUM_CLASSES, SEVERITIES, Part, set_classes
from training.distributed import Distributed
from training.precision import Precision
from utils import UserError

from ..tables import write_csv

# Top-1 errors of AlexNet, by which those of others are divided: the means over the five severities that the authors of
# ImageNet-C publish with their code (https://github.com/hendrycks/robustness, and in AugMix's), and the one without
# corruption, torchvision's.
ALEXNET = dict(zip(CORRUPTIONS, (
    0.886428, 0.894468, 0.922640, 0.819880, 0.826268, 0.785948, 0.798360, 0.866816, 0.826572, 0.819324, 0.564592,
    0.853204, 0.646056, 0.717840, 0.606500,
), strict=True))
ALEXNET_CLEAN = 0.43478


def collate(batch: list[tuple[torch.Tensor, tuple[int, ...]]]) -> tuple[torch.Tensor, torch.Tensor]:
    """(B, 3, H, W) uint8 images, and (B, 1 + K) numbers: see `RobustnessAccuracy`."""
    images, _ = fast_collate([(image, 0) for image, _ in batch])
    return images, torch.tensor([target for _, target in batch])


class RobustnessAccuracy:
    """Top-1 and top-5 accuracy and cross-entropy of each part of the sets; a `training.task.Evaluator`.

    Batches are normalised (B, 3, H, W) images and (B, 1 + K) numbers: an image's part, -1 where it is left out, and the
    classes that are right, -1 behind the last. In sets of fewer classes, a network chooses among these alone.

    Args:
        device, precision: As of `metrics.Accuracy`.
        parts: Of the sets.

    Attributes:
        by_part: What `compute` returns, for each part that has images.
    """

    def __init__(self, device: torch.device, precision: Precision, parts: Sequence[Part]):
        self.precision, self.parts = precision, parts
        self.totals = torch.zeros(len(parts), 4, dtype=torch.float64, device=device)
        self.left_out = torch.zeros(len(parts), NUM_CLASSES, dtype=torch.bool, device=device)
        for number, part in enumerate(parts):
            if classes := set_classes(part.set):
                self.left_out[number] = True
                self.left_out[number, list(classes)] = False
        self.by_part: dict[int, dict[str, float]] = {}

    def update(self, network: torch.nn.Module, batch: tuple[torch.Tensor, torch.Tensor]):
        images, targets = batch
        self.count(network(self.precision.arrange(images)).float(), targets)

    def count(self, logits: torch.Tensor, targets: torch.Tensor):
        """Count a batch's (B, 1000) logits and (B, 1 + K) targets."""
        there = targets[:, 0] >= 0
        logits, part, labels = logits[there], targets[there, 0], targets[there, 1:]
        logits = logits.masked_fill(self.left_out[part], -torch.inf)
        # -1 stands behind the last label, and is no class
        hits = (logits.topk(5, dim=1).indices[:, :, None] == labels[:, None]).any(dim=2)
        loss = F.cross_entropy(logits, labels[:, 0], reduction="none")
        values = torch.stack([hits[:, 0], hits.any(dim=1), loss, torch.ones_like(loss)], dim=1)
        self.totals.index_add_(0, part, values.double())

    def compute(self, distributed: Distributed) -> dict[str, float]:
        """ "acc1" and "acc5" in percent, "loss", and "images", their number, of all images of all processes.

        Raises:
            UserError: There was no image.
        """
        totals = distributed.sum(self.totals)
        if totals[:, 3].sum() == 0:
            raise UserError("there was no image to evaluate")
        self.by_part = {i: _results(row) for i, row in enumerate(totals.tolist()) if row[3]}
        return _results(totals.sum(dim=0).tolist())


def _results(totals: Sequence[float]) -> dict[str, float]:
    top1, top5, loss, images = totals
    return dict(acc1=100 * top1 / images, acc5=100 * top5 / images, loss=loss / images, images=int(images))


# --- corruption errors ------------------------------------------------------------------------------------------------


def corruption_errors(errors: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """CE of each corruption: the mean error over its severities, relative to AlexNet's; in percent.

    Args:
        errors: By corruption, top-1 errors of its severities, from 0 to 1.
    """
    return {name: 100 * mean(values) / ALEXNET[name] for name, values in errors.items()}


def relative_errors(errors: Mapping[str, Sequence[float]], clean: float) -> dict[str, float]:
    """Relative CE of each corruption: how much the error grows by it, relative to AlexNet; in percent.

    Args:
        errors: As of `corruption_errors`.
        clean: The top-1 error without corruption, from 0 to 1.
    """
    return {
        name: 100 * (mean(values) - clean) / (ALEXNET[name] - ALEXNET_CLEAN) for name, values in errors.items()
    }


# --- report -----------------------------------------------------------------------------------------------------------

COLUMNS = ("set", "part", "images", "acc1", "acc5", "error", "ce", "relative_ce",
           *(f"error_{severity}" for severity in SEVERITIES))


def rows(parts: Sequence[Part], by_part: Mapping[int, Mapping[str, float]]) -> list[dict[str, Any]]:
    """The table: a row for each part, of corruptions one for each, and their means; figures in percent.

    mCE and relative mCE, the means over all 15 corruptions, are there where these are, and relative ones where the
    images without corruption were evaluated as well.
    """
    found = [
        dict(set=parts[i].set, part=parts[i].name, images=values["images"], acc1=values["acc1"], acc5=values["acc5"])
        for i, values in by_part.items() if parts[i].severity is None
    ]
    clean = next((1 - row["acc1"] / 100 for row in found if row["set"] == "imagenet_val"), None)
    return found + list(_corruption_rows(parts, by_part, clean))


def _corruption_rows(
    parts: Sequence[Part], by_part: Mapping[int, Mapping[str, float]], clean: float | None
) -> Iterator[dict[str, Any]]:
    own = {name: [by_part[i] for i in by_part if parts[i].severity and parts[i].name == name] for name in CORRUPTIONS}
    # a severity whose images were all left out has no error
    own = {name: values for name, values in own.items() if len(values) == len(SEVERITIES)}
    errors = {name: [1 - value["acc1"] / 100 for value in values] for name, values in own.items()}
    ce = corruption_errors(errors)
    relative = {} if clean is None else relative_errors(errors, clean)
    for name, values in own.items():
        yield dict(
            set="imagenet_c", part=name, images=sum(value["images"] for value in values),
            acc1=mean(value["acc1"] for value in values), acc5=mean(value["acc5"] for value in values),
            error=100 * mean(errors[name]), ce=ce[name], **({"relative_ce": relative[name]} if relative else {}),
            **{f"error_{severity}": 100 * error for severity, error in zip(SEVERITIES, errors[name], strict=True)},
        )
    if len(own) == len(CORRUPTIONS):
        yield dict(
            set="imagenet_c", part="mean", images=sum(value["images"] for values in own.values() for value in values),
            acc1=mean(value["acc1"] for values in own.values() for value in values),
            acc5=mean(value["acc5"] for values in own.values() for value in values),
            error=100 * mean(mean(values) for values in errors.values()), ce=mean(ce.values()),
            **({"relative_ce": mean(relative.values())} if relative else {}),
        )


def lines(table: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """The table as text, a line for each row."""
    width = max(len(f"{row['set']} {row['part']}") for row in table)
    for row in table:
        values = [f"Acc@1 {row['acc1']:6.2f} Acc@5 {row['acc5']:6.2f}"]
        m = "m" if row["part"] == "mean" else ""
        values += [f"{m}CE {row['ce']:.2f}"] if "ce" in row else []
        values += [f"relative {m}CE {row['relative_ce']:.2f}"] if "relative_ce" in row else []
        name = f"{row['set']} {row['part']}"
        yield f"* {name:<{width}} {' '.join(values)} on {row['images']} images"


def report(evaluator: RobustnessAccuracy, folder: Path | None):
    """Print the table of an evaluation, and write it to `robustness.csv`, where there is a folder.

    Raises:
        UserError: It cannot be written.
    """
    table = rows(evaluator.parts, evaluator.by_part)
    print("\n".join(lines(table)))
    if folder is None:
        return
    cells = ([row.get(column, "") for column in COLUMNS] for row in table)
    rounded = ([round(cell, 3) if isinstance(cell, float) else cell for cell in row] for row in cells)
    write_csv(folder / "robustness.csv", [COLUMNS, *rounded])
    print(f"report: {folder / 'robustness.csv'}")
