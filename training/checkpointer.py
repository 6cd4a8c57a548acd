"""Saves a run when a save is due, and ends it when it is asked to leave."""
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .alike import check_same_weights
from .checkpoints import CheckpointStore
from .distributed import Distributed
from .meter import Meter, check_finite
from .options import CheckpointOptions
from .progress import Doing
from .restarts import MOST, NoProgressError, count_starts
from .run import Run
from .signals import SignalHandler
from .waits import GaveUpWaiting


class Stopped(Exception):
    """The run was asked to leave, and resumes from what is saved in `folder`.

    Args:
        message: How it stopped.
        folder: The run's.
        together: Whether all processes have agreed to leave, and none may wait for another one.
    """

    def __init__(self, message: str, folder: Path, together: bool = True):
        super().__init__(message)
        self.folder, self.together = folder, together


class Checkpointer:
    """Saves a run when a save is due, and ends it when it is asked to leave: on all processes at the same step.

    Args:
        run: The run.
        store: Where the main process writes.
        distributed: This process.
        signals: Whether a signal has come; where another ends the run, it says what the store holds.
        recipe: What was asked for, to be saved with the run.
        options: How often to save.
    """

    def __init__(
        self,
        run: Run,
        store: CheckpointStore,
        distributed: Distributed,
        signals: SignalHandler,
        recipe: dict[str, Any],
        options: CheckpointOptions,
    ):
        self.run, self.store, self.distributed, self.signals = run, store, distributed, signals
        self.recipe, self.options = recipe, options
        signals.kept = store.kept
        self.saved_at, self.position_before = time.monotonic(), self._position()
        self.meter: Meter | None = None  # of an epoch, from its first step to its end

    def after_step(self, meter: Meter):
        """Save, and leave, where it is time to.

        Raises:
            Stopped: A signal came to one of the processes.
            UserError: What was last saved could not be written.
            NoProgressError: A signal came in each of several starts, and none of them got any further.
        """
        self.store.check()
        self.meter = meter
        if self.run.clock.epoch_is_over:
            return  # saved by `after_epoch`, once the processes have shared batch norm's statistics
        agreed = self._agree()
        if agreed:
            self._read_meter()
            check_same_weights(self.run.model, self.distributed)
            self._write()
        if agreed >= 2:
            self._leave()

    def after_epoch(self, meter: Meter):
        """Save the trained epoch, before its evaluation: nothing that happens there costs the epoch.

        Also called where a run resumes from there; then, in a new folder, that is its first checkpoint.
        """
        clock = self.run.clock
        self.run.meter, self.meter = meter.state_dict(), None  # for `save_best` too, whether or not a save is due
        if self._agree() or clock.is_last_epoch or (clock.epoch + 1) % self.options.save_every == 0:
            check_same_weights(self.run.model, self.distributed)
            self._write_once()
            if self.distributed.is_main and not self.store.steps():
                self.store.finish()  # a run that has logged an epoch which it saves has a checkpoint

    def between_epochs(self):
        """Save and leave, where a signal came while the run did not train.

        Raises:
            Stopped: It did.
            NoProgressError: It did, as in several starts before, none of which got any further.
        """
        if self.distributed.max(self.signals.signal is not None):
            self._write()
            self._leave()

    @contextmanager
    def leaving_without_data(self) -> Iterator[None]:
        """Leave where a signal came while this process waited for data, which did not come.

        A run of one process saves itself as it was after its last step; several cannot agree on a step.

        Raises:
            Stopped: So it was.
            NoProgressError: It was, as in several starts before, none of which got any further.
        """
        try:
            yield
        except GaveUpWaiting:
            if self.distributed.is_distributed:
                how = f"without data, {self.store.kept()}"
                raise self._stopped(how, self._starts_in_vain(), together=False) from None
            self._read_meter()
            self._write_once()
            self._leave()

    def ends_early(self) -> bool:
        """Whether the run is to end before its last epoch, for want of a better evaluation; saves it then."""
        # Other processes may find another best: on a GPU, evaluations differ in the last digits.
        waited = self.distributed.max(self.run.epochs_without_better if self.distributed.is_main else 0)
        if self.options.patience is None or waited < self.options.patience or self.run.clock.is_last_epoch:
            return False
        self._write_once()
        return True

    def save_best(self):
        """Save the run as its best."""
        self.distributed.progress.note(Doing.SAVING)
        if self.distributed.is_main:
            if not self.store.has(self.run.clock.steps_taken):
                self._write()
            self.store.save_best(self.run.clock.steps_taken)

    def _agree(self) -> int:
        """2 where a process was asked to leave, 1 where a save is due, else 0; the same on all processes."""
        return self.distributed.max(2 * (self.signals.signal is not None) + self._is_due())

    def _is_due(self) -> bool:
        every_steps, every_minutes = self.options.save_every_steps, self.options.save_every_minutes
        by_steps = every_steps is not None and self.run.clock.global_step % every_steps == 0
        # The main process's clock counts; the others learn from it.
        by_time = every_minutes is not None and time.monotonic() - self.saved_at >= 60 * every_minutes
        return by_steps or (by_time and self.distributed.is_main)

    def _write_once(self):
        """Write a checkpoint of this step, where there is none yet."""
        if not self.store.has(self.run.clock.steps_taken):
            self._write()

    def _read_meter(self):
        """Where an epoch is being trained, have the run hold what was measured; raises NonFiniteLossError."""
        if self.meter is not None:
            self.meter.gather(self.run.clock.epoch)
            check_finite(self.run)
            self.run.meter = self.meter.state_dict()

    def _write(self):
        self.distributed.progress.note(Doing.SAVING)
        if self.distributed.is_main:
            self.store.save(self.run.clock.steps_taken, dict(self.run.state_dict(), args=self.recipe))
        self.saved_at = time.monotonic()

    def _leave(self):
        self.distributed.progress.note(Doing.SAVING)
        # A launcher that sees one process end may end the others: not before the main one has written what it saved.
        self.store.finish()
        starts = self.distributed.max(self._starts_in_vain())
        raise self._stopped(f"saved as {self.store.path(self.run.clock.steps_taken)}", starts)

    def _position(self) -> list[int]:
        return [self.run.clock.epoch, self.run.clock.step]

    def _starts_in_vain(self) -> int:
        """How many starts in a row, this one included, got no further; the main process counts them."""
        in_vain = self.distributed.is_main and self._position() == self.position_before
        return count_starts(self.store.folder, self._position()) if in_vain else 0

    def _stopped(self, how: str, starts: int, together: bool = True) -> Stopped | NoProgressError:
        clock, by = self.run.clock, self.signals.signal or "a signal to another process"
        message = f"{by}: stopped in epoch {clock.epoch} after step {clock.step} of {clock.epoch_steps}, {how}"
        if starts >= MOST:
            return NoProgressError(f"{message}; {starts} starts in a row got no further")
        return Stopped(message, self.store.folder, together)
