"""Weights of detectors: published ones in mmdetection's layout, and our own."""
import re

import torch

from .._backbone_weights import Weights, rename_backbone
from .._pretrained import stored
from ._network import Detector

# Published name, ours; a stage of a cascade has its index behind the head's name there.
_NAMES = [
    (r"neck\.(lateral_convs|fpn_convs)\.(\d+)\.conv\.", r"backbone.fpn.\1.\2.conv."),
    (r"rpn_head\.rpn_conv\.", "rpn.head.conv.0.0."),
    (r"rpn_head\.rpn_cls\.", "rpn.head.cls_logits."),
    (r"rpn_head\.rpn_reg\.", "rpn.head.bbox_pred."),
    (r"bbox_head\.(cls|reg)_convs\.(\d+)\.conv\.", r"head.\1.conv.\2.0."),
    (r"bbox_head\.retina_cls\.", "head.cls.cls_logits."),
    (r"bbox_head\.retina_reg\.", "head.reg.bbox_reg."),
    (r"roi_head\.(?:bbox|mask)_head\.(\d+)\.(?=shared|fc_|convs\.|upsample|conv_logits)", r"roi_heads.stages.\1."),
    (r"roi_head\.(?:bbox|mask)_head\.", "roi_heads."),
    (r"\.shared_convs\.(\d+)\.conv\.", r".box_head.\1.0."),
    (r"\.shared_convs\.(\d+)\.bn\.", r".box_head.\1.1."),
    (r"\.fc_cls\.", ".box_predictor.cls_score."),
    (r"\.fc_reg\.", ".box_predictor.bbox_pred."),
    (r"^(roi_heads\.(?:stages\.\d+\.)?)convs\.(\d+)\.conv\.", r"\1mask_head.\2.0."),
    (r"\.upsample\.", ".mask_predictor.conv5_mask."),
    (r"\.conv_logits\.", ".mask_predictor.mask_fcn_logits."),
    (r"^head\.cls\.", "head.classification_head."),
    (r"^head\.reg\.", "head.regression_head."),
]
_PUBLISHED = ("neck.", "rpn_head.", "roi_head.", "bbox_head.")


def is_detector(weights: Weights) -> bool:
    """Whether weights are those of a detector, ours or a published one."""
    return any(name.startswith(("rpn.", "rpn_head.", "head.regression_head.", "bbox_head.")) for name in weights)


def _rename(name: str) -> str:
    if not name.startswith(_PUBLISHED):
        return name
    for published, ours in _NAMES:
        name = re.sub(published, ours, name)
    # A cascade has one linear layer behind four convolutions and a flattening, other box heads have two.
    name = re.sub(r"(\.stages\.\d+\.)shared_fcs\.0\.", r"\1box_head.5.", name)
    return name.replace(".shared_fcs.0.", ".box_head.fc6.").replace(".shared_fcs.1.", ".box_head.fc7.")


def _reorder(name: str, value: torch.Tensor) -> torch.Tensor:
    """Rows of the classes: published the background is the last class, here the first, also where it has no meaning."""
    if ".cls_score." in name:
        return value.roll(1, dims=0)
    rows = 4 if ".bbox_pred." in name else 1
    return torch.cat([value.new_zeros((rows, *value.shape[1:])), value])


def rename_heads(weights: Weights) -> dict[str, torch.Tensor]:
    """The entries of a published detector, its pyramid and heads under our names; values as they are."""
    return {_rename(name): value for name, value in weights.items()}


def rename(weights: Weights, network: Detector) -> dict[str, torch.Tensor]:
    """The entries of a published detector under our names; ours as they are.

    The extra norm of a map that the network does not use is left out.
    """
    renamed = {}
    for name, value in weights.items():
        ours = _rename(name)
        of_classes = ".box_predictor." in ours or ".mask_fcn_logits." in ours
        renamed[ours] = _reorder(ours, value) if of_classes and ours != name else value
    if network.backbone.first:  # RetinaNet's: convolutions that follow those of the pyramid
        levels = len(network.backbone.fpn.fpn_convs)
        for level, top in ((levels, "p6"), (levels + 1, "p7")):
            before = f"backbone.fpn.fpn_convs.{level}.conv."
            renamed = {name.replace(before, f"backbone.top.{top}."): value for name, value in renamed.items()}
        renamed = {name: value for name, value in renamed.items() if not name.startswith("backbone.extra_norms.0.")}
    return rename_backbone(renamed, network.backbone)


def _classifiers(network: Detector) -> list[str]:
    """The layers whose output size depends on the number of classes."""
    last = ("cls_score", "mask_fcn_logits", "cls_logits")
    of_heads = (name for name, _ in network.named_modules() if not name.startswith(("backbone.", "rpn.")))
    return [name for name in of_heads if name.endswith((*last, "box_predictor.bbox_pred"))]


def load_detector(
    network: Detector, weights: Weights, new_classes: bool = False, other_classes: bool = False
) -> bool:
    """Load the weights of a detector in full.

    Args:
        network: The network, without wrappers.
        weights: As `storage.weights.unwrap` returns them; published ones are renamed.
        new_classes: Keep the network's own layers of the classes where their number differs.
        other_classes: Keep those too where it is the same.

    Returns:
        Whether the network's own layers of the classes were kept.

    Raises:
        MismatchError: They do not fit; lists the first mismatches.
    """
    classifiers = tuple(_classifiers(network)) if new_classes else ()
    return stored.load_weights(network, rename(weights, network), None, classifiers, other_classes)


def has_same_parts(network: Detector, weights: Weights) -> bool:
    """Whether the weights of a detector are of the network's kind and width; the number of classes may be another."""
    others = ("backbone.body.", *(f"{name}." for name in _classifiers(network)))

    def parts(weights: Weights) -> dict[str, torch.Size]:
        return {
            name: value.shape for name, value in weights.items()
            if not name.startswith(others) and not name.endswith("num_batches_tracked")
        }

    return parts(rename(weights, network)) == parts(network.state_dict())
