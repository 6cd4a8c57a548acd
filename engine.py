"""One epoch of training, and evaluation."""
import math
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import nullcontext
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


def _backward(
    loss: torch.Tensor,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    clip_grad: float | None,
    update: bool,
):
    """Accumulate the gradients of `loss`, and step the optimizer where an update is due."""
    scaler.scale(loss).backward()
    if not update:
        return
    if clip_grad is not None:
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), clip_grad)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()


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


def train_one_epoch(
    model: torch.nn.Module,
    loss_fn: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor],
    loader: Iterable,
    optimizer: torch.optim.Optimizer,
    schedule: Scheduler,
    scaler: torch.amp.GradScaler,
    process: Process,
    log: RunLog,
    *,
    epoch: int,
    epochs: int,
    seed: int = 0,
    start_step: int = 0,
    meter: Meter | None = None,
    after_step: Callable[[int], None] | None = None,
    amp_dtype: torch.dtype | None = None,
    channels_last: bool = False,
    mixup: Mixup | None = None,
    ema: ModelEmaV3 | None = None,
    ema_source: torch.nn.Module | None = None,
    update_freq: int = 1,
    clip_grad: float | None = None,
    log_every: int = 50,
) -> dict[str, float]:
    """Train for one epoch, or for the rest of one.

    All generators start anew at every step, from the seed, the epoch, the step and the rank: a run that goes on at any
    step draws what it would have drawn.

    Args:
        model: The model as trained, with its wrappers.
        loss_fn: (logits, targets, images) -> scalar; a tuple of logits where the model returns one in training.
        loader: Normalised (B, 3, H, W) images on the device and (B,) targets, from the batch of `start_step` on; its
            length is that of the whole epoch.
        optimizer, schedule, scaler: Stepped once every `update_freq` batches; the scaler is disabled except for fp16.
        process: This process.
        log: Where curves go.
        epoch, epochs: This epoch, from 0, and their number.
        seed: The run's.
        start_step: Optimizer steps of this epoch that have been taken before.
        meter: Their losses; a new one by default.
        after_step: Called after each optimizer step with their number in this epoch; what it raises ends the epoch.
        amp_dtype: Low precision of autocast; None for none.
        channels_last: Give the model channels-last images.
        mixup: timm's mixup or cutmix, or one for targets that are not class indices.
        ema, ema_source: Average to update, and the model without wrappers that it averages.
        update_freq: Batches per optimizer step; batches at the end that make no whole step are left out.
        clip_grad: Largest norm of the gradients.
        log_every: Optimizer steps between two log lines.

    Returns:
        "loss" (mean over the epoch and the processes), "images_per_second", "seconds", and the last "lr".

    Raises:
        NonFiniteLossError: At the next log line after the loss was lost; at the end of the epoch if the weights were.
    """
    model.train()
    steps = len(loader) // update_freq
    first_step = epoch * steps
    autocast = torch.autocast(process.device.type, dtype=amp_dtype) if amp_dtype else nullcontext()
    memory_format = torch.channels_last if channels_last else torch.preserve_format
    meter = meter or Meter(process)
    bar = tqdm(total=steps, initial=start_step, desc=f"epoch {epoch}", leave=False, disable=not _is_watched(process))
    optimizer.zero_grad()
    batch_end = time.perf_counter()
    # No batch left is no pass at all: it would start the processes that read.
    batches = islice(loader, (steps - start_step) * update_freq) if start_step < steps else ()
    for batch, (images, targets) in enumerate(batches, start=start_step * update_freq):
        data_seconds = time.perf_counter() - batch_end
        step, micro_batch = divmod(batch, update_freq)
        update = micro_batch == update_freq - 1
        if micro_batch == 0:
            seed_everything(seed, epoch, step, process.rank)
            schedule.step_update(first_step + step)

        images = images.to(memory_format=memory_format)
        if mixup is not None:
            images, targets = mixup(images, targets)
        with model.no_sync() if process.is_distributed and not update else nullcontext():
            with autocast:
                loss = loss_fn(_as_float(model(images)), targets, images)
            _backward(loss / update_freq, model, optimizer, scaler, clip_grad, update)
        meter.add(loss.detach(), len(images), data_seconds, first_step + step, optimizer.param_groups[0]["lr"])

        if update:
            if ema is not None:
                ema.update(ema_source)
            bar.update()
            done = step + 1
            if done % log_every == 0 or done == steps:
                values = meter.read(epoch)
                log.scalars("train", values, first_step + done)
                seconds_left = values["batch_seconds"] * update_freq * (epochs * steps - first_step - done)
                if process.is_main:
                    tqdm.write(_log_line(values, epoch, done, steps, seconds_left))
            if after_step is not None:
                after_step(done)
        batch_end = time.perf_counter()
    bar.close()
    check_finite(model, epoch)
    return meter.epoch_means()


@torch.inference_mode()
def evaluate(
    model: torch.nn.Module,
    loader: Iterable,
    process: Process,
    *,
    amp_dtype: torch.dtype | None = None,
    channels_last: bool = False,
    distributed: bool = True,
) -> dict[str, float]:
    """Top-1 and top-5 accuracy and cross-entropy, every image counted once.

    Args:
        model: The model, without wrappers; processes may hold different numbers of batches.
        loader: Normalised (B, 3, H, W) images on the device and (B,) targets; a target below 0 is left out.
        process: This process.
        amp_dtype: Low precision of autocast; None for none.
        channels_last: Give the model channels-last images.
        distributed: Add up over all processes; False where each of them reads all the images.

    Returns:
        "acc1" and "acc5" in percent, "loss", and "images", their number.

    Raises:
        UserError: There was no image to evaluate.
    """
    model.eval()
    autocast = torch.autocast(process.device.type, dtype=amp_dtype) if amp_dtype else nullcontext()
    memory_format = torch.channels_last if channels_last else torch.preserve_format
    totals = torch.zeros(4, dtype=torch.float64, device=process.device)
    bar = tqdm(loader, desc="evaluation", leave=False, disable=not _is_watched(process))
    for images, targets in bar:
        with autocast:
            logits = model(images.to(memory_format=memory_format))
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
