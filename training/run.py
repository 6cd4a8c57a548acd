"""A training run as something that can be left at any step and gone on with: what it holds, and when it is saved."""
import math
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from timm.utils import ModelEmaV3

from engine import Meter, check_finite
from storage.weights import class_difference, load_weights, read_checkpoint, unwrap
from training.checkpoints import CheckpointStore, translate_weights_errors
from utils import Process, StopRequest, UserError

HYPERPARAMETERS = ("lr", "lr_scale", "weight_decay", "momentum", "betas", "eps", "fused")


class Stopped(Exception):
    """The run was asked to leave, and has saved itself."""


@dataclass
class Run:
    """What training changes as it goes, and what a checkpoint therefore holds.

    The state of the random generators is not among it: it follows from the seed, the epoch, the step and the rank. Nor
    is the data loader's: it follows from the epoch and the step.

    Args:
        model, ema, optimizer, scaler: The model and the average of its weights, not wrapped, and what trains it.
        steps: Optimizer steps in an epoch.
        global_batch: Images in a step, on all processes.
        ranges: Into how many ranges the data of an epoch is cut; see `EpochLoader.ranges`.
        best_metric: Which result of an evaluation decides which weights are the best; one that ends in "loss" is better
            where it is lower.
        classes: Names of the classes, in order, where the data set knows them.
        epoch, step: This epoch, from 0, and the optimizer steps taken in it.
        total_steps: Optimizer steps taken in all, also in epochs that had another number of them.
        meter: `Meter.state_dict()` at that step.
        best: The best value of the metric so far.
    """

    model: torch.nn.Module
    ema: ModelEmaV3 | None
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    steps: int
    global_batch: int
    ranges: int = 1
    best_metric: str = "acc1"
    classes: list[str] | None = None
    epoch: int = 0
    step: int = 0
    total_steps: int = 0
    meter: dict[str, Any] = field(default_factory=dict)
    best: float | None = None

    @property
    def global_step(self) -> int:
        """Optimizer steps to here in a run of this one's epochs, by which the learning rate and the logs go."""
        return self.epoch * self.steps + self.step

    def next_epoch(self):
        """Go from the end of an epoch to the start of the next."""
        self.epoch, self.step, self.meter = self.epoch + 1, 0, {}

    def is_best(self, results: dict[str, float]) -> bool:
        """Whether the evaluation that gave `results` is the best so far, which is noted."""
        value = results[self.best_metric]
        if not math.isfinite(value):
            return False
        lower = self.best_metric.endswith("loss")
        if self.best is not None and (value >= self.best if lower else value <= self.best):
            return False
        self.best = value
        return True

    def state_dict(self) -> dict[str, Any]:
        return dict(
            model=self.model.state_dict(),
            model_ema=self.ema.module.state_dict() if self.ema is not None else None,
            optimizer=self.optimizer.state_dict(),
            scaler=self.scaler.state_dict(),
            epoch=self.epoch,
            step=self.step,
            total_steps=self.total_steps,
            steps=self.steps,
            global_batch=self.global_batch,
            ranges=self.ranges,
            meter=self.meter,
            best={self.best_metric: self.best},
            classes=self.classes,
        )

    @translate_weights_errors()
    def load(self, path: Path, opt: str):
        """Go on where the checkpoint `path` was written, with the optimizer `opt`.

        Raises:
            UserError: It holds no run, or one that this one cannot go on with.
        """
        checkpoint = read_checkpoint(str(path))
        if not {"optimizer", "meter", "args"} <= checkpoint.keys():
            raise UserError(f"{path} holds weights alone, not a run to go on with; start from it by --finetune")
        difference = class_difference(checkpoint, self.classes)
        if difference:
            raise UserError(f"{path} {difference}; fine-tune from it by --finetune")
        self._load_weights(checkpoint, path)
        self._load_optimizer(checkpoint["optimizer"], checkpoint["args"]["opt"], opt, path)
        if checkpoint["scaler"]:  # that of a run without fp16 is empty
            self.scaler.load_state_dict(checkpoint["scaler"])
        self._load_position(checkpoint, path)
        self.best = checkpoint["best"].get(self.best_metric)

    def _load_weights(self, checkpoint: dict[str, Any], path: Path):
        load_weights(self.model, unwrap(checkpoint))
        if self.ema is not None:
            if checkpoint.get("model_ema") is None:
                raise UserError(f"{path} holds no average of the weights; go on with --model_ema false")
            load_weights(self.ema.module, unwrap(checkpoint, "model_ema"))

    def _load_optimizer(self, saved: dict[str, Any], saved_opt: str, opt: str, path: Path):
        own = self.optimizer.state_dict()
        if saved_opt != opt:
            raise UserError(f"{path} is of a run with --opt {saved_opt}, not {opt}")
        if [group["params"] for group in saved["param_groups"]] != [group["params"] for group in own["param_groups"]]:
            raise UserError(f"{path} groups parameters otherwise: --layer_decay and --weight_decay must be as then")
        # What the flags say now wins over what they said then; the schedule starts from its own learning rate.
        for then, now in zip(saved["param_groups"], own["param_groups"], strict=True):
            then.update({name: now[name] for name in HYPERPARAMETERS if name in now})
            then.pop("initial_lr", None)
        self.optimizer.load_state_dict(saved)

    def _load_position(self, checkpoint: dict[str, Any], path: Path):
        self.epoch, self.step, self.meter = checkpoint["epoch"], checkpoint["step"], checkpoint["meter"]
        self.total_steps = checkpoint["total_steps"]
        if self.step == checkpoint["steps"]:
            self.step = self.steps
        elif self.step:
            self._check_same_epoch(checkpoint, path)

    def _check_same_epoch(self, checkpoint: dict[str, Any], path: Path):
        """The rest of an epoch is the rest of it only if its images come in the same order and the same steps."""
        if (checkpoint["steps"], checkpoint["global_batch"]) != (self.steps, self.global_batch):
            raise UserError(
                f"{path} was written in the middle of an epoch of {checkpoint['steps']} steps of "
                f"{checkpoint['global_batch']} images, which is now one of {self.steps} steps of {self.global_batch} "
                "images; keep --batch_size x processes x --update_freq, or go on from the end of an epoch"
            )
        if checkpoint["ranges"] != self.ranges:
            raise UserError(
                f"{path} was written in the middle of an epoch of shards shared among {checkpoint['ranges']} "
                f"process(es), which are now {self.ranges}; keep their number, or go on from the end of an epoch"
            )


