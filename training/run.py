"""The state of a training run, which can stop at any optimizer step and resume there, bit for bit."""
import math
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from timm.utils import ModelEmaV3

from storage.weights import (
    MismatchError,
    WeightsError,
    class_difference,
    load_weights,
    read_checkpoint,
    unwrap,
)
from utils import UserError, as_user_error, count

from .data.held_out import HeldOut, rule_difference
from .saved_state import NoRunError, check_is_run, taking_state
from .tensors import copy_to_memory

# Current flags override these values of a checkpoint's optimizer.
HYPERPARAMETERS = ("lr", "lr_scale", "weight_decay", "momentum", "betas", "eps", "fused")


class SpoiledRunError(UserError):
    """The weights of a run are of no more use, and are not saved: what was saved before is."""


class HeldOutMismatchError(UserError):
    """A checkpoint of a run that held other images out of the training set, and has trained on what is held out now."""


class OptimizerMismatchError(UserError):
    """A checkpoint of a run with another optimizer, or other parameter groups."""


class NoEmaError(UserError):
    """A checkpoint without EMA weights, for a run that keeps them."""


class BatchMismatchError(UserError):
    """A checkpoint from the middle of an epoch whose steps would now have other images."""


class DataMismatchError(UserError):
    """A checkpoint from the middle of an epoch whose other images would now be others, or come in other forms."""


class ShardMismatchError(UserError):
    """A checkpoint from the middle of an epoch that would now read its shards in another order."""


@dataclass
class Clock:
    """Where a run is. The trainer advances it; everything else reads it.

    Args:
        epoch_length: Optimizer steps of a whole epoch.
        total: Optimizer steps of the run; the last epoch may be cut short.
        epoch, step: This epoch, from 0, and the optimizer steps taken in it.
        steps_taken: Optimizer steps taken in all, also in epochs that had another number of them.
    """

    epoch_length: int
    total: int
    epoch: int = 0
    step: int = 0
    steps_taken: int = 0

    @property
    def epochs(self) -> int:
        """The number of epochs, the last one counted in full."""
        return math.ceil(self.total / self.epoch_length)

    @property
    def global_step(self) -> int:
        """Optimizer steps to here in epochs of this length: what the learning rate and the logs go by."""
        return self.epoch * self.epoch_length + self.step

    @property
    def epoch_steps(self) -> int:
        """Optimizer steps of this epoch."""
        return min(self.epoch_length, self.total - self.epoch * self.epoch_length)

    @property
    def epoch_is_over(self) -> bool:
        """Whether this epoch is trained; its evaluation may be still to come."""
        return self.step >= self.epoch_steps

    @property
    def is_last_epoch(self) -> bool:
        """Whether no epoch follows."""
        return self.epoch + 1 >= self.epochs

    @property
    def is_trained(self) -> bool:
        """Whether every epoch is trained; the evaluation of the last one may be still to come."""
        return self.is_last_epoch and self.epoch_is_over

    @property
    def run_is_over(self) -> bool:
        """Whether every epoch is trained and evaluated."""
        return self.epoch >= self.epochs

    @property
    def position(self) -> str:
        """Where it is, for a message."""
        rest = "; training is complete, its last epoch is evaluated and logged again" if self.is_trained else ""
        return f"epoch {self.epoch}, step {self.step} of {self.epoch_steps}{rest}"

    @property
    def next_step(self) -> tuple[int, int]:
        """The epoch and the step in it that are trained next."""
        return (self.epoch + 1, 0) if self.epoch_is_over else (self.epoch, self.step)

    def advance(self):
        """Count an optimizer step."""
        self.step += 1
        self.steps_taken += 1

    def next_epoch(self):
        """Move from the end of an epoch to the start of the next."""
        self.epoch, self.step = self.epoch + 1, 0


@dataclass(frozen=True)
class BestMetric:
    """Which result of an evaluation decides which weights are the best, and whether higher is better."""

    name: str
    higher: bool = True


def create_ema(model: torch.nn.Module, decay: float) -> ModelEmaV3:
    """EMA weights, from 0 steps on; `update` takes the number of optimizer steps taken.

    A fixed decay would keep a short run near its random start: 0.99996 remembers 25,000 steps. After t steps, the decay
    is about t / (10 + t), a mean over the last tenth of them, until it reaches `decay`.
    """
    return ModelEmaV3(model, decay=decay, use_warmup=True, warmup_gamma=10, warmup_power=1)


