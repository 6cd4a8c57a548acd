"""Train and evaluate image models. `python main.py --help` lists the flags; TRAINING.md has the recipes."""
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext

import training.startup  # before torch  # isort: skip
if __name__ == "__main__":
    training.startup.check_command_line(sys.argv[1:], __doc__.partition("`")[0])
import torch
from timm.optim import list_optimizers

import engine
from optim_factory import LengthError, OptimizerError, Schedule, ScheduleError, create_optimizer, scaled_lr
from training import advice, command_line, flags, options
from training.alike import check_same_source, check_same_start
from training.checkpointer import Checkpointer, Stopped
from training.command_line import CommandLine, TaskRegistry
from training.distributed import init_distributed, shutdown_distributed
from training.log import RunLog, is_complete, open_log, print_end, print_plan
from training.options import Settings
from training.precision import Precision
from training.resuming import find_start, keep_best, open_store
from training.run import BestMetric, Clock, Run, create_ema
from training.signals import EXIT_RESUME, SignalHandler, fault_of, run_and_exit
from training.task import Data, Evaluator, NonFiniteOutputError, Task
from training.watchdog import watched
from training.wrap import check_wrappers, compiled_as_asked, warm_up, wrap
from utils import UserError, check_name, fail, seed_everything, use_deterministic_algorithms

# Where each task is; it is imported when it is asked for.
TASKS = {name: f"tasks.{name}.task:{name.title()}Task" for name in ("classification", "detection", "segmentation")}
ADVICE = {
    **advice.ADVICE,
    OptimizerError: "see --opt_eps, --opt_betas, --momentum and --layer_decay",
    ScheduleError: "--lr is for 512 images and scaled with the batch size; percentages scale with it: --min_lr 1%",
    LengthError: "lower --warmup_epochs or --cooldown_epochs, or give --warmup_steps",
}


# --- what is asked for ------------------------------------------------------------------------------------------------


def understand(argv: Sequence[str], tasks: TaskRegistry = TASKS) -> CommandLine:
    """What a command line asks for. Raises UserError where it, or the recipe that it names, is wrong."""
    return command_line.understand(argv, tasks, description=__doc__.partition("`")[0])


def parse(argv: Sequence[str], tasks: TaskRegistry = TASKS) -> tuple[type[Task], Settings]:
    """The task of a command line, and its settings; raises as `understand` does."""
    return understand(argv, tasks)[:2]


def check_names(task_class: type[Task], settings: Settings):
    """Raises UsageError where the settings name what does not exist."""
    task_class.check_names(settings)
    settings.best_metric(list(task_class.metrics))
    check_name("optimizer", settings.optimizer.opt, list_optimizers())


# --- evaluation -------------------------------------------------------------------------------------------------------


def evaluate(task: Task, data: Data, network: torch.nn.Module, what: str = "network") -> tuple[dict, Evaluator]:
    """Evaluate a network; the main process prints the metrics. Returns them by name, and the evaluator.

    Raises:
        NonFiniteOutputError: `--eval` of a network that outputs NaN; in training, that is a warning.
    """
    results, evaluator = engine.evaluate(task, network, data.val_loader)
    problem = task.problem_of(results, what)
    if problem and task.settings.evaluation.eval:
        raise NonFiniteOutputError(problem)
    if task.distributed.is_main:
        task.report(results, evaluator, what)
        print(f"warning: {problem}\n" if problem else "", end="")
    return results, evaluator


def evaluate_checkpoint(task: Task):
    """`--eval`: print the metrics of a checkpoint, or of published weights."""
    data, asked = Data.for_evaluation(task), task.settings.checkpoint
    network = task.network()
    if source := asked.resume or asked.finetune:
        task.load(network, source)
    network = task.precision.place(network, task.distributed.device)
    task.check_input(network)
    evaluate(task, data, compiled_as_asked(network, task.settings.machine, task.distributed))


