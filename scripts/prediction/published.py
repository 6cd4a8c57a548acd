"""Networks with published weights, and the one that is taken where none is named."""
from typing import Any

from torch import nn

from tasks.networks import PretrainedWeightsError, build_model
from utils import UserError

# Its weights are in the repository.
DEFAULT_MODEL = "biformer_nano"


def build_published(name: str, kwargs: dict[str, Any]) -> nn.Module:
    """A network of timm's with its published weights.

    Raises:
        UserError: There are none, or they cannot be read; says that a file can be given.
    """
    try:
        return build_model(name, True, kwargs)
    except PretrainedWeightsError as error:
        raise UserError(f"{error}; --checkpoint takes a file of weights") from error
