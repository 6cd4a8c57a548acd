"""Runs of main.py on several processes."""
import os
import subprocess
import sys

from helpers import ROOT
from helpers.ports import free_port


def launch(*arguments):
    """Standard output of main.py with these arguments on two processes, which must end well."""
    command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--nproc_per_node=2"]
    done = subprocess.run(
        [*command, f"--master_port={free_port()}", "main.py", *map(str, arguments)], cwd=ROOT, capture_output=True,
        text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
