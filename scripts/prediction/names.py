"""The names of a classifier's classes."""
from typing import Any

from timm.data import ImageNetInfo, infer_imagenet_subset
from torch import nn

from storage import weights
from tasks.tables import complete


def _own_names(checkpoint: dict[str, Any], model: nn.Module) -> list[str] | None:
    """Of the checkpoint or, without one, of the published weights, where the network has their classes."""
    published = model.pretrained_cfg.get("label_names") or []
    return weights.class_names(checkpoint) or (published if len(published) == model.num_classes else None)


def label_names(checkpoint: dict[str, Any], model: nn.Module) -> list[str]:
    """The classes as the folders of their images are called: as the checkpoint or the published weights say, and
    numbers for those without a name; or else ImageNet's synsets where they are as many.
    """
    if names := _own_names(checkpoint, model):
        return complete(names, model.num_classes)
    subset = infer_imagenet_subset(dict(num_classes=model.num_classes))
    return ImageNetInfo(subset).label_names() if subset else [str(index) for index in range(model.num_classes)]


def class_names(checkpoint: dict[str, Any], model: nn.Module) -> list[str]:
    """`label_names`, described where the network's `pretrained_cfg`, or ImageNet, has words for them."""
    if names := _own_names(checkpoint, model):
        described = model.pretrained_cfg.get("label_descriptions") or {}
        return complete([described.get(name, name) for name in names], model.num_classes)
    subset = infer_imagenet_subset(dict(num_classes=model.num_classes))
    return ImageNetInfo(subset).label_descriptions() if subset else label_names(checkpoint, model)
