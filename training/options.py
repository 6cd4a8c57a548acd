"""The command-line options shared by all tasks, in groups that check themselves.

A task adds its own groups (`tasks/classification/options.py`), and checks there what concerns several groups.
"""
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar

from utils import UsageError, replace_file

from .flags import (
    ContradictionError,
    Group,
    Needs,
    at_least,
    flag,
    fraction,
    group_classes,
    not_negative,
    number_or_percentage,
    path,
    positive,
    share,
)
from .launcher import restart_count
from .recipes import dump_recipe

# Flags that say where a run is and how it starts.
_PLACE = frozenset({
    "auto_resume", "device", "dist_timeout", "hang_timeout", "loader_timeout", "num_workers", "output_dir", "pin_mem",
    "resume", "show_batch",
})  # fmt: skip
# Flags that say which weights a run starts from.
START = frozenset({"finetune", "load_release", "resume"})
# Flags that a run which resumes another does not take from it.
NOT_OF_RUN = _PLACE | START | {"eval"}
# Flags that do not change the result of a run.
NO_RESULT = _PLACE | {
    "data_path", "detections", "dist_eval", "download", "enable_wandb", "keep_checkpoints", "log_every", "project",
    "report", "save_every", "save_every_minutes", "save_every_steps", "shard_cache", "shard_cache_gb", "train_json",
    "val_json",
}  # fmt: skip
# Flags that may differ between the processes of a run, which may be on several machines, where all have them or none.
PLACES = (NOT_OF_RUN - {"auto_resume", "eval", "load_release"}) | {
    "data_path", "detections", "report", "shard_cache", "teacher_path", "token_label", "train_json", "val_json",
}


def holds_checkpoint(folder: Path) -> bool:
    """Whether a run has written a checkpoint in its output folder."""
    return any(folder.glob("checkpoint-*.pth"))


def _place(value: Any) -> Any:
    """A value, of which a path may be spelled in several ways."""
    return os.path.realpath(value) if isinstance(value, str) else value


@dataclass(frozen=True)
class TaskOptions(Group):
    """Task"""

    task: str = flag("classification", "the task, for example classification; decides which other flags there are")


@dataclass(frozen=True)
class LoaderOptions(Group):
    """Data loading"""

    batch_size: int = flag(128, "images for each GPU and forward pass", type=int, check=at_least(1))
    num_workers: int = flag(min(8, os.cpu_count() or 1), "data loading processes for each GPU", type=int,
                            check=lambda n: not_negative(n) or (None if n <= 1024 else "must be at most 1024"))
    pin_mem: bool = flag(True, "pin host memory")
    loader_timeout: float = flag(600.0, "seconds after which a run that waits for data ends; 0 for no limit",
                                 type=float, metavar="SECONDS", check=not_negative)


@dataclass(frozen=True)
class OptimizerOptions(Group):
    """Optimizer"""

    opt: str = flag("adamw", "adamw, adam, sgd (with Nesterov momentum), nadamw, lamb, lion, adopt, muon, rmsprop or "
                              "another that timm.optim.list_optimizers() lists; first-order ones alone")
    lr: float = flag(5e-4, "base learning rate; multiplied by the global batch / 512", type=float, check=positive)
    weight_decay: float = flag(0.05, "weight decay", type=float, check=not_negative)
    decay_groups: str = flag(
        "timm", "no weight decay on: biases, norms and model.no_weight_decay() (timm), LayerNorms and these, nothing",
        choices=["timm", "layernorm", "none"],
    )
    layer_decay: float | None = flag(None, "layer-wise learning rate decay",
                                     type=float, check=positive)
    opt_eps: float = flag(1e-8, "epsilon of the optimizer", type=float, check=positive)
    opt_betas: list[float] | None = flag(None, "betas of the optimizer (default: its own)", type=float, nargs="+",
                                         metavar="BETA")
    momentum: float = flag(0.9, "momentum of optimizers that have one", type=float)
    clip_grad: float | None = flag(None, "largest gradient norm (default: no clipping)", type=float, check=positive)
    update_freq: int = flag(1, "gradient accumulation: batches for each optimizer step", type=int, check=at_least(1))
    recipe_batch: int | None = flag(None, "global batch that a recipe was made for; a run tells how its own differs",
                                    type=int, check=at_least(1))

    def check(self):
        if not all(0 <= beta < 1 for beta in [self.momentum, *(self.opt_betas or [])]):
            raise UsageError("--momentum and --opt_betas must be at least 0 and below 1")
        if self.layer_decay is not None and self.decay_groups != "timm":
            raise UsageError(f"--layer_decay has groups of its own: leave out --decay_groups {self.decay_groups}")


