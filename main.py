"""Train and evaluate image models. `python main.py --help` lists the flags; TRAINING.md has the recipes."""
import importlib
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from timm.optim import list_optimizers
from timm.utils import ModelEmaV3
from torch.utils.data import Dataset

import engine
from optim_factory import Schedule, create_optimizer, scaled_lr
from training import flags, options
from training.advice import ADVICE, with_advice
from training.checkpoints import Checkpointer, CheckpointStore, Stopped, find_start, open_store
from training.data.loader import EpochLoader, report_skipped
from training.distributed import init_distributed, share_statistics, shutdown_distributed, warm_up_ddp, wrap_ddp
from training.log import RunLog
from training.options import Settings
from training.precision import Precision
from training.run import BestMetric, Clock, Run
from training.signals import EXIT_RESUME, SignalHandler, fault_of, run_and_exit
from training.task import Task
from utils import UsageError, UserError, check_name, fail, seed_everything, use_deterministic_algorithms

# Where each task is; it is imported when it is asked for.
TASKS = {"classification": "tasks.classification.task:ClassificationTask"}


# --- what is asked for ------------------------------------------------------------------------------------------------


def choose_task(argv: Sequence[str], tasks: Mapping[str, str | type[Task]] = TASKS) -> type[Task]:
    """The task that `--task`, or the recipe, names."""
    config = flags.given_value(argv, "config")
    in_recipe = flags.read_recipe(config).get("task") if config else None
    name = flags.given_value(argv, "task") or in_recipe or options.TaskOptions().task
    check_name("task", name, tasks)
    if isinstance(tasks[name], type):
        return tasks[name]
    module, _, task_class = tasks[name].partition(":")
    return getattr(importlib.import_module(module), task_class)


def parse(argv: Sequence[str], tasks: Mapping[str, str | type[Task]] = TASKS) -> tuple[type[Task], Settings]:
    """The task of a command line, and its settings.

    Raises:
        UsageError: The command line, or the recipe that it names, is wrong.
    """
    task_class = choose_task(argv, tasks)
    description = "Train and evaluate the routed vision transformers here, and all of timm's models."
    parser = flags.Parser(task_class.settings_class, prog="main.py", description=description)
    return task_class, flags.parse(task_class.settings_class, argv, parser)


def check_names(task_class: type[Task], settings: Settings):
    """Raises UsageError where the settings name what does not exist, or what the task does not measure."""
    task_class.check_names(settings)
    metrics = [*task_class.metrics, *(f"ema_{name}" for name in task_class.metrics)]
    best = settings.checkpoint.best_metric or metrics[0]
    if best not in metrics:
        raise UsageError(f"--best_metric is one of {', '.join(metrics)}, not {best}")
    if best.startswith("ema_") and not (settings.ema.model_ema and settings.ema.model_ema_eval):
        raise UsageError(f"--best_metric {best} needs --model_ema and --model_ema_eval")


# --- evaluation -------------------------------------------------------------------------------------------------------


def evaluate(task: Task, network: torch.nn.Module, val_set: Dataset, loader: EpochLoader, what: str = "network"):
    """The metrics of a network, which the main process prints."""
    is_main = task.distributed.is_main
    with report_skipped(val_set, task.eval_processes, is_main):
        results = engine.evaluate(task, network, loader, task.eval_processes, task.precision)
    if is_main:
        task.report(results, what)
    return results


def evaluate_checkpoint(task: Task):
    """`--eval`: print the metrics of a checkpoint, or of published weights."""
    options = task.settings.checkpoint
    val_set = task.dataset("val")
    network = task.network()
    if source := options.resume or options.finetune:
        task.load(network, source)
    network = task.precision.place(network, task.distributed.device)
    task.check_input(network)
    if task.settings.machine.compile:
        network = torch.compile(network)
    evaluate(task, network, val_set, task.loader(val_set, train=False))


# --- training ---------------------------------------------------------------------------------------------------------


@dataclass
class Data:
    """Both splits; no val with --disable_eval."""

    train_set: Dataset
    train_loader: EpochLoader
    val_set: Dataset | None
    val_loader: EpochLoader | None


def create_data(task: Task) -> Data:
    train_set = task.dataset("train")
    val_set = None if task.settings.evaluation.disable_eval else task.dataset("val")
    train_loader = task.loader(train_set, train=True)
    update_freq = task.settings.optimizer.update_freq
    if len(train_loader) < update_freq:
        raise UserError(f"--update_freq {update_freq} is more than the {len(train_loader)} batches of an epoch")
    return Data(train_set, train_loader, val_set, val_set and task.loader(val_set, train=False))


