"""--help and words that no settings could make right are answered before torch is imported, which takes seconds; and
Ctrl-C in these seconds is one line."""
import subprocess
import sys

import pytest

import main as program
from helpers import ROOT

# A program whose import of torch or timm fails.
HIDING = """
import runpy, sys
for name in ("torch", "timm", "torchvision"):
    sys.modules[name] = None
runpy.run_path("main.py", run_name="__main__")
"""


def without_torch(*arguments):
    """Exit code, standard output and standard error of main.py where torch cannot be imported."""
    done = subprocess.run([sys.executable, "-c", HIDING, *arguments], cwd=ROOT, capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr


def test_help_needs_no_torch_and_is_the_programs(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    code, out, err = without_torch("--help")
    assert (code, err) == (0, "")
    with pytest.raises(SystemExit):
        program.main(["--help"])
    assert capsys.readouterr().out == out and "--batch_size" in out


@pytest.mark.parametrize("arguments,message", [
    (["--epoch", "3"], "unknown flag --epoch; did you mean --epochs?"),
    (["--config", "configs/train/quickstart.yaml", "--epoch=3"], "unknown flag --epoch; did you mean --epochs?"),
    (["--epochs", "x"], "--epochs: invalid int value: 'x'"),
    (["--config", "nowhere.yaml"], "--config nowhere.yaml: No such file or directory"),
])
def test_a_typo_needs_no_torch_and_is_told_as_by_the_program(arguments, message, capfd):
    assert without_torch(*arguments) == (2, "", f"error: {message}\n")
    assert program.main(arguments) == 2
    assert capfd.readouterr().err == f"error: {message}\n"


@pytest.mark.parametrize("arguments,message", [
    (["--task", "segmentation", "--mixup", "0.8"], "--mixup is a flag of --task classification"),
    (["--head", "upernet"], "--head is a flag of --task segmentation"),
    (["--task", "segmentation", "--headd", "upernet"], "unknown flag --headd; did you mean --head?"),
])
def test_flags_of_another_task_are_told(arguments, message):
    assert without_torch(*arguments) == (2, "", f"error: {message}\n")


@pytest.mark.parametrize("arguments", [
    [], ["--epochs", "3", "--clip_grad", "null"], ["--task", "clasification"], ["--task", "../main"],
    ["--eval", "--resume", "best.pth", "--test_flip"], ["--auto_resume", "--test-flip"], ["--finetune=x.pth", "--what"],
])
def test_all_else_is_left_to_the_program(arguments):
    code, _, err = without_torch(*arguments)
    assert code == 1 and err.startswith("error: torch is not installed: ")


def test_a_recipe_from_a_pipe_is_left_to_the_program():
    """main.py, started as a program, reads it once."""
    line = f'"{sys.executable}" main.py --config <(echo "lr: -3") --data_set digits'
    done = subprocess.run(["bash", "-c", line], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: --config /dev/fd/")
    assert done.stderr.endswith(": lr: must be above 0 and finite, got -3.0\n")


# A program in which Ctrl-C comes while it imports a package, after one in a destructor, of which Python only tells.
INTERRUPTED = """
import builtins, runpy, sys
package, script, *sys.argv[1:] = sys.argv[1:]
sys.argv[0] = script
find = builtins.__import__
class Dropped:
    def __del__(self):
        raise KeyboardInterrupt
def interrupted(name, *arguments, **kwargs):
    if name.partition(".")[0] == package:
        Dropped()
        raise KeyboardInterrupt
    return find(name, *arguments, **kwargs)
builtins.__import__ = interrupted
runpy.run_path(script, run_name="__main__")
"""


@pytest.mark.parametrize("package,command", [
    ("torch", ["main.py", "--eval"]), ("yaml", ["main.py", "--help"]), ("torch", ["scripts/predict.py", "cat.jpg"]),
    ("hydra", ["hydra_main.py"]),
])
def test_ctrl_c_in_the_imports_is_one_line(package, command):
    command = [sys.executable, "-c", INTERRUPTED, package, *command]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "error: interrupted\n")


def test_errors_in_destructors_are_still_told():
    script = "import training.startup\nclass A:\n    def __del__(self):\n        1 / 0\nA()"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert "ZeroDivisionError" in done.stderr
