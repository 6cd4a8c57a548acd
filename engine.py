"""One epoch of training, and evaluation."""
import math
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import timedelta
from itertools import islice
from typing import Any

import torch
import torch.nn.functional as F
from timm.data.mixup import Mixup
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3
from tqdm import tqdm

from utils import Process, RunLog, UserError, seed_everything


class NonFiniteLossError(UserError):
    """The loss became NaN or infinite."""


def _is_watched(process: Process) -> bool:
    """A progress bar is for a person at a terminal; a log file gets plain lines alone."""
    return process.is_main and sys.stderr.isatty()


@dataclass(frozen=True)
class Numerics:
    """In which precision and memory layout a network computes.

    Args:
        device_type: "cuda" or "cpu".
        amp_dtype: Low precision of autocast; None for none.
        channels_last: Give the network channels-last images.
    """

    device_type: str = "cpu"
    amp_dtype: torch.dtype | None = None
    channels_last: bool = False

    @classmethod
    def on(cls, device: torch.device, amp: str, channels_last: bool = False) -> "Numerics":
        """Those that `--amp` means on a device: "bf16", "fp16", "off", or "auto" for bf16 where a GPU has it."""
        if amp == "auto":
            amp = "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False) else "off"
        return cls(device.type, dict(bf16=torch.bfloat16, fp16=torch.float16, off=None)[amp], channels_last)

    def autocast(self) -> torch.autocast:
        """The context in which the network is called."""
        return torch.autocast(self.device_type, dtype=self.amp_dtype, enabled=self.amp_dtype is not None)

    def arrange(self, images: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W) images in the network's memory layout."""
        return images.contiguous(memory_format=torch.channels_last) if self.channels_last else images


class Meter:
    """Losses and times of an epoch: since the last log line, and in all.

    Losses stay on the device until a log line or a checkpoint reads them all at once: nothing waits for the device at
    every step. They are added up one by one, so that the sums do not depend on when they were read.
    """

    def __init__(self, process: Process, state: dict[str, Any] | None = None):
        """An epoch at its start or, with what `state_dict` returned, at that point."""
        state = state or {}
        self.process = process
        self.loss_sum: float = state.get("loss_sum", 0.0)
        self.batches: int = state.get("batches", 0)
        self.images: int = state.get("images", 0)
        self.lr: float = state.get("lr", 0.0)
        # Means over the processes of the batches since the last log line.
        self.losses: list[float] = list(state.get("losses", []))
        self.unread: list[torch.Tensor] = []
        self.unread_steps: list[tuple[int, float]] = []
        self.epoch_start = time.perf_counter() - state.get("seconds", 0.0)
        self._restart()

    def _restart(self):
        self.line_batches = 0
        self.line_images = 0
        self.line_data_seconds = 0.0
        self.line_start = time.perf_counter()

    def add(self, loss: torch.Tensor, images: int, data_seconds: float, step: int, lr: float):
        """Count one batch of `images` images, and where its loss belongs."""
        self.unread.append(loss)
        self.unread_steps.append((step, lr))
        self.lr = lr
        self.images += images
        self.line_batches += 1
        self.line_images += images
        self.line_data_seconds += data_seconds

    def gather(self, epoch: int):
        """Read the losses that still lie on the device, on all processes.

        Raises:
            NonFiniteLossError: On every process alike, naming the first step at which one of them lost it.
        """
        if not self.unread:
            return
        losses = self.process.mean(torch.stack(self.unread).float()).tolist()
        for loss, (step, lr) in zip(losses, self.unread_steps, strict=True):
            if not math.isfinite(loss):
                raise NonFiniteLossError(
                    f"the loss became {loss} in epoch {epoch} at step {step}, learning rate {lr:.3g}; "
                    "try a lower --lr, longer --warmup_epochs, --clip_grad 5 or --amp off"
                )
            self.loss_sum += loss
        self.batches += len(losses)
        self.losses += losses
        self.unread, self.unread_steps = [], []

    def read(self, epoch: int) -> dict[str, float]:
        """Means over the batches since the last log line, and over all processes; begins the next line."""
        self.gather(epoch)
        seconds = time.perf_counter() - self.line_start
        device = self.process.device
        values = dict(
            loss=sum(self.losses) / len(self.losses),
            lr=self.lr,
            images_per_second=self.line_images * self.process.world_size / seconds,
            data_seconds=self.line_data_seconds / self.line_batches,
            batch_seconds=seconds / self.line_batches,
            memory_mb=torch.cuda.max_memory_allocated(device) / 2**20 if device.type == "cuda" else 0.0,
        )
        self.losses = []
        self._restart()
        return values

    def epoch_means(self) -> dict[str, float]:
        """Last learning rate, mean loss, images per second and seconds of the batches read so far."""
        seconds = time.perf_counter() - self.epoch_start
        return dict(
            lr=self.lr,
            loss=self.loss_sum / self.batches,
            images_per_second=self.images * self.process.world_size / seconds,
            seconds=seconds,
        )

    def state_dict(self) -> dict[str, Any]:
        """Plain values; every loss must have been gathered."""
        assert not self.unread
        return dict(
            loss_sum=self.loss_sum,
            batches=self.batches,
            images=self.images,
            lr=self.lr,
            losses=self.losses,
            seconds=time.perf_counter() - self.epoch_start,
        )


