"""The weights of a backbone inside those of a segmenter or detector."""
from collections.abc import Mapping

import torch
from torch import nn

from ._load import family_filter

Weights = Mapping[str, torch.Tensor]


def as_body(weights: dict[str, torch.Tensor], body: nn.Module) -> dict[str, torch.Tensor]:
    """The entries of a classifier, or of a published backbone, under the names of a backbone's body."""
    filter_fn = family_filter(body)
    if filter_fn is None:
        return weights
    try:
        return filter_fn(weights, body)
    except Exception:  # of weights of another family; what does not fit is listed by its names then
        return weights


def rename_backbone(weights: Weights, backbone: nn.Module) -> dict[str, torch.Tensor]:
    """The entries of a published backbone, `backbone.NAME`, as `backbone.body.OUR_NAME`; all others as they are.

    Args:
        weights: Of a segmenter or detector.
        backbone: Its `Backbone`; entries of its own modules are ours already.
    """
    own = tuple(f"backbone.{name}." for name in ("extra_norms", *backbone._modules))
    of_body = {
        name.removeprefix("backbone."): value for name, value in weights.items()
        if name.startswith("backbone.") and not name.startswith(own)
    }
    if not of_body:
        return dict(weights)
    kept = {name: value for name, value in weights.items() if name.removeprefix("backbone.") not in of_body}
    return kept | {f"backbone.body.{name}": value for name, value in as_body(of_body, backbone.body).items()}
