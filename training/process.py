"""What may end around a process while it goes on: the readers of its output, and the process that started it."""
import ctypes
import errno
import io
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1  # of Linux's sys/prctl.h


class _Output(io.FileIO):
    """Standard output or error: what nobody reads any more, as after `| head` or on a closed terminal, is dropped.

    So is what a full disk does not take.
    """

    def write(self, data: bytes) -> int | None:
        try:
            return super().write(data)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):  # until there is room again
                return len(data)
            if error.errno not in (errno.EPIPE, errno.EIO):
                raise
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self.fileno())  # what libraries and processes started from here on write is dropped too
            os.close(null)
            return len(data)


def open_closed_streams():
    """Open the null device as each standard stream that was closed, which Python has as None.

    The next file that is opened would otherwise get its number, and what libraries print.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            stream = open(os.devnull, mode, errors="backslashreplace")  # noqa: SIM115, for as long as the process lives
            os.set_inheritable(stream.fileno(), True)
            setattr(sys, name, stream)


def outlive_readers():
    """Have this process go on, silently, when nobody reads its standard output or error any more."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is not getattr(sys, f"__{name}__"):
            continue  # a notebook's or a test's, or done before
        raw = _Output(stream.fileno(), "w", closefd=False)
        buffer = raw if stream.write_through else io.BufferedWriter(raw)  # of `python -u`
        again = io.TextIOWrapper(
            buffer, stream.encoding, stream.errors, line_buffering=stream.line_buffering,
            write_through=stream.write_through,
        )
        setattr(sys, name, again)


def end_with_parent(number: signal.Signals = signal.SIGKILL):
    """Have Linux send this process a signal when the one that started it ends, however that ends.

    More exactly, when the thread that started it ends.
    """
    if sys.platform == "linux":
        parent = os.getppid()
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, number)
        if os.getppid() != parent:  # it ended just before
            os.kill(os.getpid(), number)
