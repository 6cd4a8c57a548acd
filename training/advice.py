"""What a user of the command line can do about an error that was raised by a module which knows no flags."""
from collections.abc import Mapping

from utils import UserError

from . import (
    alike,
    checkpoints,
    compiler,
    cuda_graphs,
    distributed,
    launcher,
    meter,
    restarts,
    resuming,
    run,
    saved_state,
    signals,
    task,
    trackers,
    waits,
    watchdog,
)

ADVICE: Mapping[type[UserError], str] = {
    distributed.DeviceError: "--device auto takes what is there",
    launcher.LauncherError: "torchrun sets these variables; a run of one process needs none of them",
    launcher.SeparateRunsError: "start torchrun in them, or a job by hydra_main.py (docs/slurm.md)",
    compiler.NoCompilerError: "on a CPU it needs a C++ compiler and Python's headers, on a GPU Triton, a C compiler "
                              "and Python's headers: install them, or leave out --compile",
    compiler.CompilationError: "leave out --compile",
    cuda_graphs.CudaGraphError: "leave out --cuda_graph",
    checkpoints.FolderInUseError: "resume it with --auto_resume, or take another --output_dir",
    resuming.LaterCheckpointsError: "take another --output_dir",
    resuming.NoFolderError: "give --output_dir",
    resuming.DamagedCheckpointError: "resume from the one before it, or download it again",
    task.NonFiniteOutputError: "see whether --amp off has finite ones",
    task.WeightsUnderKeysError: "--model_key takes one of them",
    task.SingleImageError: "give --batch_size 2 or more",
    task.ShortEpochError: "lower --update_freq or --batch_size",
    resuming.LostCheckpointsError: "put them back, resume from best.pth with --resume, or take another --output_dir",
    alike.UnlikeProcessesError: "start all processes with the same flags, on the same data and checkpoint",
    alike.DivergedError: "resume on other machines, from the last checkpoint, with --auto_resume",
    restarts.NoProgressError: "start it again with a time limit that is longer than its start and a step take",
    saved_state.BrokenRunError: "resume from another checkpoint, or take its weights with --finetune",
    saved_state.NoRunError: "fine-tune from it with --finetune",
    run.HeldOutMismatchError: "give --val_split and --seed as in that run, or fine-tune from it with --finetune",
    run.NoEmaError: "resume with --model_ema false",
    run.OptimizerMismatchError: "--opt, --weight_decay, --decay_groups, --layer_decay and --freeze_backbone must be "
                                "as in that run",
    run.BatchMismatchError: "keep --batch_size x processes x --update_freq, or resume from the end of an epoch",
    run.DataMismatchError: "give what it had, or resume from the end of an epoch",
    run.ShardMismatchError: "keep the number of processes, or resume from the end of an epoch",
    meter.NonFiniteLossError: "try a lower --lr, longer --warmup_epochs, --clip_grad 5 or --amp off",
    trackers.WandbError: "log in with `wandb login`, set WANDB_MODE=offline, or leave out --enable_wandb",
    signals.OutOfMemoryFault: "lower --batch_size and raise --update_freq by as much, which trains the same, or pass "
                              "--grad_checkpointing",
    signals.NondeterministicFault: "leave out --deterministic",
    signals.WorkerFault: "give fewer --num_workers or more memory",
    signals.HostMemoryFault: "give fewer --num_workers, a smaller --batch_size, or more memory",
    signals.SharedMemoryFault: "make it larger, by docker run --shm-size 8g for example, or give fewer --num_workers",
    signals.OpenFilesFault: "raise the limit, by ulimit -n 65536 for example, or give fewer --num_workers",
    signals.TemporaryFolderFault: "set TMPDIR to a short one",
    waits.NoDataFault: "--loader_timeout says how long a run waits for data",
    signals.PeerFault: "--dist_timeout says how long a process waits for another",
    watchdog.HangFault: "--hang_timeout says how long a run may take for nothing",
    signals.MachineFault: "what was saved is intact, resume with --auto_resume and the run's --output_dir",
}


def with_advice(error: UserError, advice: Mapping[type[UserError], str] = ADVICE) -> str:
    """The text of an error, and what to do about an error of its class and of the classes that it derives from."""
    return "; ".join([str(error), *(advice[kind] for kind in type(error).__mro__ if kind in advice)])
