"""Images with a label for each pixel, in training and in evaluation."""
from typing import Any

import numpy as np
import torch
from PIL import Image

from datasets import ImageDataset

from .metrics import Sample


class SegmentationDataset(ImageDataset):
    """What the transform makes of (PIL RGB image, (H, W) labels), by index or by (index, seed).

    As `datasets.ImageDataset`; its source gives such pairs, and its transform takes both.
    """

    def _transformed(self, image: Image.Image, target: np.ndarray | None) -> Any:
        return self.transform(image, target)

    @staticmethod
    def _masked() -> tuple[Image.Image, None]:
        return Image.new("RGB", (256, 256)), None


def collate_samples(batch: list[tuple[list[torch.Tensor], torch.Tensor | None]]) -> list[Sample]:
    """Views and labels of images, of any sizes -> a batch of `SegmentationScores`."""
    return [Sample(views, torch.empty(0, 0) if labels is None else labels) for views, labels in batch]
