"""The errors of this task, and what a user of the command line can do about them."""
from training.data import images
from utils import UserError

from .. import errors


class BadAnnotationError(UserError):
    """An annotation that cannot be right, or an image that is not there; names the file and the id."""


class NoAnnotationsError(UserError):
    """A split without a file of annotations."""


class NothingToFindError(UserError):
    """Annotations without an object, to evaluate by."""


class NoMasksError(UserError):
    """Annotations without masks, for a detector that learns masks."""


class MissingMaskError(BadAnnotationError):
    """An annotation without a mask, where masks are scored."""


class OtherSizeError(images.UnreadableImageError):
    """An image of another size than its annotations say."""


ADVICE = {
    **errors.ADVICE,
    BadAnnotationError: "correct it, or pass --skip_bad_images",
    NoAnnotationsError: "--train_json and --val_json name them",
    NothingToFindError: "--eval --detections FILE writes what is found unscored, --disable_eval trains without it",
    NoMasksError: "--detector retinanet learns boxes alone",
    MissingMaskError: "--detector retinanet scores boxes alone",
    OtherSizeError: "correct it, or pass --skip_bad_images",
    images.UnreadableFileError: "remove it and its annotations, or pass --skip_bad_images",
}
