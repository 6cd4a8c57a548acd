"""Settings of a Slurm cluster, and what sbatch and squeue make of them."""
import re
import shlex
import signal
import subprocess
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from utils import UsageError

# The signal that Slurm sends before the time limit. main.py saves and leaves on it, not on submitit's own choice.
TIME_LIMIT_SIGNAL = signal.SIGUSR1


@dataclass
class Slurm:
    """What configs/slurm/NAME.yaml may say, and `slurm.KEY=VALUE`; None is the cluster's own default."""

    nodes: int = 1
    ngpus: int = 1
    tasks_per_node: int | None = None
    cpus_per_task: int | None = None
    mem: str | None = None
    time: str = "1-00:00:00"
    signal_delay: int = 120
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    exclude: str | None = None
    job_name: str | None = None
    setup: list[str] = field(default_factory=list)
    sbatch: Any = None  # a mapping; not typed, since hydra would let no keys be added to one


def minutes(text: str) -> int:
    """Minutes, rounded up, of Slurm's [DAYS-]HOURS:MINUTES:SECONDS.

    Raises:
        UsageError: It is something else; unquoted, YAML parses it as a number.
    """
    match = re.fullmatch(r"(?:(\d+)-)?(\d+):(\d\d):(\d\d)", text)
    if match is None:
        raise UsageError(f'slurm.time is "DAYS-HOURS:MINUTES:SECONDS" or "HOURS:MINUTES:SECONDS", not {text}')
    days, hours, mins, secs = (int(part or 0) for part in match.groups())
    return (days * 24 + hours) * 60 + mins + (secs > 0)


def sbatch_parameters(slurm: Slurm, name: str, root: Path) -> dict[str, Any]:
    """The settings of a cluster, as submitit's `SlurmExecutor.update_parameters` takes them.

    Args:
        slurm: The settings.
        name: The job's name, where the settings give none.
        root: The repository, which the job's processes import from.

    Raises:
        UsageError: They contradict each other, or one is invalid for sbatch.
    """
    if slurm.nodes < 1 or slurm.ngpus < 0:
        raise UsageError(f"slurm.nodes is at least 1 and slurm.ngpus at least 0, not {slurm.nodes} and {slurm.ngpus}")
    if slurm.ngpus and slurm.tasks_per_node not in (None, slurm.ngpus):
        raise UsageError("every GPU gets a process: slurm.tasks_per_node is for slurm.ngpus=0 alone")
    if not isinstance(slurm.sbatch or {}, dict):
        raise UsageError(f"slurm.sbatch maps long options of sbatch to values, {{mail-type: END}}; not {slurm.sbatch}")
    same = ("partition", "account", "qos", "constraint", "exclude", "mem", "cpus_per_task")
    parameters = {key: value for key, value in asdict(slurm).items() if key in same and value is not None}
    if slurm.ngpus:
        parameters["gpus_per_node"] = slurm.ngpus
    # srun does not take it from sbatch since Slurm 22.05. A process that dies must not leave the others waiting for it.
    cores = [f"--cpus-per-task={slurm.cpus_per_task}"] if slurm.cpus_per_task else []
    parameters.update(
        job_name=slurm.job_name or name,
        nodes=slurm.nodes,
        ntasks_per_node=slurm.ngpus or slurm.tasks_per_node or 1,
        time=minutes(slurm.time),
        srun_args=[*cores, "--kill-on-bad-exit=1"],
        additional_parameters={
            "requeue": True,
            "signal": f"{TIME_LIMIT_SIGNAL.name.removeprefix('SIG')}@{slurm.signal_delay}",
            **(slurm.sbatch or {}),
        },
        stderr_to_stdout=True,
        wckey=None,
    )
    for key, value in {**parameters, **parameters["additional_parameters"]}.items():
        if isinstance(value, str) and not value.isprintable():
            raise UsageError(f"slurm: {key} is one line of text, not {value!r}")
    # Where submitit finds the code, from whatever folder the user submits; and the signal as it is to expect it.
    parameters["setup"] = [
        f"export PYTHONPATH={shlex.quote(str(root))}${{PYTHONPATH:+:$PYTHONPATH}}",
        f"export SUBMITIT_PREEMPT_SIGNAL={TIME_LIMIT_SIGNAL.name.removeprefix('SIG')}",
        *slurm.setup,
    ]
    return parameters


def is_running(job: str) -> bool:
    """Whether Slurm still runs the job; not once it was cancelled or requeued."""
    command = ["squeue", "--noheader", f"--jobs={job}", "--format=%T"]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip() == "RUNNING"
