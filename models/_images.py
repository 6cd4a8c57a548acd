"""The size of an image for segmenters and detectors, and how it is resized: as mmcv does for the published results."""
import torch
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F


def fit(height: int, width: int, short: float, long: float) -> tuple[int, int]:
    """The height and width of an image of this shape, as large as fits with the sides `short` and `long`.

    >>> fit(480, 640, 512, 2048), fit(200, 1000, 512, 2048)
    ((512, 683), (410, 2048))
    """
    scale = min(long / max(height, width), short / min(height, width))
    return max(1, int(height * scale + 0.5)), max(1, int(width * scale + 0.5))


def resize(image: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """(..., H, W) pixels at another size: bilinear and without antialiasing, as OpenCV's and published."""
    return F.resize(image, list(size), InterpolationMode.BILINEAR, antialias=False)
