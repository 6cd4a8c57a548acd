"""Train and evaluate image classifiers. `python main.py --help` lists the flags; TRAINING.md has the recipes."""
import argparse
import os
import sys
import time
import zipfile
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from timm.data import create_transform
from timm.data.mixup import Mixup
from timm.layers import to_2tuple
from timm.optim import list_optimizers
from timm.utils import ModelEmaV3, distribute_bn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import Dataset

import datasets
from engine import Meter, NonFiniteLossError, Numerics, Trainer, evaluate
from optim_factory import create_optimizer, create_schedule, scaled_lr
from storage.weights import fetch
from tasks.classification import token_labels
from tasks.classification.losses import DistillationLoss, TokenLabelLoss, create_loss
from tasks.networks import (
    build_model,
    check_model,
    check_released_classes,
    create_teacher,
    load_from,
    model_data_config,
    released_classes,
    size_kwargs,
)
from training import options
from training.checkpoints import CheckpointStore, is_whole, translate_weights_errors
from training.run import Checkpointer, Run, Stopped
from utils import (
    EXIT_RESUME,
    Process,
    RunLog,
    StopRequest,
    UsageError,
    UserError,
    check_name,
    end_process,
    explain_fault,
    fail,
    run_and_exit,
    seed_everything,
    start_process,
    use_deterministic_algorithms,
)

# --- models ---------------------------------------------------------------------------------------------------------


def create_model(args: argparse.Namespace, num_classes: int | None) -> torch.nn.Module:
    """The model that the flags describe, with the weights that it starts from."""
    kwargs = size_kwargs(args.model, args.input_size)
    if num_classes is not None:
        kwargs["num_classes"] = num_classes
    if not args.eval:
        kwargs.update(drop_rate=args.drop, drop_path_rate=args.drop_path)
        if args.token_label:
            kwargs["token_head"] = True
    kwargs.update(args.model_kwargs)
    try:
        model = build_model(args.model, args.load_release, kwargs)
    except UsageError as error:
        if "'token_head'" in str(error):
            raise UsageError(f"--token_label: {args.model} has no token head, as BiFormer and its kin have") from error
        if "'drop_path_rate'" not in str(error):
            raise
        print(f"{args.model} has no stochastic depth: --drop_path is left out")
        del kwargs["drop_path_rate"]
        model = build_model(args.model, args.load_release, kwargs)
    if args.grad_checkpointing:
        model.set_grad_checkpointing()
    return model


# --- data -----------------------------------------------------------------------------------------------------------


def build_dataset(args: argparse.Namespace, split: str):
    """The train or val data set, with the transform that the flags and the model ask for."""
    train = split == "train"
    config = model_data_config(args.model)
    policy = None if args.aa == "none" else args.aa
    if train and policy is not None:
        check_policy(policy)
    augmentation = dict(
        scale=tuple(args.scale),
        ratio=tuple(args.ratio),
        hflip=args.hflip,
        color_jitter=args.color_jitter,
        auto_augment=policy,
    )
    transform = datasets.build_transform(
        train=train,
        input_size=args.input_size,
        mean=config["mean"],
        std=config["std"],
        interpolation=args.train_interpolation if train else config["interpolation"],
        crop_pct=args.crop_pct or config["crop_pct"],
        crop_mode=config["crop_mode"],
        **(augmentation if train else {}),
    )
    dataset = datasets.build_dataset(
        args.data_set,
        args.data_path,
        split,
        transform,
        on_bad="raise" if not args.skip_bad_images else "next" if train else "mask",
        download=args.download,
        shard_cache=args.shard_cache,
        shard_cache_gb=args.shard_cache_gb,
        most_classes=args.nb_classes or released_classes(args.model),
    )
    if train and args.token_label:
        classes = class_count(args, dataset)
        return token_labels.add_label_maps(dataset, args.token_label, classes, options.TOKEN_STRIDE)
    return dataset


