"""Runs of main.py on several processes, and in this one."""
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from helpers import ROOT
from helpers.ports import free_port
from training.checkpointer import Checkpointer


def launch(*arguments):
    """Standard output of main.py with these arguments on two processes, which must end well."""
    command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--nproc_per_node=2"]
    done = subprocess.run(
        [*command, f"--master_port={free_port()}", "main.py", *map(str, arguments)], cwd=ROOT, capture_output=True,
        text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@contextmanager
def signal_after(step: int, number: signal.Signals = signal.SIGTERM) -> Iterator[list[None]]:
    """Send this process a signal once its runs have taken so many steps; yields a list with an entry for each step."""
    taken, after_step = [], Checkpointer.after_step

    def count(self, *arguments):
        taken.append(None)
        if len(taken) == step:
            os.kill(os.getpid(), number)
        after_step(self, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Checkpointer, "after_step", count)
        yield taken
