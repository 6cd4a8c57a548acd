"""Optimizer, parameter groups and learning rate schedule, which are timm's."""
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from timm.optim import create_optimizer_v2, param_groups_weight_decay
from timm.scheduler import CosineLRScheduler, MultiStepLRScheduler, PolyLRScheduler, TanhLRScheduler
from timm.scheduler.scheduler import Scheduler
from torch import nn

from utils import UsageError, count

LR_BATCH = 512
# Where on its tanh that schedule ends: 0.03 % of the way from `min_lr` to the peak, with timm's 3 it would be 0.25 %.
TANH_END = 4.0
# Optimizers with a fused kernel, which takes a sixth of the time of biformer_small's adamw step on a CPU.
_FUSED = ("adam", "adamw", "sgd")


class OptimizerError(UsageError):
    """An optimizer cannot be used with these arguments."""


class ScheduleError(UsageError):
    """A learning rate schedule would start or end above its own peak."""


class LengthError(UsageError):
    """Warm-up and cool-down take the whole run."""


def scaled_lr(lr: float, global_batch: int) -> float:
    """The learning rate for a global batch, by the linear rule: `lr` is for 512 images."""
    return lr * global_batch / LR_BATCH


def parameter_groups(model: nn.Module, weight_decay: float, decay_groups: str) -> list[dict]:
    """The parameters with and without weight decay.

    Args:
        model: Any network, without wrappers.
        weight_decay: Weight decay of the other parameters.
        decay_groups: "layernorm" for no weight decay on layer norms and on what the model itself names (DeBiFormer's
            tables of positions), as in the published detection and segmentation recipes; "none" for weight decay on
            everything.
    """
    excluded = []
    if decay_groups == "layernorm":
        norms = [name for name, module in model.named_modules() if isinstance(module, nn.LayerNorm)]
        excluded = [*(f"{name}.*" for name in norms), *getattr(model, "no_weight_decay", set)()]
    return param_groups_weight_decay(
        model, weight_decay, weight_decay_exclude_1d=False, no_weight_decay_list=excluded
    )


def create_optimizer(
    model: nn.Module,
    opt: str,
    lr: float,
    weight_decay: float,
    momentum: float = 0.9,
    layer_decay: float | None = None,
    decay_groups: str = "timm",
    **kwargs,
) -> torch.optim.Optimizer:
    """An optimizer over the model's parameter groups.

    Args:
        model: A network, without wrappers; of timm's interface where `decay_groups` is "timm".
        opt: One of timm's optimizers, for example "adamw".
        lr: Learning rate of a step, not scaled any further.
        weight_decay: Weight decay.
        momentum: For the optimizers that have one.
        layer_decay: Factor of the learning rate from one layer to the one before it, as in fine-tuning.
        decay_groups: What has no weight decay: "timm" (biases, norms, and what the model names), or as in
            `parameter_groups`.
        kwargs: `eps` and `betas` where they are not the optimizer's own.

    Raises:
        OptimizerError: The optimizer does not take these arguments.
        UsageError: It needs second derivatives.
    """
    if opt in _FUSED:
        kwargs = dict(fused=True, **kwargs)
    parameters = model if decay_groups == "timm" else parameter_groups(model, weight_decay, decay_groups)
    try:
        optimizer = create_optimizer_v2(
            parameters, opt=opt, lr=lr, weight_decay=weight_decay, momentum=momentum, layer_decay=layer_decay, **kwargs
        )
    except (AssertionError, ImportError, IndexError, RuntimeError, TypeError, ValueError) as error:
        raise OptimizerError(f"the optimizer {opt} cannot be used with these arguments: {error}") from error
    if getattr(optimizer, "is_second_order", False):
        raise UsageError(f"the optimizer {opt} needs second derivatives, which no training here computes")
    return optimizer


@dataclass(frozen=True)
class Schedule:
    """A learning rate schedule; all times are optimizer steps.

    Args:
        kind: "cosine", "poly" or "tanh", which fall to `min_lr` until `cooldown`; or "step", which decays at
            `milestones`.
        total: Length of the run.
        warmup: Length of the linear warm-up; its steps count towards `total`.
        warmup_lr: Learning rate at step 0, where there is a warm-up.
        min_lr: Learning rate at the end.
        power: Of "poly".
        milestones: Steps from which "step" multiplies the learning rate by `decay_rate` once more.
        decay_rate: Of "step".
        cooldown: Length of the end at `min_lr`; its steps count towards `total`. Not for "step".
    """

    kind: str
    total: int
    warmup: int = 0
    warmup_lr: float = 0.0
    min_lr: float = 0.0
    power: float = 1.0
    milestones: Sequence[int] = ()
    decay_rate: float = 0.1
    cooldown: int = 0

    def check(self, lr: float):
        """Check the schedule for `lr`, the learning rate of its peak.

        Raises:
            ScheduleError: It would start or end above its peak.
            LengthError: Nothing is left of the run between warm-up and cool-down.
        """
        ends = dict(warmup_lr=self.warmup_lr if self.warmup else 0.0)
        if self.kind != "step":
            ends.update(min_lr=self.min_lr)
        for name, value in ends.items():
            if value > lr:
                raise ScheduleError(f"{name} {value:g} is above the learning rate of this batch size, {lr:.3g}")
        if self.warmup + self.cooldown >= self.total:
            parts = {"warm-up": self.warmup, "cool-down": self.cooldown}
            taken = [f"a {name} of {count(steps, 'step')}" for name, steps in parts.items() if steps]
            verb = "leaves" if len(taken) == 1 else "leave"
            raise LengthError(f"{' and '.join(taken)} {verb} nothing of the run's {self.total}")

    def build(self, optimizer: torch.optim.Optimizer) -> Scheduler:
        """timm's scheduler, which `step_update(step)` moves to any step, from 0 up; it has no other state."""
        # timm's factory takes poly's power for the decay rate of the others, and does not let tanh end at `min_lr`.
        warmup = dict(warmup_t=self.warmup, warmup_lr_init=self.warmup_lr, warmup_prefix=False, t_in_epochs=False)
        if self.kind == "step":
            # timm compares a milestone with the step after.
            milestones = [step + 1 for step in self.milestones]
            return MultiStepLRScheduler(optimizer, milestones, self.decay_rate, **warmup)
        kind, shape = {
            "cosine": (CosineLRScheduler, {}),
            "poly": (PolyLRScheduler, dict(power=self.power)),
            "tanh": (TanhLRScheduler, dict(ub=TANH_END)),
        }[self.kind]
        # Of one step: the first of two is the same, and timm does not warn of a schedule without effect.
        length = 2 if self.total == 1 else self.total - self.cooldown
        return kind(optimizer, length, lr_min=self.min_lr, **shape, **warmup)