def contiguous_state(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The model's state, each tensor contiguous, as safetensors takes it; weights may lie channels last."""
    state = model.state_dict()
    for name, value in state.items():
        state[name] = value.contiguous()
    return state


@dataclass
class Run:
    """What training changes as it goes, and what a checkpoint therefore holds.

    The state of the random generators is not part of it: it follows from the seed, the epoch, the step and the rank.
    Nor is the data loader's: it follows from the epoch and the step.

    Args:
        model, ema, optimizer, scaler: The model and its EMA weights, without wrappers, and what trains them.
        clock: Where the run is.
        global_batch: Images of an optimizer step, on all processes.
        ranges: Into how many ranges the data of an epoch is cut; see `EpochLoader.ranges`.
        best_metric: What decides which weights are the best.
        classes: Names of the classes, in order, where the data set knows them.
        held_out: What was held out of the training images for validation; see `training.task.Task`.
        images: How many training images there are; None where that is not known.
        fingerprint: Which they are, see `Data.fingerprints`; None where the data set does not say.
        meter: `Meter.state_dict()` at this step.
        best: The best value of the metric so far.
        best_epoch: The epoch after which it was measured.
        seconds: What the run has taken before this process started.
    """

    model: torch.nn.Module
    ema: ModelEmaV3 | None
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    clock: Clock
    global_batch: int
    ranges: int = 1
    best_metric: BestMetric = BestMetric("acc1")
    classes: list[str] | None = None
    held_out: HeldOut | None = None
    images: int | None = None
    fingerprint: str | None = None
    meter: dict[str, Any] = field(default_factory=dict)
    best: float | None = None
    best_epoch: int | None = None
    seconds: float = 0.0
    started: float = field(default_factory=time.monotonic)

    @property
    def total_seconds(self) -> float:
        """What the run has taken since it began, pauses and what was lost with a killed process aside."""
        return self.seconds + time.monotonic() - self.started

    @property
    def epochs_without_better(self) -> int:
        """Evaluated epochs, this one included, since the best; all of them where none is."""
        return self.clock.epoch - (-1 if self.best_epoch is None else self.best_epoch)

    def next_epoch(self):
        """Move from the end of an epoch to the start of the next."""
        self.clock.next_epoch()
        self.meter = {}

    def record_best(self, results: dict[str, float]) -> bool:
        """Record the results of an evaluation if they are the best so far; returns whether they are.

        Parts of a metric, NAME/PART, may be undefined; if another value is not finite, none counts.
        """
        value = results[self.best_metric.name]
        of_ema = self.best_metric.name.startswith("ema_")
        # Where outputs are NaN, the accuracy is a number all the same.
        measured = [v for name, v in results.items() if name.startswith("ema_") == of_ema and "/" not in name]
        if not all(map(math.isfinite, measured)):
            return False
        if self.best is not None and (value <= self.best if self.best_metric.higher else value >= self.best):
            return False
        self.best, self.best_epoch = value, self.clock.epoch
        return True

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values."""
        return dict(
            model=contiguous_state(self.model),
            model_ema=contiguous_state(self.ema.module) if self.ema is not None else None,
            optimizer=self.optimizer.state_dict(),
            scaler=self.scaler.state_dict(),
            epoch=self.clock.epoch,
            step=self.clock.step,
            total_steps=self.clock.steps_taken,
            steps=self.clock.epoch_length,
            global_batch=self.global_batch,
            ranges=self.ranges,
            meter=self.meter,
            best={self.best_metric.name: self.best},
            best_epoch=self.best_epoch,
            seconds=self.total_seconds,
            classes=self.classes,
            held_out=self.held_out and self.held_out.rule,
            held_out_images=self.held_out and self.held_out.images,
            images=self.images,
            fingerprint=self.fingerprint,
        )

    def load(
        self,
        path: Path,
        recipe: Mapping[str, Any],
        decides_epoch: Collection[str] = (),
        tell: Callable[[str], Any] = print,
    ):
        """Resume from the checkpoint `path`.

        Args:
            path: The checkpoint.
            recipe: What is asked for now.
            decides_epoch: Of what is asked for, what decides the images of an epoch.
            tell: Gets each line that the user should read.

        Raises:
            UserError: It cannot be read, holds no run, or holds one that this one cannot resume.
        """
        with as_user_error(WeightsError):
            checkpoint = read_checkpoint(str(path), mmap=True)
        check_is_run(checkpoint, path)
        self._check_data(checkpoint, path, tell)
        is_within_epoch = 0 < checkpoint["step"] != checkpoint["steps"]
        if is_within_epoch:
            self._check_same_epoch(checkpoint, path)
            self._check_same_images(checkpoint, path, {name: recipe[name] for name in decides_epoch})
        elif difference := self._other_images(checkpoint):
            tell(f"warning: {path} {difference}")
        with taking_state(path):
            self._load_weights(checkpoint, path)
            self._load_optimizer(checkpoint["optimizer"], checkpoint["args"]["opt"], recipe["opt"], path)
            if checkpoint["scaler"]:  # empty in a run without fp16
                self.scaler.load_state_dict(checkpoint["scaler"])
        self._load_position(checkpoint)

    def _check_data(self, checkpoint: dict[str, Any], path: Path, tell: Callable[[str], Any]):
        if difference := class_difference(checkpoint, self.classes):
            raise NoRunError(f"{path} {difference}")
        if difference := rule_difference(dict(held_out=None) | checkpoint, self.held_out):
            raise HeldOutMismatchError(f"{path} {difference}")
        if self.held_out is not None:
            if leak := self.held_out.leak(checkpoint):
                tell(f"warning: {path} {leak}")
            self.held_out = self.held_out.unseen(checkpoint)

    def _other_images(self, checkpoint: dict[str, Any]) -> str | None:
        """How the training images of a checkpoint differ from those here, or None; None too where it does not say."""
        then, now = checkpoint.get("images"), self.images
        if None not in (then, now) and then != now:
            return f"has trained on {count(then, 'image')}, and there are {now} now"
        then, now = checkpoint.get("fingerprint"), self.fingerprint
        if None not in (then, now) and then != now:
            return "has trained on images of other names, or in other classes"
        return None

    def _load_weights(self, checkpoint: dict[str, Any], path: Path):
        try:
            load_weights(self.model, unwrap(checkpoint))
            if self.ema is not None:
                if checkpoint.get("model_ema") is None:
                    raise NoEmaError(f"{path} holds no EMA weights")
                load_weights(self.ema.module, unwrap(checkpoint, "model_ema"))
        except MismatchError as error:
            owner = checkpoint["args"].get("model")
            raise UserError(f"{error}; this is {owner}'s" if owner else str(error)) from error
        except WeightsError as error:
            raise UserError(str(error)) from error

    def _load_optimizer(self, saved: dict[str, Any], saved_opt: str, opt: str, path: Path):
        own = self.optimizer.state_dict()
        if saved_opt != opt:
            raise OptimizerMismatchError(f"{path} was trained with the optimizer {saved_opt}, not {opt}")
        if [group["params"] for group in saved["param_groups"]] != [group["params"] for group in own["param_groups"]]:
            raise OptimizerMismatchError(
                f"{path} has other parameter groups: what is trained, weight decay or layer decay differs"
            )
        for then, now in zip(saved["param_groups"], own["param_groups"], strict=True):
            then.update({name: now[name] for name in HYPERPARAMETERS if name in now})
            then.pop("initial_lr", None)
        self.optimizer.load_state_dict(copy_to_memory(saved))  # else it would train in the file's pages

    def _load_position(self, checkpoint: dict[str, Any]):
        clock = self.clock
        clock.epoch, clock.step, clock.steps_taken = (checkpoint[key] for key in ("epoch", "step", "total_steps"))
        if clock.step == checkpoint["steps"]:
            clock.step = clock.epoch_length
        self.meter = checkpoint["meter"]
        self.best = checkpoint["best"].get(self.best_metric.name)
        if self.best is not None:
            self.best_epoch = checkpoint.get("best_epoch", clock.epoch)
        self.seconds = checkpoint.get("seconds", 0.0)

    def _check_same_epoch(self, checkpoint: dict[str, Any], path: Path):
        """The rest of an epoch is the rest of it only if its images come in the same order and the same steps."""
        steps = self.clock.epoch_length
        global_batch, ranges = checkpoint.get("global_batch", self.global_batch), checkpoint.get("ranges", self.ranges)
        if (checkpoint["steps"], global_batch) != (steps, self.global_batch):
            raise BatchMismatchError(
                f"{path} was written in the middle of an epoch of {count(checkpoint['steps'], 'step')} of "
                f"{count(global_batch, 'image')}, which is now one of {count(steps, 'step')} of "
                f"{count(self.global_batch, 'image')}"
            )
        if ranges != self.ranges:
            raise ShardMismatchError(
                f"{path} was written in the middle of an epoch of shards shared among "
                f"{count(ranges, 'process')}, which are now {self.ranges}"
            )

    def _check_same_images(self, checkpoint: dict[str, Any], path: Path, now: Mapping[str, Any]):
        if difference := self._other_images(checkpoint):
            raise DataMismatchError(f"{path}, written in the middle of an epoch, {difference}")
        then = checkpoint["args"]
        changed = [f"{name}={then[name]}, not {value}" for name, value in now.items() if then.get(name, value) != value]
        if changed:
            raise DataMismatchError(f"{path} was written in the middle of an epoch of {'; '.join(sorted(changed))}")
