"""What a map shows in a box: RoIAlign on the map of the box's size, as in mmdetection 2.x."""
from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import nn
from torchvision.ops import roi_align

from ._types import at_least_float32

_FINEST = 56  # side of the square boxes from twice which the second map is taken


def level_of(boxes: torch.Tensor, num_levels: int) -> torch.Tensor:
    """(N, 4) -> (N,): index of the map for each box: floor(log2(sqrt(area) / 56)), within what there is."""
    width, height = (boxes[:, 2] - boxes[:, 0]).clamp(min=0), (boxes[:, 3] - boxes[:, 1]).clamp(min=0)
    level = torch.floor(torch.log2((width * height).sqrt() / _FINEST + 1e-6))
    return level.clamp(0, num_levels - 1).long()


class RoIPool(nn.Module):
    """RoIAlign with half-pixel offsets and as many samples as pixels, where torchvision's has neither.

    Args:
        size: Rows and columns of what is returned.
        strides: Of the maps that are read, finest first; maps beyond them are not.
    """

    def __init__(self, size: int, strides: Sequence[int] = (4, 8, 16, 32)):
        super().__init__()
        self.size, self.strides = size, tuple(strides)

    def forward(
        self, features: OrderedDict[str, torch.Tensor], proposals: list[torch.Tensor], image_shapes=None
    ) -> torch.Tensor:
        """(N, C, size, size) of N boxes in all.

        Args:
            features: Maps (B, C, H_i, W_i), finest first.
            proposals: For each image (n, 4) corners in pixels.
            image_shapes: Not needed; torchvision's classes pass it.
        """
        maps = list(features.values())[: len(self.strides)]
        boxes = torch.cat(proposals)
        image = torch.cat([torch.full_like(x[:, :1], i) for i, x in enumerate(proposals)])
        rois, levels = torch.cat([image, boxes], dim=1), level_of(boxes, len(maps))
        out = maps[0].new_zeros((len(rois), maps[0].shape[1], self.size, self.size))
        for i, (x, stride) in enumerate(zip(maps, self.strides, strict=True)):
            of_level = torch.where(levels == i)[0]
            # In the type of a map in low precision, a box would be known to some pixels.
            x, = at_least_float32([x])
            pooled = roi_align(x, rois[of_level].to(x.dtype), self.size, 1 / stride, sampling_ratio=0, aligned=True)
            out = out.index_put((of_level,), pooled.to(out.dtype))
        return out
