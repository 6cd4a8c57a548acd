"""A trained detector and the transform of its images, from the checkpoint of a run."""
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import timm
import torch
from PIL import Image
from torchvision.transforms.v2 import functional as F

from .._backbone_weights import Weights
from .._load import to_rgb
from .._pretrained import stored
from .._recipe import NetworkRecipe
from .._trained import advising, check_backbone, create, said_of
from ._network import DETECTORS, LONG, SHORT, Detector
from ._retinanet import SCALES
from ._rpn import RATIOS
from ._weights import is_detector, load_detector, rename_heads

# The layer of the classes that only one detector has, and the first dimension of its weights: of a number of classes.
_ROWS: dict[str, tuple[str, Callable[[int], int]]] = dict(
    mask_rcnn=("roi_heads.box_predictor.cls_score", lambda rows: rows - 1),  # and the background
    cascade_mask_rcnn=("roi_heads.stages.0.box_predictor.cls_score", lambda rows: rows - 1),
    retinanet=("head.classification_head.cls_logits", lambda rows: rows // (len(SCALES) * len(RATIOS))),
)
_LATERAL = "backbone.fpn.lateral_convs.0.conv.weight"


def to_tensor(image: Image.Image, exif_transpose: bool = True) -> torch.Tensor:
    """A PIL image of any mode with 8 bits as float (3, H, W), 0 to 1, turned upright as its EXIF orientation says.

    The network itself resizes and normalises it.
    """
    return F.to_dtype(F.pil_to_tensor(to_rgb(image, exif_transpose)), torch.float32, scale=True)


@dataclass(frozen=True)
class DetectorRecipe:
    """What is needed to build a detector again.

    Args:
        model: Name of its backbone.
        detector: A name in `DETECTORS`.
        num_classes: Classes, without the background.
        class_names: Their names, in order, where they are known.
        kwargs: Arguments of the backbone.
        channels: Of the feature pyramid and what looks at it.
        head_channels: Width of the box head; None for what was published, and of RetinaNet, which has none.
        extra_norms: See `Backbone`.
        freeze_batch_norm: See `PyramidBackbone`.
        short, long: The sides that images are fitted with.
        exif_transpose: Whether images were turned upright, as their EXIF orientation says.
    """

    model: str
    detector: str
    num_classes: int
    class_names: list[str] | None = None
    kwargs: dict[str, Any] = field(default_factory=dict)
    channels: int = 256
    head_channels: int | None = None
    extra_norms: bool | None = None
    freeze_batch_norm: bool = True
    short: int = SHORT
    long: int = LONG
    exif_transpose: bool = True

    @classmethod
    def of(cls, checkpoint: dict[str, Any], source: str, model: str | None = None) -> "DetectorRecipe":
        """What the checkpoint of a run says or, of a published detector, what its weights show.

        Args:
            checkpoint: As `storage.weights.read_checkpoint` returns it.
            source: Where it was read from, for messages.
            model: The name of its backbone, where the checkpoint does not say it.

        Raises:
            WeightsError: It is of no detector that is known here, or nothing names its backbone.
        """
        said = said_of(checkpoint, source, "detection", Detector.kind)
        source, weights = stored.public(source), rename_heads(stored.unwrap(checkpoint))
        if said is None:
            return cls._of_published(weights, source, model)
        if said.get("detector") not in DETECTORS or not timm.is_model(said.get("model") or ""):
            raise stored.WeightsError(f"{source} is of {said.get('detector')} on {said.get('model')}, which are not "
                                      "known here")
        shared = NetworkRecipe.of(checkpoint)
        # A run says what each flag was, RetinaNet's the default of one that it has no use for.
        width = None if said["detector"] == "retinanet" else said.get("head_channels")
        try:
            return cls(
                shared.model, said["detector"], _count_classes(weights, said["detector"]), shared.class_names,
                shared.kwargs, said["fpn_channels"], width, said.get("extra_norms"),
                said.get("freeze_batch_norm", True), said["short_side"], said["long_side"], shared.exif_transpose,
            )
        except KeyError as error:
            raise stored.WeightsError(f"{source} lacks {error}") from error

    @classmethod
    def _of_published(cls, weights: Weights, source: str, model: str | None) -> "DetectorRecipe":
        """The detector and its widths, by the names and shapes of its weights, whose heads have our names."""
        if not is_detector(weights):
            raise stored.WeightsError(f"{source} holds no detector: it has neither proposals nor boxes")
        found = [name for name, (layer, _) in _ROWS.items() if f"{layer}.weight" in weights]
        if len(found) != 1 or _LATERAL not in weights:
            raise stored.WeightsError(f"{source} is of a detector other than {', '.join(DETECTORS)}")
        check_backbone(source, model)
        layer = weights[f"{_ROWS[found[0]][0]}.weight"]
        return cls(
            model, found[0], _count_classes(weights, found[0]), channels=len(weights[_LATERAL]),
            head_channels=None if found[0] == "retinanet" else layer.shape[1],
            extra_norms=any(name.startswith("backbone.extra_norms.") for name in weights),
        )

    def build(self) -> Detector:
        """The network, with random weights."""
        width = {} if self.head_channels is None else dict(head_channels=self.head_channels)
        return DETECTORS[self.detector](
            self.model, self.num_classes, channels=self.channels, short=self.short, long=self.long,
            extra_norms=self.extra_norms, freeze_batch_norm=self.freeze_batch_norm, **width, **self.kwargs,
        )


def _count_classes(weights: Weights, detector: str) -> int:
    """The number of classes that a detector's weights are of; KeyError where they are another detector's."""
    layer, classes_of = _ROWS[detector]
    return classes_of(len(weights[f"{layer}.weight"]))


def create_trained(
    recipe: DetectorRecipe, checkpoint: dict[str, Any], source: str, weights: str | None = None
) -> Detector:
    """The detector of a recipe with the weights of a checkpoint, in evaluation mode, on the CPU.

    Args:
        recipe: As `DetectorRecipe.of` returns it.
        checkpoint: As `storage.weights.read_checkpoint` returns it.
        source: Where it was read from, for messages.
        weights: Its key in the checkpoint; None for `storage.weights.default_weights`.

    Raises:
        WeightsError: One line: the backbone refuses the recipe's arguments, or the weights do not fit, or are not
            finite.
    """
    return create(recipe, load_detector, checkpoint, source, weights)


def load(
    source: str, weights: str | None = None, model: str | None = None
) -> tuple[Detector, Callable[[Image.Image], torch.Tensor]]:
    """The detector of a run in evaluation mode, on the CPU, and the transform of its images.

        network, transform = load("best.pth")
        with torch.inference_mode():
            found, = network([transform(Image.open("photo.jpg"))])
        names = [network.classes[label - 1] for label in found["labels"]]

    Boxes and masks are in the pixels of the image as the transform turned it upright.

    Args:
        source: File or URL of a checkpoint of this repository, or of a published detector.
        weights: Its key in the checkpoint, for example "model_ema"; None for the model's own or, of a run whose best
            metric is the EMA's, for the EMA weights.
        model: The name of its backbone, for weights that do not say it; any of timm's.

    Returns:
        The network, whose `classes` are the names of the classes where they are known (None otherwise), and the
        transform, `to_tensor`.

    Raises:
        WeightsError: A ValueError in one line: the checkpoint cannot be read, holds no detector, or does not fit.
    """
    checkpoint = stored.read_checkpoint(str(source))
    with advising():
        recipe = DetectorRecipe.of(checkpoint, str(source), model)
    network = create_trained(recipe, checkpoint, str(source), weights)
    return network, partial(to_tensor, exif_transpose=recipe.exif_transpose)