def check_policy(policy: str):
    """Raises UsageError where timm knows no such augmentation policy."""
    try:
        # With timm's defaults for all else, nothing but the policy can be at fault.
        create_transform(is_training=True, auto_augment=policy)
    except (AssertionError, KeyError, ValueError) as error:
        raise UsageError(f"--aa {policy}: timm does not know this policy ({error})") from error


def class_count(args: argparse.Namespace, dataset: Dataset) -> int | None:
    """Classes of the model; None, for the model's own number, where neither the flags nor the data set know."""
    held = dataset.num_classes
    if args.nb_classes is not None and held is not None and args.nb_classes < held:
        raise UsageError(f"--nb_classes {args.nb_classes} is fewer than the {held} classes that the data holds")
    return args.nb_classes or held


def build_loader(args: argparse.Namespace, dataset, process: Process, train: bool):
    """Batches on the device. Without --dist_eval every process reads all of the val set."""
    config = model_data_config(args.model)
    shared = train or args.dist_eval
    return datasets.build_loader(
        dataset,
        train=train,
        batch_size=args.batch_size,
        num_workers=args.num_workers,
        device=process.device,
        mean=config["mean"],
        std=config["std"],
        seed=args.seed,
        rank=process.rank if shared else 0,
        world_size=process.world_size if shared else 1,
        repeated_aug=train and args.repeated_aug,
        reprob=args.reprob if train else 0.0,
        remode=args.remode,
        pin_memory=args.pin_mem,
        **(dict(collate_fn=token_labels.collate) if train and args.token_label else {}),
    )


# --- a run ----------------------------------------------------------------------------------------------------------


def create_numerics(args: argparse.Namespace, process: Process) -> Numerics:
    return Numerics.on(process.device, args.amp, args.channels_last)


def to_device(model: torch.nn.Module, args: argparse.Namespace, process: Process) -> torch.nn.Module:
    memory_format = torch.channels_last if args.channels_last else torch.preserve_format
    return model.to(process.device, memory_format=memory_format)


def check_input(model: torch.nn.Module, args: argparse.Namespace, process: Process):
    """Try the model on one image of nothing.

    Raises:
        UsageError: It cannot take such images.
    """
    numerics = create_numerics(args, process)
    height, width = to_2tuple(args.input_size)
    image = torch.zeros(1, 3, height, width, device=process.device)
    try:
        with torch.no_grad(), numerics.autocast():
            model.eval()(numerics.arrange(image))
    except torch.OutOfMemoryError:
        raise
    except (AssertionError, RuntimeError, ValueError) as error:
        raise UsageError(f"{args.model} cannot take images of 3 x {height} x {width}: {error}") from error


def count_unreadable(dataset, before: int, process: Process, shared: bool = True) -> int:
    """Images passed over since `before`, on all processes."""
    count = torch.tensor(dataset.bad_images - before, device=process.device)
    return int(process.sum(count) if shared else count)


def report_unreadable(count: int):
    if count:
        print(f"skipped {count} images that could not be read")


def evaluate_and_report(args, model, dataset, loader, process: Process, what: str = "network") -> dict[str, float]:
    """Evaluate `model`, and print the two lines of its accuracy."""
    unreadable = dataset.bad_images
    result = evaluate(
        model,
        loader,
        process,
        numerics=create_numerics(args, process),
        distributed=args.dist_eval,
    )
    unreadable = count_unreadable(dataset, unreadable, process, shared=args.dist_eval)
    if process.is_main:
        report_unreadable(unreadable)
        print(f"* Acc@1 {result['acc1']:.3f} Acc@5 {result['acc5']:.3f} loss {result['loss']:.3f}")
        print(f"Accuracy of the {what} on the {result['images']} test images: {result['acc1']:.1f}%")
    return result


