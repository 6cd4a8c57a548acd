"""The names of a classifier's classes."""
from typing import Any

from timm.data import ImageNetInfo, infer_imagenet_subset
from torch import nn

from storage import weights
from tasks.tables import complete


def label_names(checkpoint: dict[str, Any], model: nn.Module) -> list[str]:
    """The classes as the folders of their images are called: of the checkpoint or, without one, of the published
    weights, and numbers for those without a name; or else ImageNet's synsets where they are as many.
    """
    if names := weights.class_names(checkpoint) or model.pretrained_cfg.get("label_names"):
        return complete(list(names), model.num_classes)
    subset = infer_imagenet_subset(dict(num_classes=model.num_classes))
    if subset is None:
        return [str(index) for index in range(model.num_classes)]
    return ImageNetInfo(subset).label_names()


def class_names(checkpoint: dict[str, Any], model: nn.Module) -> list[str]:
    """`label_names`, described where the network's `pretrained_cfg`, or ImageNet, has words for them."""
    names = label_names(checkpoint, model)
    if weights.class_names(checkpoint) or model.pretrained_cfg.get("label_names"):
        described = model.pretrained_cfg.get("label_descriptions") or {}
        return [described.get(name, name) for name in names]
    subset = infer_imagenet_subset(dict(num_classes=model.num_classes))
    return ImageNetInfo(subset).label_descriptions() if subset else names
