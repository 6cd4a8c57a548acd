"""Objects in a picture: their masks, boxes and names, each in the colour of its class."""
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

from ..lettering import Font, can_draw, drawable, load_font, shorten

Rectangle = tuple[int, int, int, int]  # left, top, right and bottom in pixels; the last two lie outside

_OPACITY = 0.4  # of masks
# The side of a square image as large as a picture, in widths of its lines and in heights of its letters.
_LINES, _LETTERS = 300, 42
_LEAST = 10  # pixels of letters that can be read


def draw_objects(
    image: np.ndarray, boxes: np.ndarray, names: Sequence[str], scores: Sequence[float] | None,
    masks: np.ndarray | None, colours: np.ndarray,
) -> np.ndarray:
    """An image with objects drawn into it; where they overlap, the first ones lie above the others.

    torchvision's functions draw names outside of the image, and those of close objects over one another.

    Args:
        image: (H, W, 3) uint8.
        boxes: (N, 4) corners in pixels.
        names: Of the objects' classes, in any script.
        scores: From 0 to 1, written behind the names; None for none.
        masks: (N, H, W) bool; None for none.
        colours: (N, 3) uint8, of the objects.

    Returns:
        (H, W, 3) uint8.
    """
    height, width = image.shape[:2]
    line = max(1, round((height * width) ** 0.5 / _LINES))
    pixels = image.copy()
    order = range(len(boxes) - 1, -1, -1)
    for i in order if masks is not None else ():
        _draw_mask(pixels, masks[i], colours[i], line)
    canvas = Image.fromarray(pixels)
    draw = ImageDraw.Draw(canvas)
    corners = [_in_image(box, height, width) for box in boxes]
    for i in order:
        left, top, right, bottom = corners[i]
        draw.rectangle((left, top, right - 1, bottom - 1), outline=tuple(colours[i].tolist()), width=line)
    texts = list(names) if scores is None else [f"{n} {100 * s:.0f} %" for n, s in zip(names, scores, strict=True)]
    _draw_texts(draw, texts, corners, colours, (height, width))
    return np.asarray(canvas)


def _in_image(box: np.ndarray, height: int, width: int) -> Rectangle:
    """The pixels of a box that lie in the image, at least one of them."""
    left, top, right, bottom = (int(x) for x in np.rint(np.asarray(box, np.float64)))
    left, top = min(max(left, 0), width - 1), min(max(top, 0), height - 1)
    return left, top, max(min(right, width), left + 1), max(min(bottom, height), top + 1)


def _draw_mask(pixels: np.ndarray, mask: np.ndarray, colour: np.ndarray, line: int):
    """Mix a colour into the (H, W, 3) `pixels` of a mask, and draw the mask's border, `line` pixels wide, in it."""
    rows, columns = (np.flatnonzero(mask.any(axis=axis)) for axis in (1, 0))
    if len(rows) == 0:
        return
    part = slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)
    inside, seen = mask[part], pixels[part]
    mixed = np.rint(np.arange(256)[:, None] * (1 - _OPACITY) + colour * _OPACITY).astype(np.uint8)
    for channel in range(3):  # looked up, which is ten times as fast as to compute it for each pixel
        np.copyto(seen[..., channel], mixed[:, channel][seen[..., channel]], where=inside)
    outside = np.pad(~inside, line, constant_values=True)
    near = _any_of(_any_of(outside, 2 * line + 1).T, 2 * line + 1).T
    seen[inside & near] = colour


def _any_of(values: np.ndarray, number: int) -> np.ndarray:
    """(H, W) bool -> (H - number + 1, W): whether any of so many rows from each one on is true."""
    rows = 1
    while rows < number:
        step = min(rows, number - rows)
        values, rows = values[:-step] | values[step:], rows + step
    return values


def _draw_texts(
    draw: ImageDraw.ImageDraw, texts: Sequence[str], corners: Sequence[Rectangle], colours: np.ndarray,
    size: tuple[int, int],
):
    """Write a text at each box, on its colour; those of the first boxes, where there is no room for all."""
    height, width = size
    font, letters = load_font(can_draw(), max(_LEAST, round((height * width) ** 0.5 / _LETTERS)))
    top, bottom = _extent(font)
    margin = max(1, (bottom - top) // 8)
    placed: list[Rectangle] = []
    for text, box, colour in zip(texts, corners, colours.tolist(), strict=True):
        text = shorten(drawable(text, letters), font, width - 2 * margin)
        sides = round(font.getlength(text)) + 2 * margin, bottom - top + 2 * margin
        found = _place(box, sides, placed, size)
        if found is None or not text:
            continue
        placed.append(found)
        draw.rectangle((*found[:2], found[2] - 1, found[3] - 1), fill=tuple(colour))
        is_bright = np.dot(colour, (0.299, 0.587, 0.114)) > 140
        draw.text((found[0] + margin, found[1] + margin - top), text, "black" if is_bright else "white", font)


def _extent(font: Font) -> tuple[int, int]:
    """Where letters begin and end below the place at which a text is drawn, in pixels."""
    _, top, _, bottom = font.getbbox("\u00c1g" if can_draw() else "Ag")
    return int(top), int(bottom)


def _place(
    box: Rectangle, sides: tuple[int, int], placed: Sequence[Rectangle], size: tuple[int, int]
) -> Rectangle | None:
    """Where a text is written: above its box, or else in or around it, within the image and over no other text.

    Args:
        box: Of the object.
        sides: Width and height of the text.
        placed: Where others are written.
        size: Height and width of the image.

    Returns:
        None where there is no such place.
    """
    left, top, right, bottom = box
    width, height = sides
    rows = top - height, top, bottom, bottom - height, (top + bottom - height) // 2
    columns = left, right - width, (left + right - width) // 2, right, left - width
    for x in columns:
        x = max(0, min(x, size[1] - width))
        for y in rows:
            found = x, y, x + width, y + height
            if 0 <= y <= size[0] - height and not any(_overlap(found, other) for other in placed):
                return found
    return None


def _overlap(a: Rectangle, b: Rectangle) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
