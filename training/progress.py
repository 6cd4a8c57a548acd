"""What a process is doing, for the watch on runs that hang (`training.watchdog`)."""
from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntEnum


class Doing(IntEnum):
    """What a process does, in the order of a step."""

    STARTING = 0
    LOADING = 1
    LOSS = 2
    GRADIENTS = 3
    UPDATING = 4
    SAVING = 5
    EVALUATING = 6

    @property
    def words(self) -> str:
        """What to say of it."""
        return (
            "starting", "loading data", "computing the loss", "computing gradients", "updating the weights",
            "saving a checkpoint", "evaluating",
        )[self]


class Progress:
    """Where the main thread of a process is: it notes this as it goes, and the watch thread reads it.

    Attributes:
        doing: What it does.
        notes: How often it has noted something: where this stays, nothing moves.
    """

    def __init__(self):
        self.doing, self.notes, self._in_collective = Doing.STARTING, 0, False

    def note(self, doing: Doing):
        """Note what comes now."""
        self.doing = doing
        self.notes += 1

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Note that what comes now waits for other processes."""
        self._in_collective = True
        try:
            yield
        finally:
            self._in_collective = False
            self.notes += 1

    @property
    def waits(self) -> bool:
        """Whether it may wait for another process; gradients are all-reduced while they are computed."""
        return self._in_collective or self.doing == Doing.GRADIENTS
