"""The images of a detector: resized, normalised and padded to a batch; and its detections in the image's own pixels."""
import torch
from torchvision.models.detection.transform import GeneralizedRCNNTransform, resize_boxes

from .._images import fit, resize
from ._masks import paste_masks
from ._types import Detections, Targets


class DetectionTransform(GeneralizedRCNNTransform):
    """As torchvision's, but that sides are rounded, not cut off, and masks are pasted by the centres of pixels.

    Args:
        short, long: The sides that an image is fitted with.
        mean, std: Of the channels, for images of 0 to 1.
        resize_in_training: Off where images come to training as large as they are to be.
    """

    def __init__(self, short: int, long: int, mean, std, resize_in_training: bool = True):
        super().__init__(short, long, list(mean), list(std), size_divisible=32)
        self.short, self.long, self.resize_in_training = short, long, resize_in_training

    def forward(self, images: list[torch.Tensor], targets: Targets | None = None):
        """The images as a batch, and the targets, each of which learns the `image_size` that is seen."""
        batch, targets = super().forward(images, targets)
        if targets is not None:
            of_images = zip(targets, batch.image_sizes, strict=True)
            targets = [dict(target, image_size=torch.tensor(size)) for target, size in of_images]
        return batch, targets

    def resize(self, image: torch.Tensor, target: dict[str, torch.Tensor] | None = None):
        """A normalised image (3, H, W) and its target, in the size to be seen."""
        if self.training and not self.resize_in_training:
            return image, target
        before = tuple(image.shape[-2:])
        after = fit(*before, self.short, self.long)
        image = resize(image, after) if after != before else image
        if target is None or after == before:
            return image, target
        target = dict(target, boxes=resize_boxes(target["boxes"], before, after))
        if "masks" in target:
            masks = target["masks"][:, None].float()
            target["masks"] = torch.nn.functional.interpolate(masks, after)[:, 0].to(target["masks"].dtype)
        return image, target

    def postprocess(self, result: Detections, image_shapes, original_image_sizes) -> Detections:
        """Boxes in the pixels of the images as they came, and masks (N, H, W) of them."""
        if self.training:
            return result
        found = []
        for detections, seen, size in zip(result, image_shapes, original_image_sizes, strict=True):
            detections = dict(detections, boxes=resize_boxes(detections["boxes"], seen, size))
            if "masks" in detections:
                detections["masks"] = paste_masks(detections["masks"], detections["boxes"], *size)
            found.append(detections)
        return found
