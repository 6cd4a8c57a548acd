"""Masks of objects: cut out of the image for training, and pasted into it afterwards, as in mmdetection 2.x."""
import torch
import torch.nn.functional as F
from torchvision.ops import roi_align

THRESHOLD = 0.5


def cut_masks(masks: torch.Tensor, boxes: torch.Tensor, matched: torch.Tensor, size: int) -> torch.Tensor:
    """What a mask head is to say of each box.

    Args:
        masks: (objects, H, W) of an image; zero is background.
        boxes: (N, 4) corners in pixels.
        matched: (N,) index of each box's object.
        size: Rows and columns of what the head says.

    Returns:
        (N, size, size) of 0 and 1, of the type of `boxes`.
    """
    rois = torch.cat([matched[:, None].to(boxes), boxes], dim=1)
    values = roi_align(masks[:, None].to(boxes), rois, size, 1.0, sampling_ratio=0, aligned=True)
    return (values[:, 0] >= THRESHOLD).to(boxes.dtype)


def paste_masks(masks: torch.Tensor, boxes: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """The pixels of each object in an image.

    Args:
        masks: (N, 1, m, m) probabilities, of boxes.
        boxes: (N, 4) corners in pixels.
        height, width: Of the image.

    Returns:
        (N, height, width) bool: where the probability, interpolated at the pixel's centre, is at least 0.5.
    """
    out = torch.zeros((len(masks), height, width), dtype=torch.bool, device=masks.device)
    # Outside of its box a mask fades from at most a half.
    first, last = boxes[:, :2].floor().clamp(min=0), boxes[:, 2:].ceil().clamp(min=0)
    bounds = torch.cat([first, last], dim=1).long().tolist()
    for mask, box, pixels, (left, top, right, bottom) in zip(masks, boxes, out, bounds, strict=True):
        right, bottom = min(right, width), min(bottom, height)
        if left >= right or top >= bottom:
            continue
        x = (torch.arange(left, right, device=box.device) + 0.5 - box[0]) / (box[2] - box[0]) * 2 - 1
        y = (torch.arange(top, bottom, device=box.device) + 0.5 - box[1]) / (box[3] - box[1]) * 2 - 1
        grid = torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1)[None].to(mask.dtype)
        values = F.grid_sample(mask[None], grid, align_corners=False)
        pixels[top:bottom, left:right] = values[0, 0] >= THRESHOLD
    return out
