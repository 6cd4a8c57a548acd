"""The classifier that is exported."""
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from timm.layers import to_2tuple
from torch import nn

from models import NetworkRecipe
from scripts.prediction.names import class_names, label_names
from tasks.classification.images import ImagePipeline
from training.distributed import Distributed
from training.options import LoaderOptions

from . import check
from .metadata import Metadata


class Source(NamedTuple):
    """A network in evaluation mode, how its images are prepared, what its file says of both, and its classes' folders.
    """

    network: nn.Module
    images: ImagePipeline
    metadata: Metadata
    label_names: list[str]

    @classmethod
    def of(
        cls,
        network: nn.Module,
        recipe: NetworkRecipe,
        checkpoint: dict[str, Any],
        dynamic: tuple[str, ...] = ("batch",),
        precision: str = "float32",
    ) -> "Source":
        """A network, by the recipe that it was built by and the checkpoint that its weights are of.

        Args:
            network: Classifies images.
            recipe: With the size of its images.
            checkpoint: Empty for published weights.
            dynamic: What is left open, see `Metadata`.
            precision: See `Metadata`.
        """
        images = ImagePipeline(recipe.model, to_2tuple(recipe.input_size), recipe.crop_pct)
        config = images.config
        metadata = Metadata(
            model=recipe.model,
            class_names=class_names(checkpoint, network),
            input_size=images.input_size,
            mean=tuple(config["mean"]),
            std=tuple(config["std"]),
            interpolation=config["interpolation"],
            crop_pct=images.crop_pct or config["crop_pct"],
            crop_mode=config["crop_mode"],
            exif_transpose=recipe.exif_transpose,
            dynamic=dynamic,
            precision=precision,
            torch=torch.__version__,
        )
        return cls(network.eval().requires_grad_(False), images, metadata, label_names(checkpoint, network))

    def batches(self, paths: list[Path], batch_size: int) -> Iterator[check.Batch]:
        """Normalised (B, 3, H, W) images and labels (B,) of image files or, without any, of samples."""
        photos = check.Photographs(paths, self.images, self.metadata.exif_transpose, self.label_names)
        options = LoaderOptions(batch_size=batch_size, num_workers=0)
        return iter(self.images.loader(photos, options, Distributed(torch.device("cpu"))))

    def photographs(self, paths: list[Path]) -> torch.Tensor:
        """All of them at once, (N, 3, H, W)."""
        return torch.cat([x for x, _ in self.batches(paths, 1)])