def create_optimizer_of(settings: Settings, model: torch.nn.Module, lr: float) -> torch.optim.Optimizer:
    options, schedule = settings.optimizer, settings.schedule
    for name, value in (("min_lr", schedule.min_lr), ("warmup_lr", schedule.warmup_lr)):
        warms_up = schedule.warmup_steps or (schedule.warmup_steps is None and schedule.warmup_epochs)
        if value > lr and (name == "min_lr" or warms_up):
            raise UsageError(
                f"--{name} {value:g} is above the learning rate of this batch size, {lr:.3g}, by --lr {options.lr:g} "
                f"for 512 images; lower --{name}, which is not scaled"
            )
    kwargs = dict(eps=options.opt_eps) | (dict(betas=tuple(options.opt_betas)) if options.opt_betas else {})
    try:
        optimizer = create_optimizer(
            model, options.opt, lr, options.weight_decay, options.momentum, options.layer_decay, options.decay_groups,
            **kwargs,
        )
    except (AssertionError, ImportError, IndexError, RuntimeError, TypeError, ValueError) as error:
        raise UsageError(f"--opt {options.opt} cannot be used so: {error}") from error
    if getattr(optimizer, "is_second_order", False):
        raise UsageError(f"--opt {options.opt} needs second derivatives, which no training here computes")
    return optimizer


def create_run(task: Task, data: Data) -> Run:
    """A run at its start: model, EMA weights, optimizer."""
    settings = task.settings
    # The same weights in every process, whatever was drawn before.
    seed_everything(settings.machine.seed)
    model = task.precision.place(task.network(), task.distributed.device)
    task.check_input(model)
    global_batch = settings.loader.batch_size * settings.optimizer.update_freq * task.distributed.world_size
    optimizer = create_optimizer_of(settings, model, scaled_lr(settings.optimizer.lr, global_batch))
    ema = ModelEmaV3(model, decay=settings.ema.model_ema_decay) if settings.ema.model_ema else None
    epoch_length = len(data.train_loader) // settings.optimizer.update_freq
    return Run(
        model,
        ema,
        optimizer,
        task.precision.grad_scaler(),
        Clock(epoch_length, settings.schedule.total_steps(epoch_length)),
        global_batch,
        data.train_loader.ranges,
        BestMetric.of(settings.checkpoint.best_metric or next(iter(task.metrics)), task.metrics),
        task.classes,
    )


def create_schedule(settings: Settings, clock: Clock) -> Schedule:
    options, steps = settings.schedule, clock.epoch_length
    return Schedule(
        options.sched, clock.total, options.total_warmup(steps), options.warmup_lr, options.min_lr, options.poly_power,
        options.milestones(steps), options.decay_rate,
    )


def create_trainer(task: Task, run: Run, log: RunLog) -> engine.Trainer:
    """What trains the run from where it is: its network with all wrappers, and its schedule."""
    settings = task.settings
    network = wrap_ddp(run.model, task.distributed)
    if settings.machine.compile:
        network = torch.compile(network)

    def dummy_loss() -> torch.Tensor:
        with task.precision.autocast():
            return task.loss(network, task.dummy_batch(settings.loader.batch_size, train=True))[0]

    warm_up_ddp(network, task.distributed, dummy_loss)
    schedule = create_schedule(settings, run.clock).build(run.optimizer)
    if run.clock.global_step:
        schedule.step_update(run.clock.global_step - 1)
    return engine.Trainer(
        task, run, network, schedule, task.distributed, task.precision, log, settings.machine.seed,
        settings.optimizer.update_freq, settings.optimizer.clip_grad, settings.checkpoint.log_every,
    )


def print_plan(task: Task, run: Run, store: CheckpointStore):
    settings, clock, world_size = task.settings, run.clock, task.distributed.world_size
    parameters = sum(p.numel() for p in run.model.parameters())
    classes = f", {len(task.classes)} classes" if task.classes else ""
    print(f"{task.name}: {parameters / 1e6:.2f} M parameters{classes}, on {task.distributed.device}")
    length = f"{clock.epochs} epochs of {clock.epoch_length} steps of {run.global_batch} images"
    print(f"{length}{'' if settings.schedule.max_steps is None else f', {clock.total} steps in all'}; writes to "
          f"{store.folder}")
    lr, update_freq = settings.optimizer.lr, settings.optimizer.update_freq
    print(
        f"global batch {run.global_batch} = {settings.loader.batch_size} images x {world_size} processes "
        f"x {update_freq} accumulated; learning rate {scaled_lr(lr, run.global_batch):.3e} = {lr:g} x "
        f"{run.global_batch} / 512"
    )


