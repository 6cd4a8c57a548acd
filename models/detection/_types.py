"""What goes into a detector and comes out of it, as in torchvision's."""
from collections.abc import Sequence

import torch

# One dictionary for each image. Of targets: boxes (N, 4) float corners in pixels, labels (N,) int64 from 1, and masks
# (N, H, W), where there is a mask head. Of detections: these, masks being bool, and scores (N,), best first.
Targets = Sequence[dict[str, torch.Tensor]]
Detections = list[dict[str, torch.Tensor]]

_LOW = (torch.bfloat16, torch.float16)


def at_least_float32(outputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Outputs of a head under autocast: in bfloat16, a coordinate of 1000 pixels is known to 8 pixels."""
    return [x.float() if x.dtype in _LOW else x for x in outputs]


def check_targets(
    targets: Targets | None, images: Sequence[torch.Tensor], num_classes: int, with_masks: bool
):
    """Raises ValueError, in one line, unless `targets` are what a detector is trained on with these images."""
    if targets is None or len(targets) != len(images):
        found = "none" if targets is None else str(len(targets))
        raise ValueError(f"training takes targets for each of the {len(images)} images, got {found}")
    for index, (image, target) in enumerate(zip(images, targets, strict=True)):
        missing = {"boxes", "labels", *(["masks"] if with_masks else [])} - target.keys()
        if missing:
            raise ValueError(f"targets of image {index} lack {', '.join(sorted(missing))}")
        boxes, labels = target["boxes"], target["labels"]
        if boxes.ndim != 2 or boxes.shape[1] != 4 or not boxes.is_floating_point():
            raise ValueError(f"boxes of image {index} must be (N, 4) floats, got {tuple(boxes.shape)} {boxes.dtype}")
        if labels.dtype != torch.int64 or labels.shape != boxes.shape[:1]:
            raise ValueError(f"labels of image {index} must be (N,) int64 for {len(boxes)} boxes, got "
                             f"{tuple(labels.shape)} {labels.dtype}")
        of_masks = (len(boxes), *image.shape[1:])
        if with_masks and target["masks"].shape != of_masks:
            raise ValueError(f"masks of image {index} must be {of_masks}, got {tuple(target['masks'].shape)}")
        empty = ~((boxes[:, 2:] > boxes[:, :2]).all(dim=1) & boxes.isfinite().all(dim=1))
        if empty.any():
            raise ValueError(f"image {index} has a box without area, {boxes[empty][0].tolist()}")
        if len(labels) and not 1 <= labels.min() <= labels.max() <= num_classes:
            raise ValueError(f"labels of image {index} must be 1 to {num_classes} (0 is the background), got "
                             f"{labels.min().item()} to {labels.max().item()}")
