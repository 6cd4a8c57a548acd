"""scripts/measure_gpu.sh: every step's commands run, here at small sizes on the CPU."""
import os
import subprocess
import sys

import pytest

from helpers import ROOT


def measure(step, folder):
    environment = dict(os.environ, DEVICE="cpu", PYTHON=sys.executable, OMP_NUM_THREADS="1")
    command = ["bash", "scripts/measure_gpu.sh", step, str(folder)]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


LONG = pytest.mark.long


@pytest.mark.slow
@pytest.mark.parametrize("step,left", [
    pytest.param("tests", ["kernels.log", "kernels-on-maps.log"], marks=LONG),
    pytest.param("measure", ["measure.log", "*-cores.json", "*-cores.md"], marks=LONG),
    pytest.param("headline", ["eager/*.json", "compiled/*.json", "eager.log"], marks=[LONG, pytest.mark.compile]),
    pytest.param("tune", ["tiles.json", "tune.log"], marks=LONG),
    ("resume", ["resume.log"]),
])
def test_steps_run_and_leave_their_results(step, left, tmp_path):
    result = measure(step, tmp_path)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    for pattern in left:
        assert any(path.stat().st_size for path in tmp_path.glob(pattern)), pattern


def test_a_failed_command_fails_the_step_and_unknown_steps_are_named(tmp_path):
    assert "unknown step tset" in measure("tset", tmp_path).stderr
    environment = dict(os.environ, DEVICE="cpu", PYTHON="false")
    command = ["bash", "scripts/measure_gpu.sh", "measure", str(tmp_path)]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 1 and "== measure failed" in result.stdout
