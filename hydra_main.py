"""The runs of main.py, described by hydra's overrides, on this machine or on a Slurm cluster.

    python hydra_main.py model=biformer_small drop_path=0.15 data_path=./data/in1k
    python hydra_main.py model=biformer_small drop_path=0.15 data_path=./data/in1k +slurm=default slurm.nodes=2

hydra reads the overrides and composes the cluster's settings, submitit submits the job, and main.py runs it. The keys
are main.py's flags. Only what is given is passed on, so that overrides win over a recipe (`config=FILE`), and a recipe
over the defaults.
"""
import hashlib
import os
import re
import shlex
import shutil
import signal
import sys
import time
from contextlib import nullcontext, redirect_stderr
from dataclasses import dataclass, fields
from io import StringIO
from pathlib import Path
from typing import Any

import training.startup  # before what may not be installed  # noqa: F401  # isort: skip
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
from training import flags, parsing, recipes
from training.advice import with_advice
from training.command_line import choose_task
from training.options import NO_RESULT, Settings
from training.resuming import open_store
from training.signals import EXIT_RESUME, exit_with, run_and_exit
from training.slurm import TIME_LIMIT_SIGNAL, Slurm, is_running, sbatch_parameters
from utils import UsageError, UserError, fail, nearest

ROOT = Path(__file__).resolve().parent
CONFIGS = ROOT / "configs"
OUTPUTS = Path("outputs") / "cls"
# Ports for a run's first process, below the range that Linux uses for outgoing connections.
PORTS = range(20000, 32768)
MANY = 10**6


# --- the keys -------------------------------------------------------------------------------------------------------


def flag_defaults() -> dict[str, Any]:
    """Every flag of main.py, of any task, with its default, as hydra's config."""
    parsers = [parsing.Parser(choose_task(["--task", name], program.TASKS).settings_class) for name in program.TASKS]
    defaults = {name: parser.get_default(name) for parser in parsers for name in parser.names()}
    del defaults["local_rank"]
    # hydra lets None become a mapping with any keys, but adds no keys to an empty mapping.
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


# --- the overrides --------------------------------------------------------------------------------------------------


@dataclass
class RunSpec:
    """A run that was asked for.

    Args:
        recipe: The flags of main.py that were given, and their values; None stands for the default.
        slurm: The cluster's settings; None for a run on this machine.
    """

    recipe: dict[str, Any]
    slurm: Slurm | None

    @property
    def argv(self) -> list[str]:
        """main.py's command line."""
        return recipes.as_tokens(self.recipe)

    @property
    def settings(self) -> Settings:
        """main.py's settings. Raises UsageError where a flag is wrong."""
        return program.parse(self.argv)[1]

    @property
    def name(self) -> str:
        """The job's name: the model's."""
        return self.settings.name

    def within(self, folder: Path, **changes: Any) -> "RunSpec":
        """The same run, writing to `folder`, with other flags changed."""
        return RunSpec(dict(self.recipe, output_dir=str(folder), **changes), self.slurm)


def cluster_names() -> str:
    return ", ".join(sorted(path.stem for path in (CONFIGS / "slurm").glob("*.yaml")))


def check_overrides(overrides: list[Override]):
    """Raises UsageError where an override names no flag or setting; suggests the nearest one."""
    known, settings = flag_defaults(), [f"slurm.{key.name}" for key in fields(Slurm)]
    has_cluster = any(override.key_or_group == "slurm" for override in overrides)
    for override in overrides:
        key, text = override.key_or_group, override.input_line
        if key.startswith("hydra"):
            continue
        if override.type == OverrideType.DEL:
            raise UsageError(f"{text}: keys cannot be deleted; {key}=null restores the default")
        if key == "slurm" and override.value() in ("", None):
            raise UsageError(f"{text} names no cluster; is the variable set? There are: {cluster_names()}")
        if key.startswith("slurm."):
            setting = ".".join(key.split(".")[:2])
            if setting not in settings:
                raise UsageError(f"unknown key {key}{nearest(key, settings)}")
            if not has_cluster:
                raise UsageError(f"{text} needs +slurm=NAME; there are: {cluster_names()}")
        elif key != "slurm" and key.split(".")[0] not in known:
            raise UsageError(f"unknown key {key}{parsing.similar(key, known)}")


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


def read_runs() -> list[RunSpec]:
    """The runs that this process's command line asks for: one, several for --multirun, or none for --help.

    Raises:
        UsageError: A key is unknown, or an override is not hydra's grammar.
    """
    runs = []

    @hydra.main(version_base="1.3", config_path=str(CONFIGS), config_name="main")
    def collect(config: DictConfig):
        context = HydraConfig.get()
        recipe = as_recipe(config, OverridesParser.create().parse_overrides(list(context.overrides.task)))
        slurm = OmegaConf.to_object(config.slurm) if "slurm" in context.runtime.choices else None
        runs.append(RunSpec(recipe, slurm))

    words = [word for word in sys.argv[1:] if not word.startswith("-") and ("=" in word or word.startswith("~"))]
    try:
        check_overrides(OverridesParser.create().parse_overrides(words))
        # With it hydra raises, where it would otherwise print several lines and exit.
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
    return runs


# --- folders --------------------------------------------------------------------------------------------------------


