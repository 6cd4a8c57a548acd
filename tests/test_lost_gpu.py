"""After an illegal access every call of CUDA fails in that process: a worker of pytest must give way to a new one."""
import os
import subprocess
import sys

import pytest

from helpers import ROOT

# A process whose GPU one of the tests loses.
CONFTEST = """
import pytest
import torch

lost = []

def synchronize():
    if lost:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

torch.cuda.is_initialized = lambda: True
torch.cuda.synchronize = synchronize

@pytest.fixture
def gpu():
    synchronize()
    return lost
"""
TESTS = """
import pytest

@pytest.mark.parametrize("number", range(8))
def test_earlier(gpu, number):
    assert number != 5, "an ordinary failure"

def test_that_loses_it(gpu):
    gpu.append(True)
    assert False, "the first failure"

@pytest.mark.parametrize("number", range(8))
def test_later(gpu, number):
    pass
"""


@pytest.fixture
def run_pytest(tmp_path):
    """Runs these tests in a process of their own, and gives it back with its output."""
    for name, text in (("conftest.py", CONFTEST), ("test_gpu.py", TESTS), ("pytest.ini", "[pytest]\n")):
        (tmp_path / name).write_text(text)
    path = os.pathsep.join(filter(None, (str(ROOT / "tests"), os.environ.get("PYTHONPATH"))))
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_", "COV_"))}

    def run(*options):
        command = [sys.executable, "-m", "pytest", "-p", "helpers.lost_gpu", "-p", "no:cacheprovider", *options]
        return subprocess.run(
            command, cwd=tmp_path, env=environment | {"PYTHONPATH": path}, capture_output=True, text=True, timeout=120
        )

    return run


@pytest.mark.long
@pytest.mark.parametrize("options", [(), ("--dist", "loadfile")])
def test_a_new_worker_runs_the_other_tests(run_pytest, options):
    """The first failure is reported as it is; that its worker left is another, of the same test."""
    pytest.importorskip("xdist")
    done = run_pytest("-n", "2", *options)
    assert "3 failed, 15 passed" in done.stdout, done.stdout + done.stderr
    assert ("1 skipped" in done.stdout) == (options != ())  # by files, the same test would end every new worker
    crash = "crashed while running 'test_gpu.py::test_that_loses_it'"
    for reason in ("an ordinary failure", "the first failure", crash):
        assert reason in done.stdout
    assert "test_that_loses_it: CUDA fails since this test" in done.stderr and "illegal memory access" in done.stderr
    assert done.returncode == 1


@pytest.mark.slow
def test_a_single_process_ends_with_its_report(run_pytest):
    done = run_pytest("-n", "0")
    assert "2 failed, 7 passed" in done.stdout, done.stdout + done.stderr
    assert "the first failure" in done.stdout and "test_that_loses_it: CUDA fails since this test" in done.stdout
    assert done.returncode == 1
