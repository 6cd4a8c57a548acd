"""Waits for data that may never come: a stopped process, a dead file server, a pipe that nobody writes to."""
import math
import signal
import threading
from collections.abc import Callable
from typing import Any, TypeVar

from .launcher import has_peers
from .signals import MachineFault, SignalHandler

T = TypeVar("T")
# Seconds that data may still take once the run is asked to leave. A run of several processes cannot save itself without
# them; torchrun and Slurm wait for 30 seconds before they kill it.
GRACE, GRACE_WITH_PEERS = 5, 15


class NoDataFault(MachineFault):
    """No data came for too long."""


class GaveUpWaiting(Exception):
    """The run was asked to leave while it waited for data, which did not come."""


class _Enough(BaseException):
    """Ends a wait wherever it is; no Exception, since a reader of images takes any for a damaged image."""


def wait_for(get: Callable[[], T], seconds: float, arriving: Callable[[], Any] = lambda: None) -> T:
    """What `get` returns, called in the main thread; in others, the wait has no limit.

    The time while the process itself is stopped does not count.

    Args:
        get: May block for ever.
        seconds: After which it is given up; 0 for no limit.
        arriving: Returns what changes while something arrives, as a file does that is downloaded: the time then starts
            again.

    Raises:
        NoDataFault: It took longer.
        GaveUpWaiting: It took longer than `GRACE` after a signal that asks the run to leave.
    """
    if threading.current_thread() is not threading.main_thread():
        return get()
    left, seen = seconds or math.inf, None

    def count(number: int, frame: Any):
        nonlocal left, seen
        if left == seconds:
            seen = arriving()
        left -= 1
        if SignalHandler.is_leaving():
            left = min(left, GRACE_WITH_PEERS if has_peers() else GRACE)
        elif left <= 0 and arriving() != seen:
            left = seconds
        if left <= 0:
            raise _Enough

    handler = signal.signal(signal.SIGALRM, count)
    timer = signal.setitimer(signal.ITIMER_REAL, 1, 1)
    try:
        return get()
    except _Enough:
        pass
    finally:
        signal.setitimer(signal.ITIMER_REAL, *timer)
        signal.signal(signal.SIGALRM, handler)
    if SignalHandler.is_leaving():
        raise GaveUpWaiting
    raise NoDataFault(f"no data for {seconds:g} seconds: a data loading process or the storage does not answer")