def _log_line(values: dict[str, float], epoch: int, step: int, steps: int, seconds_left: float) -> str:
    memory = f"  memory {values['memory_mb']:.0f} MB" if values["memory_mb"] else ""
    return (
        f"epoch {epoch} [{step}/{steps}]  loss {values['loss']:.4f}  lr {values['lr']:.3e}  "
        f"{values['images_per_second']:.0f} images/s  data {values['data_seconds']:.3f} s  "
        f"batch {values['batch_seconds']:.3f} s{memory}  eta {timedelta(seconds=round(seconds_left))}"
    )


def _as_float(outputs: torch.Tensor | tuple[torch.Tensor, ...]) -> torch.Tensor | tuple[torch.Tensor, ...]:
    """Logits, or the several that a network returns in training, in float32."""
    return tuple(x.float() for x in outputs) if isinstance(outputs, tuple) else outputs.float()


def check_finite(model: torch.nn.Module, epoch: int):
    """A finite loss may still have had a gradient that was not; such weights must not reach a checkpoint.

    Raises:
        NonFiniteLossError: A weight or a running statistic is NaN or infinite.
    """
    finite = [value.isfinite().all() for value in model.state_dict().values() if value.is_floating_point()]
    if not torch.stack(finite).all():
        raise NonFiniteLossError(
            f"weights became NaN or infinite in epoch {epoch}; try a lower --lr, --clip_grad 5 or --amp off"
        )


