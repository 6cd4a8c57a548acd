"""How the images of a timm model are prepared for evaluation: the one pipeline of main.py and of the scripts."""
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from timm.data.loader import fast_collate
from timm.layers import to_2tuple
from torch.utils.data import DataLoader, Dataset

import datasets
from training.data.loader import EpochLoader, Transfer, build_loader
from training.distributed import Distributed
from training.options import LoaderOptions

from ..networks import model_data_config
from .options import AugmentationOptions
from .policies import check_policy


@dataclass(frozen=True)
class ImagePipeline:
    """Images as a model was published to take them, at a size.

    Args:
        model: Any of timm's.
        input_size: Side, or (height, width), in pixels.
        crop_pct: Part of the image that is kept; None for the model's own.
        crop_mode: See `datasets.build_transform`; None for the model's own.
    """

    model: str
    input_size: int | tuple[int, int]
    crop_pct: float | None = None
    crop_mode: str | None = None

    @classmethod
    def of_validation(cls, model: str, crop_pct: float | None = None) -> "ImagePipeline":
        """The images as timm's validate.py takes them: at the model's own size and crop of evaluation."""
        config = model_data_config(model, use_test_size=True)
        return cls(model, config["input_size"][-2:], crop_pct or config["crop_pct"])

    @property
    def config(self) -> dict[str, Any]:
        return model_data_config(self.model)

    @property
    def description(self) -> str:
        """How images are evaluated: size in pixels, crop, interpolation."""
        config, (height, width) = self.config, to_2tuple(self.input_size)
        crop_mode = self.crop_mode or config["crop_mode"]
        crop = f"crop {self.crop_pct or config['crop_pct']:g}{'' if crop_mode == 'center' else f' ({crop_mode})'}"
        return f"{height} x {width}, {crop}, {config['interpolation']}"

    def transform(self, train: bool = False, interpolation: str | None = None, **augmentation: Any):
        """PIL RGB image -> uint8 tensor (3, H, W); the arguments are those of `datasets.build_transform`."""
        config = self.config
        return datasets.build_transform(
            train=train,
            input_size=self.input_size,
            mean=config["mean"],
            std=config["std"],
            interpolation=interpolation or config["interpolation"],
            crop_pct=self.crop_pct or config["crop_pct"],
            crop_mode=self.crop_mode or config["crop_mode"],
            **augmentation,
        )

    def augmented(self, options: AugmentationOptions) -> datasets.Transform:
        """The transform of training.

        Raises:
            UnknownPolicyError: timm has no augmentation policy of this name.
        """
        policy = None if options.aa == "none" else options.aa
        if policy is not None:
            check_policy(policy)
        return self.transform(
            train=True,
            interpolation=options.train_interpolation,
            scale=tuple(options.scale),
            ratio=tuple(options.ratio),
            hflip=options.hflip,
            color_jitter=options.color_jitter,
            auto_augment=policy,
        )

    def on_device(self, distributed: Distributed, **erasing: Any) -> Callable[[DataLoader], Transfer]:
        """DataLoader -> normalised (B, 3, H, W) images and targets on the device; a `training.data.loader.Transfer`."""
        mean, std = self.config["mean"], self.config["std"]
        return partial(datasets.NormalizedImages, mean=mean, std=std, device=distributed.device, **erasing)

    def loader(
        self, dataset: Dataset, options: LoaderOptions, distributed: Distributed, collate_fn: Callable = fast_collate
    ) -> EpochLoader:
        """Batches of a data set whose transform is this pipeline's, each image once over all processes, in order."""
        return build_loader(
            dataset, options, distributed, train=False, collate_fn=collate_fn, transfer=self.on_device(distributed)
        )
