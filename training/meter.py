"""Losses and times of an epoch: gathered on the device, and as a line of the terminal."""
import math
import time
from collections import defaultdict
from collections.abc import Iterable
from datetime import timedelta
from typing import Any

import torch

from .distributed import Distributed
from .run import Run, SpoiledRunError
from .signals import EXIT_NON_FINITE

# What a log line says of its steps beside the loss and the task's own parts of it.
_MEASURED = {
    "loss", "lr", "images_per_second", "data_seconds", "batch_seconds", "memory_mb", "slowest_seconds",
    "slowest_process",
}


class NonFiniteLossError(SpoiledRunError):
    """The loss, a weight or the optimizer's state became NaN or infinite; has an exit code of its own."""

    exit_code = EXIT_NON_FINITE


def check_finite(run: Run):
    """Check the weights and the optimizer's state: what a gradient too large has spoiled must not reach a checkpoint.

    The loss may have been finite, and so may the weights be: where AdamW's second moment is infinite, its weight never
    moves again.

    Raises:
        NonFiniteLossError: A weight, a running statistic or a value of the optimizer's is NaN or infinite.
    """
    state = [value for values in run.optimizer.state.values() for value in values.values()]
    for name, values in (("weights", run.model.state_dict().values()), ("the optimizer's state", state)):
        if not _are_finite(values):
            raise NonFiniteLossError(f"{name} became NaN or infinite in epoch {run.clock.epoch}")


def _are_finite(values: Iterable[Any]) -> bool:
    """Whether all tensors of floating point are finite; waits once for each device."""
    finite = defaultdict(list)
    for value in values:
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            finite[value.device].append(value.isfinite().all())
    return all(torch.stack(each).all() for each in finite.values())


class Meter:
    """Losses and times of an epoch: since the last log line, and in all.

    Losses stay on the device until a log line or a checkpoint reads them all at once: no step waits for the device.
    They are added up one by one, so that the sums do not depend on when they were read.
    """

    def __init__(self, distributed: Distributed, state: dict[str, Any] | None = None):
        """The meter of an epoch at its start or, given what `state_dict` returned, at that point of it."""
        state = _by_images(state or {}, distributed)
        self.distributed = distributed
        # Over the images of all processes, of which a step may have more or fewer batches when the run is resumed.
        self.loss_sum: float = state.get("loss_sum", 0.0)
        self.part_sums: dict[str, float] = dict(state.get("part_sums", {}))
        self.images: int = state.get("images", 0)
        self.lr: float = state.get("lr", 0.0)
        # Of the batches since the last log line, the loss and its parts: means over the processes.
        self.losses: list[float] = list(state.get("losses", []))
        self.parts: dict[str, list[float]] = {name: list(x) for name, x in state.get("parts", {}).items()}
        self.unread: list[torch.Tensor] = []
        self.unread_steps: list[tuple[int, float, int]] = []
        self.epoch_start = time.perf_counter() - state.get("seconds", 0.0)
        self._restart()

    def _restart(self):
        self.line_batches = 0
        self.line_images = 0
        self.line_data_seconds = 0.0
        self.line_start = time.perf_counter()

    def add(self, losses: dict[str, torch.Tensor], images: int, data_seconds: float, step: int, lr: float):
        """Count one batch of `images` images here: its "loss" and the parts of it, and the step that it belongs to."""
        self.part_names = [name for name in losses if name != "loss"]
        self.unread.append(torch.stack([losses["loss"], *(losses[name] for name in self.part_names)]))
        self.unread_steps.append((step, lr, images * self.distributed.world_size))
        self.lr = lr
        self.line_batches += 1
        self.line_images += images
        self.line_data_seconds += data_seconds

    def gather(self, epoch: int):
        """Read the losses that are still on the device, on all processes.

        Raises:
            NonFiniteLossError: On every process alike; names the first step at which any process lost it.
        """
        if not self.unread:
            return
        read = self.distributed.mean(torch.stack(self.unread).float()).tolist()
        for (loss, *parts), (step, lr, images) in zip(read, self.unread_steps, strict=True):
            if not math.isfinite(loss):
                raise NonFiniteLossError(
                    f"the loss became {loss} in epoch {epoch} at step {step}, learning rate {lr:.3g}"
                )
            self.loss_sum += loss * images
            self.images += images
            self.losses.append(loss)
            for name, part in zip(self.part_names, parts, strict=True):
                self.part_sums[name] = self.part_sums.get(name, 0.0) + part * images
                self.parts.setdefault(name, []).append(part)
        self.unread, self.unread_steps = [], []

    def read(self, epoch: int) -> dict[str, float]:
        """Means over the batches since the last log line, and over all processes; starts the next line."""
        self.gather(epoch)
        seconds = time.perf_counter() - self.line_start
        device = self.distributed.device
        values = dict(
            loss=sum(self.losses) / len(self.losses),
            **{name: sum(parts) / len(parts) for name, parts in self.parts.items()},
            lr=self.lr,
            images_per_second=self.line_images * self.distributed.world_size / seconds,
            data_seconds=self.line_data_seconds / self.line_batches,
            batch_seconds=seconds / self.line_batches,
            memory_mb=torch.cuda.max_memory_allocated(device) / 2**20 if device.type == "cuda" else 0.0,
        )
        self.losses, self.parts = [], {}
        self._restart()
        return values

    def epoch_means(self) -> dict[str, float]:
        """Last learning rate, mean loss and parts of it, images per second and seconds of the images read so far."""
        seconds = time.perf_counter() - self.epoch_start
        return dict(
            lr=self.lr,
            loss=self.loss_sum / self.images,
            **{name: total / self.images for name, total in self.part_sums.items()},
            images_per_second=self.images / seconds,
            seconds=seconds,
        )

    def state_dict(self) -> dict[str, Any]:
        """Plain values; every loss must have been gathered."""
        assert not self.unread
        return dict(
            loss_sum=self.loss_sum,
            part_sums=self.part_sums,
            images=self.images,
            lr=self.lr,
            losses=self.losses,
            parts=self.parts,
            seconds=time.perf_counter() - self.epoch_start,
        )


def _by_images(state: dict[str, Any], distributed: Distributed) -> dict[str, Any]:
    """The state of a meter, also of an earlier version, which summed over batches and counted this process's images."""
    if "batches" not in state:
        return state
    images = state["images"] * distributed.world_size
    weight = images / max(state["batches"], 1)
    parts = {name: total * weight for name, total in state.get("part_sums", {}).items()}
    return dict(state, loss_sum=state["loss_sum"] * weight, part_sums=parts, images=images)


def log_line(values: dict[str, float], epoch: int, step: int, steps: int, seconds_left: float) -> str:
    """One line about the last steps of an epoch."""
    memory = f"  memory {values['memory_mb']:.0f} MB" if values["memory_mb"] else ""
    slowest = ""
    if "slowest_seconds" in values:
        slowest = f"  slowest {values['slowest_seconds']:.3f} s (process {values['slowest_process']})"
    parts = [f"{name} {value:.4f}" for name, value in values.items() if name not in _MEASURED]
    named = f" ({', '.join(parts)})" if len(parts) > 1 else ""
    speed = values["images_per_second"]
    return (
        f"epoch {epoch} [{step}/{steps}]  loss {values['loss']:.4f}{named}  "
        f"lr {values['lr']:.3e}  "
        f"{speed:.{0 if speed >= 10 else 1}f} images/s  data {values['data_seconds']:.3f} s  "
        f"batch {values['batch_seconds']:.3f} s{slowest}{memory}  eta {timedelta(seconds=round(seconds_left))}"
    )
