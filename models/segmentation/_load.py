"""A trained segmenter and its transform, from the checkpoint of a run."""
from dataclasses import dataclass, field
from typing import Any

import timm
from timm.data import resolve_data_config

from .._pretrained import stored
from .._recipe import ImageSize, NetworkRecipe
from ._images import EvalSize, SegmentationTransform
from ._network import HEADS, Segmenter
from ._weights import load_into


@dataclass(frozen=True)
class SegmenterRecipe:
    """What is needed to build a segmenter again.

    Args:
        model: Name of its backbone.
        head: A name in `HEADS`.
        num_classes: Classes.
        class_names: Their names, in order, where they are known.
        kwargs: Arguments of the backbone.
        extra_norms: See `Backbone`.
        head_channels: Width of the head; None for what was published.
        input_size: Of the crops that it was trained on, for backbones that are built for one size.
        test_size: Of evaluation.
        exif_transpose: Whether images were turned upright, as their EXIF orientation says.
    """

    model: str
    head: str
    num_classes: int
    class_names: list[str] | None = None
    kwargs: dict[str, Any] = field(default_factory=dict)
    extra_norms: bool | None = None
    head_channels: int | None = None
    input_size: ImageSize | None = None
    test_size: EvalSize = field(default_factory=EvalSize)
    exif_transpose: bool = True

    @classmethod
    def of(cls, checkpoint: dict[str, Any], source: str) -> "SegmenterRecipe":
        """What the checkpoint of a run says.

        Raises:
            WeightsError: The run has not trained a segmenter.
        """
        said = checkpoint.get("args")
        if not isinstance(said, dict) or said.get("task") != "segmentation":
            raise stored.WeightsError(f"{stored.public(source)} is not the checkpoint of a run that trains a segmenter")
        if said.get("head") not in HEADS or not timm.is_model(said.get("model") or ""):
            raise stored.WeightsError(f"{stored.public(source)} is of {said.get('head')} on {said.get('model')}, which "
                                      "are not known here")
        shared = NetworkRecipe.of(checkpoint)
        try:
            num_classes = len(stored.unwrap(checkpoint)["decode_head.conv_seg.bias"])
            test_size = EvalSize(said["short_side"], said["long_side"], said["test_rounding"])
        except KeyError as error:
            raise stored.WeightsError(f"{stored.public(source)} lacks {error}") from error
        return cls(
            shared.model, said["head"], num_classes, shared.class_names, shared.kwargs, said.get("extra_norms"),
            said.get("head_channels"), shared.input_size, test_size, shared.exif_transpose,
        )

    def build(self) -> Segmenter:
        """The network, with random weights."""
        return HEADS[self.head](
            self.model, self.num_classes, head_channels=self.head_channels, extra_norms=self.extra_norms,
            img_size=self.input_size, **self.kwargs,
        )


def load(source: str, weights: str | None = None) -> tuple[Segmenter, SegmentationTransform]:
    """The segmenter of a run in evaluation mode, on the CPU, and the transform of its images.

        network, transform = load("best.pth")
        image = ImageOps.exif_transpose(Image.open("photo.jpg"))      # upright, as the transform takes it
        logits = network(transform(image)[None])                      # (1, classes, h / 4, w / 4)
        logits = F.interpolate(logits, image.size[::-1], mode="bilinear")
        labels = logits.argmax(dim=1)                                 # (1, H, W)

    The transform sees an image whole and at one scale, also where the run's evaluation had windows, several scales,
    mirrored images or padding.

    Args:
        source: File or URL of a checkpoint of this repository.
        weights: Its key in the checkpoint, for example "model_ema"; None for the model's own or, of a run whose best
            metric is the EMA's, for the EMA weights.

    Returns:
        The network, whose `classes` are the names of the classes where they are known, and the transform.

    Raises:
        WeightsError: A ValueError in one line: the checkpoint cannot be read, holds no segmenter, or does not fit.
    """
    checkpoint = stored.read_checkpoint(str(source))
    recipe = SegmenterRecipe.of(checkpoint, str(source))
    network = recipe.build()
    load_into(network, checkpoint, str(source), weights)
    network.classes = recipe.class_names
    config = resolve_data_config(pretrained_cfg=timm.get_pretrained_cfg(recipe.model).to_dict())
    transform = SegmentationTransform(recipe.test_size, config["mean"], config["std"], recipe.exif_transpose)
    return network.eval(), transform
