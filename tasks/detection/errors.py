"""The errors of this task, and what a user of the command line can do about them."""
from training.data import images
from utils import UserError

from .. import errors


class BadAnnotationError(UserError):
    """An annotation that cannot be right, or an image that is not there; names the file and the id."""


class NoMasksError(UserError):
    """Annotations without masks, for a detector that learns masks."""


class OtherSizeError(images.UnreadableFileError):
    """An image of another size than its annotations say."""


ADVICE = {
    **errors.ADVICE,
    BadAnnotationError: "correct it, or pass --skip_bad_images",
    NoMasksError: "--detector retinanet learns boxes alone",
    OtherSizeError: "correct it, or pass --skip_bad_images",
    images.UnreadableFileError: "remove it and its annotations, or pass --skip_bad_images",
}
