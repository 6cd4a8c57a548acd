"""Writing files behind the training, which meanwhile goes on."""
import os
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress

# A process that is forked has a copy of every lock as it was held, and would wait for this thread's for ever: none is
# forked while something is written.
_WRITING = threading.RLock()


def _hold():
    while True:
        try:
            _WRITING.acquire()
            return
        except BaseException:  # of a signal's handler: Python would print it, and fork all the same
            continue


def _release():
    with suppress(RuntimeError):  # it is not held any more
        while True:
            _WRITING.release()


os.register_at_fork(before=_hold, after_in_parent=_release, after_in_child=_release)


def _undisturbed(write: Callable[[], None]):
    with _WRITING:
        write()


class BackgroundWriter:
    """Calls functions that write, one after another, in a thread of its own."""

    def __init__(self):
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="writer")
        self._pending: list[Future] = []

    def start(self, write: Callable[[], None]):
        """Have `write` called, once those before are done."""
        self._pending.append(self._pool.submit(_undisturbed, write))

    def check(self):
        """Raise what was raised in writing, without waiting for what is still to be written."""
        if any(future.done() and future.exception() for future in self._pending):
            self.finish()

    def finish(self):
        """Wait until all is written; raises the first error of doing so, once."""
        wait(self._pending)  # here a signal may raise; what is being written is then still to be waited for
        pending, self._pending = self._pending, []
        for future in pending:
            future.result()