@dataclass(frozen=True)
class ScheduleOptions(Group):
    """Length of the run and learning rate schedule"""

    epochs: int = flag(300, "epochs to train", type=int, check=at_least(1))
    max_steps: int | None = flag(None, "optimizer steps to train, instead of --epochs", type=int, check=at_least(1))
    sched: str = flag("cosine", "learning rate schedule", choices=["cosine", "poly", "step", "tanh"])
    warmup_epochs: int | None = flag(None, "epochs of linear warm-up (default: 5, at most a tenth of the run)",
                                     type=int, check=not_negative)
    warmup_steps: int | None = flag(None, "optimizer steps of linear warm-up, instead of --warmup_epochs", type=int,
                                    check=not_negative)
    warmup_lr: float | str = flag("0.1%", "initial learning rate of the warm-up: a percentage of the peak, or a number "
                                          "that is not scaled", type=number_or_percentage, check=share, metavar="LR")
    min_lr: float | str = flag("1%", "final learning rate, except of step: a percentage of the peak, or a number that "
                                     "is not scaled", type=number_or_percentage, check=share, metavar="LR")
    cooldown_epochs: int = flag(0, "last epochs, of --epochs, at --min_lr", type=int, check=not_negative)
    poly_power: float = flag(1.0, "power of poly, 1 for a straight line", type=float, check=positive)
    decay_epochs: list[int] | None = flag(None, "epochs at which step decays", type=int, nargs="+", metavar="EPOCH")
    decay_steps: list[int] | None = flag(None, "optimizer steps at which step decays, instead of --decay_epochs",
                                         type=int, nargs="+", metavar="STEP")
    decay_rate: float = flag(0.1, "factor by which step decays", type=float, check=positive)

    alternatives = (("epochs", "max_steps"), ("warmup_epochs", "warmup_steps"), ("decay_epochs", "decay_steps"))
    parts_of: ClassVar[Mapping[str, str]] = MappingProxyType({"decay_epochs": "sched", "decay_steps": "sched"})

    def check(self):
        milestones = [name for name in ("decay_epochs", "decay_steps") if getattr(self, name) is not None]
        if self.sched == "step" and len(milestones) != 1:
            raise UsageError("--sched step needs either --decay_epochs or --decay_steps")
        if self.sched != "step" and milestones:
            raise UsageError(f"--{milestones[0]} is for --sched step, not {self.sched}")
        for name in milestones:
            values = getattr(self, name)
            if min(values) < 1 or sorted(set(values)) != values:
                raise UsageError(f"--{name} must be positive and strictly increasing, got {values}")

    def needs(self) -> Needs:
        warmup = self.warmup_epochs if self.warmup_steps is None else self.warmup_steps
        return {
            "poly_power": (self.sched == "poly", "without --sched poly"),
            "decay_rate": (self.sched == "step", "without --sched step"),
            "min_lr": (self.sched != "step", "with --sched step"),
            "cooldown_epochs": (self.sched != "step", "with --sched step"),
            "warmup_lr": (warmup != 0, "without a warm-up"),
        }

    def total_steps(self, epoch_length: int) -> int:
        """Optimizer steps of the run, for epochs of `epoch_length` steps."""
        return self.epochs * epoch_length if self.max_steps is None else self.max_steps

    def total_warmup(self, epoch_length: int) -> int:
        """Optimizer steps of the warm-up."""
        if self.warmup_steps is not None:
            return self.warmup_steps
        if self.warmup_epochs is not None:
            return self.warmup_epochs * epoch_length
        return min(5 * epoch_length, self.total_steps(epoch_length) // 10)

    def times(self, epoch_length: int) -> dict[str, int | list[int]]:
        """Optimizer steps of warm-up and cool-down, and those at which "step" decays, as `Schedule` takes them."""
        milestones = self.decay_steps or [epoch * epoch_length for epoch in self.decay_epochs or []]
        cooldown = 0 if self.sched == "step" else self.cooldown_epochs * epoch_length
        return dict(warmup=self.total_warmup(epoch_length), milestones=milestones, cooldown=cooldown)

    def check_lengths(self):
        """Raises UsageError where nothing of a run is left between warm-up and cool-down; evaluation asks for none."""
        length, unit = (self.epochs, "epochs") if self.max_steps is None else (self.max_steps, "max_steps")
        warmup, of = (self.warmup_epochs, "epochs") if self.warmup_steps is None else (self.warmup_steps, "steps")
        if warmup is not None and of == unit.removeprefix("max_") and warmup >= length:
            raise ContradictionError(
                f"--warmup_{of} {warmup} must be less than --{unit} {length}; --warmup_{of} 0 trains without a warm-up",
                [f"warmup_{of}", unit],
            )
        warmup = (self.warmup_steps is None and self.warmup_epochs) or 0
        has_cooldown = self.cooldown_epochs and self.sched != "step" and self.max_steps is None
        if has_cooldown and warmup + self.cooldown_epochs >= self.epochs:
            names = [*(["warmup_epochs"] if warmup else []), "cooldown_epochs"]
            asked = " and ".join(f"--{name} {getattr(self, name)}" for name in names)
            raise ContradictionError(f"{asked} must be less than --epochs {self.epochs}", [*names, "epochs"])


@dataclass(frozen=True)
class EmaOptions(Group):
    """Exponential moving average (EMA) of the weights"""

    model_ema: bool = flag(True, "keep EMA weights")
    model_ema_decay: float = flag(0.99996, "decay of the EMA; it warms up, so that a short run averages its last tenth",
                                  type=float, check=fraction)
    model_ema_eval: bool = flag(False, "evaluate the EMA weights too, after every epoch")

    def needs(self) -> Needs:
        return dict.fromkeys(("model_ema_decay", "model_ema_eval"), (self.model_ema, "without --model_ema"))


@dataclass(frozen=True)
class EvaluationOptions(Group):
    """Evaluation"""

    eval: bool = flag(False, "evaluate a checkpoint, and do not train")
    split: str = flag("val", "with --eval, the images to evaluate on", choices=["train", "val", "test"])
    dist_eval: bool = flag(True, "share the evaluation among the processes; the result is the same")
    disable_eval: bool = flag(False, "do not evaluate while training")
    eval_every: int = flag(1, "epochs between two evaluations; the last is evaluated always", type=int,
                           metavar="EPOCHS", check=at_least(1))

    def check(self):
        if self.split != "val" and not self.eval:
            raise UsageError(f"--split {self.split} is for --eval; training evaluates on val")

    def needs(self) -> Needs:
        return {"eval_every": (not self.disable_eval, "with --disable_eval")}

    def is_due(self, epoch: int, is_last: bool) -> bool:
        """Whether an epoch, counted from 0, is evaluated once it is trained."""
        return is_last or (epoch + 1) % self.eval_every == 0


# Where runs write, each in a folder of its own, without an output folder.
OUTPUTS = Path("outputs")


@dataclass(frozen=True)
class CheckpointOptions(Group):
    """Checkpoints, logs and resuming"""

    output_dir: str | None = flag(None, "checkpoints and logs (default: outputs/MODEL/DATE-TIME)", type=path,
                                   metavar="FOLDER")
    resume: str | None = flag(None, "resume from this checkpoint or, with --eval, evaluate it; file or URL",
                              type=path, metavar="CHECKPOINT")
    auto_resume: bool = flag(False, "resume from the newest intact checkpoint in --output_dir, if there is one")
    finetune: str | None = flag(None, "start from these weights; another class count gets a new classifier",
                                type=path, metavar="CHECKPOINT")
    model_key: str | None = flag(None, "checkpoint key to load, for example model_ema (default: model, state_dict, or "
                                       "the checkpoint itself; the EMA's where a run's best metric is theirs, or "
                                       "timm's train.py wrote state_dict_ema)")
    save_every: int = flag(1, "epochs between two checkpoints", type=int, metavar="EPOCHS", check=at_least(1))
    save_every_steps: int | None = flag(None, "also save every STEPS optimizer steps", type=int, metavar="STEPS",
                                        check=at_least(1))
    save_every_minutes: float | None = flag(None, "also save every so many minutes", type=float,
                                            metavar="MINUTES", check=positive)
    keep_checkpoints: int = flag(2, "how many of the newest checkpoints to keep", type=int, metavar="N",
                                 check=at_least(1))
    best_metric: str | None = flag(None, "metric that selects best.pth; ema_METRIC for the EMA weights (default: the "
                                         "task's first metric)", metavar="METRIC")
    patience: int | None = flag(None, "end the run after so many epochs without a better --best_metric", type=int,
                                metavar="EPOCHS", check=at_least(1))
    log_every: int = flag(50, "steps between two log lines", type=int, metavar="STEPS", check=at_least(1))

    def check(self):
        if self.auto_resume and self.output_dir is None:
            raise UsageError("--auto_resume needs the --output_dir to resume in")

    @property
    def resumes(self) -> bool:
        """Whether the run resumes from its newest checkpoint, if there is one: asked for, or restarted by torchrun."""
        return self.auto_resume or restart_count() > 0

    def resumes_here(self) -> bool:
        """Whether it does, and there is one."""
        return self.resumes and self.output_dir is not None and holds_checkpoint(Path(self.output_dir))


@dataclass(frozen=True)
class WandbOptions(Group):
    """Weights & Biases"""

    enable_wandb: bool = flag(False, "log to Weights & Biases too, beside TensorBoard")
    project: str = flag("routedvit", "project there")

    def needs(self) -> Needs:
        return {"project": (self.enable_wandb, "without --enable_wandb")}

    def check_installed(self):
        """Raises UsageError where it is asked for and not installed; evaluation needs none."""
        if self.enable_wandb and find_spec("wandb") is None:
            raise UsageError("--enable_wandb needs the package wandb: pip install wandb")


@dataclass(frozen=True)
class MachineOptions(Group):
    """Device, precision and reproducibility"""

    device: str = flag("auto", "auto, cuda, cuda:1 or cpu")
    amp: str = flag("auto", "mixed precision; auto: bf16 if the GPU has it", choices=["auto", "bf16", "fp16", "off"])
    channels_last: bool = flag(True, "hold images channels last in memory")
    compile: bool = flag(False, "torch.compile the model: faster steps, after minutes at the start")
    cuda_graph: bool = flag(False, "replay the training pass from CUDA graphs, for a GPU that waits for its host")
    seed: int = flag(0, "seed of everything random", type=int,
                     check=lambda seed: not_negative(seed) or (None if seed < 2**32 else "must be below 2 ** 32"))
    deterministic: bool = flag(False, "deterministic GPU kernels, which are slower; CPU runs always are deterministic")
    dist_timeout: float = flag(30.0, "timeout of collective operations, in minutes", type=float, metavar="MINUTES",
                               check=positive)
    hang_timeout: float = flag(20.0, "end a run that makes no progress for so many minutes, and write its stacks",
                               type=float, metavar="MINUTES", check=positive)


@dataclass(frozen=True)
class Settings:
    """All options of a run, by group; a task's settings class adds groups.

    Attributes:
        evaluated: Flags that decide the result of an evaluation; --eval takes those that are not given from the run.
        decides_epoch: Flags that decide what the images of an epoch are; a run that resumes within one keeps them.

    Raises:
        UsageError: Groups contradict each other.
    """

    evaluated: ClassVar[frozenset[str]] = frozenset({"task", "seed"})
    decides_epoch: ClassVar[frozenset[str]] = frozenset({"seed"})
    task: TaskOptions
    loader: LoaderOptions
    optimizer: OptimizerOptions
    schedule: ScheduleOptions
    ema: EmaOptions
    evaluation: EvaluationOptions
    checkpoint: CheckpointOptions
    wandb: WandbOptions
    machine: MachineOptions

    # What --help lists first.
    most_used: ClassVar[tuple[str, ...]] = (
        "batch_size", "lr", "epochs", "output_dir", "resume", "auto_resume", "eval", "device",
    )

    def __post_init__(self):
        if not self.evaluation.eval:
            self.schedule.check_lengths()
            if self.checkpoint.patience is not None and self.evaluation.disable_eval:
                raise UsageError("--patience waits for a better evaluation, which --disable_eval leaves out")
            if (self.checkpoint.patience or self.evaluation.eval_every) < self.evaluation.eval_every:
                raise UsageError(f"--patience {self.checkpoint.patience} is below --eval_every "
                                 f"{self.evaluation.eval_every}: it would end before there is a better evaluation")
            self._check_cuda_graph()
            self.wandb.check_installed()
        self.check()

    @property
    def name(self) -> str:
        """What the run is called: its model's name."""
        raise NotImplementedError

    def advice_for(self, images: int) -> str | None:
        """What to say about settings that do not suit so many training images; for a task to extend."""
        return None

    def best_metric(self, metrics: Sequence[str]) -> str:
        """The name of the metric that decides which weights are the best, among a task's metrics; `ema_METRIC` too.

        Raises:
            UsageError: There is none of that name, or it is not measured.
        """
        names = [*metrics, *(f"ema_{name}" for name in metrics)]
        best = self.checkpoint.best_metric or names[0]
        if best not in names:
            raise UsageError(f"--best_metric must be one of {', '.join(names)}, got {best}")
        if best.startswith("ema_") and not (self.ema.model_ema and self.ema.model_ema_eval):
            raise UsageError(f"--best_metric {best} needs --model_ema and --model_ema_eval")
        return best

    def needs(self) -> Needs:
        """`Group.needs` of all groups and among them; of an evaluation, for a task to extend."""
        if self.evaluation.eval:
            return {}
        of_groups = {k: v for name in group_classes(type(self)) for k, v in getattr(self, name).needs().items()}
        return of_groups | {
            "best_metric": (not self.evaluation.disable_eval, "with --disable_eval"),
            "model_key": (self.checkpoint.finetune, "without --finetune or --eval"),
        }

    @classmethod
    def check_words(cls, given: Mapping[str, Any]):
        """Raises UsageError where values of the command line itself, its recipe aside, contradict each other."""

    @classmethod
    def not_taken(cls, asked: Mapping[str, Any], of_run: Mapping[str, Any]) -> set[str]:
        """Flags that are not taken from the run that is evaluated or resumed, whatever it has.

        They are parts of what is another in the run, such as arguments of another model (`Group.parts_of`). Data that
        were moved are others for an evaluation alone: a run that resumes holds out the same images.

        Args:
            asked: The values that were given.
            of_run: Those of the run.
        """
        parts = {name: whole for group in group_classes(cls).values() for name, whole in group.parts_of.items()}
        same = frozenset() if asked.get("eval") else NO_RESULT
        found = {name for name in (asked.keys() & of_run.keys()) - same if _place(asked[name]) != _place(of_run[name])}
        while more := {name for name, whole in parts.items() if whole in found} - found:
            found |= more
        return found

    def _check_cuda_graph(self):
        if self.machine.cuda_graph and self.optimizer.update_freq > 1:
            raise UsageError(f"--cuda_graph takes a step on each batch, --update_freq must be 1, "
                             f"got {self.optimizer.update_freq}")

    def check(self):
        """Raises UsageError where groups contradict each other; for a task to extend."""


def save(recipe: dict[str, Any], path: Path, keep: bool = False):
    """Write what runs, as a recipe, next to its checkpoints, or `keep` the one that is there."""
    if keep and path.exists():
        return
    text = dump_recipe(recipe)
    replace_file(path, lambda file: file.write(text.encode()))

