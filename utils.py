"""What every part of a run shares: processes, randomness, signals, logs."""
import errno
import json
import os
import random
import re
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from difflib import get_close_matches
from pathlib import Path
from typing import Any, BinaryIO, NoReturn
from urllib.parse import urlparse

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

# "Temporary failure, try again" of sysexits.h: the run was asked to leave and has saved itself; start it again.
EXIT_RESUME = 75
# torch has no class for gloo's errors, and gloo's words do not always name it.
_OF_PEERS = re.compile(
    r"gloo/|gloo timeout|caused pair closure|connection (reset|closed|refused)|nccl.*(remote|time|abort|connection)",
    re.IGNORECASE | re.DOTALL,
)
_DISK_FAULTS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS, errno.ESTALE)


class UserError(ValueError):
    """A mistake of the user's: one line that says what was wrong and what to do. A run ends with it and exit code 1."""

    exit_code = 1


class LostDataError(UserError):
    """Data that was there is gone, or is not what it should be: more than one image that could be passed over."""


class UsageError(UserError):
    """A wrong command line or recipe: exit code 2."""

    exit_code = 2


def nearest(name: str, known: Iterable[str], n: int = 1) -> str:
    """A hint at those of `known` that may have been meant, to end an error with; empty where none is near."""
    close = get_close_matches(name, list(known), n, cutoff=0.5)
    return f"; did you mean {' or '.join(close)}?" if close else ""


def check_name(kind: str, name: str, known: Iterable[str]):
    """Raises UsageError, with the nearest names, where `name` is not among those `known`."""
    if name not in known:
        raise UsageError(f"unknown {kind} {name!r}{nearest(name, known, n=3)}")


def fail(message: str, exit_code: int) -> int:
    """Print the one line of an error; returns `exit_code`."""
    with suppress(OSError):  # standard error may lie on the disk that is full
        # In one write, so that the lines of several processes do not run together.
        sys.stderr.write(f"error: {' '.join(message.split())}\n")
    return exit_code


def run_script(run: Callable[[], Any]) -> int:
    """Call `run`; returns the exit code: that of a user's mistake, 1 for a file or folder that cannot be used, or 0."""
    try:
        run()
    except UserError as error:
        return fail(str(error), error.exit_code)
    except OSError as error:
        if error.filename is None:
            raise
        return fail(f"{error.filename}: {error.strerror}", 1)
    return 0


def exit_with(code: int) -> NoReturn:
    """End the process; where something went wrong, at once.

    Python would wait for threads and processes first, and what is at fault may never answer.
    """
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):
            stream.flush()
    if code:
        os._exit(code)
    sys.exit(code)


def run_and_exit(run: Callable[[], int]) -> NoReturn:
    """End the process with what `run` returns, or with 1 and a traceback where it raises."""
    try:
        code = run()
    except Exception:
        traceback.print_exc()
        code = UserError.exit_code
    exit_with(code)


def explain_fault(error: OSError | RuntimeError) -> str | None:
    """What happened and what to do, in words, where an error is known; None where it may be a bug of ours."""
    text = str(error)
    if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in text:
        return (
            "memory ran out; lower --batch_size and raise --update_freq by as much, which trains the same, or pass "
            f"--grad_checkpointing ({_first_line(text)})"
        )
    if "does not have a deterministic implementation" in text:
        return f"--deterministic cannot train this network on this device ({_first_line(text)})"
    fault = _fault_of_machine(error)
    return fault and f"{fault}; what was saved is whole, go on with --auto_resume"


def _fault_of_machine(error: OSError | RuntimeError) -> str | None:
    text = str(error)
    if "DataLoader worker (pid" in text:  # torch raises it from a signal, wherever the run is
        return (
            "a process that reads images was killed, as happens where memory runs out; "
            f"give fewer --num_workers or more memory ({_first_line(text)})"
        )
    if isinstance(error, dist.DistError) or (_world_size() > 1 and _OF_PEERS.search(text)):
        return f"another process of the run ended, or did not answer within --dist_timeout ({_first_line(text)})"
    if isinstance(error, OSError) and error.errno in _DISK_FAULTS:
        return error.strerror + (f": {error.filename}" if error.filename else " in the output folder")
    return None


def _world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", 1))


def _first_line(text: str) -> str:
    return text.strip().splitlines()[0][:200]


