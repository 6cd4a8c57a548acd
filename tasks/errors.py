"""Errors of tasks whose network stands on a backbone, and what a user of the command line can do about them."""
from utils import UserError

from . import networks


class OtherNetworkError(UserError):
    """The weights to evaluate are those of a network of another kind."""


class NothingFitsError(UserError):
    """Weights to start from that fit neither the network nor its backbone."""


class UnfitImageError(UserError):
    """An image of a size that the network does not take."""


ADVICE = {
    OtherNetworkError: "start from it with --finetune, and train",
    NothingFitsError: "--model must name the model of the weights",
    networks.PretrainedWeightsError: "--finetune takes a file of weights",
    networks.UncheckedArgumentsError: "run without -O, or without --model_kwargs",
}
