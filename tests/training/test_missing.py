"""A package that is missing is one line, whatever program misses it."""
import subprocess
import sys

import pytest

from helpers import ROOT
from training.missing import DISTRIBUTIONS, FILES, missing_package

INSTALLS = {"torch": "requirements.txt", "timm": "requirements.txt", "yaml": "requirements.txt",
            "PIL": "requirements.txt", "triton": "requirements.txt", "submitit": "requirements-slurm.txt",
            "hydra": "requirements-slurm.txt", "matplotlib": "requirements-dev.txt"}


@pytest.fixture
def repository(tmp_path):
    for name in FILES:
        (tmp_path / name).write_text((ROOT / name).read_text())
    return tmp_path


def missed(module):
    return ModuleNotFoundError(f"No module named {module!r}", name=module)


@pytest.mark.parametrize("module,file", INSTALLS.items())
def test_what_installs_a_package(module, file, repository):
    line = missing_package(missed(f"{module}.part"), repository)
    assert line == (f"{DISTRIBUTIONS.get(module, module)} is not installed: {sys.executable} -m pip install "
                    f"-r {repository / file}")


@pytest.mark.parametrize("error", [missed("trainning"), missed("onnx_"), ModuleNotFoundError("x"), ValueError("torch")])
def test_bugs_are_no_missing_packages(error, repository):
    assert missing_package(error, repository) is None


def test_an_installed_package_has_no_requirements_files(tmp_path):
    assert missing_package(missed("torch"), tmp_path) is None


def test_an_environment_that_was_not_activated(repository):
    environment = repository / ".venv"
    (environment / "bin").mkdir(parents=True)
    (environment / "bin" / "python").touch()
    line = missing_package(missed("torch"), repository, prefix="/usr")
    assert line == f"torch is not installed in this Python; it may be in {environment}: . .venv/bin/activate"
    assert missing_package(missed("torch"), repository, prefix=str(environment)).startswith("torch is not installed: ")


HIDDEN = """
import runpy, sys
hidden, script, *sys.argv[1:] = sys.argv[1:]
sys.modules[hidden] = None
sys.argv[0] = script
runpy.run_path(script, run_name="__main__")
"""


def without(module, *command):
    """A program, run where a package is missing."""
    command = [sys.executable, "-c", HIDDEN, module, *command]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def check_line(done, distribution, file):
    assert done.stderr == f"error: {distribution} is not installed: {sys.executable} -m pip install -r {ROOT / file}\n"
    assert done.returncode == 1


@pytest.mark.parametrize("module,script,file", [
    ("hydra", "hydra_main.py", "requirements-slurm.txt"),
    ("submitit", "hydra_main.py", "requirements-slurm.txt"),
    ("torch", "hydra_main.py", "requirements.txt"),
    *[("torch", f"scripts/{name}.py", "requirements.txt")
      for name in ("benchmark", "compile_kernels", "make_label_maps", "make_shards", "predict", "tune_kernels")],
])
def test_a_program_whose_package_is_missing(module, script, file):
    check_line(without(module, script, "--help"), DISTRIBUTIONS.get(module, module), file)


@pytest.mark.slow
@pytest.mark.parametrize("module", ["torch", "yaml", "tqdm", "torchvision", "PIL", "timm"])
def test_training_where_a_package_is_missing(module):
    """Some are imported only once the task is known."""
    done = without(module, "main.py", "--data_set", "digits")
    check_line(done, DISTRIBUTIONS.get(module, module), "requirements.txt")
