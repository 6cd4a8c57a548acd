"""A trained segmenter and its transform, from the checkpoint of a run."""
from dataclasses import dataclass, field
from typing import Any

import timm
from timm.data import resolve_data_config

from .._backbone_weights import Weights
from .._pretrained import stored
from .._recipe import ImageSize, NetworkRecipe
from .._trained import advising, check_backbone, create, said_of
from ._images import EvalSize, SegmentationTransform
from ._network import HEADS, Segmenter
from ._weights import is_segmenter, load_segmenter

# What only one head has, by name.
_PARTS = dict(upernet="decode_head.psp_modules.", semantic_fpn="decode_head.scale_heads.")


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
    def of(cls, checkpoint: dict[str, Any], source: str, model: str | None = None) -> "SegmenterRecipe":
        """What the checkpoint of a run says or, of a published segmenter, what its weights show.

        Args:
            checkpoint: As `storage.weights.read_checkpoint` returns it.
            source: Where it was read from, for messages.
            model: The name of its backbone, where the checkpoint does not say it.

        Raises:
            WeightsError: It is of no segmenter that is known here, or nothing names its backbone.
        """
        said = said_of(checkpoint, source, "segmentation", Segmenter.kind)
        if said is None:
            return cls._of_published(stored.unwrap(checkpoint), stored.public(source), model)
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

    @classmethod
    def _of_published(cls, weights: Weights, source: str, model: str | None) -> "SegmenterRecipe":
        """The head and its width, by the names and shapes of its weights."""
        if not is_segmenter(weights):
            raise stored.WeightsError(f"{source} holds no segmenter: it has no decode_head")
        found = [head for head, part in _PARTS.items() if any(name.startswith(part) for name in weights)]
        classifier = weights.get("decode_head.conv_seg.weight")
        if len(found) != 1 or classifier is None:
            raise stored.WeightsError(f"{source} has a head other than {' and '.join(_PARTS)}")
        check_backbone(source, model)
        return cls(model, found[0], len(classifier), head_channels=classifier.shape[1])

    def build(self) -> Segmenter:
        """The network, with random weights."""
        return HEADS[self.head](
            self.model, self.num_classes, head_channels=self.head_channels, extra_norms=self.extra_norms,
            img_size=self.input_size, **self.kwargs,
        )


def create_trained(
    recipe: SegmenterRecipe, checkpoint: dict[str, Any], source: str, weights: str | None = None
) -> Segmenter:
    """The segmenter of a recipe with the weights of a checkpoint, in evaluation mode, on the CPU.

    Args:
        recipe: As `SegmenterRecipe.of` returns it.
        checkpoint: As `storage.weights.read_checkpoint` returns it.
        source: Where it was read from, for messages.
        weights: Its key in the checkpoint; None for `storage.weights.default_weights`.

    Raises:
        WeightsError: One line: the backbone refuses the recipe's arguments, or the weights do not fit, or are not
            finite.
    """
    return create(recipe, load_segmenter, checkpoint, source, weights)


def load(
    source: str, weights: str | None = None, model: str | None = None
) -> tuple[Segmenter, SegmentationTransform]:
    """The segmenter of a run in evaluation mode, on the CPU, and the transform of its images.

        network, transform = load("best.pth")
        image = ImageOps.exif_transpose(Image.open("photo.jpg"))      # upright, as the transform takes it
        logits = network(transform(image)[None])                      # (1, classes, h / 4, w / 4)
        logits = F.interpolate(logits, image.size[::-1], mode="bilinear")
        labels = logits.argmax(dim=1)                                 # (1, H, W)

    The transform sees an image whole and at one scale, also where the run's evaluation had windows, several scales,
    mirrored images or padding.

    Args:
        source: File or URL of a checkpoint of this repository, or of a published segmenter.
        weights: Its key in the checkpoint, for example "model_ema"; None for the model's own or, of a run whose best
            metric is the EMA's, for the EMA weights.
        model: The name of its backbone, for weights that do not say it; any of timm's.

    Returns:
        The network, whose `classes` are the names of the classes where they are known, and the transform.

    Raises:
        WeightsError: A ValueError in one line: the checkpoint cannot be read, holds no segmenter, or does not fit.
    """
    checkpoint = stored.read_checkpoint(str(source))
    with advising():
        recipe = SegmenterRecipe.of(checkpoint, str(source), model)
    network = create_trained(recipe, checkpoint, str(source), weights)
    config = resolve_data_config(pretrained_cfg=timm.get_pretrained_cfg(recipe.model).to_dict())
    transform = SegmentationTransform(recipe.test_size, config["mean"], config["std"], recipe.exif_transpose)
    return network, transform
