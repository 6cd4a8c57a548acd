"""Pictures of objects: masks, boxes and names where they belong, and legible."""
import numpy as np
import pytest
from PIL import ImageDraw

from tasks.detection import drawing
from tasks.detection.drawing import _any_of, draw_objects

RED, GREEN = (255, 0, 0), (0, 200, 0)
GREY = 100


def grey(height, width):
    return np.full((height, width, 3), GREY, np.uint8)


def draw(image, boxes, names, scores=None, masks=None, colours=(RED, GREEN)):
    colours = np.array([colours[i % len(colours)] for i in range(len(boxes))], np.uint8).reshape(-1, 3)
    return draw_objects(image, np.array(boxes, np.float32).reshape(-1, 4), names, scores, masks, colours)


@pytest.fixture
def written(monkeypatch):
    """Texts, their fonts' sizes, and the rectangles that they take, in the order in which they are written."""
    found = []
    text = ImageDraw.ImageDraw.text

    def note(self, place, words, fill, font):
        found.append((words, font.size, self.textbbox(place, words, font)))
        text(self, place, words, fill, font)

    monkeypatch.setattr(ImageDraw.ImageDraw, "text", note)
    return found


def test_a_box_by_hand():
    """Corners are rounded; the line lies within the box, is as wide as the image asks, and leaves what is in it."""
    image = grey(300, 300)
    before = image.copy()
    picture = draw(image, [[49.6, 80.4, 120, 160]], [""])
    assert picture.dtype == np.uint8 and picture.shape == image.shape and np.array_equal(image, before)
    is_red = (picture == RED).all(axis=2)
    expected = np.zeros((300, 300), bool)
    expected[80:160, 50:120] = True
    expected[81:159, 51:119] = False
    assert np.array_equal(is_red, expected)
    assert (picture[~is_red] == GREY).all()
    wide = (draw(grey(1200, 1200), [[100, 200, 900, 1000]], [""]) == RED).all(axis=2)
    assert wide[600, 100:104].all() and not wide[600, 104] and not wide[600, 99]


def test_masks_are_mixed_and_have_a_border():
    masks = np.zeros((1, 60, 80), bool)
    masks[0, 20:40, 10:50] = True
    picture = draw(grey(60, 80), [[10, 20, 50, 40]], [""], masks=masks)
    assert picture[30, 30].tolist() == [162, 60, 60]  # 0.6 * 100 + 0.4 * (255, 0, 0)
    assert (picture[20:40, 10] == RED).all() and (picture[39, 10:50] == RED).all()
    assert (picture[50:] == GREY).all() and (picture[20:40, 51:] == GREY).all()
    ring = np.ones((9, 9), bool)
    ring[4, 4] = False
    pixels = np.zeros((9, 9, 3), np.uint8)
    drawing._draw_mask(pixels, ring, np.array(GREEN), 1)
    border = (pixels == GREEN).all(axis=2)
    expected = np.ones((9, 9), bool)
    expected[1:8, 1:8] = False
    expected[3:6, 3:6] = True
    expected[4, 4] = False
    assert np.array_equal(border, expected)
    assert pixels[4, 4].tolist() == [0, 0, 0] and pixels[2, 2].tolist() == [0, 80, 0]
    drawing._draw_mask(pixels, np.zeros((9, 9), bool), np.array(RED), 1)
    assert not (pixels == RED).all(axis=2).any()


@pytest.mark.parametrize("number", [1, 2, 3, 5, 8, 21])
def test_whether_any_of_some_rows_is_true(number):
    values = np.random.default_rng(0).random((40, 7)) < 0.05
    expected = [values[i : i + number].any(axis=0) for i in range(40 - number + 1)]
    assert np.array_equal(_any_of(values, number), expected)


def test_the_first_objects_lie_above_the_others(written):
    """In their pixels; and of their names, those of the first are there where there is no room for all."""
    masks = np.zeros((2, 90, 90), bool)
    masks[:, 30:60, 30:60] = True
    picture = draw(grey(90, 90), [[20, 20, 80, 80]] * 2, ["", ""], masks=masks)
    assert (picture[30:60, 30] == RED).all() and (picture[20:80, 20] == RED).all()
    assert picture[45, 45].tolist() == [138, 84, 36], "green was mixed in before red"
    written.clear()
    draw(grey(40, 80), [[0, 0, 80, 40]] * 20, [f"name {i}" for i in range(20)])
    names = [text for text, _, _ in written]
    assert names and names == [f"name {i}" for i in range(len(names))] and len(names) < 20


@pytest.mark.parametrize("box", [
    [0, 0, 300, 200], [0, 0, 20, 10], [280, 0, 300, 200], [285, 190, 300, 200], [0, 195, 300, 200],
    [100, 100, 101, 101], [-20, -30, 400, 500],
])
def test_names_lie_in_the_image(box, written):
    draw(grey(200, 300), [box], ["an animal"], [0.987])
    (text, _, (left, top, right, bottom)), = written
    assert text == "an animal 99 %" and 0 <= left < right <= 300 and 0 <= top < bottom <= 200


def test_names_of_close_objects_do_not_cover_one_another(written):
    boxes = [[20 + 4 * i, 50 + 3 * i, 120 + 4 * i, 140 + 3 * i] for i in range(7)]
    draw(grey(200, 300), boxes, [f"person {i}" for i in range(7)])
    assert len(written) == 7
    for i, (_, _, a) in enumerate(written):
        for _, _, b in written[:i]:
            assert a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]


def test_letters_grow_with_the_image(written):
    for side in (50, 640, 4000):
        draw(grey(side, side), [[0, 0, side, side]], ["cat"])
    small, middle, large = (size for _, size, _ in written)
    assert small == 10 and 12 <= middle <= 20 and large == round(4000 / 42)


@pytest.mark.parametrize("with_matplotlib", [True, False])
def test_names_of_any_script_and_length(monkeypatch, with_matplotlib, written):
    monkeypatch.setattr(drawing, "can_draw", lambda: with_matplotlib)
    draw(grey(200, 300), [[50, 50, 200, 150]], ["\u732b\n"])
    draw(grey(200, 300), [[50, 50, 200, 150]], ["x" * 500])
    assert written[0][0] == "\\u732b\\n" and set(written[1][0]) == {"x"} and 280 < written[1][2][2] <= 300


def test_text_is_told_from_its_ground():
    """Black on a bright colour, white on a dark one."""
    for colour, ink in (((250, 240, 100), 0), ((60, 0, 120), 255)):
        picture = draw(grey(200, 300), [[50, 50, 200, 150]], ["HHHH"], colours=[colour])
        assert (picture[20:50] == ink).all(axis=2).any() and not (picture == 255 - ink).all(axis=2).any()


@pytest.mark.parametrize("size", [(1, 1), (3, 200), (200, 3)])
def test_images_too_small_for_a_name(size):
    picture = draw(grey(*size), [[0, 0, size[1], size[0]]], ["cat"], [0.5], np.ones((1, *size), bool))
    assert picture.shape == (*size, 3) and (picture == RED).all(axis=2).any()


def test_no_object():
    assert np.array_equal(draw(grey(20, 30), [], [], [], np.zeros((0, 20, 30), bool)), grey(20, 30))
