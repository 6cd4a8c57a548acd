"""How a run ends: signals that ask it to leave, exit codes, and faults of the machine reported in one line."""
import errno
import multiprocessing
import os
import re
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, ClassVar, NoReturn

import torch
import torch.distributed as dist

from utils import UserError

from .compiler import compilation_error
from .launcher import has_peers
from .process import outlive_readers

# EX_TEMPFAIL of sysexits.h: the run was asked to leave and has saved itself; start it again.
EXIT_RESUME = 75
# The run diverged: started again with the same settings, it would do so again.
EXIT_NON_FINITE = 3
# torch has no class for gloo's errors, and gloo's words do not always name it.
_OF_PEERS = re.compile(
    r"gloo/|gloo timeout|caused pair closure|connection (reset|closed|refused)|nccl.*(remote|time|abort|connection)",
    re.IGNORECASE | re.DOTALL,
)
# torch's, where a batch is handed over; Triton too speaks of shared memory, which is a GPU's.
_OF_SHARED_MEMORY = re.compile(r"</torch_|/dev/shm|unable to \w+ shared memory|your shared memory limit")
_DISK_FAULTS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS, errno.ESTALE)


class OutOfMemoryFault(UserError):
    """The device, or the machine, had no more memory."""


class NondeterministicFault(UserError):
    """An operation has no deterministic implementation on this device."""


class MachineFault(UserError):
    """The machine failed, not the run: a checkpoint that was saved before is intact."""


class WorkerFault(MachineFault):
    """A data loading process was killed."""


class HostMemoryFault(MachineFault):
    """A process has no more memory, that of a GPU aside."""


class SharedMemoryFault(MachineFault):
    """There is no more shared memory, in which data loading processes hand over their batches."""


class OpenFilesFault(MachineFault):
    """A process may open no more files; a batch that is handed over is one too."""


class TemporaryFolderFault(MachineFault):
    """No socket can be made in the temporary folder, through which batches are handed over."""


class PeerFault(MachineFault):
    """Another process of the run ended, or does not answer."""


def fault_of(error: OSError | RuntimeError | MemoryError) -> UserError | None:
    """An error of torch's or the system's as one of those above or the compiler's; None where it may be our bug."""
    text = str(error)
    if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in text or "CUDA out of memory" in text:
        return OutOfMemoryFault(f"out of memory ({_first_line(text)})")
    if fault := compilation_error(error) or _too_little(error, text):
        return fault
    if "does not have a deterministic implementation" in text:
        return NondeterministicFault(f"this network cannot be trained deterministically here ({_first_line(text)})")
    if "DataLoader worker (pid" in text:  # torch raises it from a signal handler, wherever the run is
        return WorkerFault(f"a data loading process was killed, as happens when memory runs out ({_first_line(text)})")
    if isinstance(error, dist.DistError) or (has_peers() and _OF_PEERS.search(text)):
        return PeerFault(f"another process of the run ended, or did not answer in time ({_first_line(text)})")
    if isinstance(error, OSError) and error.errno in _DISK_FAULTS:
        return MachineFault(error.strerror + (f": {error.filename}" if error.filename else " in the output folder"))
    return None


def _too_little(error: Exception, text: str) -> UserError | None:
    """The fault of a process, mostly of one that loads data, that has too little of something other than a GPU."""
    number = getattr(error, "errno", None)
    if isinstance(error, MemoryError) or re.search(r"\bMemoryError", text) or number == errno.ENOMEM:
        return HostMemoryFault(f"out of memory ({_first_line(text or 'MemoryError')})")
    if os.strerror(errno.EMFILE) in text or os.strerror(errno.ENFILE) in text:
        return OpenFilesFault(f"too many open files ({_first_line(text)})")
    if _OF_SHARED_MEMORY.search(text):
        return SharedMemoryFault(f"shared memory, /dev/shm, is too small or full ({_first_line(text)})")
    if "AF_UNIX path too long" in text:
        return TemporaryFolderFault(f"the path of the temporary folder {tempfile.gettempdir()} is too long for sockets")
    return None


def _first_line(text: str) -> str:
    """The first line of an error's text or, of a data loading process's, which is a traceback, the last."""
    lines = text.strip().splitlines()
    return lines[-1 if text.startswith("Caught ") else 0][:200]


def exit_with(code: int) -> NoReturn:
    """End the process; after an error at once.

    Python would first wait for threads and processes, and the one at fault, or one that is stopped, may never answer.
    """
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):
            stream.flush()
    if code:
        os._exit(code)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would take them for faults
    for child in multiprocessing.active_children():
        child.kill()
    sys.exit(code)


def run_and_exit(run: Callable[[], int]) -> NoReturn:
    """End the process with the exit code that `run` returns, or with 1 and what Python prints where it raises."""
    outlive_readers()
    try:
        code = run()
    except Exception:
        sys.excepthook(*sys.exc_info())
        code = UserError.exit_code
    exit_with(code)


class SignalHandler:
    """Notes a signal that asks the run to leave. A SIGINT after any of them ends it at once.

    A SIGHUP comes when a terminal or an ssh connection is closed; one that was ignored at the start, as under nohup,
    still is.

    Attributes:
        signal: The name of the last one; None before.
        kept: What to say then of the run's checkpoints; None before there can be one.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
    _installed: ClassVar["SignalHandler | None"] = None

    def __init__(self):
        self.signal: str | None = None
        self.kept: Callable[[], str] | None = None

    def _note(self, number: int, frame: Any):
        if number == signal.SIGINT and self.signal is not None:
            line = "; ".join(["ended at once", *([self.kept()] if self.kept else [])])
            with suppress(OSError):  # the terminal may be closed
                os.write(2, f"\n{line}\n".encode(errors="backslashreplace"))  # a bar may stand on this line
            os._exit(128 + number)
        self.signal = signal.Signals(number).name

    @classmethod
    def is_leaving(cls) -> bool:
        """Whether the handler that is installed, if one is, has noted a signal."""
        return cls._installed is not None and cls._installed.signal is not None

    @contextmanager
    def installed(self) -> Iterator["SignalHandler"]:
        """Handle these signals, in the main thread."""
        ignored = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        numbers = [number for number in self.SIGNALS if not (ignored and number == signal.SIGHUP)]
        before = {number: signal.signal(number, self._note) for number in numbers}
        SignalHandler._installed = self
        try:
            yield self
        finally:
            SignalHandler._installed = None
            for number, handler in before.items():
                signal.signal(number, handler)
