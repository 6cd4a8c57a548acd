"""Accuracy of a classifier."""
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
        logits = network(self.precision.arrange(images)).float()
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
