"""What a launcher says of the processes, or fails to say."""
import os

import pytest

from training.advice import with_advice
from training.distributed import init_distributed
from training.launcher import (
    LauncherError,
    SeparateRunsError,
    has_peers,
    local_rank,
    rank_and_size,
    restart_count,
)  # fmt: skip

MEETING = dict(MASTER_ADDR="127.0.0.1", MASTER_PORT="29500")
SINGLE = (0, 1)


@pytest.mark.parametrize("environment,expected", [
    ({}, SINGLE),
    (dict(RANK="0", WORLD_SIZE="1"), SINGLE),
    (dict(RANK="2", WORLD_SIZE="4", **MEETING), (2, 4)),
    # Within torchrun, whatever started that; and in a job, beside the steps that srun starts in it.
    (dict(RANK="1", WORLD_SIZE="2", **MEETING, SLURM_STEP_NUM_TASKS="2", SLURM_PROCID="0"), (1, 2)),
    (dict(SLURM_NTASKS="8", SLURM_PROCID="0"), SINGLE),
    (dict(SLURM_STEP_NUM_TASKS="1"), SINGLE),
    (dict(WORLD_SIZE="1", SLURM_STEP_NUM_TASKS="8", SLURM_PROCID="3"), SINGLE),
    # A shell on a terminal, which is the first task alone: srun -n8 --pty bash.
    (dict(SLURM_STEP_NUM_TASKS="8", SLURM_PROCID="0", SLURM_PTY_PORT="40123", SLURM_PTY_WIN_ROW="50"), SINGLE),
])
def test_rank_and_size(environment, expected):
    assert rank_and_size(environment) == expected


@pytest.mark.parametrize("environment,names", [
    (dict(WORLD_SIZE=""), "WORLD_SIZE must be a number of at least 1, got ''"),
    (dict(WORLD_SIZE="two"), "WORLD_SIZE must be a number of at least 1, got 'two'"),
    (dict(WORLD_SIZE="0"), "WORLD_SIZE must be a number of at least 1, got '0'"),
    (dict(WORLD_SIZE="9" * 10), "WORLD_SIZE must be a number of at least 1, got '9999999999'"),
    (dict(WORLD_SIZE="2", RANK="9" * 5000), "RANK must be a number of at least 0, got '9999"),
    (dict(WORLD_SIZE="2"), "WORLD_SIZE is 2, but there is no RANK, no MASTER_ADDR, no MASTER_PORT"),
    (dict(WORLD_SIZE="2", RANK="0", MASTER_PORT="1"), "WORLD_SIZE is 2, but there is no MASTER_ADDR"),
    (dict(WORLD_SIZE="2", RANK="0", MASTER_ADDR="", MASTER_PORT="1"), "WORLD_SIZE is 2, but there is no MASTER_ADDR"),
    (dict(WORLD_SIZE="2", RANK="first", **MEETING), "RANK must be a number of at least 0, got 'first'"),
    (dict(WORLD_SIZE="2", RANK="-1", **MEETING), "RANK must be a number of at least 0, got '-1'"),
    (dict(WORLD_SIZE="2", RANK="2", **MEETING), "RANK is 2, which WORLD_SIZE 2 has no process for"),
    (dict(RANK="1"), "RANK is 1, which WORLD_SIZE 1 has no process for"),
    (dict(WORLD_SIZE="2", RANK="0", MASTER_ADDR="a", MASTER_PORT="x"), "MASTER_PORT must be a number from 0 to 65535"),
    (dict(WORLD_SIZE="2", RANK="0", MASTER_ADDR="a", MASTER_PORT="65536"), "MASTER_PORT must be a number from 0 to"),
])
def test_a_wrong_variable_is_named(environment, names):
    with pytest.raises(LauncherError) as error:
        rank_and_size(environment)
    assert names in str(error.value)
    assert with_advice(error.value).endswith("; torchrun sets these variables; a run of one process needs none of them")


@pytest.mark.parametrize("read,name", [(local_rank, "LOCAL_RANK"), (restart_count, "TORCHELASTIC_RESTART_COUNT")])
def test_other_numbers(read, name):
    assert read({}) == 0 and read({name: "3"}) == 3
    with pytest.raises(LauncherError, match=f"{name} must be a number of at least 0, got ''"):
        read({name: ""})


@pytest.mark.parametrize("environment,launcher", [
    (dict(SLURM_STEP_NUM_TASKS="4", SLURM_PROCID="0"), "srun"),
    (dict(SLURM_STEP_NUM_TASKS="4", SLURM_PROCID="0", PMI_SIZE="4"), "srun"),
    (dict(SLURM_STEP_NUM_TASKS="4", RANK="0"), "srun"),
    # With a terminal, but not in a shell on it: the second task, and the program itself as the first.
    (dict(SLURM_STEP_NUM_TASKS="4", SLURM_PROCID="1", SLURM_PTY_PORT="40123"), "srun"),
    (dict(SLURM_STEP_NUM_TASKS="4", SLURM_PROCID="0", SLURM_PTY_PORT="40123", SLURM_TASK_PID=str(os.getpid())), "srun"),
    (dict(OMPI_COMM_WORLD_SIZE="4", OMPI_COMM_WORLD_RANK="1", LOCAL_RANK="1"), "mpirun"),
    (dict(OMPI_COMM_WORLD_SIZE="4", OMPI_COMM_WORLD_RANK="1"), "mpirun"),
    (dict(PMI_SIZE="4", PMI_RANK="1"), "mpirun"),
])
def test_processes_that_would_each_be_a_run(environment, launcher):
    with pytest.raises(SeparateRunsError, match=f"^{launcher} started 4 processes ") as error:
        rank_and_size(environment)
    assert "WORLD_SIZE=1 says that they are meant to be single runs" in str(error.value)
    assert with_advice(error.value).endswith("; start torchrun in them, or a job by hydra_main.py (docs/slurm.md)")


def test_a_run_asks_the_launcher_first(monkeypatch):
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "2")
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(SeparateRunsError):
        init_distributed("toaster")


@pytest.mark.parametrize("size,expected", [("1", False), ("2", True), ("", True)])
def test_asking_for_peers_raises_nothing(size, expected):
    assert has_peers({"WORLD_SIZE": size}) is expected and not has_peers({})