def run_evaluation(args: argparse.Namespace, process: Process):
    """`--eval`: print the accuracy of a checkpoint."""
    dataset = build_dataset(args, "val")
    classes = class_count(args, dataset)
    if args.load_release and classes is not None:
        advice = "fine-tune them first, or give theirs by --nb_classes if the data's first classes are the same"
        check_released_classes(args.model, classes, advice)
    model = create_model(args, classes)
    source = args.resume or args.finetune
    if source:
        load_from(model, source, args.model_key, trained_on=dataset.classes)
    model = to_device(model, args, process)
    check_input(model, args, process)
    if args.compile:
        model = torch.compile(model)
    evaluate_and_report(args, model, dataset, build_loader(args, dataset, process, train=False), process)


def resumes(args: argparse.Namespace) -> bool:
    """Whether the run goes on from its last checkpoint, if there is one: asked for, or started again by torchrun."""
    return args.auto_resume or int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0


def output_store(args: argparse.Namespace, started: float) -> CheckpointStore:
    """Where the run writes: `--output_dir`, or a folder named after the time it started, in seconds since 1970.

    Raises:
        UserError: The folder holds another run.
    """
    if args.output_dir is None:
        if resumes(args):
            raise UserError("torchrun started the run again, which goes on from its checkpoint if it has --output_dir")
        name = time.strftime("%Y%m%d-%H%M%S", time.localtime(started))
        return CheckpointStore(Path("outputs") / args.model / name, args.keep_checkpoints)
    store = CheckpointStore(Path(args.output_dir), args.keep_checkpoints)
    resumed_here = args.resume and Path(args.resume).resolve().parent == store.folder.resolve()
    if store.holds_run() and not resumes(args) and not resumed_here:
        raise UserError(
            f"{store.folder} holds a run already; go on with it by --auto_resume, or take another --output_dir"
        )
    return store


def find_start(args: argparse.Namespace, store: CheckpointStore, process: Process) -> Path | None:
    """The checkpoint to go on from, the same on every process; None for the start of a run."""
    if resumes(args):
        newest = store.newest_whole() if process.is_main else None
        step = process.max(-1 if newest is None else newest)
        if step >= 0:
            path = store.path(step)
            if not path.exists():
                raise UserError(f"{path} is not seen by every process; machines must share --output_dir")
            return path
    if not args.resume:
        return None
    with translate_weights_errors():
        path = fetch(args.resume).resolve()
    # Other formats hold no run, which says who reads them.
    if zipfile.is_zipfile(path) and not is_whole(path):
        raise UserError(f"{args.resume}: damaged or truncated; go on from the one before it, or fetch it again")
    steps = store.steps()
    if path.parent == store.folder.resolve() and steps and path != store.path(steps[-1]).resolve():
        raise UserError(f"{store.folder} holds later checkpoints than {path.name}; take another --output_dir")
    return path


def print_plan(args: argparse.Namespace, process: Process, run: Run, folder: Path):
    parameters = sum(p.numel() for p in run.model.parameters())
    print(f"{args.model}: {parameters / 1e6:.2f} M parameters, {run.model.num_classes} classes, on {process.device}")
    print(f"{args.epochs} epochs of {run.steps} steps of {run.global_batch} images; writes to {folder}")
    lr = scaled_lr(args.lr, run.global_batch)
    print(
        f"global batch {run.global_batch} = {args.batch_size} images x {process.world_size} processes "
        f"x {args.update_freq} accumulated; learning rate {lr:.3e} = {args.lr:g} x {run.global_batch} / 512"
    )


def training_loss(args: argparse.Namespace, num_classes: int, soft_targets: bool, process: Process) -> Callable:
    """(logits, targets, images) -> loss, with the teacher where there is one."""
    if args.token_label:
        weight = {} if args.token_label_weight is None else dict(weight=args.token_label_weight)
        token_loss = TokenLabelLoss(**weight)
        return lambda logits, targets, images: token_loss(logits, targets)
    label_loss = create_loss(args.smoothing, soft_targets)
    if args.distillation_type == "none":
        return lambda logits, targets, images: label_loss(logits, targets)
    student, teacher = model_data_config(args.model), model_data_config(args.teacher_model)
    return DistillationLoss(
        label_loss,
        create_teacher(
            args.teacher_model,
            num_classes,
            args.input_size,
            args.teacher_path,
            key=None,
            advice="fine-tune the teacher, and give it by --teacher_path",
        ),
        args.distillation_type,
        args.distillation_alpha,
        args.distillation_tau,
        mean=student["mean"],
        std=student["std"],
        teacher_mean=teacher["mean"],
        teacher_std=teacher["std"],
    ).to(process.device)


