"""The errors of this task, and what a user of the command line can do about them."""
from training.data import images
from utils import UserError

from .. import networks


class NoSegmenterError(UserError):
    """The weights to evaluate or to resume from are those of a classifier."""


class NothingFitsError(UserError):
    """Weights to start from that fit neither the segmenter nor its backbone."""


class UnfitImageError(UserError):
    """An image of a size that the network does not take."""


class TurnedImageError(UserError):
    """An image that has its label's size as it is stored, and not as its EXIF orientation turns it."""


ADVICE = {
    images.UnreadableFileError: "remove it and its label, or pass --skip_bad_images",
    NoSegmenterError: "start from it with --finetune, and train",
    NothingFitsError: "--model must name the model of the weights",
    UnfitImageError: "--crop shows it in windows of one size, --test_rounding rounds its sides",
    TurnedImageError: "--exif_transpose false reads images as they are stored",
    networks.PretrainedWeightsError: "--finetune takes a file of weights",
    networks.UncheckedArgumentsError: "run without -O, or without --model_kwargs",
}
