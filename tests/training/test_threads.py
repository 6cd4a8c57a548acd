"""How long threads spin is limited before torch is loaded, by every command that trains or predicts."""
import os
import re
import subprocess
import sys

import pytest

from helpers import ROOT
from training.threads import SPINS, limit_spinning


def test_spinning_is_limited():
    environment = {"PATH": "/bin"}
    assert limit_spinning(environment)
    assert environment == {"PATH": "/bin", "GOMP_SPINCOUNT": str(SPINS)}
    assert not limit_spinning(environment)


@pytest.mark.parametrize("given", [
    {"GOMP_SPINCOUNT": "7"},
    {"OMP_WAIT_POLICY": "active"},
    {"OMP_NUM_THREADS": "1"},  # as torchrun says; a thread alone waits for none
])
def test_what_was_said_is_kept(given):
    environment = dict(given)
    assert not limit_spinning(environment)
    assert environment == given


def test_the_number_of_threads_stays():
    environment = {"OMP_NUM_THREADS": "3"}
    assert limit_spinning(environment)
    assert environment["OMP_NUM_THREADS"] == "3"


def spins(*command, **said):
    """What the OpenMP that torch loads says it read, in a new process; skips where that is not GNU's."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("OMP_", "GOMP_"))}
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, capture_output=True, text=True,
        env={**environment, **said, "OMP_DISPLAY_ENV": "VERBOSE"},
    )
    assert done.returncode == 0, done.stderr
    found = re.findall(r"GOMP_SPINCOUNT = '(\w+)'", done.stderr)
    if not found:
        pytest.skip("torch computes with another OpenMP than GNU's")
    return set(found)


@pytest.mark.slow
@pytest.mark.parametrize("command", [
    ["-c", "import main"], ["hydra_main.py", "--help"], ["scripts/predict.py", "--help"],
])
def test_torch_reads_it(command):
    assert spins(*command) == {str(SPINS)}


@pytest.mark.slow
def test_torch_reads_what_was_said():
    assert spins("-c", "import main", GOMP_SPINCOUNT="7") == {"7"}
