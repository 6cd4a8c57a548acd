"""Saves a run when a save is due, and ends it when it is asked to leave."""
import time
from pathlib import Path
from typing import Any

from .alike import check_same_weights
from .checkpoints import CheckpointStore
from .distributed import Distributed
from .log import Meter, check_finite
from .options import CheckpointOptions
from .run import Run
from .signals import SignalHandler


class Stopped(Exception):
    """The run was asked to leave, and has saved itself in `folder`."""

    def __init__(self, message: str, folder: Path):
        super().__init__(message)
        self.folder = folder


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
        self.saved_at = time.monotonic()

    def after_step(self, meter: Meter):
        """Save, and leave, where it is time to.

        Raises:
            Stopped: A signal came to one of the processes.
            UserError: What was last saved could not be written.
        """
        self.store.check()
        clock = self.run.clock
        if clock.epoch_is_over:
            return  # saved by `after_epoch`, once the processes have shared batch norm's statistics
        agreed = self._agree()
        if agreed:
            meter.gather(clock.epoch)
            check_finite(self.run.model, clock.epoch)
            check_same_weights(self.run.model, self.distributed)
            self.run.meter = meter.state_dict()
            self._write()
        if agreed >= 2:
            self._leave()

    def after_epoch(self, meter: Meter):
        """Save the trained epoch, before its evaluation: nothing that happens there costs the epoch.

        Also called where a run resumes from there; then, in a new folder, that is its first checkpoint.
        """
        clock = self.run.clock
        self.run.meter = meter.state_dict()  # for `save_best` too, whether or not a save is due
        if self._agree() or clock.is_last_epoch or (clock.epoch + 1) % self.options.save_every == 0:
            check_same_weights(self.run.model, self.distributed)
            self._write_once()

    def between_epochs(self):
        """Save and leave, where a signal came while the run did not train.

        Raises:
            Stopped: It did.
        """
        if self.distributed.max(self.signals.signal is not None):
            self._write()
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
        """Write a checkpoint of the end of an epoch, where there is none yet."""
        if not self.store.has(self.run.clock.steps_taken):
            self._write()

    def _write(self):
        if self.distributed.is_main:
            self.store.save(self.run.clock.steps_taken, dict(self.run.state_dict(), args=self.recipe))
        self.saved_at = time.monotonic()

    def _leave(self):
        # A launcher that sees one process end may end the others: not before the main one has written what it saved.
        self.store.finish()
        self.distributed.max(0)
        clock = self.run.clock
        by = self.signals.signal or "a signal to another process"
        raise Stopped(
            f"{by}: stopped in epoch {clock.epoch} after step {clock.step} of {clock.epoch_steps}, "
            f"saved as {self.store.path(clock.steps_taken)}",
            self.store.folder,
        )
