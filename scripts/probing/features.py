"""Features of images from a frozen network."""
import argparse
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from datasets import ImageDataset, Reading, ValSplit, build_dataset
from scripts.prediction.classifier import load_network
from tasks.classification.images import ImagePipeline
from training.distributed import Distributed
from training.options import LoaderOptions
from training.precision import Precision
from utils import UserError

OF_CHECKPOINTS = (".pth", ".pt", ".tar", ".bin", ".safetensors")


@dataclass(frozen=True)
class Features:
    """What a network sees in the images of a split.

    Args:
        values: (N, C) float32: what the classifier would be given, after pooling.
        targets: (N,) int64, class indices.
        num_classes: Of the data set.
    """

    values: torch.Tensor
    targets: torch.Tensor
    num_classes: int


@dataclass(frozen=True)
class Extractor:
    """A frozen network with the transform of its images.

    Args:
        name: What it is called in messages.
        checkpoint: That the network came from; empty for published weights.
        network: In evaluation mode, on the device.
        images: How its images are prepared.
        distributed: The process, and its device.
        precision: In which it computes.
    """

    name: str
    checkpoint: dict[str, Any]
    network: torch.nn.Module
    images: ImagePipeline
    distributed: Distributed
    precision: Precision

    @classmethod
    def of(cls, name: str, args: argparse.Namespace, distributed: Distributed) -> "Extractor":
        """The network called `name`: a checkpoint file, or one of timm's models with its published weights.

        Raises:
            UserError: There is no such network, or its weights cannot be read.
        """
        is_file = Path(name).is_file()
        if not is_file and Path(name).suffix in OF_CHECKPOINTS:
            raise UserError(f"{name} does not exist, or is no file")
        own = argparse.Namespace(
            checkpoint=name if is_file else None, model=None if is_file else name, model_key=None, nb_classes=None,
            input_size=args.input_size, use_test_size=False,
        )
        network, recipe, checkpoint = load_network(own)
        precision = Precision.on(distributed.device, args.amp)
        network = precision.place(network, distributed.device).eval()
        images = ImagePipeline(recipe.model, recipe.input_size, recipe.crop_pct)
        return cls(name, checkpoint, network, images, distributed, precision)

    @torch.no_grad()
    def extract(self, dataset: ImageDataset, options: LoaderOptions) -> Features:
        """The features of all images, in order.

        Raises:
            UserError: They are NaN or infinite.
        """
        values, targets = [], []
        loader = self.images.loader(dataset, options, self.distributed)
        for images, labels in tqdm(loader, desc="features", leave=False, disable=None):
            with self.precision.autocast():
                maps = self.network.forward_features(self.precision.arrange(images))
                values.append(self.network.forward_head(maps, pre_logits=True).float())
            targets.append(labels)
        found = torch.cat(values)
        if not found.isfinite().all():
            raise UserError("the features of the network are NaN or infinite")
        return Features(found, torch.cat(targets), dataset.num_classes)

    def split(self, args: argparse.Namespace, split: str) -> ImageDataset:
        """The images of a split, prepared for this network, with a warning if it may have been trained on some.

        Raises:
            UserError: They are not there.
        """
        reading = Reading(val_split=args.val_split and ValSplit(args.val_split, args.seed))
        dataset = build_dataset(args.data_set, args.data_path, split, self.images.transform(), reading=reading)
        if split != "train" and dataset.held_out and (leak := dataset.held_out.leak(self.checkpoint)):
            tqdm.write(f"warning: {self.name} {leak}", file=sys.stderr)
        return dataset
