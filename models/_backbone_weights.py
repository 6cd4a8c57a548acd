"""The weights of a backbone: those of a classifier, or of the backbone inside a segmenter or detector."""
from collections import Counter
from collections.abc import Mapping

import torch
from torch import nn

from ._load import family_filter
from ._pretrained import stored

Weights = Mapping[str, torch.Tensor]
_BODY, _NORMS = "backbone.body.", "backbone.extra_norms."


def _as_body(weights: dict[str, torch.Tensor], body: nn.Module) -> dict[str, torch.Tensor]:
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
    return kept | {f"{_BODY}{name}": value for name, value in _as_body(of_body, backbone.body).items()}


def load_backbone(network: nn.Module, weights: Weights) -> list[str]:
    """Load the weights of a classifier, or those of another network's backbone, into a network's backbone.

    Args:
        network: A segmenter or detector, without wrappers.
        weights: As `storage.weights.unwrap` returns them: of a classifier, a segmenter or a detector.

    Returns:
        Lines: how many entries were loaded; which of the others' were not needed; which of the network's were not
        there.

    Raises:
        MismatchError: They do not fit the backbone: lists the first entries that are missing or of another shape.
    """
    body = network.backbone.body
    expected, own = body.state_dict(), network.state_dict()
    found, norms, left_out = _parts(weights, network.backbone)
    wanted = {name for name in own if name.startswith(_NORMS)}
    if not wanted <= norms.keys():
        wanted = set()
    left_out = [*left_out, *(name for name in norms if name not in wanted)]
    # A larger network of the family has layers more in modules that the backbone has too.
    modules = {name.partition(".")[0] for name in expected}
    left_out += [name for name in found if name.partition(".")[0] not in modules]
    stored.load_weights(body, {name: value for name, value in found.items() if name not in left_out})
    network.load_state_dict({name: norms[name] for name in wanted}, strict=False)
    missing = [name for name in own if not name.startswith(_BODY) and name not in wanted]
    return [
        f"{len(expected) + len(wanted)} tensors of the backbone are loaded",
        *([f"not needed, and left out: {_by_module(left_out)}"] if left_out else []),
        f"not there, and newly initialised: {_by_module(missing)}",
    ]


def _parts(
    weights: Weights, backbone: nn.Module
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], list[str]]:
    """The entries of the body among those of a classifier or a whole network, under the body's names; the extra norms;
    and the names of the others.
    """
    if not any(name.startswith("backbone.") for name in weights):
        plain = stored.without_model_prefix(dict(weights), backbone.body.state_dict())
        return _as_body(plain, backbone.body), {}, []
    renamed = rename_backbone(weights, backbone)
    body = {name.removeprefix(_BODY): value for name, value in renamed.items() if name.startswith(_BODY)}
    norms = {name: value for name, value in renamed.items() if name.startswith(_NORMS)}
    return body, norms, [name for name in renamed if not name.startswith((_BODY, _NORMS))]


def _by_module(names: list[str]) -> str:
    """Names of tensors by their first parts: "decode_head (58), backbone.extra_norms (8)"."""
    modules = Counter(".".join(name.split(".")[: 2 if name.startswith("backbone.") else 1]) for name in names)
    return ", ".join(f"{module} ({number})" for module, number in modules.items())
