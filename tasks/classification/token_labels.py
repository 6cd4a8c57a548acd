"""Token labels: dense label maps that follow the augmentation of their images, and the targets made of them.

"All Tokens Matter: Token Labeling for Training Better Vision Transformers" (Jiang et al.,
https://arxiv.org/abs/2104.10858). A label map holds a teacher's top-k prediction at every position of an image;
https://github.com/zihangJiang/TokenLabeling offers ImageNet's, `scripts/make_label_maps.py` makes your own.

A data loading process passes on the map as it is stored, and the points of it that the image's tokens show: 10 kB
together. The tokens' targets, 49 distributions over all classes, are computed on the device.
"""
import math
import random
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from timm.data.auto_augment import AugmentOp, AutoAugment, RandAugment
from timm.data.mixup import Mixup, cutmix_bbox_and_lam
from timm.data.transforms import RandomResizedCropAndInterpolation
from torch.utils.data import default_collate
from torchvision.datasets import ImageFolder
from torchvision.transforms import Compose, RandomHorizontalFlip

from utils import UserError

GEOMETRIC = {"Rotate", "ShearX", "ShearY", "TranslateX", "TranslateXRel", "TranslateY", "TranslateYRel"}
_MIRROR = np.diag([-1.0, 1.0, 1.0])
_NOWHERE = 2.0


# --- label maps -------------------------------------------------------------------------------------------------------


def label_map_path(root: Path, image: Path) -> Path:
    """The path of an image's map: `image`, the image's path below its split, below `root` with another extension."""
    return root / image.with_suffix(".pt")


def label_map_dtype(num_classes: int) -> torch.dtype:
    """float16, as published, where it holds every class index exactly."""
    return torch.float16 if num_classes <= 2048 else torch.float32


def read_label_map(path: Path, num_classes: int) -> torch.Tensor:
    """A label map, (2, k, h, w): the logits of the top-k classes, and their indices; rows from the top.

    Raises:
        UserError: It is missing, damaged, no label map, or has other classes; names the file.
    """
    advice = "make it by scripts/make_label_maps.py"
    try:
        label_map = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path}: no such label map; {advice}") from None
    except Exception as error:  # on damaged bytes the unpickler raises nearly anything
        raise UserError(f"{path}: not a label map, or a damaged one; remove it, and {advice}") from error
    if not isinstance(label_map, torch.Tensor) or label_map.ndim != 4 or len(label_map) != 2 or not label_map.numel():
        shape = tuple(label_map.shape) if isinstance(label_map, torch.Tensor) else type(label_map).__name__
        raise UserError(f"{path}: a label map is a tensor (2, k, h, w), this is {shape}; remove it, and {advice}")
    classes = label_map[1]
    if not label_map.isfinite().all() or classes.min() < 0 or classes.max() >= num_classes:
        raise UserError(
            f"{path}: holds a value that is no class index below {num_classes}, or not finite; remove it, and {advice} "
            "with a teacher of these classes"
        )
    return label_map.to(label_map_dtype(num_classes))


class LabelledFolder:
    """((PIL RGB image, path of its label map), class index) by index.

    The map is not read here, where its image would be skipped if the map were missing.

    Args:
        images: The split's folder of images.
        root: The folder of label maps.
    """

    def __init__(self, images: ImageFolder, root: Path):
        self.images, self.root, self.samples = images, root, images.samples

    def __len__(self) -> int:
        return len(self.images)

    def fingerprint(self) -> str:
        """That of the images."""
        return self.images.fingerprint()

    def path(self, index: int) -> Path:
        """The path of an image's label map."""
        return label_map_path(self.root, Path(self.images.samples[index][0]).relative_to(self.images.root))

    def __getitem__(self, index: int) -> tuple[tuple[Image.Image, Path], int]:
        image, target = self.images[index]
        return (image, self.path(index)), target


# --- which part of its map an image shows -----------------------------------------------------------------------------
# All matrices are 3 x 3 and map a point of an operation's output to a point of its input; coordinates run from -1 to 1,
# x before y, as for torch.nn.functional.grid_sample.


def _crop_matrix(top: int, left: int, height: int, width: int, size: tuple[int, int]) -> np.ndarray:
    """The matrix of a crop from an image of (width, height)."""
    full_width, full_height = size
    return np.array([
        [width / full_width, 0, (2 * left + width) / full_width - 1],
        [0, height / full_height, (2 * top + height) / full_height - 1],
        [0, 0, 1],
    ])


class _Probe:
    """Stands in for an image: PIL's geometric operations on it return their matrix instead of moving pixels."""

    def __init__(self, size: tuple[int, int]):
        self.size = size

    def transform(self, size: tuple[int, int], method: Any, matrix: tuple[float, ...], **_) -> np.ndarray:
        return np.array([matrix[:3], matrix[3:], (0, 0, 1)])

    def rotate(self, degrees: float, **_) -> np.ndarray:
        x, y = self.size[0] / 2, self.size[1] / 2
        cosine, sine = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
        return np.array([
            [cosine, -sine, x - cosine * x + sine * y],
            [sine, cosine, y - sine * x - cosine * y],
            [0, 0, 1],
        ])