@dataclass
class Data:
    """Both splits; no val where --disable_eval says so."""

    train_set: Dataset
    train_loader: datasets.EpochLoader
    val_set: Dataset | None = None
    val_loader: datasets.EpochLoader | None = None


def create_data(args: argparse.Namespace, process: Process) -> Data:
    train_set = build_dataset(args, "train")
    val_set = None if args.disable_eval else build_dataset(args, "val")
    if val_set is not None:
        datasets.check_same_classes(train_set.classes, val_set.classes)
    data = Data(train_set, build_loader(args, train_set, process, train=True), val_set)
    if len(data.train_loader) < args.update_freq:
        batches = len(data.train_loader)
        raise UserError(f"--update_freq {args.update_freq} is more than the {batches} batches of an epoch")
    if val_set is not None:
        data.val_loader = build_loader(args, val_set, process, train=False)
    return data


def check_schedule(args: argparse.Namespace, lr: float):
    """Raises UsageError where the schedule would start or end above its own peak, `lr`, which is scaled."""
    for name, value in (("min_lr", args.min_lr), ("warmup_lr", args.warmup_lr if args.warmup_epochs else 0.0)):
        if value > lr:
            raise UsageError(
                f"--{name} {value:g} is above the learning rate of this batch size, {lr:.3g}, by --lr {args.lr:g} "
                f"for 512 images; lower --{name}, which is not scaled"
            )


def create_run(args: argparse.Namespace, process: Process, data: Data) -> Run:
    """A run at its start: model, average, optimizer."""
    # The same weights in every process, whatever was drawn before.
    seed_everything(args.seed)
    model = create_model(args, class_count(args, data.train_set))
    if args.finetune:
        load_from(model, args.finetune, args.model_key, new_classifier=True)
    model = to_device(model, args, process)
    check_input(model, args, process)
    global_batch = args.batch_size * args.update_freq * process.world_size
    lr = scaled_lr(args.lr, global_batch)
    check_schedule(args, lr)
    own_betas = dict(betas=tuple(args.opt_betas)) if args.opt_betas else {}
    try:
        optimizer = create_optimizer(
            model, args.opt, lr, args.weight_decay, args.momentum, args.layer_decay, eps=args.opt_eps, **own_betas
        )
    except (AssertionError, ImportError, IndexError, RuntimeError, TypeError, ValueError) as error:
        raise UsageError(f"--opt {args.opt} cannot be used so: {error}") from error
    if getattr(optimizer, "is_second_order", False):
        raise UsageError(f"--opt {args.opt} needs second derivatives, which no training here computes")
    ema = ModelEmaV3(model, decay=args.model_ema_decay) if args.model_ema else None
    fp16 = create_numerics(args, process).amp_dtype == torch.float16
    scaler = torch.amp.GradScaler(process.device.type, enabled=fp16)
    steps = len(data.train_loader) // args.update_freq
    return Run(
        model,
        ema,
        optimizer,
        scaler,
        steps,
        global_batch,
        data.train_loader.ranges,
        args.best_metric,
        data.train_set.classes,
    )


def wrap(model: torch.nn.Module, args: argparse.Namespace, process: Process) -> torch.nn.Module:
    """The model as it is trained: shared among the processes, compiled."""
    if process.is_distributed:
        model = DistributedDataParallel(model, device_ids=[process.device] if process.device.type == "cuda" else None)
    return torch.compile(model) if args.compile else model


