"""One epoch of training of any task, and the evaluation of any task."""
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import islice
from typing import Protocol

import torch
from timm.scheduler.scheduler import Scheduler
from tqdm import tqdm

from training.buffers import copy_buffers, put_back
from training.data.loader import EpochLoader, report_skipped
from training.distributed import share_statistics
from training.health import LossWatch, OwnTime, check_loss_scale
from training.log import RunLog, is_watched
from training.meter import Meter, check_finite, log_line
from training.progress import Doing
from training.run import Run
from training.task import Batch, Evaluator, Task
from training.waits import GaveUpWaiting
from utils import seed_everything


class Saver(Protocol):
    """Saves a run while it trains: `training.checkpointer.Checkpointer`, of which the engine need not know."""

    def after_step(self, meter: Meter):
        """After each optimizer step; what it raises ends the epoch."""

    def after_epoch(self, meter: Meter):
        """After the last step of an epoch, before its evaluation; also of an epoch that was trained before."""


@dataclass
class Trainer:
    """Trains a run from where its clock is, epoch by epoch, and advances the clock.

    Args:
        task: Computes the loss.
        run: What is trained, and where it is.
        network: The run's model with its wrappers.
        schedule: The learning rate of any optimizer step.
        log: Where curves go.
        seed: The run's.
        update_freq: Batches per optimizer step; batches left over at the end of an epoch are dropped.
        clip_grad: Largest norm of the gradients.
        log_every: Optimizer steps between two log lines.
    """

    task: Task
    run: Run
    network: torch.nn.Module
    schedule: Scheduler
    log: RunLog
    seed: int = 0
    update_freq: int = 1
    clip_grad: float | None = None
    log_every: int = 50
    losses: LossWatch = field(default_factory=LossWatch, init=False)
    own_time: OwnTime = field(default_factory=OwnTime, init=False)

    def train_epoch(self, loader: EpochLoader, saver: Saver | None = None) -> dict[str, float]:
        """Train for one epoch, or for the rest of one.

        All random generators are seeded at every step from the seed, the epoch, the step and the rank: a run that
        resumes at any step draws what it would have drawn.

        Args:
            loader: Batches on the device.
            saver: Saves the run.

        Returns:
            "loss" (mean over the epoch and the processes) and its parts, "images_per_second", "seconds", and the last
            "lr".

        Raises:
            NonFiniteLossError: At the first log line after the loss became NaN or infinite, at the end of the epoch if
                a weight or the optimizer's state did, or where float16 overflows at every step.
        """
        meter = Meter(self.task.distributed, self.run.meter)
        if not self.run.clock.epoch_is_over:
            with report_skipped(loader.dataset, self.task.distributed, self.task.distributed.is_main):
                self._train_steps(loader, meter, saver)
            share_statistics(self.run.model, self.run.ema, self.task.distributed)
        if saver is not None:
            saver.after_epoch(meter)
        return meter.epoch_means()

    def _train_steps(self, loader: EpochLoader, meter: Meter, saver: Saver | None):
        clock = self.run.clock
        loader.set_epoch(clock.epoch, first_batch=clock.step * self.update_freq)
        batches = iter(islice(loader, (clock.epoch_steps - clock.step) * self.update_freq))
        self.task.train_mode(self.network)
        self.run.optimizer.zero_grad()
        # Whatever ends the epoch, the bar is cleared before anything is said about it.
        with tqdm(
            total=clock.epoch_steps, initial=clock.step, desc=f"epoch {clock.epoch}", leave=False,
            disable=not is_watched(self.task.distributed),
        ) as bar:
            while not clock.epoch_is_over:
                self._train_step(batches, meter)
                clock.advance()
                bar.update()
                if clock.step % self.log_every == 0 or clock.epoch_is_over:
                    check_loss_scale(self.run.scaler, clock)
                    self._write_log_line(meter)
                if saver is not None:
                    saver.after_step(meter)
        check_finite(self.run)

    def _train_step(self, batches: Iterator[Batch], meter: Meter):
        """Take one optimizer step, on `update_freq` batches; without one of them, the run stays as it was before it."""
        clock, progress, measured = self.run.clock, self.task.distributed.progress, []
        # Which each batch changes. A run of several processes does not save itself as it was before a step.
        is_restored = self.update_freq > 1 and not self.task.distributed.is_distributed
        before = copy_buffers(self.run.model) if is_restored else []
        for micro_batch in range(self.update_freq):
            start = time.perf_counter()
            progress.note(Doing.LOADING)
            try:
                batch = next(batches)
            except GaveUpWaiting:
                put_back(before)
                raise
            data_seconds = time.perf_counter() - start
            if micro_batch == 0:
                seed_everything(self.seed, clock.epoch, clock.step, self.task.distributed.rank)
                self.schedule.step_update(clock.global_step)
            losses, own_seconds = self._backward(batch, is_last=micro_batch == self.update_freq - 1)
            self.own_time.add(data_seconds + own_seconds)
            measured.append((losses, self.task.count(batch), data_seconds))
        progress.note(Doing.UPDATING)
        self._update_weights()
        for losses, images, data_seconds in measured:
            meter.add(losses, images, data_seconds, clock.global_step, self._learning_rate())

    def _backward(self, batch: Batch, is_last: bool) -> tuple[dict[str, torch.Tensor], float]:
        """Add the gradients of one batch, all-reduced with the last micro-batch of a step.

        Returns:
            Its losses, and the seconds of the forward pass; 0 where that waits for other processes to share buffers.
        """
        with self.network.no_sync() if self.task.distributed.is_distributed and not is_last else nullcontext():
            waits = getattr(self.network, "will_sync_module_buffers", bool)()
            start = time.perf_counter()
            self.task.distributed.progress.note(Doing.LOSS)
            with self.task.precision.autocast():
                loss, parts = self.task.loss(self.network, batch)
            own_seconds = 0.0 if waits else time.perf_counter() - start
            self.task.distributed.progress.note(Doing.GRADIENTS)
            self.run.scaler.scale(loss / self.update_freq).backward()
        return dict(parts, loss=loss.detach()), own_seconds

    def _update_weights(self):
        run = self.run
        if self.clip_grad is not None:
            run.scaler.unscale_(run.optimizer)
            torch.nn.utils.clip_grad_norm_(run.model.parameters(), self.clip_grad)
        run.scaler.step(run.optimizer)
        run.scaler.update()
        run.optimizer.zero_grad()
        if run.ema is not None:
            run.ema.update(run.model, step=run.clock.steps_taken + 1)

    def _learning_rate(self) -> float:
        """The learning rate of the last layers, where layer decay gives the others less."""
        return max(group["lr"] for group in self.run.optimizer.param_groups)

    def _write_log_line(self, meter: Meter):
        clock = self.run.clock
        meter.gather(clock.epoch)
        warning = self.losses.warning(meter.losses, clock, self.update_freq)
        values = meter.read(clock.epoch) | self.own_time.read(self.task.distributed)
        self.log.scalars("train", values, clock.steps_taken)
        seconds_left = values["batch_seconds"] * self.update_freq * (clock.total - clock.global_step)
        if self.task.distributed.is_main:
            tqdm.write(log_line(values, clock.epoch, clock.step, clock.epoch_steps, seconds_left))
            if warning is not None:
                tqdm.write(warning)


@torch.inference_mode()
def evaluate(task: Task, network: torch.nn.Module, loader: EpochLoader) -> tuple[dict[str, float], Evaluator]:
    """The metrics of a task and "images", their number, every image counted once; and the evaluator, which saw them.

    Args:
        task: Computes the metrics.
        network: The network, without wrappers but torch.compile's; processes may hold different numbers of batches.
        loader: Batches on the device.

    Raises:
        UserError: There was no image to evaluate.
    """
    network.eval()
    evaluator = task.evaluator()
    task.distributed.progress.note(Doing.EVALUATING)
    is_main = task.distributed.is_main
    bar = tqdm(loader, desc="evaluation", leave=False, disable=not is_watched(task.distributed))
    with report_skipped(loader.dataset, task.eval_processes, is_main), bar:
        for batch in bar:
            task.distributed.progress.note(Doing.EVALUATING)
            with task.precision.autocast():
                evaluator.update(network, batch)
    return evaluator.compute(task.eval_processes), evaluator
