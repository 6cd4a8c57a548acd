"""Colours of classes in pictures."""
from functools import cache

import numpy as np

_COLOURS = 256  # of the palette of a PNG


@cache
def palette() -> np.ndarray:
    """(256, 3) uint8 colours of classes from 1: black for 0, and the others as far from all before them as can be.

    Distances are Euclidean in CIELAB, among colours that are neither nearly black nor nearly white.
    """
    levels = np.linspace(0, 255, 9).round().astype(np.uint8)
    candidates = np.stack(np.meshgrid(levels, levels, levels, indexing="ij"), axis=-1).reshape(-1, 3)
    places = _cielab(candidates)
    is_clear = (places[:, 0] > 30) & (places[:, 0] < 90)
    candidates, places = candidates[is_clear], places[is_clear]
    chosen = [int(np.flatnonzero((candidates == (255, 0, 0)).all(axis=1))[0])]
    nearest = np.full(len(places), np.inf)
    while len(chosen) < _COLOURS - 1:
        nearest = np.minimum(nearest, np.linalg.norm(places - places[chosen[-1]], axis=1))
        chosen.append(int(nearest.argmax()))
    return np.concatenate([np.zeros((1, 3), np.uint8), candidates[chosen]])


def colours_of(labels: np.ndarray) -> np.ndarray:
    """(N,) classes from 1, of any number, -> (N, 3) uint8 colours; those after the 255th have the first ones again."""
    return palette()[(labels.astype(np.int64) - 1) % (_COLOURS - 1) + 1]


def _cielab(colours: np.ndarray) -> np.ndarray:
    """(N, 3) uint8 sRGB colours in CIELAB, under D65."""
    x = colours / 255
    x = np.where(x > 0.04045, ((x + 0.055) / 1.055) ** 2.4, x / 12.92)
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    x = x @ to_xyz.T / (0.9505, 1.0, 1.089)
    x, y, z = np.where(x > 0.008856, np.cbrt(x), 7.787 * x + 16 / 116).T
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], axis=1)
