"""One task's time, and its failures: what goes wrong with a contender stays with that contender."""
import gc
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

NO_TIME = "left out for lack of time"
LONGEST_REASON = 160


class Unsupported(Exception):
    """A contender cannot do what is asked of it; the message says why."""


class DeviceLost(Exception):
    """The device no longer answers: this process cannot measure anything more."""

    def __init__(self, contender: str, reason: str):
        super().__init__(f"{contender}: {reason}")
        self.contender = contender
        self.reason = reason


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device, or the CPU's allocator, had no more memory."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error)


def describe(error: BaseException) -> str:
    """An error as one short line for a table."""
    if is_out_of_memory(error):
        return "out of memory"
    kind = "" if isinstance(error, Unsupported) else f"{type(error).__name__}: "
    text = " ".join(f"{kind}{error}".split())
    return text if len(text) <= LONGEST_REASON else text[: LONGEST_REASON - 3] + "..."


def release(device: torch.device):
    """Give back what failed or finished contenders held. Raises what the device has to say if it is lost."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()


@dataclass
class Trial:
    """What a task may use, and which of its contenders have failed.

    Args:
        device: Where to measure.
        deadline: `time.time()` by which this task should be through; rounds are chosen to fit.
        section_deadline: `time.time()` after which nothing dear is begun.
        failures: Contenders that are out, with the reason; those of an earlier attempt are there from the start.
        least_rounds: Rounds to run however late it is.
        most_rounds: Rounds to run however early it is.
        announce: Called with the name of each contender before it runs.
    """
    device: torch.device
    deadline: float = float("inf")
    section_deadline: float = float("inf")
    failures: dict[str, str] = field(default_factory=dict)
    least_rounds: int = 5
    most_rounds: int = 30
    announce: Callable[[str], None] = lambda name: None

    def left(self) -> float:
        """Seconds that this task has left; negative once it is late."""
        return self.deadline - time.time()

    @contextmanager
    def guard(self, name: str):
        """An exception in here is a failure of contender `name`, and no more than that.

        Raises:
            DeviceLost: The device does not answer after the failure.
        """
        self.announce(name)
        try:
            yield
        except Exception as error:
            self.failures[name] = describe(error)
        if name in self.failures:
            # Outside of the handler: until there, the traceback holds the tensors of all its frames.
            try:
                release(self.device)
            except Exception as error:
                raise DeviceLost(name, self.failures[name]) from error