def run_name(recipe: dict[str, Any]) -> str:
    """KEY.VALUE of the given flags, sorted and joined by hyphens, in characters that no shell needs quotes for.

    Flags that do not change the result of the run are left out.

    >>> run_name(dict(lr="5e-4", batch_size="128", data_path="/in1k"))
    'batch_size.128-lr.5e-4'
    """
    text = "-".join(f"{key}.{flags.kept(value)}" for key, value in sorted(recipe.items()) if key not in NO_RESULT)
    name = re.sub(r"[^\w.,+-]+", "_", re.sub(r"[][{}'\" ]", "", text), flags=re.ASCII).strip("_") or "defaults"
    if len(name) > 200:  # file systems take 255 bytes
        name = f"{name[:200]}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
    return name


def run_folder(recipe: dict[str, Any]) -> Path:
    return OUTPUTS / run_name(recipe) / time.strftime("%Y%m%d-%H:%M:%S")


def make_new_folder(folder: Path) -> Path:
    """Make `folder`, or one beside it where another run started in the same second."""
    for number in range(1, MANY):
        path = folder if number == 1 else folder.with_name(f"{folder.name}-{number}")
        try:
            path.mkdir(parents=True)
            return path
        except FileExistsError:
            continue
    raise AssertionError("a million runs in one second")


# --- here -----------------------------------------------------------------------------------------------------------


def run_here(run: RunSpec) -> int:
    """Run in this process, one of torchrun's or the only one; returns main.py's exit code.

    Raises:
        UsageError: A flag is wrong.
    """
    # A run that torchrun restarts would not find its checkpoints in a new folder; main.py says so.
    checkpoint = run.settings.checkpoint
    if checkpoint.output_dir is None and not checkpoint.resumes:
        run = run.within(run_folder(run.recipe))
    return program.main(run.argv)


# --- on a cluster ---------------------------------------------------------------------------------------------------


@dataclass
class Job:
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
            return  # without an error, so that the main process can requeue the job: srun ends all when one fails
        if code == EXIT_RESUME and is_running(job):
            # The run has left, so that the signal is submitit's again, which requeues the job and exits.
            signal.raise_signal(TIME_LIMIT_SIGNAL)
        if code:
            exit_with(code)

    def checkpoint(self) -> DelayedSubmission:
        """What submitit starts after a requeue: the same, since all that a run needs to resume is in its folder."""
        return DelayedSubmission(self)


def check_submission(run: RunSpec):
    """Find what would end the run at once, before it waits in a queue.

    Raises:
        UserError: It would not start.
    """
    if "LOCAL_RANK" in os.environ:
        raise UsageError("+slurm under torchrun would submit a job from every process; Slurm starts the processes")
    task_class, settings = program.parse(run.argv)
    program.check_names(task_class, settings)
    output_dir = settings.checkpoint.output_dir
    folder = os.path.abspath(output_dir or "")
    if not folder.isprintable() or set(folder) & set("%\\'\""):
        raise UsageError(f"Slurm has its own reading of %, \\ and quotes in paths: {folder}; take another output_dir")
    if output_dir is not None and not settings.evaluation.eval:
        open_store(settings.checkpoint, run.name, started=0)
    sbatch_parameters(run.slurm, run.name, ROOT)
    if shutil.which("sbatch") is None:
        raise UserError("sbatch not found: this is no machine of a Slurm cluster; without +slurm the run starts here")


def submit(run: RunSpec):
    """Submit a checked run, and print where to look for it.

    Raises:
        UserError: sbatch did not take it.
    """
    output_dir = run.settings.checkpoint.output_dir
    new = make_new_folder(run_folder(run.recipe)) if output_dir is None else None
    folder = new or Path(output_dir)
    executor = submitit.SlurmExecutor(folder / "slurm", max_num_timeout=MANY)
    executor.update_parameters(**sbatch_parameters(run.slurm, run.name, ROOT))
    try:
        # From within a job, that job's settings would be the new one's.
        with clean_env() if "SLURM_JOB_ID" in os.environ else nullcontext(), redirect_stderr(StringIO()):
            job = executor.submit(Job(run.within(folder, auto_resume=True).argv))
    except RuntimeError as error:  # submitit's, with what sbatch wrote
        if new is not None:
            shutil.rmtree(new)
        raise UserError(f"sbatch did not take the job: {error}") from error
    print(f"job {job.job_id} writes to {folder}")
    print(f"log:    tail -F {shlex.quote(os.path.relpath(job.paths.stdout))}")
    print(f"state:  squeue --jobs {job.job_id}")
    print(f"cancel: scancel {job.job_id}")


def check_sweep(runs: list[RunSpec]):
    """Raises UsageError where several runs would be in each other's way."""
    if len(runs) > 1 and "LOCAL_RANK" in os.environ:
        raise UsageError("--multirun under torchrun: one run after another needs a torchrun for each")
    folders = [folder for run in runs if (folder := run.settings.checkpoint.output_dir) is not None]
    if len(set(folders)) < len(folders):
        raise UsageError(f"the runs of --multirun would share output_dir={folders[0]}; without it each gets its own")


def main() -> int:
    """Run or submit what this process's command line asks for; returns the exit code."""
    try:
        runs = read_runs()
        check_sweep(runs)
        on_cluster = [run for run in runs if run.slurm is not None]
        for run in on_cluster:
            check_submission(run)
        for run in on_cluster:
            submit(run)
        codes = (run_here(run) for run in runs if run.slurm is None)
        return next((code for code in codes if code), 0)
    except UserError as error:
        return fail(with_advice(error, program.ADVICE), error.exit_code)


if __name__ == "__main__":
    # Under the module's own name, by which Slurm's processes find `Job`.
    import hydra_main

    run_and_exit(hydra_main.main)
