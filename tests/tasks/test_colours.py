"""Colours of classes, by which they are told apart."""
import numpy as np

from tasks.colours import _cielab, colours_of, palette


def test_colours_are_far_apart():
    """The first of them above all, in CIELAB by scikit-image's values of four colours; none comes twice."""
    colours = palette()
    assert colours.shape == (256, 3) and colours.dtype == np.uint8
    assert colours[0].tolist() == [0, 0, 0] and len({tuple(colour) for colour in colours.tolist()}) == 256
    known = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255], [128, 128, 128]], np.uint8)
    expected = [[53.24, 80.09, 67.2], [87.73, -86.18, 83.18], [32.3, 79.2, -107.86], [53.59, 0, 0]]
    assert np.abs(_cielab(known) - expected).max() < 0.1
    places = _cielab(colours[1:])
    for number, least in ((5, 80), (11, 50), (20, 35), (150, 12)):
        distances = np.linalg.norm(places[:number, None] - places[None, :number], axis=-1) + 1e3 * np.eye(number)
        assert distances.min() > least, number


def test_classes_beyond_the_palette_have_the_first_colours_again():
    colours = colours_of(np.array([1, 255, 256, 511], np.int32))
    assert np.array_equal(colours, palette()[[1, 255, 1, 1]])
