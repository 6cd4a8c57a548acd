"""Weights of segmenters: published and own checkpoints."""
import torch

from .._backbone_weights import Weights, rename_backbone
from .._pretrained import stored
from ._network import Segmenter


def is_segmenter(weights: Weights) -> bool:
    """Whether weights are those of a segmenter, ours or a published one, and not of a classifier alone."""
    return any(name.startswith("decode_head.") for name in weights)


def rename(weights: Weights, network: Segmenter) -> dict[str, torch.Tensor]:
    """The entries of a segmenter under our names: those of a published backbone by its family's own renaming.

    Statistics of batch norms under mmcv's names are ours, and every other module is named as published.
    """
    return rename_backbone(weights, network.backbone)


def load_segmenter(
    network: Segmenter, weights: Weights, new_classes: bool = False, other_classes: bool = False
) -> bool:
    """Load the weights of a segmenter in full.

    Args:
        network: The network, without wrappers.
        weights: As `storage.weights.unwrap` returns them.
        new_classes: Keep the network's own classifiers where the number of classes differs.
        other_classes: Keep those too where it is the same.

    Returns:
        Whether the network's own classifiers were kept.

    Raises:
        MismatchError: They do not fit; lists the first mismatches.
    """
    weights = rename(weights, network)
    own = network.state_dict()
    # Some publish a segmenter without the head that training alone needs.
    if not any(name.startswith("auxiliary_head.") for name in weights):
        weights |= {name: value for name, value in own.items() if name.startswith("auxiliary_head.")}
    if network.auxiliary_head is None:
        weights = {name: value for name, value in weights.items() if not name.startswith("auxiliary_head.")}
    classifiers = ("decode_head.conv_seg", "auxiliary_head.conv_seg") if new_classes else ()
    return stored.load_weights(network, weights, None, classifiers, other_classes)


def has_same_heads(network: Segmenter, weights: Weights) -> bool:
    """Whether the weights of a segmenter are of the network's head and width; the number of classes may be another."""
    def heads(weights: Weights) -> dict[str, tuple[int, ...]]:
        return {
            name: value.shape[1:] if ".conv_seg." in name else value.shape
            for name, value in weights.items() if not name.startswith(("backbone.", "auxiliary_head."))
        }

    return heads(weights) == heads(network.state_dict())
