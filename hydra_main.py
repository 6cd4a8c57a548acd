"""The runs of main.py described in hydra's overrides, here or on a Slurm cluster.

    python hydra_main.py model=biformer_small drop_path=0.15 data_path=./data/in1k
    python hydra_main.py model=biformer_small drop_path=0.15 data_path=./data/in1k +slurm=default slurm.nodes=2

hydra reads the overrides and composes the cluster's settings, submitit submits; what the run does is main.py's alone.
Its flags are the keys here, from its own parser, and what is not given is not passed on: recipes, given by
`config=FILE`, and defaults keep their order.
"""
import argparse
import hashlib
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from contextlib import nullcontext, redirect_stderr
from dataclasses import asdict, dataclass, field, fields
from io import StringIO
from pathlib import Path
from typing import Any

import hydra
import submitit
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, OverrideType
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from submitit.helpers import DelayedSubmission, TorchDistributedEnvironment, clean_env, environment_variables

import main as program
from training import options
from utils import EXIT_RESUME, UsageError, UserError, exit_with, fail, run_and_exit

ROOT = Path(__file__).resolve().parent
CONFIGS = ROOT / "configs"
OUTPUTS = Path("outputs") / "cls"
# Where and how a run runs and is watched, not what it is: of no use in the name of its folder.
NOT_IN_NAMES = {
    "auto_resume", "data_path", "device", "dist_eval", "dist_timeout", "download", "keep_checkpoints", "log_every",
    "num_workers", "output_dir", "pin_mem", "resume", "save_every", "save_every_minutes", "save_every_steps",
    "shard_cache", "shard_cache_gb",
}  # fmt: skip
# Ports of a run's first process, below those that Linux gives to outgoing connections.
PORTS = range(20000, 32768)
# What Slurm sends before the time is up. main.py saves and leaves on it; submitit's own choice it does not know.
TIME_IS_NEARLY_UP = signal.SIGUSR1
MANY = 10**6


# --- what can be said -----------------------------------------------------------------------------------------------


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


def flag_defaults() -> dict[str, Any]:
    """Every flag of main.py with its default, as hydra's config."""
    parser = options.build_parser()
    defaults = {name: parser.get_default(name) for name in parser.names() if name != "local_rank"}
    # None can become a mapping of any keys, which hydra would not let a mapping of none.
    return dict(defaults, model_kwargs=None)


ConfigStore.instance().store(
    "main",
    {
        # hydra neither logs nor makes folders: the run does, and under torchrun there is one hydra for each process.
        "defaults": ["_self_", {"override hydra/job_logging": "none"}, {"override hydra/hydra_logging": "none"}],
        "hydra": {
            "output_subdir": None,
            "run": {"dir": "."},
            "sweep": {"dir": str(OUTPUTS / "multirun" / "${now:%Y%m%d-%H:%M:%S}"), "subdir": "."},
        },
        "slurm": Slurm,
        **flag_defaults(),
    },
)


# --- what was said --------------------------------------------------------------------------------------------------


@dataclass
class RunSpec:
    """A run that was asked for.

    Args:
        recipe: The flags of main.py that were given, and their values; None for one that is to have its default.
        slurm: The cluster's settings; None for a run on this machine.
    """

    recipe: dict[str, Any]
    slurm: Slurm | None

    @property
    def argv(self) -> list[str]:
        """main.py's command line."""
        return options.as_tokens(self.recipe)

    @property
    def args(self) -> argparse.Namespace:
        """What main.py reads in it. Raises UsageError where that is a mistake."""
        return options.parse(self.argv)

    def within(self, folder: Path, **flags: Any) -> "RunSpec":
        """The same run, writing to `folder`."""
        return RunSpec(dict(self.recipe, output_dir=str(folder), **flags), self.slurm)


def cluster_names() -> str:
    return ", ".join(sorted(path.stem for path in (CONFIGS / "slurm").glob("*.yaml")))


def check_overrides(overrides: list[Override]):
    """Raises UsageError where an override is of no flag or setting; names the nearest one."""
    flags, settings = flag_defaults(), [f"slurm.{key.name}" for key in fields(Slurm)]
    has_cluster = any(override.key_or_group == "slurm" for override in overrides)
    for override in overrides:
        key, text = override.key_or_group, override.input_line
        if key.startswith("hydra"):
            continue
        if override.type == OverrideType.DEL:
            raise UsageError(f"{text}: nothing can be taken out; {key}=null goes back to the default")
        if key == "slurm" and override.value() in ("", None):
            raise UsageError(f"{text} names no cluster; is the variable set? There are: {cluster_names()}")
        if key.startswith("slurm."):
            setting = ".".join(key.split(".")[:2])
            if setting not in settings:
                raise UsageError(f"unknown key {key}{options.nearest(key, settings)}")
            if not has_cluster:
                raise UsageError(f"{text} needs +slurm=NAME; there are: {cluster_names()}")
        elif key != "slurm" and key.split(".")[0] not in flags:
            raise UsageError(f"unknown key {key}{options.nearest(key, flags)}")