@dataclass
class Trainer:
    """What trains a network, and stays the same from epoch to epoch.

    Args:
        model: The model, without wrappers.
        network: The model as it is called, with its wrappers.
        loss_fn: (logits, targets, images) -> scalar; a tuple of logits where the model returns one in training.
        optimizer, schedule, scaler: Stepped once every `update_freq` batches; the scaler is disabled except for fp16.
        process: This process.
        log: Where curves go.
        epochs: Epochs of the run.
        seed: The run's.
        numerics: Precision and memory layout; by default float32 on the CPU.
        mixup: timm's mixup or cutmix, or one for targets that are not class indices.
        ema: Exponential moving average of the model's weights to update.
        update_freq: Batches per optimizer step; batches at the end that make no whole step are left out.
        clip_grad: Largest norm of the gradients.
        log_every: Optimizer steps between two log lines.
    """

    model: torch.nn.Module
    network: torch.nn.Module
    loss_fn: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
    optimizer: torch.optim.Optimizer
    schedule: Scheduler
    scaler: torch.amp.GradScaler
    process: Process
    log: RunLog
    epochs: int
    seed: int = 0
    numerics: Numerics = Numerics()
    mixup: Mixup | None = None
    ema: ModelEmaV3 | None = None
    update_freq: int = 1
    clip_grad: float | None = None
    log_every: int = 50

    def train_one_epoch(
        self,
        loader: Iterable,
        epoch: int,
        start_step: int = 0,
        meter: Meter | None = None,
        after_step: Callable[[int], None] | None = None,
    ) -> dict[str, float]:
        """Train for one epoch, or for the rest of one.

        All generators start anew at every step, from the seed, the epoch, the step and the rank: a run that goes on at
        any step draws what it would have drawn.

        Args:
            loader: Normalised (B, 3, H, W) images on the device and (B,) targets, from the batch of `start_step` on;
                its length is that of the whole epoch.
            epoch: This epoch, from 0.
            start_step: Optimizer steps of this epoch that have been taken before.
            meter: Their losses; a new one by default.
            after_step: Called after each optimizer step with their number in this epoch; what it raises ends the epoch.

        Returns:
            "loss" (mean over the epoch and the processes), "images_per_second", "seconds", and the last "lr".

        Raises:
            NonFiniteLossError: At the next log line after the loss was lost; at the end of the epoch if the weights
                were.
        """
        self.network.train()
        steps = len(loader) // self.update_freq
        first_step = epoch * steps
        meter = meter or Meter(self.process)
        watched = _is_watched(self.process)
        bar = tqdm(total=steps, initial=start_step, desc=f"epoch {epoch}", leave=False, disable=not watched)
        self.optimizer.zero_grad()
        batch_end = time.perf_counter()
        # No batch left is no pass at all: it would start the processes that read.
        batches = islice(loader, (steps - start_step) * self.update_freq) if start_step < steps else ()
        for batch, (images, targets) in enumerate(batches, start=start_step * self.update_freq):
            data_seconds = time.perf_counter() - batch_end
            step, micro_batch = divmod(batch, self.update_freq)
            update = micro_batch == self.update_freq - 1
            if micro_batch == 0:
                seed_everything(self.seed, epoch, step, self.process.rank)
                self.schedule.step_update(first_step + step)
            loss = self._backward(images, targets, update)
            meter.add(loss, len(images), data_seconds, first_step + step, self._learning_rate())
            if update:
                self._step()
                bar.update()
                done = step + 1
                if done % self.log_every == 0 or done == steps:
                    self._write_log_line(meter, epoch, done, steps)
                if after_step is not None:
                    after_step(done)
            batch_end = time.perf_counter()
        bar.close()
        check_finite(self.model, epoch)
        return meter.epoch_means()

    def _backward(self, images: torch.Tensor, targets: torch.Tensor, share: bool) -> torch.Tensor:
        """Add the gradients of one batch, and share them where they are the last of a step; returns its loss."""
        images = self.numerics.arrange(images)
        if self.mixup is not None:
            images, targets = self.mixup(images, targets)
        with self.network.no_sync() if self.process.is_distributed and not share else nullcontext():
            with self.numerics.autocast():
                loss = self.loss_fn(_as_float(self.network(images)), targets, images)
            self.scaler.scale(loss / self.update_freq).backward()
        return loss.detach()

    def _step(self):
        if self.clip_grad is not None:
            self.scaler.unscale_(self.optimizer)
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.clip_grad)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        if self.ema is not None:
            self.ema.update(self.model)

    def _learning_rate(self) -> float:
        """That of the last layers, where --layer_decay gives the others less."""
        return max(group["lr"] for group in self.optimizer.param_groups)

    def _write_log_line(self, meter: Meter, epoch: int, done: int, steps: int):
        values = meter.read(epoch)
        taken = epoch * steps + done
        self.log.scalars("train", values, taken)
        seconds_left = values["batch_seconds"] * self.update_freq * (self.epochs * steps - taken)
        if self.process.is_main:
            tqdm.write(_log_line(values, epoch, done, steps, seconds_left))


@torch.inference_mode()
def evaluate(
    model: torch.nn.Module,
    loader: Iterable,
    process: Process,
    *,
    numerics: Numerics = Numerics(),
    distributed: bool = True,
) -> dict[str, float]:
    """Top-1 and top-5 accuracy and cross-entropy, every image counted once.

    Args:
        model: The model, without wrappers; processes may hold different numbers of batches.
        loader: Normalised (B, 3, H, W) images on the device and (B,) targets; a target below 0 is left out.
        process: This process.
        numerics: Precision and memory layout; by default float32 on the CPU.
        distributed: Add up over all processes; False where each of them reads all the images.

    Returns:
        "acc1" and "acc5" in percent, "loss", and "images", their number.

    Raises:
        UserError: There was no image to evaluate.
    """
    model.eval()
    totals = torch.zeros(4, dtype=torch.float64, device=process.device)
    bar = tqdm(loader, desc="evaluation", leave=False, disable=not _is_watched(process))
    for images, targets in bar:
        with numerics.autocast():
            logits = model(numerics.arrange(images))
        logits = logits.float()
        hits = logits.topk(min(5, logits.shape[1]), dim=1).indices == targets[:, None]
        loss = F.cross_entropy(logits, targets, ignore_index=-1, reduction="sum")
        totals += torch.stack([hits[:, 0].sum(), hits.any(dim=1).sum(), loss, (targets >= 0).sum()])
    if distributed:
        totals = process.sum(totals)
    top1, top5, loss, images = totals.tolist()
    if images == 0:
        raise UserError("there was no image to evaluate")
    return dict(acc1=100 * top1 / images, acc5=100 * top5 / images, loss=loss / images, images=int(images))
