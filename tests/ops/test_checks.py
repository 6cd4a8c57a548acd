"""Arguments of the wrong kind."""
import numpy as np
import pytest

from ops.checks import check_positive, check_rates, check_whole

NO_NUMBERS = ["4", (7, 7), None, True, 2j]


@pytest.mark.parametrize("check,message,right,wrong", [
    (check_whole, "x must be a whole number, got ", [1, 7, np.int64(7)], [*NO_NUMBERS, 4.0, np.float32(4)]),
    (check_whole, "x must be at least 1, got ", [], [0, -3]),
    (check_positive, "x must be a positive number, got ", [1, 0.5, np.float32(4)],
     [*NO_NUMBERS, 0, -1.0, float("nan"), float("inf")]),
    (check_rates, "x must be a number from 0 to 1, got ", [0, 0.5, 1, np.float32(0.5)],
     [*NO_NUMBERS, -0.1, 1.5, float("nan")]),
])
def test_every_mistake_is_named(check, message, right, wrong):
    for value in right:
        check(x=value)
    for value in wrong:
        with pytest.raises(ValueError) as caught:
            check(y=1, x=value)
        assert str(caught.value) in (message + repr(value), message + str(value))


def test_the_least():
    check_whole(0, x=0)
    with pytest.raises(ValueError, match="x must be at least 0, got -1"):
        check_whole(0, x=-1)
