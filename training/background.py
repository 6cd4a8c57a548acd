"""Writing files behind the training, which meanwhile goes on."""
import os
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait

# A process that is forked has a copy of every lock as it was held, and would wait for this thread's for ever: none is
# forked while something is written.
_WRITING = threading.Lock()
os.register_at_fork(before=_WRITING.acquire, after_in_parent=_WRITING.release, after_in_child=_WRITING.release)


def _undisturbed(write: Callable[[], None]):
    with _WRITING:
        write()


class BackgroundWriter:
    """Calls functions that write, in a thread of its own, never two at once."""

    def __init__(self):
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="writer")
        self._pending: Future | None = None

    def start(self, write: Callable[[], None]):
        """Have `write` called, once the one before is done; raises what that one raised instead."""
        self.finish()
        self._pending = self._pool.submit(_undisturbed, write)

    def check(self):
        """Raise what the last one raised, without waiting for it to be done."""
        if self._pending is not None and self._pending.done():
            self.finish()

    def finish(self):
        """Wait until it is written; raises what was raised in doing so, once."""
        if self._pending is None:
            return
        wait([self._pending])  # here a signal may raise; what is being written is then still to be waited for
        pending, self._pending = self._pending, None
        pending.result()