class Checkpointer:
    """Saves a run when a save is due, and ends it when it is asked to leave: on all processes at the same step.

    Args:
        run: The run.
        store: Where its main process writes.
        process: This process.
        request: Whether a signal has come.
        recipe: The command line, for the checkpoint.
        every_epochs, every_steps, every_minutes: How often to save; None for not by that measure.
    """

    def __init__(
        self,
        run: Run,
        store: CheckpointStore,
        process: Process,
        request: StopRequest,
        recipe: dict[str, Any],
        every_epochs: int = 1,
        every_steps: int | None = None,
        every_minutes: float | None = None,
    ):
        self.run, self.store, self.process, self.request, self.recipe = run, store, process, request, recipe
        self.every_epochs, self.every_steps, self.every_minutes = every_epochs, every_steps, every_minutes
        self.saved_at = time.monotonic()

    def after_step(self, meter: Meter, step: int):
        """Save, and leave, where it is time to, after `step` optimizer steps of the epoch.

        Raises:
            Stopped: A signal came to one of the processes.
        """
        self.run.total_steps += step - self.run.step
        self.run.step = step
        if step == self.run.steps:
            return  # the end of the epoch, which is saved when the processes have shared what they know
        agreed = self._agree()
        if agreed:
            meter.gather(self.run.epoch)
            check_finite(self.run.model, self.run.epoch)
            self._save(meter)
        if agreed >= 2:
            self._leave()

    def after_epoch(self, meter: Meter, last: bool):
        """Save the trained epoch, before its evaluation: nothing that happens there costs the epoch."""
        agreed = self._agree()
        if agreed or last or (self.run.epoch + 1) % self.every_epochs == 0:
            self._save(meter)

    def between_epochs(self):
        """Save and leave, where a signal came while the run did not train.

        Raises:
            Stopped: It did.
        """
        if self.process.max(self.request.signal is not None):
            self._write()
            self._leave()

    def save_best(self, metrics: dict[str, float]):
        """Keep the run as its best, with what it was measured at."""
        if self.process.is_main:
            self.store.save_best(dict(self._state(), metrics=metrics))

    def _agree(self) -> int:
        """2 where a process was asked to leave, 1 where a save is due, else 0; the same on all processes."""
        return self.process.max(2 * (self.request.signal is not None) + self._is_due())

    def _is_due(self) -> bool:
        by_steps = self.every_steps is not None and self.run.global_step % self.every_steps == 0
        # The main process's clock counts; the others learn from it.
        by_time = self.every_minutes is not None and time.monotonic() - self.saved_at >= 60 * self.every_minutes
        return by_steps or (by_time and self.process.is_main)

    def _save(self, meter: Meter):
        self.run.meter = meter.state_dict()
        self._write()

    def _write(self):
        if self.process.is_main:
            self.store.save(self.run.total_steps, self._state())
        self.saved_at = time.monotonic()

    def _state(self) -> dict[str, Any]:
        return dict(self.run.state_dict(), args=self.recipe)

    def _leave(self):
        # A launcher that sees one process end may end the others: not before the main one has saved.
        self.process.max(0)
        by = self.request.signal or "a signal to another process"
        raise Stopped(
            f"{by}: left epoch {self.run.epoch} after step {self.run.step} of {self.run.steps}, "
            f"saved as {self.store.path(self.run.total_steps)}; go on with --auto_resume"
        )
