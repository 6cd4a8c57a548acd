"""Anchors at exact sizes and strides, and which object each is to find, as in mmdetection 2.x."""
from collections.abc import Sequence

import torch
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList

RATIOS = (0.5, 1.0, 2.0)  # height / width
BACKGROUND, IGNORED = -1, -2  # what an anchor or a proposal is matched with that is matched with no object


class Anchors(AnchorGenerator):
    """Boxes around the upper left corner of each cell of a map.

    torchvision rounds their sides to whole pixels, and takes the quotient of image and map for the stride: 61 instead
    of 64 where 800 pixels have 13 rows.

    Args:
        strides: Of each map.
        scales: Side of a square anchor in strides; one or several at each cell.
    """

    def __init__(self, strides: Sequence[int], scales: Sequence[float]):
        self.strides = tuple(strides)
        sizes = tuple(tuple(scale * stride for scale in scales) for stride in strides)
        super().__init__(sizes, (RATIOS,) * len(sizes))

    def generate_anchors(self, scales, aspect_ratios, dtype=torch.float32, device="cpu") -> torch.Tensor:
        """(ratios * scales, 4): corners, around the origin; scales of a ratio follow one another."""
        root = torch.as_tensor(aspect_ratios, dtype=dtype, device=device).sqrt()
        sides = torch.as_tensor(scales, dtype=dtype, device=device)
        half_width, half_height = (sides / root[:, None]).flatten() / 2, (sides * root[:, None]).flatten() / 2
        return torch.stack([-half_width, -half_height, half_width, half_height], dim=1)

    def set_cell_anchors(self, dtype: torch.dtype, device: torch.device):
        """Recompute them: cast from a lower precision, they would keep its rounding."""
        if self.cell_anchors[0].dtype != dtype or self.cell_anchors[0].device != device:
            of_maps = zip(self.sizes, self.aspect_ratios, strict=True)
            self.cell_anchors = [self.generate_anchors(*of_map, dtype, device) for of_map in of_maps]

    def forward(self, image_list: ImageList, feature_maps: list[torch.Tensor]) -> list[torch.Tensor]:
        """For each image (anchors, 4) corners in pixels, map after map, row after row, in float32 or float64."""
        images = image_list.tensors
        self.set_cell_anchors(images.dtype if images.dtype == torch.float64 else torch.float32, images.device)
        strides = [[torch.tensor(stride, device=images.device)] * 2 for stride in self.strides]
        of_maps = self.grid_anchors([list(x.shape[-2:]) for x in feature_maps], strides)
        return [torch.cat(of_maps)] * len(image_list.image_sizes)


def see_image(anchors: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
    """Which of the (anchors, 4) are around a cell of an image (height, width), not of what fills its batch.

    The image is padded to a multiple of 32 for itself; in a batch, up to the largest.
    """
    height, width = (-(-int(side) // 32) * 32 for side in size)
    x, y = (anchors[:, 0] + anchors[:, 2]) / 2, (anchors[:, 1] + anchors[:, 3]) / 2
    return (x < width - 0.5) & (y < height - 0.5)  # centres are whole pixels, up to rounding


class Matcher:
    """Which object each box is matched with, by the largest overlap.

    Args:
        high: Overlap from which a box is matched.
        low: Overlap below which it is background; in between it is ignored.
        low_quality: Overlap from which an object's best boxes are matched with it whatever theirs is; None for not.
    """

    BELOW_LOW_THRESHOLD, BETWEEN_THRESHOLDS = BACKGROUND, IGNORED  # as torchvision's classes look them up

    def __init__(self, high: float, low: float, low_quality: float | None = None):
        self.high, self.low, self.low_quality = high, low, low_quality

    def __call__(self, overlaps: torch.Tensor) -> torch.Tensor:
        """(objects, boxes) intersections over unions -> (boxes,): index of the object, -1 background, -2 ignored."""
        if overlaps.shape[1] == 0:
            return overlaps.new_zeros(0, dtype=torch.long)
        largest, matches = overlaps.max(dim=0)
        matches = matches.masked_fill(largest < self.high, IGNORED).masked_fill(largest < self.low, BACKGROUND)
        if self.low_quality is None:
            return matches
        largest_of_object = overlaps.max(dim=1, keepdim=True).values
        is_best = (overlaps == largest_of_object) & (largest_of_object >= self.low_quality) & (largest_of_object > 0)
        # Of several objects whose best this box is, the last has it.
        last = len(overlaps) - 1 - is_best.flip(0).to(torch.uint8).argmax(dim=0)
        return torch.where(is_best.any(dim=0), last, matches)
