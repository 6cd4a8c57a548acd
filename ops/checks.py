"""Checks of arguments. A message names the argument and what was given."""
import math
from numbers import Integral, Real
from typing import Any


def _is(value: Any, kind: type) -> bool:
    """Whether it is a number of that kind; True and False are none."""
    return isinstance(value, kind) and not isinstance(value, bool)


def check_whole(least: int = 1, **values: Any):
    """Raises ValueError unless each of `values`, by name, is a whole number of at least `least`."""
    for name, value in values.items():
        if not _is(value, Integral):
            raise ValueError(f"{name} must be a whole number, got {value!r}")
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")


def check_positive(**values: Any):
    """Raises ValueError unless each of `values`, by name, is a positive number."""
    for name, value in values.items():
        if not _is(value, Real) or not 0 < value < math.inf:
            raise ValueError(f"{name} must be a positive number, got {value!r}")


def check_rates(**values: Any):
    """Raises ValueError unless each of `values`, by name, is a number from 0 to 1."""
    for name, value in values.items():
        if not _is(value, Real) or not 0 <= value <= 1:
            raise ValueError(f"{name} must be a number from 0 to 1, got {value!r}")
