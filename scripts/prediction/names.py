"""The names of a classifier's classes."""
from typing import Any

from timm.data import ImageNetInfo, infer_imagenet_subset
from torch import nn

from storage import weights
from tasks.tables import complete


def class_names(checkpoint: dict[str, Any], model: nn.Module) -> list[str]:
    """The classes of the checkpoint or, without one, of the published weights, and numbers for those without a name;
    or else ImageNet's where they are as many. Where the network's `pretrained_cfg` describes them, as it says.
    """
    config, num_classes = model.pretrained_cfg, model.num_classes
    if names := weights.class_names(checkpoint) or config.get("label_names"):
        described = config.get("label_descriptions") or {}
        return complete([described.get(name, name) for name in names], num_classes)
    subset = infer_imagenet_subset(dict(num_classes=num_classes))
    if subset is None:
        return [str(index) for index in range(num_classes)]
    return ImageNetInfo(subset).label_descriptions()