# --- processes ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Process:
    """This process among those of the run."""

    device: torch.device
    rank: int = 0
    world_size: int = 1

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def is_distributed(self) -> bool:
        return self.world_size > 1

    def mean(self, values: torch.Tensor) -> torch.Tensor:
        """Mean of `values` over all processes."""
        return self.sum(values) / self.world_size

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Sum of `values` over all processes."""
        if self.is_distributed:
            dist.all_reduce(values)
        return values

    def max(self, value: int) -> int:
        """The largest `value` of all processes. It travels between the CPUs: nothing waits for a GPU."""
        if not self.is_distributed:
            return value
        largest = torch.tensor(value)
        dist.all_reduce(largest, dist.ReduceOp.MAX)
        return int(largest)


def start_process(device: str = "auto", timeout: float = 30.0) -> Process:
    """Join the run that torchrun or torch.distributed.launch started, or start one of a single process.

    Args:
        device: "auto" (a GPU where there is one), "cuda", "cuda:1" or "cpu".
        timeout: Minutes that a process waits for another before it gives up.

    Raises:
        UserError: The device is not there.
    """
    rank, world_size = int(os.environ.get("RANK", 0)), _world_size()
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        resolved = torch.device(device)
        if resolved.type == "cuda" and resolved.index is None:
            resolved = torch.device("cuda", local_rank)
        torch.empty(1, device=resolved)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"--device {device} cannot be used ({reason}); --device auto takes what is there") from error
    if resolved.type == "cuda":
        torch.cuda.set_device(resolved)
    if world_size > 1:
        # What is on the CPU travels by gloo also where there are GPUs: the word to save or to leave waits for none.
        backend = "cpu:gloo,cuda:nccl" if resolved.type == "cuda" else "gloo"
        wait = timedelta(minutes=timeout)
        store, rank, world_size = next(rendezvous("env://", timeout=wait))
        # With --master_port, torchrun's store outlives a restart, and with it the addresses of processes that are gone.
        store = dist.PrefixStore(f"start-{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=wait)
    return Process(resolved, rank, world_size)


def end_process():
    """Leave the process group. Gloo's needs no farewell, and torch 2.6 can hang in it when a peer has left before."""
    if dist.is_initialized() and dist.get_backend() != "gloo":
        dist.destroy_process_group()


def use_deterministic_algorithms():
    """Have torch compute the same bits in every run on a GPU too, or say which operation cannot."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.backends.cudnn.benchmark = False
    torch.use_deterministic_algorithms(True)
    # By default torch would then fill what it allocates, before what computes it writes all of it.
    torch.utils.deterministic.fill_uninitialized_memory = False


def derive_seed(*key: int) -> int:
    """Mix integers >= 0 into one 64-bit seed."""
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0])


def seed_generators(seed: int, *manual_seed: Callable[[int], Any]):
    """Start the generators of Python and NumPy, and those of torch that each `manual_seed` starts, from `seed`."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    for start in manual_seed:
        start(seed)


def seed_everything(seed: int, *salt: int):
    """Seed Python, NumPy and torch from `seed` and, say, the epoch, the step and the rank.

    Called at every step, it makes the state of the generators a function of the step, so that a checkpoint need not
    store them, and a run may go on with another number of processes.
    """
    seed_generators(derive_seed(seed, *salt) % 2**32, torch.manual_seed)


# --- files ----------------------------------------------------------------------------------------------------------


def is_url(source: str | Path) -> bool:
    """Whether a file or folder is one on a web server."""
    return urlparse(str(source)).scheme in ("http", "https")


def replace_file(path: Path, write: Callable[[BinaryIO], Any]):
    """Write `path` by `write` so that it is never half written, whatever ends the process or the machine."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    mask = os.umask(0)
    os.umask(mask)
    os.fchmod(handle, 0o666 & ~mask)  # as any file: mkstemp's are the owner's alone
    try:
        with os.fdopen(handle, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    with suppress(OSError):  # the new name too, where the file system can
        os.fsync(folder)
    os.close(folder)


# --- signals --------------------------------------------------------------------------------------------------------


class StopRequest:
    """Whether SIGTERM, SIGINT or SIGUSR1 has asked the run to leave. A SIGINT after any of them leaves at once."""

    SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)

    def __init__(self):
        self.signal: str | None = None

    def _note(self, number: int, frame: Any):
        if number == signal.SIGINT and self.signal is not None:
            os.write(2, b"left at once; the last checkpoint is as it was\n")
            os._exit(128 + number)
        self.signal = signal.Signals(number).name

    @contextmanager
    def heard(self) -> Iterator["StopRequest"]:
        """Listen, in the main thread."""
        before = {number: signal.signal(number, self._note) for number in self.SIGNALS}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


# --- logs -----------------------------------------------------------------------------------------------------------


class RunLog:
    """TensorBoard curves and one line of JSON per epoch in `log.txt`; silent on all processes but the main one."""

    def __init__(self, folder: Path | None, epoch: int = 0, step: int = 0):
        """The log of a run in `folder` that begins, or goes on, after `step` optimizer steps, in `epoch`.

        What a run that went further had logged before it was ended is taken back.
        """
        self.file = None
        self.tensorboard = None
        if folder is not None:
            from torch.utils.tensorboard import SummaryWriter

            self.file = folder / "log.txt"
            self.tensorboard = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)
            self._take_back(epoch)

    def _take_back(self, epoch: int):
        lines = self.file.read_text().splitlines() if self.file.exists() else []
        kept = []
        for line in lines:
            with suppress(json.JSONDecodeError):  # the run was ended in the middle of the line
                if json.loads(line)["epoch"] < epoch:
                    kept.append(line)
        if kept != lines:
            replace_file(self.file, lambda file: file.write("".join(f"{line}\n" for line in kept).encode()))

    def scalars(self, group: str, values: dict[str, float], step: int):
        if self.tensorboard is not None:
            for name, value in values.items():
                self.tensorboard.add_scalar(f"{group}/{name}", value, step)

    def close(self):
        if self.tensorboard is not None:
            self.tensorboard.close()

    def epoch(self, record: dict[str, Any]):
        if self.file is not None:
            self.tensorboard.flush()
            with open(self.file, "a") as file:
                file.write(json.dumps(record) + "\n")
