"""The errors of this task, and what a user of the command line can do about them."""
from training.data import images
from utils import UserError

from .. import errors


class TurnedImageError(UserError):
    """An image that has its label's size as it is stored, and not as its EXIF orientation turns it."""


ADVICE = {
    **errors.ADVICE,
    images.UnreadableFileError: "remove it and its label, or pass --skip_bad_images",
    errors.UnfitImageError: "--crop shows it in windows of one size, --test_rounding rounds its sides",
    TurnedImageError: "--exif_transpose false reads images as they are stored",
}