class _Traced:
    """One of timm's geometric operations, which appends its matrix to `trace`."""

    def __init__(self, operation: Callable, trace: list[np.ndarray]):
        self.operation, self.trace = operation, trace

    def __call__(self, image: Image.Image, *level: float, **kwargs: Any) -> Image.Image:
        width, height = image.size
        pixels = np.array([[width / 2, 0, width / 2], [0, height / 2, height / 2], [0, 0, 1]])
        # One fixed filter: given several, timm draws one at every call.
        in_pixels = self.operation(_Probe(image.size), *level, **{**kwargs, "resample": Image.Resampling.BILINEAR})
        self.trace.append(np.linalg.inv(pixels) @ in_pixels @ pixels)
        return self.operation(image, *level, **kwargs)


def _operations(step: Any) -> Iterator[AugmentOp]:
    """The single operations of an augmentation policy."""
    if isinstance(step, RandAugment):
        yield from step.ops
    elif isinstance(step, AutoAugment):
        for policy in step.policy:
            yield from policy


class TokenLabelTransform:
    """(PIL RGB image, path of its label map) -> (uint8 image, label map, points of the map that the tokens show).

    Follows the crop, the flip and the geometric operations of RandAugment or AutoAugment. Random erasing, which comes
    later, changes no label. This is as published, with two differences: the published code crops last, and passes the
    crop to RoIAlign with x and y swapped, so that tokens learn the labels of other places.

    Args:
        transform: timm's training transform; a copy of it is followed.
        num_classes: Classes that the maps may hold.
        shape: (2, k, h, w) of all maps.
        stride: Pixels of a token along each side.
    """

    def __init__(self, transform: Compose, num_classes: int, shape: tuple[int, ...], stride: int):
        self.steps, self.num_classes, self.shape = deepcopy(transform.transforms), num_classes, shape
        size = next(step.size for step in self.steps if isinstance(step, RandomResizedCropAndInterpolation))
        # Each token reads as many points as RoIAlign takes of the map, since what it shows may be rotated.
        self.height, self.width = (
            side // stride * math.ceil(cells / (side // stride)) for side, cells in zip(size, shape[2:], strict=True)
        )
        self.trace: list[np.ndarray] = []
        for step in self.steps:
            for operation in _operations(step):
                if operation.name in GEOMETRIC:
                    operation.aug_fn = _Traced(operation.aug_fn, self.trace)

    def __call__(self, item: tuple[Image.Image, Path]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Returns uint8 (3, H, W), (2, k, h, w), and the points, float32 (rows, columns, 2) as (x, y)."""
        image, path = item
        label_map = read_label_map(path, self.num_classes)
        if label_map.shape != self.shape:
            raise UserError(f"{path}: is {tuple(label_map.shape)}, and other label maps are {self.shape}; remake them")
        self.trace.clear()
        for step in self.steps:
            image = self._follow(step, image)
        return image, label_map, self._points()

    def _points(self) -> torch.Tensor:
        """The points of the map that the last image shows; `_NOWHERE` where an operation left the image empty."""
        y, x = ((2 * np.arange(count) + 1) / count - 1 for count in (self.height, self.width))
        points = np.stack([*np.broadcast_arrays(x, y[:, None]), np.ones((self.height, self.width))], axis=-1)
        seen = np.ones((self.height, self.width), bool)
        for matrix in reversed(self.trace):
            points = points @ matrix.T
            seen &= np.abs(points[..., :2]).max(axis=-1) <= 1
        points[~seen] = _NOWHERE
        return torch.from_numpy(points[..., :2]).float()

    def _follow(self, step: Callable, image: Image.Image) -> Any:
        if isinstance(step, RandomResizedCropAndInterpolation):
            state = random.getstate()
            box = step.get_params(image, step.scale, step.ratio)
            random.setstate(state)  # so that the crop draws the same box
            self.trace.append(_crop_matrix(*box, image.size))
        out = step(image)
        if isinstance(step, RandomHorizontalFlip) and out is not image:
            self.trace.append(_MIRROR)
        return out


def add_label_maps(dataset: Any, root: str | Path, num_classes: int, stride: int) -> Any:
    """A training set of an image folder that yields, with each image, its label map and the points that it shows.

    Args:
        dataset: A `datasets.ImageDataset` whose source is an ImageFolder, with timm's training transform; not changed.
        root: The folder of label maps.
        num_classes: Classes that the maps may hold.
        stride: Pixels of a token along each side.

    Raises:
        UserError: The folder has no map of the first image.
    """
    source = LabelledFolder(dataset.source, Path(root))
    shape = tuple(read_label_map(source.path(0), num_classes).shape)
    transform = TokenLabelTransform(dataset.transform, num_classes, shape, stride)
    return replace(dataset, source=source, transform=transform)


# --- batches ----------------------------------------------------------------------------------------------------------


@dataclass
class TokenTargets:
    """The label maps of a batch, and the points of each that its image shows.

    Attributes:
        maps: (B, 2, k, h, w).
        points: float32 (B, rows, columns, 2), several for each token along each side; outside [-1, 1] where an image is
            empty.
    """

    maps: torch.Tensor
    points: torch.Tensor

    @classmethod
    def zeros(cls, size: int, rows: int, cols: int, device: torch.device) -> "TokenTargets":
        """Those of `size` images of `rows` x `cols` tokens, each of class 0."""
        maps = torch.zeros(size, 2, 1, rows, cols, device=device)
        return cls(maps, torch.zeros(size, rows, cols, 2, device=device))

    def to(self, **kwargs: Any) -> "TokenTargets":
        """A copy on another device; arguments as of torch.Tensor.to."""
        return TokenTargets(self.maps.to(**kwargs), self.points.to(**kwargs))

    def pin_memory(self) -> "TokenTargets":
        """A copy in page-locked memory, for torch's DataLoader."""
        return TokenTargets(self.maps.pin_memory(), self.points.pin_memory())

    def scores(self, num_classes: int, rows: int, cols: int) -> torch.Tensor:
        """Logits of each token of the image, float32 (B, num_classes, rows, cols).

        As published: classes beyond the top-k count as 0, as do places outside the map, and a token's value is the mean
        of bilinear samples, as in RoIAlign.
        """
        scores, classes = self.maps.unbind(1)
        dense = torch.zeros(len(scores), num_classes, *scores.shape[2:], device=scores.device)
        dense.scatter_(1, classes.long(), scores.float())
        seen = (self.points.abs() <= 1).all(dim=-1)
        sampled = F.grid_sample(dense, self.points, padding_mode="border", align_corners=False)
        height, width = seen.shape[1:]
        return F.avg_pool2d(sampled * seen[:, None], (height // rows, width // cols))


def collate(batch: list[tuple[tuple[torch.Tensor, ...], int]]) -> tuple[torch.Tensor, TokenTargets]:
    """Images and targets of a batch; the maps take the place of the folders' classes."""
    images, maps, points = default_collate([labelled for labelled, _ in batch])
    return images, TokenTargets(maps, points)


class TokenLabelMixup(Mixup):
    """(images, `TokenTargets`) -> mixed images, and the smoothed distributions that image and tokens are to predict.

    Mixup mixes images and labels with one weight. CutMix is the paper's MixToken: its box is drawn as by timm and moved
    to the borders of tokens, so that every token belongs to one image and has its label. The paper pastes tokens after
    the patch embedding; here pixels are pasted, so that any network can be trained. The image's label mixes by the area
    of the box.

    Args:
        num_classes: Number of classes.
        smoothing: Share of each target that is spread over all classes.
        stride: Pixels of a token along each side.
        mixup, cutmix: Their alphas; 0 for none.
        prob: Probability that a batch is mixed.
        switch_prob: Probability of CutMix where both are on.
    """

    def __init__(
        self,
        num_classes: int,
        smoothing: float,
        stride: int,
        mixup: float = 0.0,
        cutmix: float = 0.0,
        prob: float = 1.0,
        switch_prob: float = 0.5,
    ):
        prob = prob if mixup or cutmix else 0.0
        super().__init__(mixup, cutmix, prob=prob, switch_prob=switch_prob, label_smoothing=smoothing,
                         num_classes=num_classes)
        self.stride = stride

    def _smooth(self, scores: torch.Tensor) -> torch.Tensor:
        """(..., classes) logits -> probabilities, smoothed as timm smooths one-hot targets."""
        return scores.softmax(dim=-1) * (1 - self.label_smoothing) + self.label_smoothing / self.num_classes

    def _box(self, shape: torch.Size, lam: float) -> tuple[int, int, int, int]:
        """Top, bottom, left and right of CutMix's box, in tokens."""
        return tuple(round(int(edge) / self.stride) for edge in cutmix_bbox_and_lam(shape, lam)[0])

    def __call__(
        self, images: torch.Tensor, targets: TokenTargets
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
        """Returns (B, 3, H, W) images, and targets: (B, classes) of images, (B, rows, cols, classes) of tokens.

        As published, an image's target is the mean over its tokens, not the class of its folder.
        """
        rows, cols = (side // self.stride for side in images.shape[2:])
        scores = targets.scores(self.num_classes, rows, cols).permute(0, 2, 3, 1)
        tokens, labels = self._smooth(scores), self._smooth(scores.mean(dim=(1, 2)))
        lam, use_cutmix = self._params_per_batch()
        if use_cutmix:
            top, bottom, left, right = self._box(images.shape, lam)
            y, x = slice(self.stride * top, self.stride * bottom), slice(self.stride * left, self.stride * right)
            images[..., y, x] = images.flip(0)[..., y, x]
            tokens[:, top:bottom, left:right] = tokens.flip(0)[:, top:bottom, left:right]
            lam = 1 - (bottom - top) * (right - left) / (rows * cols)
        elif lam < 1:
            images, tokens = (x.lerp(x.flip(0), 1 - lam) for x in (images, tokens))
        return images, (labels.lerp(labels.flip(0), 1 - lam), tokens)
