"""Accuracy of a classifier."""
from collections.abc import Sequence

import torch
import torch.nn.functional as F

from training.distributed import Distributed
from training.precision import Precision
from utils import UserError


class Accuracy:
    """Top-1 and top-5 accuracy and cross-entropy; a `training.task.Evaluator`.

    Batches are normalised (B, 3, H, W) images and (B,) class indices; images with an index below 0 are left out.
    """

    def __init__(self, device: torch.device, precision: Precision):
        self.precision = precision
        self.totals = torch.zeros(4, dtype=torch.float64, device=device)

    def update(self, network: torch.nn.Module, batch: tuple[torch.Tensor, torch.Tensor]):
        """Count one batch."""
        images, targets = batch
        self.count(network(self.precision.arrange(images)).float(), targets)

    def count(self, logits: torch.Tensor, targets: torch.Tensor):
        """Count a batch's (B, classes) logits and (B,) targets."""
        hits = logits.topk(min(5, logits.shape[1]), dim=1).indices == targets[:, None]
        loss = F.cross_entropy(logits, targets, ignore_index=-1, reduction="sum")
        self.totals += torch.stack([hits[:, 0].sum(), hits.any(dim=1).sum(), loss, (targets >= 0).sum()])

    def compute(self, distributed: Distributed) -> dict[str, float]:
        """ "acc1" and "acc5" in percent, "loss", and "images", their number, over all processes.

        Raises:
            UserError: There was no image.
        """
        top1, top5, loss, images = distributed.sum(self.totals).tolist()
        if images == 0:
            raise UserError("there was no image to evaluate")
        return dict(acc1=100 * top1 / images, acc5=100 * top5 / images, loss=loss / images, images=int(images))


class RecordedAccuracy(Accuracy):
    """`Accuracy` that also keeps what was predicted of every image, 88 bytes each, and gathers it by the image's index.

    Args:
        device, precision: As of `Accuracy`.
        shown: Which of this process's images to keep, by their places among them, in order.

    Attributes:
        images: Those, normalised (3, H, W).
        num_classes: Of the network, after `compute`.
        targets: (N,) int64, class indices, -1 for images that are left out; after `compute`, as all that follows.
        classes: (N, k) int64, the five most probable classes, or all where there are fewer, in this order.
        probabilities: (N, k) float64, theirs.
    """

    def __init__(self, device: torch.device, precision: Precision, shown: Sequence[int] = ()):
        super().__init__(device, precision)
        self.shown, self.images, self.seen = shown, [], 0
        self.num_classes, self.rows = 0, []

    def update(self, network: torch.nn.Module, batch: tuple[torch.Tensor, torch.Tensor]):
        super().update(network, batch)
        images = batch[0]
        self.images += [images[i - self.seen].clone() for i in self.shown if 0 <= i - self.seen < len(images)]
        self.seen += len(images)

    def count(self, logits: torch.Tensor, targets: torch.Tensor):
        super().count(logits, targets)
        self.num_classes = logits.shape[1]
        top = logits.softmax(dim=1).topk(min(5, logits.shape[1]), dim=1)
        self.rows.append(torch.cat([targets[:, None], top.indices, top.values], dim=1).double())

    def compute(self, distributed: Distributed) -> dict[str, float]:
        """As `Accuracy.compute`; the loader gave this process every `world_size`-th image, as `build_loader` does."""
        results = super().compute(distributed)
        self.num_classes = distributed.max(self.num_classes)  # 0 on a process that got no image
        count = min(5, self.num_classes)
        own = torch.cat([self.totals.new_zeros(0, 1 + 2 * count), *self.rows])
        images = int(distributed.sum(self.totals.new_tensor(len(own))))
        rows = own.new_zeros(images, own.shape[1])
        rows[distributed.rank::distributed.world_size] = own
        rows = distributed.sum(rows).cpu()
        self.targets, self.classes = rows[:, 0].long(), rows[:, 1:1 + count].long()
        self.probabilities = rows[:, 1 + count:]
        return results