def train_epoch(trainer: engine.Trainer, data: Data, checkpointer: Checkpointer) -> dict[str, float]:
    """Train what is left of the run's epoch, and save it; returns the means of its log line."""
    run, distributed = trainer.run, trainer.distributed
    data.train_loader.set_epoch(run.clock.epoch, first_batch=run.clock.step * trainer.update_freq)
    was_over = run.clock.epoch_is_over
    with report_skipped(data.train_set, distributed, distributed.is_main):
        meter = trainer.train_epoch(data.train_loader, checkpointer.after_step)
    means = meter.epoch_means()
    if not was_over:
        share_statistics(run.model, run.ema, distributed)
        checkpointer.after_epoch(meter)
    return means


def evaluate_epoch(task: Task, run: Run, data: Data, log: RunLog, checkpointer: Checkpointer) -> dict[str, float]:
    """Evaluate the run after an epoch, and save it if it is the best; returns what its log line says."""
    results = {"val": evaluate(task, run.model, data.val_set, data.val_loader)}
    if run.ema is not None and task.settings.ema.model_ema_eval:
        results["ema"] = evaluate(task, run.ema.module, data.val_set, data.val_loader, "model EMA")
    for name, values in results.items():
        log.scalars(name, values, run.clock.global_step)
    metrics = results["val"] | {f"ema_{name}": value for name, value in results.get("ema", {}).items()}
    if run.record_best(metrics):
        checkpointer.save_best(metrics)
    return {f"{name}_{key}": value for name, values in results.items() for key, value in values.items()}


def train(task: Task, signals: SignalHandler):
    """Train, evaluate after every epoch, and leave checkpoints and logs in the output folder."""
    settings, distributed = task.settings, task.distributed
    check_name("optimizer", settings.optimizer.opt, list_optimizers())
    if settings.machine.deterministic:
        use_deterministic_algorithms()
    # One time for all processes, whose clocks differ.
    store = open_store(settings.checkpoint, task.name, started=distributed.max(int(time.time())))
    data = create_data(task)
    run = create_run(task, data)
    with store.locked() if distributed.is_main else nullcontext():
        source = find_start(settings.checkpoint, store, distributed)
        if source:
            run.load(source, settings.optimizer.opt)
            if run.clock.run_is_over:
                if distributed.is_main:
                    print(f"nothing is left to train: {source} is at epoch {run.clock.epoch} of {run.clock.epochs}")
                return
        log = RunLog(store.folder if distributed.is_main else None, run.clock.epoch, run.clock.global_step)
        trainer = create_trainer(task, run, log)
        recipe = flags.as_recipe(settings)
        if distributed.is_main:
            options.save(recipe, store.folder / "args.yaml")
            print_plan(task, run, store)
            if source:
                print(f"resuming from {source}: epoch {run.clock.epoch}, step {run.clock.step} of "
                      f"{run.clock.epoch_steps}")
        train_until_over(trainer, data, Checkpointer(run, store, distributed, signals, recipe, settings.checkpoint))
        if distributed.is_main:
            print(f"log: {store.folder / 'log.txt'}")
            print(f"checkpoint: {store.last}")


def train_until_over(trainer: engine.Trainer, data: Data, checkpointer: Checkpointer):
    run, task, log = trainer.run, trainer.task, trainer.log
    try:
        while not run.clock.run_is_over:
            checkpointer.between_epochs()
            means = train_epoch(trainer, data, checkpointer)
            record = dict(epoch=run.clock.epoch, step=run.clock.global_step)
            record.update({f"train_{name}": value for name, value in means.items()})
            if data.val_loader is not None:
                record.update(evaluate_epoch(task, run, data, log, checkpointer))
            log.epoch(record)
            run.next_epoch()
    finally:
        log.close()


def main(argv: Sequence[str] | None = None, tasks: Mapping[str, str | type[Task]] = TASKS) -> int:
    """Run a command line; returns the exit code: 0, 1 for a mistake or a fault, 2 for a wrong command line, and
    `training.signals.EXIT_RESUME` where the run was asked to leave and should be started again.
    """
    advice = ADVICE
    try:
        task_class, settings = parse(sys.argv[1:] if argv is None else argv, tasks)
        advice = {**ADVICE, **task_class.advice}
        check_names(task_class, settings)
        machine = settings.machine
        distributed = init_distributed(machine.device, machine.dist_timeout)
        task = task_class(settings, distributed, Precision.on(distributed.device, machine.amp, machine.channels_last))
        if settings.evaluation.eval:
            evaluate_checkpoint(task)
        else:
            with SignalHandler().installed() as signals:
                train(task, signals)
        shutdown_distributed()
    except UserError as error:
        return fail(with_advice(error, advice), error.exit_code)
    except Stopped as stopped:
        shutdown_distributed()
        sys.stderr.write(f"{stopped}; resume with --auto_resume\n")
        return EXIT_RESUME
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except (OSError, RuntimeError) as error:
        fault = fault_of(error)
        if fault is None:
            raise
        return fail(with_advice(fault, advice), 1)
    return 0


if __name__ == "__main__":
    run_and_exit(main)
