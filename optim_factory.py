"""Optimizer and learning-rate schedule, by timm's factories."""
import torch
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler

LR_BATCH = 512
# Those that torch can step in one pass over the weights: biformer_small's adamw takes a sixth of the time on a CPU.
_FUSED = ("adam", "adamw", "sgd")


def scaled_lr(lr: float, global_batch: int) -> float:
    """The learning rate for a global batch, by the linear rule: `lr` is that of 512 images."""
    return lr * global_batch / LR_BATCH


def create_optimizer(
    model: torch.nn.Module,
    opt: str,
    lr: float,
    weight_decay: float,
    momentum: float = 0.9,
    layer_decay: float | None = None,
    **kwargs,
) -> torch.optim.Optimizer:
    """An optimizer over the model's parameter groups: no weight decay on biases, norms and what the model names.

    Args:
        model: A timm model, not wrapped.
        opt: One of timm's optimizers, "adamw" say.
        lr: Learning rate of a step, not scaled any further.
        weight_decay: Weight decay of all other parameters.
        momentum: For the optimizers that have one.
        layer_decay: Factor of the learning rate from one layer to the one before it, as in fine-tuning.
        kwargs: `eps` and `betas` where they are not the optimizer's own.
    """
    if opt in _FUSED:
        kwargs = dict(fused=True, **kwargs)
    return create_optimizer_v2(
        model, opt=opt, lr=lr, weight_decay=weight_decay, momentum=momentum, layer_decay=layer_decay, **kwargs
    )


def create_schedule(
    optimizer: torch.optim.Optimizer,
    sched: str,
    epochs: int,
    steps_per_epoch: int,
    warmup_epochs: int,
    warmup_lr: float,
    min_lr: float,
) -> Scheduler:
    """A schedule that `schedule.step_update(step)` moves to any optimizer step, from 0 up; it has no other state."""
    schedule, _ = create_scheduler_v2(
        optimizer,
        sched=sched,
        num_epochs=epochs,
        warmup_epochs=warmup_epochs,
        warmup_lr=warmup_lr,
        min_lr=min_lr,
        step_on_epochs=False,
        updates_per_epoch=steps_per_epoch,
    )
    return schedule