def settle_buckets(network: torch.nn.Module, run: Run, args: argparse.Namespace, process: Process):
    """Take one backward pass that changes nothing, so that no pass which counts is the first after a start.

    In its first pass DistributedDataParallel learns in which order gradients come, and lays out its buckets anew. What
    three processes or more add up depends on that layout in the last digit: a run that goes on would differ.
    """
    if process.world_size < 3:
        return
    buffers = [(buffer, buffer.clone()) for buffer in run.model.buffers()]
    images = torch.zeros(args.batch_size, 3, *to_2tuple(args.input_size), device=process.device)
    numerics = create_numerics(args, process)
    with numerics.autocast():
        outputs = network.train()(numerics.arrange(images))
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    sum(output.float().sum() for output in outputs).backward()
    run.optimizer.zero_grad()
    with torch.no_grad():
        for buffer, before in buffers:
            buffer.copy_(before)


def create_mixup(args: argparse.Namespace, num_classes: int) -> Mixup | None:
    if args.token_label:
        return token_labels.TokenLabelMixup(
            num_classes,
            args.smoothing,
            options.TOKEN_STRIDE,
            args.mixup,
            args.cutmix,
            prob=args.mixup_prob,
            switch_prob=args.mixup_switch_prob,
        )
    if not (args.mixup or args.cutmix):
        return None
    return Mixup(
        args.mixup,
        args.cutmix,
        prob=args.mixup_prob,
        switch_prob=args.mixup_switch_prob,
        label_smoothing=args.smoothing,
        num_classes=num_classes,
    )


def evaluate_run(args, run: Run, data: Data, process: Process) -> dict[str, dict[str, float]]:
    """Results of the model, and of its average where --model_ema_eval asks for it."""
    evaluated = dict(val=(run.model, "network"))
    if run.ema is not None and args.model_ema_eval:
        evaluated["ema"] = (run.ema.module, "model EMA")
    return {
        name: evaluate_and_report(args, model, data.val_set, data.val_loader, process, what)
        for name, (model, what) in evaluated.items()
    }


def share_statistics(run: Run, process: Process):
    """Make batch norm's running statistics the same on all processes: at the last step each saw its own images.

    The model's become the mean. The average of the weights keeps the main process's, as checkpoints within an epoch do.
    """
    if process.is_distributed:
        distribute_bn(run.model, process.world_size, reduce=True)
        if run.ema is not None:
            distribute_bn(run.ema.module, process.world_size, reduce=False)


def create_trainer(
    args: argparse.Namespace, run: Run, loss_fn: Callable, mixup: Mixup | None, process: Process, log: RunLog
) -> Trainer:
    """What trains the run from where it is: its network with all wrappers, and its schedule."""
    network = wrap(run.model, args, process)
    settle_buckets(network, run, args, process)
    schedule = create_schedule(
        run.optimizer, args.sched, args.epochs, run.steps, args.warmup_epochs, args.warmup_lr, args.min_lr
    )
    if run.global_step:
        schedule.step_update(run.global_step - 1)
    return Trainer(
        run.model,
        network,
        loss_fn,
        run.optimizer,
        schedule,
        run.scaler,
        process,
        log,
        epochs=args.epochs,
        seed=args.seed,
        numerics=create_numerics(args, process),
        mixup=mixup,
        ema=run.ema,
        update_freq=args.update_freq,
        clip_grad=args.clip_grad,
        log_every=args.log_every,
    )


def train_epoch(trainer: Trainer, run: Run, data: Data, checkpointer: Checkpointer) -> dict[str, float]:
    """Train what is left of the run's epoch, and save it; returns the means of its log line."""
    process = trainer.process
    meter = Meter(process, run.meter)
    start_step = run.step
    data.train_loader.set_epoch(run.epoch, first_batch=start_step * trainer.update_freq)
    unreadable = data.train_set.bad_images
    stats = trainer.train_one_epoch(
        data.train_loader, run.epoch, start_step, meter, after_step=partial(checkpointer.after_step, meter)
    )
    unreadable = count_unreadable(data.train_set, unreadable, process)
    if process.is_main:
        report_unreadable(unreadable)
    if start_step < run.steps:
        share_statistics(run, process)
        checkpointer.after_epoch(meter, last=run.epoch + 1 == trainer.epochs)
    return stats