def as_recipe(config: DictConfig, overrides: list[Override]) -> dict[str, Any]:
    """The flags among `overrides`, with their values."""
    recipe, values = {}, OmegaConf.to_container(config, resolve=True)
    for override in overrides:
        flag = override.key_or_group.split(".")[0]
        if flag == "slurm":
            continue
        recipe[flag] = values[flag]
        if flag == override.key_or_group and isinstance(override.value(), int | float):
            # As it was typed: a folder named 20230307_1 is no number, and 5e-4 need not become 0.0005.
            recipe[flag] = override.input_line.partition("=")[2].strip()
    return recipe


def read_orders() -> list[RunSpec]:
    """What hydra makes of this process's command line: a run, several for --multirun, or none for --help.

    Raises:
        UsageError: Something on it is unknown, or is not hydra's grammar.
    """
    orders = []

    @hydra.main(version_base="1.3", config_path=str(CONFIGS), config_name="main")
    def collect(config: DictConfig):
        said = HydraConfig.get()
        recipe = as_recipe(config, OverridesParser.create().parse_overrides(list(said.overrides.task)))
        slurm = OmegaConf.to_object(config.slurm) if "slurm" in said.runtime.choices else None
        orders.append(RunSpec(recipe, slurm))

    words = [word for word in sys.argv[1:] if not word.startswith("-") and ("=" in word or word.startswith("~"))]
    try:
        check_overrides(OverridesParser.create().parse_overrides(words))
        # hydra then raises, where it would print several lines and exit.
        with environment_variables(HYDRA_FULL_ERROR="1"):
            collect()
    except OverrideParseException as error:
        raise UsageError(
            f"{error.override}: not in hydra's grammar; write a value with = , quotes or brackets in it as "
            "KEY='VALUE', and all of that in double quotes for the shell"
        ) from error
    except MissingConfigException as error:
        raise UsageError(f"there is no configs/{error.missing_cfg_file}.yaml; there are: {cluster_names()}") from error
    except (HydraException, OmegaConfBaseException) as error:
        raise UsageError(f"{error} {error.__cause__ or ''}") from error
    return orders


# --- folders --------------------------------------------------------------------------------------------------------


def run_name(recipe: dict[str, Any]) -> str:
    """KEY.VALUE of what was given, sorted and joined by hyphens, of letters that need no quotes anywhere.

    >>> run_name(dict(lr="5e-4", batch_size="128", data_path="/in1k"))
    'batch_size.128-lr.5e-4'
    """
    text = "-".join(f"{key}.{value}" for key, value in sorted(recipe.items()) if key not in NOT_IN_NAMES)
    name = re.sub(r"[^\w.,+-]+", "_", re.sub(r"[][{}'\" ]", "", text), flags=re.ASCII).strip("_") or "defaults"
    if len(name) > 200:  # file systems take 255 bytes
        name = f"{name[:200]}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
    return name


def run_folder(recipe: dict[str, Any]) -> Path:
    return OUTPUTS / run_name(recipe) / time.strftime("%Y%m%d-%H:%M:%S")


def make_new_folder(folder: Path) -> Path:
    """Make `folder`, or one beside it where another run that began in the same second has it."""
    for number in range(1, MANY):
        path = folder if number == 1 else folder.with_name(f"{folder.name}-{number}")
        try:
            path.mkdir(parents=True)
            return path
        except FileExistsError:
            continue
    raise AssertionError("a million runs in one second")


# --- here -----------------------------------------------------------------------------------------------------------


def run_here(order: RunSpec) -> int:
    """Run in this process, one of torchrun's or the only one; returns main.py's exit code.

    Raises:
        UsageError: The run is described wrong.
    """
    # A run that torchrun starts again would not find its checkpoints in a new folder; main.py says so.
    if order.args.output_dir is None and not program.resumes(order.args):
        order = order.within(run_folder(order.recipe))
    return program.main(order.argv)


# --- on a cluster ---------------------------------------------------------------------------------------------------


def minutes(text: str) -> int:
    """Minutes, rounded up, of Slurm's [DAYS-]HOURS:MINUTES:SECONDS.

    Raises:
        UsageError: It is something else; YAML makes a number of one without quotes.
    """
    match = re.fullmatch(r"(?:(\d+)-)?(\d+):(\d\d):(\d\d)", text)
    if match is None:
        raise UsageError(f'slurm.time is "DAYS-HOURS:MINUTES:SECONDS" or "HOURS:MINUTES:SECONDS", not {text}')
    days, hours, mins, secs = (int(part or 0) for part in match.groups())
    return (days * 24 + hours) * 60 + mins + (secs > 0)


