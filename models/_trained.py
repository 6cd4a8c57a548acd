"""What networks on a backbone, segmenters and detectors, share where they are loaded from a checkpoint."""
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import timm
from torch import nn

from ._backbone_weights import Weights
from ._pretrained import stored


class NoBackboneError(stored.WeightsError):
    """The weights of a published segmenter or detector, which do not say what their backbone is."""


class Recipe(Protocol):
    """What is needed to build a network again: the name of its backbone, those of its classes, and how."""

    model: str
    class_names: list[str] | None

    def build(self) -> nn.Module:
        """The network, with random weights."""


def said_of(checkpoint: dict[str, Any], source: str, task: str, kind: str) -> dict[str, Any] | None:
    """What the checkpoint of a run says of it; None where it is no run's, but weights that others published.

    Args:
        checkpoint: As `storage.weights.read_checkpoint` returns it.
        source: Where it was read from, for messages.
        task: Which the run has to be of.
        kind: What such a run trains, with an article.

    Raises:
        WeightsError: It is of a run of another task.
    """
    said = checkpoint.get("args")
    found = said.get("task") if isinstance(said, dict) else None
    if found not in (None, task):
        raise stored.WeightsError(f"{stored.public(source)} is not the checkpoint of a run that trains {kind}")
    return said if found else None


def check_backbone(source: str, model: str | None):
    """Raises NoBackboneError where nobody names the backbone of published weights, WeightsError where timm has none of
    this name.
    """
    if model is None:
        raise NoBackboneError(f"{source} does not say which model its backbone is")
    if not timm.is_model(model):
        raise stored.WeightsError(f"timm knows no model {model!r}")


@contextmanager
def advising() -> Iterator[None]:
    """Add to a NoBackboneError how `load` is told the name."""
    try:
        yield
    except NoBackboneError as error:
        raise NoBackboneError(f"{error}; name it: load(..., model='NAME')") from error


def create(
    recipe: Recipe, load_into: Callable[[nn.Module, Weights], Any], checkpoint: dict[str, Any], source: str,
    weights: str | None = None,
) -> nn.Module:
    """The network of a recipe with the weights of a checkpoint, in evaluation mode, on the CPU.

    Args:
        recipe: As its class's `of` returns it.
        load_into: Loads weights into the network, in full, and raises WeightsError where they do not fit.
        checkpoint: As `storage.weights.read_checkpoint` returns it.
        source: Where it was read from, for messages.
        weights: Its key in the checkpoint; None for `storage.weights.default_weights`.

    Returns:
        The network, whose `classes` are the names of the classes where they are known.

    Raises:
        WeightsError: One line: the backbone refuses the recipe's arguments, or the weights do not fit, or are not
            finite.
    """
    source = stored.public(source)
    try:
        network = recipe.build()
    except Exception as error:  # on arguments that it does not take, a model raises nearly anything
        reason = " ".join(str(error).split()) or repr(error)
        raise stored.WeightsError(f"{source}: {recipe.model} cannot be built: {reason}") from error
    load_into(network, stored.unwrap(checkpoint, weights or stored.default_weights(checkpoint, source)[0]))
    stored.check_finite(network, source)
    network.classes = recipe.class_names
    return network.eval()
