"""What an exported file says of itself: which images it takes, and what its outputs mean."""
import json
from dataclasses import asdict, dataclass, fields

from utils import UserError

# Under which the metadata lie in a file, as JSON.
KEY = "routedvit"
VERSION = 2


@dataclass(frozen=True)
class Metadata:
    """How to prepare images for an exported network, and how to read its outputs.

    Its input `images` is (batch, 3, height, width), RGB from 0 to 1, less `mean`, over `std`; its output `logits` is
    (batch, classes).

    Args:
        model: timm's name of it.
        class_names: In the order of the logits.
        input_size: (height, width) in pixels.
        mean: Of each channel.
        std: Of each channel.
        interpolation: How images are resized.
        crop_pct: Part of the resized image that the crop keeps.
        crop_mode: Where the crop lies.
        exif_transpose: Whether images are first turned upright, as their EXIF orientation says.
        dynamic: What is left open: "batch", "size", both or neither.
        precision: "float32" or "int8".
        torch: The version that wrote it.
        version: Of these metadata.
    """

    model: str
    class_names: list[str]
    input_size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str
    crop_pct: float
    crop_mode: str
    exif_transpose: bool
    dynamic: tuple[str, ...]
    precision: str
    torch: str
    version: int = VERSION

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str | None, file: str) -> "Metadata":
        """The metadata in a file.

        Raises:
            UserError: There are none, or they are of a later version.
        """
        if not text:
            raise UserError(f"{file} does not say which images it takes: it was not written by scripts/export.py")
        said = json.loads(text)
        if said.get("version") != VERSION or said.keys() != {field.name for field in fields(cls)}:
            raise UserError(f"{file} was written by another version of scripts/export.py: export it again")
        lists = {name: tuple(said[name]) for name in ("input_size", "mean", "std", "dynamic")}
        return cls(**{**said, **lists})
