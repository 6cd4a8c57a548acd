"""Text in pictures: class names of any script, in the letters that there are."""
import unicodedata
from collections.abc import Container
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from PIL import ImageFont

from utils import printable

_SIZE = 10  # pixels
Font = ImageFont.ImageFont | ImageFont.FreeTypeFont
_QUOTES = str.maketrans("\u2018\u2019\u201c\u201d", "''\"\"")  # typographic ones, which ASCII has not


def can_draw() -> bool:
    """Whether matplotlib is installed, which this repository needs for pictures alone."""
    return find_spec("matplotlib") is not None


@cache
def load_font(with_matplotlib: bool, size: int = _SIZE) -> tuple[Font, Container[int]]:
    """A font of so many pixels, and the code points that it has: DejaVu Sans, which comes with matplotlib and has the
    alphabets of Europe, or else Pillow's own, which has ASCII.
    """
    if not with_matplotlib:
        return ImageFont.load_default(size), range(32, 127)
    from matplotlib import get_data_path
    from matplotlib.ft2font import FT2Font

    file = str(Path(get_data_path(), "fonts", "ttf", "DejaVuSans.ttf"))
    return ImageFont.truetype(file, size), FT2Font(file).get_charmap().keys()


def drawable(text: str, letters: Container[int]) -> str:
    """Text on one line, in code points among `letters`: a letter without its accents where it must be, and an escape
    as in Python's strings, `\\u732b`, for what has no such letter.
    """
    found = []
    for c in unicodedata.normalize("NFC", printable(text)):  # some file systems take letters and accents apart
        parts = [c] if ord(c) in letters else unicodedata.normalize("NFKD", c.translate(_QUOTES))
        known = "".join(part for part in parts if ord(part) in letters)
        found.append(known or c.encode("ascii", "backslashreplace").decode())
    return "".join(found)


def shorten(text: str, font: Font, width: float) -> str:
    """As much of a text as fits into a width, in pixels."""
    while text and font.getlength(text) > width:
        text = text[:-1]
    return text