def evaluate_epoch(trainer: engine.Trainer, data: Data, checkpointer: Checkpointer) -> dict[str, float]:
    """Evaluate a run after an epoch, and save it if it is the best; returns what its log line says."""
    task, run = trainer.task, trainer.run
    results = {}
    results["val"], evaluator = evaluate(task, data, run.model)
    if run.ema is not None and task.settings.ema.model_ema_eval:
        results["ema"], evaluator = evaluate(task, data, run.ema.module, "model EMA")
    trainer.log.evaluations(results, lambda: task.pictures(evaluator), run.clock.steps_taken)
    metrics = results["val"] | {f"ema_{name}": value for name, value in results.get("ema", {}).items()}
    if run.record_best(metrics):
        checkpointer.save_best()
    return {f"{name}_{key}": value for name, values in results.items() for key, value in values.items()}


# --- training ---------------------------------------------------------------------------------------------------------


def create_run(task: Task, data: Data) -> Run:
    """A run at its start: model, EMA weights, optimizer."""
    settings, asked = task.settings, task.settings.optimizer
    # The same weights in every process, whatever was drawn before.
    seed_everything(settings.machine.seed)
    model = task.precision.place(task.network(), task.distributed.device)
    task.check_input(model)
    global_batch = settings.loader.batch_size * asked.update_freq * task.distributed.world_size
    lr = scaled_lr(asked.lr, global_batch)
    epoch_length = len(data.train_loader) // asked.update_freq
    clock = Clock(epoch_length, settings.schedule.total_steps(epoch_length))
    create_schedule(settings.schedule, clock, lr).check(lr)
    own = dict(eps=asked.opt_eps) | (dict(betas=tuple(asked.opt_betas)) if asked.opt_betas else {})
    optimizer = create_optimizer(
        model, asked.opt, lr, asked.weight_decay, asked.momentum, asked.layer_decay, asked.decay_groups, **own
    )
    ema = create_ema(model, settings.ema.model_ema_decay) if settings.ema.model_ema else None
    best = settings.best_metric(list(task.metrics))
    return Run(
        model, ema, optimizer, task.precision.grad_scaler(), clock, global_batch, data.train_loader.ranges,
        BestMetric(best, higher=task.metrics[best.removeprefix("ema_")]), task.classes, task.held_out,
        len(data.train_loader.dataset), data.fingerprints.get("train"),
    )


def create_schedule(asked: options.ScheduleOptions, clock: Clock, peak: float) -> Schedule:
    return Schedule(
        asked.sched, clock.total, warmup_lr=flags.share_of(asked.warmup_lr, peak), power=asked.poly_power,
        min_lr=flags.share_of(asked.min_lr, peak), decay_rate=asked.decay_rate, **asked.times(clock.epoch_length),
    )


def create_trainer(task: Task, run: Run, log: RunLog) -> engine.Trainer:
    """The trainer of a run at its current position: wraps the model (compile, DDP) and creates the schedule."""
    settings = task.settings
    network = wrap(run.model, settings.machine, task.precision, task.distributed)
    warm_up(network, settings.machine, task.distributed, lambda: task.dummy_loss(network))
    peak = scaled_lr(settings.optimizer.lr, run.global_batch)
    schedule = create_schedule(settings.schedule, run.clock, peak).build(run.optimizer)
    if run.clock.global_step:
        schedule.step_update(run.clock.global_step - 1)
    return engine.Trainer(
        task, run, network, schedule, log, settings.machine.seed, settings.optimizer.update_freq,
        settings.optimizer.clip_grad, settings.checkpoint.log_every,
    )


def train_until_over(trainer: engine.Trainer, data: Data, checkpointer: Checkpointer):
    run, evaluates = trainer.run, trainer.task.settings.evaluation.is_due
    while not run.clock.run_is_over:
        checkpointer.between_epochs()
        means = trainer.train_epoch(data.train_loader, checkpointer)
        record = dict(epoch=run.clock.epoch, step=run.clock.global_step)
        record.update({f"train_{name}": value for name, value in means.items()})
        if data.val_loader is not None and evaluates(run.clock.epoch, run.clock.is_last_epoch):
            record.update(evaluate_epoch(trainer, data, checkpointer))
        trainer.log.epoch(record)
        if checkpointer.ends_early():
            return
        run.next_epoch()


