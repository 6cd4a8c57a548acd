"""training/waits.py: a wait for data ends, whatever keeps them from coming."""
import os
import signal
import threading
import time
from contextlib import suppress

import pytest

from training import waits
from training.signals import SignalHandler
from training.waits import GaveUpWaiting, NoDataFault, wait_for


def never():
    """As a reader of images, which takes any error for a damaged image."""
    while True:
        with suppress(Exception):
            time.sleep(60)


def ever_more():
    return time.monotonic()


@pytest.fixture(autouse=True)
def alarms_are_as_before():
    before = signal.getsignal(signal.SIGALRM)
    yield
    assert signal.getsignal(signal.SIGALRM) is before
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_data_that_do_not_come_end_a_wait():
    start = time.monotonic()
    with pytest.raises(NoDataFault, match="no data for 1 second"):
        wait_for(never, 1)
    assert time.monotonic() - start < 5


def test_what_is_still_arriving_is_waited_for():
    """As a shard that takes long to download; once nothing more of it comes, the wait ends."""
    start = time.monotonic()
    with pytest.raises(NoDataFault):
        wait_for(never, 2, arriving=lambda: min(int(time.monotonic() - start), 4))
    assert 5 < time.monotonic() - start < 11


@pytest.mark.parametrize("seconds,arriving", [(0, lambda: None), (0, ever_more), (2, ever_more)])
def test_a_signal_ends_a_wait_that_has_no_limit(monkeypatch, seconds, arriving):
    monkeypatch.setattr(waits, "GRACE", 1)
    with SignalHandler().installed():
        start = time.monotonic()
        threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM)).start()
        with pytest.raises(GaveUpWaiting):
            wait_for(never, seconds, arriving)
        assert time.monotonic() - start < 5


def test_data_that_come_are_given_whatever_was_asked():
    """Within its time, a healthy step is not cut short by a signal."""
    with SignalHandler().installed():
        os.kill(os.getpid(), signal.SIGTERM)
        assert wait_for(lambda: time.sleep(1.5) or "batch", 100) == "batch"


def test_several_processes_wait_longer(monkeypatch):
    """They cannot save without the data, and start from their last checkpoint."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(waits, "GRACE", 1)
    monkeypatch.setattr(waits, "GRACE_WITH_PEERS", 30)
    with SignalHandler().installed():
        os.kill(os.getpid(), signal.SIGTERM)
        assert wait_for(lambda: time.sleep(1.5) or "batch", 100) == "batch"


def test_errors_pass_through_a_wait():
    with pytest.raises(StopIteration):
        wait_for(lambda: next(iter(())), 1)


def test_waits_in_other_threads_have_no_alarm():
    found = []
    thread = threading.Thread(target=lambda: found.append(wait_for(lambda: "batch", 1)))
    thread.start()
    thread.join()
    assert found == ["batch"]
