"""Plain data beside the tensors of a checkpoint: what `torch.load` may make of it, all of it inert.

Published checkpoints store their command line as a Namespace, and their metrics as numbers and arrays of NumPy. NumPy's
own types are not handed to a file: by the state of a dtype, a file can have its bytes taken for addresses of objects.
Stand-ins read what NumPy 1 and 2 write of plain numbers and texts, and refuse all else.
"""
import argparse
import math
import re
from typing import Any

import numpy as np

# Booleans, integers, floats, complex numbers, bytes and texts, as `numpy.dtype.str` writes them without byte order.
_PLAIN_CODE = re.compile(r"b1|[iu][1248]|f\d+|c\d+|[SU]\d+")


class NotPlainError(ValueError):
    """Data of NumPy that is not what NumPy writes of numbers and texts."""


class _Dtype:
    """Stands for `numpy.dtype`."""

    def __init__(self, code: Any, *_: Any):
        if not (isinstance(code, str) and _PLAIN_CODE.fullmatch(code)):
            raise NotPlainError("a type of NumPy that is no number and no text")
        self.dtype = np.dtype(code)

    def __setstate__(self, state: tuple):
        # version, byte order, base, names, fields, and sizes, which follow from the code
        _, order, *structure = state[:5]
        if order not in ("<", ">", "|", "=") or structure != [None, None, None]:
            raise NotPlainError("a type of NumPy with fields")
        self.dtype = self.dtype.newbyteorder(order)


class _Array:
    """Stands for `numpy.ndarray`."""

    value: np.ndarray | None = None

    def __setstate__(self, state: tuple):
        _, shape, dtype, is_fortran, data = state
        self.value = _read(shape, dtype, data, "F" if is_fortran else "C")


def _read(shape: tuple[int, ...], dtype: Any, data: Any, order: str = "C") -> np.ndarray:
    if not isinstance(dtype, _Dtype) or not isinstance(data, bytes):
        raise NotPlainError("an array of NumPy that holds no numbers and no texts")
    if dtype.dtype.itemsize == 0 and math.prod(shape) > 1:  # any number of empty texts, for which NumPy takes memory
        raise NotPlainError("an array of NumPy of nothing")
    return np.ndarray(shape, dtype.dtype, data, order=order).copy("K")


def _scalar(dtype: Any, data: Any) -> np.generic:
    """Stands for the function by which NumPy reads a number."""
    return _read((), dtype, data)[()]


def _reconstruct(*_: Any) -> _Array:
    """Stands for the function by which NumPy makes the array whose content follows."""
    return _Array()


# The globals that a file may name, for `torch.serialization.safe_globals`.
PLAIN = [
    argparse.Namespace,
    (_Dtype, "numpy.dtype"),
    (_Array, "numpy.ndarray"),
    *(
        (function, f"numpy.{core}.multiarray.{name}")
        for core in ("core", "_core")
        for name, function in (("scalar", _scalar), ("_reconstruct", _reconstruct))
    ),
]


def as_numpy(content: Any) -> Any:
    """What was read, with arrays and types of NumPy in the place of their stand-ins; dictionaries and lists are kept.

    Raises:
        NotPlainError: An array has no content.
    """
    return _replaced(content, {})


def _replaced(value: Any, seen: dict[int, tuple[Any, Any]]) -> Any:
    """What takes the place of `value`. `seen` has what was met, lest it is freed, with what takes its place."""
    if id(value) in seen:
        return seen[id(value)][1]
    seen[id(value)] = value, value  # a list may hold itself
    new = value
    if isinstance(value, _Dtype):
        new = value.dtype
    elif isinstance(value, _Array):
        new = value.value
        if new is None:
            raise NotPlainError("an array of NumPy without content")
    elif isinstance(value, argparse.Namespace):
        _replaced(vars(value), seen)
    elif type(value) is tuple:
        items = tuple(_replaced(item, seen) for item in value)
        if any(item is not old for item, old in zip(items, value, strict=True)):
            new = items
    elif isinstance(value, dict | list):
        for key, item in list(value.items() if isinstance(value, dict) else enumerate(value)):
            if (replacement := _replaced(item, seen)) is not item:
                value[key] = replacement
    seen[id(value)] = value, new
    return new
