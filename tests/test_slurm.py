"""hydra_main.py on a real Slurm, of this machine alone: jobs that are told to leave, requeued, cancelled, or fail."""
import os
import re
import socket
import subprocess
import sys
import time

import pytest
import torch

from helpers import ROOT

RUN = [
    "model=biformer_nano", "data_set=digits", "input_size=32", "batch_size=64", "epochs=2", "warmup_epochs=0",
    "lr=1e-3", "num_workers=0", "device=cpu", "log_every=1",
]  # fmt: skip


def has_slurm_of_its_own():
    """Whether there is a cluster that is this machine: nobody's real cluster gets jobs from tests."""
    try:
        nodes = subprocess.run(["sinfo", "--noheader", "--Node", "--format=%N"], capture_output=True, text=True)
    except FileNotFoundError:
        return False
    return nodes.stdout.split() == [socket.gethostname().partition(".")[0]]


pytestmark = [
    pytest.mark.slurm,
    pytest.mark.skipif(not has_slurm_of_its_own(), reason="no Slurm of this machine alone; .ci/slurm starts one"),
]


def command(*words, **kwargs):
    return subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=300, **kwargs)


def submit(folder, *overrides):
    """Submit a run of two processes; returns the job's number."""
    said = command(
        sys.executable, "hydra_main.py", *overrides, f"output_dir={folder}", "+slurm=cpu", "slurm.time=0:20:00"
    )
    assert said.returncode == 0, said.stderr
    return re.match(r"job (\d+) writes to (.+)\n", said.stdout).group(1)


def state(job):
    return dict(re.findall(r"(\w+)=(\S*)", command("scontrol", "show", "job", job).stdout))


def log(folder, job, rank=0):
    path = folder / "slurm" / f"{job}_{rank}_log.out"
    return path.read_text() if path.exists() else ""


def wait(condition, folder, job, seconds=300):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"{state(job)}\n{log(folder, job)}"
        time.sleep(0.2)


def wait_for_requeue(folder, job, restarts):
    """Wait until the job waits again, and spare it the two minutes for which Slurm holds back what it requeued."""
    wait(lambda: state(job)["JobState"] == "PENDING", folder, job)
    time.sleep(2)  # slurmd refuses a job that starts in the second in which it revoked the credential of its last start
    command("scontrol", "update", f"JobId={job}", "StartTime=now")
    wait(lambda: state(job)["Restarts"] == str(restarts) and state(job)["JobState"] == "RUNNING", folder, job)


def wait_for_end(folder, job):
    wait(lambda: state(job)["JobState"] not in ("PENDING", "RUNNING", "COMPLETING"), folder, job)
    return state(job)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """The same run here, under torchrun."""
    folder = tmp_path_factory.mktemp("uninterrupted") / "run"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    said = command(*launcher, "hydra_main.py", *RUN, f"output_dir={folder}", env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert said.returncode == 0, said.stderr
    return folder


def test_jobs_that_are_requeued_end_as_uninterrupted_ones(uninterrupted, tmp_path):
    folder = tmp_path / "run"
    job = submit(folder, *RUN)
    wait(lambda: "epoch 0 [2/" in log(folder, job), folder, job)
    # What Slurm sends before the time is up: the run leaves, and requeues its job, once.
    command("scancel", "--signal=USR1", job)
    wait_for_requeue(folder, job, restarts=1)
    wait(lambda: re.search(r"resuming from .*: epoch 0, step \d+ of", log(folder, job)), folder, job)
    steps = log(folder, job).count("[")
    wait(lambda: log(folder, job).count("[") > steps + 2, folder, job)
    # By hand: Slurm tells the run to leave and requeues the job itself.
    command("scontrol", "requeue", job)
    wait_for_requeue(folder, job, restarts=2)
    end = wait_for_end(folder, job)
    assert (end["JobState"], end["Restarts"], end["ExitCode"]) == ("COMPLETED", "2", "0:0"), log(folder, job)
    assert log(folder, job).count("Requeued job") == 1 and "Requeued job" not in log(folder, job, rank=1)
    assert log(folder, job).count("resuming from") == 2
    requeued, reference = (torch.load(f / "last.pth", weights_only=True) for f in (folder, uninterrupted))
    for key in ("model", "model_ema"):
        torch.testing.assert_close(requeued[key], reference[key], rtol=0, atol=0)
    assert len((folder / "log.txt").read_text().splitlines()) == 2


def test_an_evaluation_is_submitted(uninterrupted, tmp_path):
    folder = tmp_path / "it has spaces"
    job = submit(folder, *RUN[:4], "eval=true", f"resume={uninterrupted / 'last.pth'}")
    assert wait_for_end(folder, job)["JobState"] == "COMPLETED", log(folder, job)
    assert len(re.findall(r"on 360 val images", log(folder, job))) == 1


def test_a_cancelled_job_is_not_requeued(tmp_path):
    job = submit(tmp_path, *RUN, "epochs=100")
    wait(lambda: "epoch 0 [1/" in log(tmp_path, job), tmp_path, job)
    command("scancel", job)
    end = wait_for_end(tmp_path, job)
    assert (end["JobState"], end["Restarts"]) == ("CANCELLED", "0") and "saved as" in log(tmp_path, job)


def test_a_job_that_fails_says_why(tmp_path):
    job = submit(tmp_path, *RUN, "eval=true", f"resume={tmp_path / 'nothing.pth'}")
    assert wait_for_end(tmp_path, job)["JobState"] == "FAILED"
    assert "nothing.pth: no such checkpoint file" in log(tmp_path, job)


def test_what_sbatch_refuses_is_one_line(tmp_path):
    overrides = [*RUN, f"output_dir={tmp_path}", "+slurm=cpu", "slurm.partition=nowhere"]
    said = command(sys.executable, "hydra_main.py", *overrides)
    assert said.returncode == 1 and said.stderr.count("\n") == 1 and "invalid partition" in said.stderr