def sbatch_parameters(slurm: Slurm, name: str) -> dict[str, Any]:
    """The settings of a cluster, as submitit's `SlurmExecutor.update_parameters` takes them.

    Raises:
        UsageError: They contradict each other, or one is no value for sbatch.
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
            "signal": f"{TIME_IS_NEARLY_UP.name.removeprefix('SIG')}@{slurm.signal_delay}",
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
        f"export PYTHONPATH={shlex.quote(str(ROOT))}${{PYTHONPATH:+:$PYTHONPATH}}",
        f"export SUBMITIT_PREEMPT_SIGNAL={TIME_IS_NEARLY_UP.name.removeprefix('SIG')}",
        *slurm.setup,
    ]
    return parameters


@dataclass
class Task:
    """A run, as Slurm starts it in each of its processes, at first and after every requeue.

    submitit keeps it pickled in the run's own folder: a list of words, and the name of this class.
    """

    argv: list[str]

    def __call__(self):
        job = os.environ["SLURM_JOB_ID"]
        # By the job's number: the same in all its processes and after a requeue, and no two of some thousand jobs that
        # follow one another have the same.
        os.environ["MASTER_PORT"] = str(PORTS[int(job) % len(PORTS)])
        rank = TorchDistributedEnvironment().export(set_cuda_visible_devices=False, overwrite=True).rank
        code = program.main(self.argv)
        if code == EXIT_RESUME and rank != 0:
            return  # in peace, that the main process can requeue the job: srun ends all when one fails
        if code == EXIT_RESUME and is_running(job):
            # The run has left, so that the signal is submitit's again, which requeues the job and exits.
            signal.raise_signal(TIME_IS_NEARLY_UP)
        if code:
            exit_with(code)

    def checkpoint(self) -> DelayedSubmission:
        """What submitit starts after a requeue: the same, as all that a run needs to go on is in its folder."""
        return DelayedSubmission(self)


def is_running(job: str) -> bool:
    """Whether Slurm lets the job run: false once it was cancelled or requeued, when nothing is left to be asked for."""
    command = ["squeue", "--noheader", f"--jobs={job}", "--format=%T"]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip() == "RUNNING"


def check_submission(order: RunSpec):
    """Find what would end the run at once, before it waits in a queue.

    Raises:
        UserError: It would not start.
    """
    if "LOCAL_RANK" in os.environ:
        raise UsageError("+slurm under torchrun would submit a job from every process; Slurm starts the processes")
    args = order.args
    program.check_model(args.model)
    if args.teacher_model:
        program.check_model(args.teacher_model)
    folder = os.path.abspath(args.output_dir or "")
    if not folder.isprintable() or set(folder) & set("%\\'\""):
        raise UsageError(f"Slurm has its own reading of %, \\ and quotes in paths: {folder}; take another output_dir")
    if args.output_dir is not None and not args.eval:
        program.output_store(args, started=0)
    sbatch_parameters(order.slurm, args.model)
    if shutil.which("sbatch") is None:
        raise UserError("no sbatch here: this is no machine of a Slurm cluster; without +slurm it runs on this machine")


def submit(order: RunSpec):
    """Submit a checked order, and print where to look for it.

    Raises:
        UserError: sbatch did not take it.
    """
    args = order.args
    new = make_new_folder(run_folder(order.recipe)) if args.output_dir is None else None
    folder = new or Path(args.output_dir)
    executor = submitit.SlurmExecutor(folder / "slurm", max_num_timeout=MANY)
    executor.update_parameters(**sbatch_parameters(order.slurm, args.model))
    try:
        # From within a job, that job's settings would be the new one's.
        with clean_env() if "SLURM_JOB_ID" in os.environ else nullcontext(), redirect_stderr(StringIO()):
            job = executor.submit(Task(order.within(folder, auto_resume=True).argv))
    except RuntimeError as error:  # submitit's, with what sbatch wrote
        if new is not None:
            shutil.rmtree(new)
        raise UserError(f"sbatch did not take the job: {error}") from error
    print(f"job {job.job_id} writes to {folder}")
    print(f"log:    tail -F {shlex.quote(os.path.relpath(job.paths.stdout))}")
    print(f"state:  squeue --jobs {job.job_id}")
    print(f"cancel: scancel {job.job_id}")


def check_sweep(orders: list[RunSpec]):
    """Raises UsageError where several runs would be in each other's way."""
    if len(orders) > 1 and "LOCAL_RANK" in os.environ:
        raise UsageError("--multirun under torchrun: one run after another needs a torchrun for each")
    folders = [order.args.output_dir for order in orders if order.args.output_dir is not None]
    if len(set(folders)) < len(folders):
        raise UsageError(f"the runs of --multirun would share output_dir={folders[0]}; without it each gets its own")


def main() -> int:
    """Run or submit what this process's command line asks for; returns the exit code."""
    try:
        orders = read_orders()
        check_sweep(orders)
        on_cluster = [order for order in orders if order.slurm is not None]
        for order in on_cluster:
            check_submission(order)
        for order in on_cluster:
            submit(order)
        codes = (run_here(order) for order in orders if order.slurm is None)
        return next((code for code in codes if code), 0)
    except UserError as error:
        return fail(str(error), error.exit_code)


if __name__ == "__main__":
    # Under the module's own name, by which a job finds its `Task`.
    import hydra_main

    run_and_exit(hydra_main.main)
