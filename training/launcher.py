"""What the launcher says of the processes of a run, in the environment variables that torchrun sets."""
import os
from collections.abc import Mapping

from utils import UserError

# Of launchers that start several processes and leave torchrun's variables to others.
OTHERS = {"SLURM_STEP_NUM_TASKS": "srun", "OMPI_COMM_WORLD_SIZE": "mpirun", "PMI_SIZE": "mpirun"}


class LauncherError(UserError):
    """A variable of the launcher's is missing, or is no number in its range."""


class SeparateRunsError(UserError):
    """A launcher has started processes that do not know of one another."""


def rank_and_size(environment: Mapping[str, str] = os.environ) -> tuple[int, int]:
    """This process's number, and the number of processes; 0 and 1 without a launcher.

    Raises:
        LauncherError: They are not said as torchrun says them, or not where the processes meet.
        SeparateRunsError: There are several processes, each of which would be a run of its own.
    """
    if "WORLD_SIZE" not in environment:
        _check_other_launchers(environment)
    size = _number("WORLD_SIZE", 1, environment, least=1)
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if not environment.get(name)]
    if size > 1 and missing:
        raise LauncherError(f"WORLD_SIZE is {size}, but there is no {', no '.join(missing)}")
    rank = _number("RANK", 0, environment)
    if rank >= size:
        raise LauncherError(f"RANK is {rank}, which WORLD_SIZE {size} has no process for: the first is 0")
    if size > 1:
        _number("MASTER_PORT", 0, environment, most=65535)
    return rank, size


def local_rank(environment: Mapping[str, str] = os.environ) -> int:
    """This process's number on its machine; 0 without a launcher. Raises LauncherError as `rank_and_size`."""
    return _number("LOCAL_RANK", 0, environment)


def restart_count(environment: Mapping[str, str] = os.environ) -> int:
    """How many times torchrun has restarted the run."""
    return _number("TORCHELASTIC_RESTART_COUNT", 0, environment)


def has_peers(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether the launcher says that there are several processes; raises nothing."""
    return environment.get("WORLD_SIZE", "1") != "1"


def _check_other_launchers(environment: Mapping[str, str]):
    if _is_in_shell_of_srun(environment):
        return
    for name, launcher in OTHERS.items():
        count = environment.get(name, "")
        if count.isdigit() and int(count) > 1:
            raise SeparateRunsError(
                f"{launcher} started {count} processes ({name}) without WORLD_SIZE: each would be a run of its own; "
                "WORLD_SIZE=1 says that they are meant to be single runs"
            )


def _is_in_shell_of_srun(environment: Mapping[str, str]) -> bool:
    """Whether this process was started in the shell of `srun --pty`, which is task 0; the others have no terminal."""
    is_task = environment.get("SLURM_TASK_PID") == str(os.getpid())
    return "SLURM_PTY_PORT" in environment and environment.get("SLURM_PROCID") == "0" and not is_task


def _number(
    name: str, default: int, environment: Mapping[str, str], least: int = 0, most: int | None = None
) -> int:
    text = environment.get(name, str(default))
    value = int(text) if text.isdecimal() and len(text) < 10 else -1  # more, no system has of anything
    if value < least or (most is not None and value > most):
        of = f"of at least {least}" if most is None else f"from {least} to {most}"
        raise LauncherError(f"the environment variable {name} must be a number {of}, got {text!r}")
    return value