def evaluate_epoch(
    args: argparse.Namespace, run: Run, data: Data, process: Process, log: RunLog, checkpointer: Checkpointer
) -> dict[str, float]:
    """Evaluate the run after an epoch, and keep it if it is the best; returns what its log line says."""
    results = evaluate_run(args, run, data, process)
    for name, result in results.items():
        log.scalars(name, result, run.global_step)
    named = {f"{'ema_' if name == 'ema' else ''}{k}": v for name, result in results.items() for k, v in result.items()}
    if run.is_best(named):
        checkpointer.save_best(named)
    return {f"{name}_{k}": v for name, result in results.items() for k, v in result.items()}


def run_training(args: argparse.Namespace, process: Process, request: StopRequest):
    """Train, evaluate after every epoch, and leave checkpoints and logs in the output folder."""
    check_name("optimizer", args.opt, list_optimizers())
    if args.deterministic:
        use_deterministic_algorithms()
    # One time for all processes, whose clocks differ.
    store = output_store(args, started=process.max(int(time.time())))
    data = create_data(args, process)
    run = create_run(args, process, data)
    mixup = create_mixup(args, run.model.num_classes)
    loss_fn = training_loss(args, run.model.num_classes, mixup is not None, process)

    with store.locked() if process.is_main else nullcontext():
        source = find_start(args, store, process)
        if source:
            run.load(source, args.opt)
            if run.epoch >= args.epochs:
                if process.is_main:
                    print(f"nothing is left to train: {source} is at epoch {run.epoch}, and --epochs is {args.epochs}")
                return
        log = RunLog(store.folder if process.is_main else None, run.epoch, run.global_step)
        trainer = create_trainer(args, run, loss_fn, mixup, process, log)
        if process.is_main:
            options.save(args, store.folder / "args.yaml")
            print_plan(args, process, run, store.folder)
            if source:
                print(f"going on from {source}: epoch {run.epoch}, step {run.step} of {run.steps}")
        checkpointer = Checkpointer(
            run,
            store,
            process,
            request,
            options.as_recipe(args),
            args.save_every,
            args.save_every_steps,
            args.save_every_minutes,
        )
        try:
            while run.epoch < args.epochs:
                checkpointer.between_epochs()
                stats = train_epoch(trainer, run, data, checkpointer)
                record = dict(epoch=run.epoch, step=run.global_step, **{f"train_{k}": v for k, v in stats.items()})
                if data.val_loader is not None:
                    record.update(evaluate_epoch(args, run, data, process, log, checkpointer))
                log.epoch(record)
                run.next_epoch()
        except NonFiniteLossError as error:
            raise UserError(f"{error}; {store.kept()}") from error
        except Stopped:
            log.close()
            raise
        if process.is_main:
            print(f"log: {store.folder / 'log.txt'}")
            print(f"checkpoint: {store.last}")


def main(argv: list[str] | None = None) -> int:
    """Run a command line; returns the exit code: 0, 1 for a mistake or a fault, 2 for a wrong command line, and
    `utils.EXIT_RESUME` where the run was asked to leave and is to be started again.
    """
    try:
        args = options.parse(argv)
        check_model(args.model)
        if args.teacher_model:
            check_model(args.teacher_model)
        process = start_process(args.device, args.dist_timeout)
        if args.eval:
            run_evaluation(args, process)
        else:
            with StopRequest().heard() as request:
                run_training(args, process, request)
        end_process()
    except UserError as error:
        return fail(str(error), error.exit_code)
    except Stopped as stopped:
        end_process()
        sys.stderr.write(f"{stopped}\n")
        return EXIT_RESUME
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except (OSError, RuntimeError) as error:
        fault = explain_fault(error)
        if fault is None:
            raise
        return fail(fault, 1)
    return 0


if __name__ == "__main__":
    run_and_exit(main)
