"""Class names of any script are legible in pictures: no letter is drawn as the box of what a font has not."""
import warnings

import numpy as np
import pytest
import torch
from PIL import ImageDraw

from tasks import confusion
from tasks.classification import pictures
from tasks.lettering import drawable, load_font

NAMES = ["Gr\u00fc\u00dfe", "robe d\u2019\u00e9te\u0301", "\u03b3\u03ac\u03c4\u03b1", "\u043a\u043e\u0448\u043a\u0430",
         "\u732b", "a\nb"]


@pytest.mark.parametrize("with_matplotlib,expected", [
    (True, [NAMES[0], "robe d\u2019\u00e9t\u00e9", *NAMES[2:4], "\\u732b", "a\\nb"]),
    (False, ["Gru\\xdfe", "robe d'ete", "\\u03b3\\u03ac\\u03c4\\u03b1", "\\u043a\\u043e\\u0448\\u043a\\u0430",
             "\\u732b", "a\\nb"]),
])
def test_letters_that_a_font_lacks_are_drawn_as_others(with_matplotlib, expected):
    font, letters = load_font(with_matplotlib)
    assert [drawable(name, letters) for name in NAMES] == expected
    box = bytes(font.getmask("\uffff"))
    assert not [c for text in expected for c in text if bytes(font.getmask(c)) == box]


@pytest.mark.parametrize("with_matplotlib", [True, False])
def test_titles_hold_no_boxes(monkeypatch, with_matplotlib):
    drawn = []
    text = ImageDraw.ImageDraw.text
    monkeypatch.setattr(pictures, "can_draw", lambda: with_matplotlib)
    monkeypatch.setattr(ImageDraw.ImageDraw, "text", lambda self, place, line, **k: drawn.append((line, k["font"])) or
                        text(self, place, line, **k))
    pictures.draw_grid(torch.zeros(len(NAMES), 3, 128, 128), [(name, "") for name in NAMES], (0.5,) * 3, (0.5,) * 3)
    lines, fonts = zip(*drawn, strict=True)
    (font,) = set(fonts)
    assert font is load_font(with_matplotlib)[0] and drawable(NAMES[1], load_font(with_matplotlib)[1]) in lines


def test_the_confusion_matrix_names_them_alike():
    """matplotlib would draw boxes, and warn of each on several lines."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure = confusion.confusion_figure(np.eye(len(NAMES), dtype=np.int64), NAMES)
        confusion.as_pixels(figure)
    shown = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert shown == [drawable(name, load_font(with_matplotlib=True)[1]) for name in NAMES]