def train(task: Task, signals: SignalHandler):
    """Train, evaluate after every epoch, and leave checkpoints and logs in the output folder."""
    settings, distributed = task.settings, task.distributed
    if settings.machine.deterministic:
        use_deterministic_algorithms()
    # One time for all processes, whose clocks differ.
    store = open_store(settings.checkpoint, task.name, started=distributed.max(time.time_ns()))
    data, recipe = Data.of(task), flags.as_recipe(settings)
    check_same_start(recipe, data.fingerprints, distributed)
    run = create_run(task, data)
    clock = run.clock
    with store.locked() if distributed.is_main else nullcontext():
        source = find_start(settings.checkpoint, store, distributed)
        if source:
            run.load(source, recipe, settings.decides_epoch, distributed.print)
            check_same_source(run.model, source, distributed)
            keep_best(run, source, store, distributed)
        if is_complete(clock, source, store.folder, recipe, distributed):
            distributed.print(f"training is already complete: nothing is left to do after {source}")
            return
        with open_log(store.folder if distributed.is_main else None, clock, settings.wandb, recipe) as log:
            if distributed.is_main:
                options.save(recipe, store.folder / "args.yaml", keep=clock.is_trained)
                print_plan(task, run, data, scaled_lr(settings.optimizer.lr, run.global_batch), store.folder)
                if source:
                    print(f"resuming from {source}: {clock.position}")
            saver = Checkpointer(run, store, distributed, signals, recipe, settings.checkpoint)
            with saver.leaving_without_data(), watched(distributed, clock, store.folder, settings.machine.hang_timeout):
                task.preview(data.train_loader.dataset, clock)
                train_until_over(create_trainer(task, run, log), data, saver)
    if distributed.is_main:
        print_end(run, store)


# --- the program ------------------------------------------------------------------------------------------------------


def run_task(asked: CommandLine):
    """Evaluate or train, on this process's device."""
    settings, machine = asked.settings, asked.settings.machine
    distributed = init_distributed(machine.device, machine.dist_timeout)
    if distributed.is_main:
        print("".join(f"{note}\n" for note in asked.notes), end="")
    check_wrappers(settings, distributed)
    task = asked.task_class(settings, distributed, Precision.on(distributed.device, machine.amp, machine.channels_last))
    if settings.evaluation.eval:
        evaluate_checkpoint(task)
    else:
        with SignalHandler().installed() as signals:
            train(task, signals)


def main(argv: Sequence[str] | None = None, tasks: TaskRegistry = TASKS) -> int:
    """Run a command line; returns the exit code: 0, EXIT_RESUME, or the error's: 1, 2 for usage, 3 for divergence."""
    known_advice = ADVICE
    try:
        asked = understand(sys.argv[1:] if argv is None else argv, tasks)
        known_advice = {**ADVICE, **asked.task_class.advice}
        check_names(asked.task_class, asked.settings)
        run_task(asked)
        shutdown_distributed()
    except UserError as error:
        return fail(advice.with_advice(error, known_advice), error.exit_code)
    except Stopped as stopped:
        sys.stderr.write(f"{stopped}; {command_line.how_to_resume(stopped.folder)}\n")
        if stopped.together:
            shutdown_distributed()
        return EXIT_RESUME
    except KeyboardInterrupt:
        return fail("interrupted", 130)
    except (OSError, RuntimeError, MemoryError) as error:
        fault = fault_of(error)
        if fault is None:
            raise
        return fail(advice.with_advice(fault, known_advice), fault.exit_code)
    return 0


if __name__ == "__main__":
    run_and_exit(main)
