"""The loss of each pixel."""
import torch
import torch.nn.functional as F

from .labels import IGNORE


def pixel_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The cross-entropy of logits, brought to the size of the labels, as a mean over all pixels.

    As published (mmsegmentation 0.x), pixels without a label count as 0: an image with few labels weighs little.
    PyTorch's own mean is over labelled pixels, and NaN where there is none.

    Args:
        logits: (B, classes, h, w).
        labels: (B, H, W) class indices and `IGNORE`.
    """
    logits = F.interpolate(logits.float(), labels.shape[1:], mode="bilinear", align_corners=False)
    # Not by its own reduction: on GPUs that is not deterministic.
    return F.cross_entropy(logits, labels.long(), ignore_index=IGNORE, reduction="none").mean()
