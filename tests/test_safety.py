"""Nothing that is read is run: not what a file holds, not what a name says."""
import argparse
import ast
import json
import os
import subprocess
import sys

import pytest
import torch

import main as program
from helpers import ROOT
from helpers.hostile import Hostile, forged_array, forged_dtype, forged_number
from helpers.photos import write_photos
from storage.plain import PLAIN
from storage.weights import HostileFileError, read_checkpoint

SMALL = ["--model", "biformer_nano", "--input_size", "32", "--batch_size", "4", "--num_workers", "0", "--device", "cpu"]
SHORT = ["--epochs", "1", "--warmup_epochs", "0", "--lr", "1e-2"]
# Calls that run what they read, and the argument without which they do not, where there is one.
RUNS_WHAT_IT_READS = {
    "eval", "exec", "compile", "pickle.load", "pickle.loads", "pickle.Unpickler", "marshal.load", "marshal.loads",
    "shelve.open", "joblib.load", "yaml.load", "yaml.unsafe_load", "yaml.full_load", "os.system", "os.popen",
    "subprocess.getoutput", "subprocess.getstatusoutput", "torch.hub.load", "pandas.read_pickle",
}
SAFE_ONLY_WITH = {"torch.load": ("weights_only", True), "torch.hub.load_state_dict_from_url": ("weights_only", True)}
NEVER_WITH = {"shell": True, "allow_pickle": True, "trust_remote_code": True}


def name_of(function):
    if isinstance(function, ast.Attribute):
        return f"{name_of(function.value)}.{function.attr}"
    return function.id if isinstance(function, ast.Name) else ""


def dangers(source):
    """What in Python source would run what it reads."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        name = name_of(node.func)
        words = {keyword.arg: getattr(keyword.value, "value", None) for keyword in node.keywords}
        if name in RUNS_WHAT_IT_READS:
            yield f"line {node.lineno}: {name}"
        if name in SAFE_ONLY_WITH and words.get(SAFE_ONLY_WITH[name][0]) is not SAFE_ONLY_WITH[name][1]:
            yield f"line {node.lineno}: {name} without {SAFE_ONLY_WITH[name][0]}"
        yield from (f"line {node.lineno}: {name} with {word}" for word, value in NEVER_WITH.items()
                    if words.get(word) is value)


@pytest.mark.parametrize("source", [
    "pickle.load(f)", "torch.load(f)", "torch.load(f, weights_only=False)", "yaml.load(f)", "os.system(x)",
    "subprocess.run(x, shell=True)", "np.load(f, allow_pickle=True)", "eval(x)",
])
def test_the_search_finds(source):
    assert list(dangers(source))


def test_the_search_knows_what_is_safe():
    assert not list(dangers("torch.load(f, weights_only=True); yaml.safe_load(f); model.eval(); run([x], shell=False)"))


def test_nothing_here_runs_what_it_reads():
    files = [p for p in ROOT.rglob("*.py") if p.relative_to(ROOT).parts[0] not in (".venv", "tests", "outputs", "data")]
    assert len(files) > 40
    found = {str(path.relative_to(ROOT)): list(dangers(path.read_text())) for path in files}
    assert {path: lines for path, lines in found.items() if lines} == {}


@pytest.mark.parametrize("flags", [
    ["--eval", "--resume"], ["--resume"], ["--finetune"],
    ["--distillation_type", "hard", "--teacher_model", "biformer_nano", "--teacher_path"],
])
def test_a_hostile_checkpoint_is_refused_by_every_flag(photos, tmp_path, capfd, flags):
    torch.save(dict(model={}, optimizer={}, meter={}, args=Hostile(tmp_path / "owned")), tmp_path / "hostile.pth")
    common = [*SMALL, *SHORT, "--data_path", str(photos), "--output_dir", str(tmp_path / "out")]
    assert program.main([*common, *flags, str(tmp_path / "hostile.pth")]) == 1
    assert "refused, since loading it would run code" in capfd.readouterr().err
    assert not (tmp_path / "owned").exists()


def test_a_hostile_checkpoint_to_resume_from(photos, tmp_path, capfd):
    (tmp_path / "out").mkdir()
    torch.save(dict(model={}, args=Hostile(tmp_path / "owned")), tmp_path / "out" / "checkpoint-00000003.pth")
    common = [*SMALL, *SHORT, "--data_path", str(photos), "--output_dir", str(tmp_path / "out"), "--auto_resume"]
    assert program.main(common) == 1
    assert "refused, since loading it would run code" in capfd.readouterr().err
    assert not (tmp_path / "owned").exists()


FORGED = {
    "a type": forged_dtype(),
    "a type with fields": forged_dtype(state=False),
    "an array": forged_array(forged_dtype()),
    "a number": forged_number(forged_dtype()),
    "deep within": [{"a": (1, [forged_array(forged_dtype())])}],
}


@pytest.mark.parametrize("value", FORGED.values(), ids=FORGED)
def test_a_file_cannot_forge_the_types_of_numpy(tmp_path, value):
    """A field of objects in a type of bytes: the file would choose the addresses of these objects."""
    torch.save(dict(model=dict(w=torch.ones(1)), best=value), tmp_path / "c.pth")
    with pytest.raises(HostileFileError, match=r"refused, since it holds a type of NumPy .*; ask its author") as error:
        read_checkpoint(str(tmp_path / "c.pth"))
    assert len(str(error.value).splitlines()) == 1


def test_types_of_numpy_are_handed_to_no_file():
    allowed = [entry[0] if isinstance(entry, tuple) else entry for entry in PLAIN]
    assert all(value.__module__ == "storage.plain" or value is argparse.Namespace for value in allowed)


def test_a_hostile_recipe(tmp_path, capfd):
    (tmp_path / "recipe.yaml").write_text(f"model: !!python/object/apply:os.mkdir ['{tmp_path / 'owned'}']\n")
    assert program.main(["--config", str(tmp_path / "recipe.yaml")]) == 2
    assert "not YAML" in capfd.readouterr().err
    assert not (tmp_path / "owned").exists()


@pytest.mark.slow
def test_paths_are_names_and_nothing_else(tmp_path):
    """Spaces, quotes, what a shell would run, brackets that a glob would take, and letters of other alphabets."""
    odd = tmp_path / "a b'c\"d $(touch owned) `touch owned`; touch owned & [x]*? é日 %s {0}"
    write_photos(odd / "data", train=13, val=7)
    command = [sys.executable, str(ROOT / "main.py"), *SMALL, "--data_path", str(odd / "data")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    out = odd / "out"
    for more in ([*SHORT, "--output_dir", str(out)], [*SHORT, "--output_dir", str(out), "--auto_resume"],
                 ["--eval", "--resume", str(out / "last.pth")]):
        done = subprocess.run([*command, *more], cwd=tmp_path, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr
    assert "resuming from" not in done.stdout and "7 val images" in done.stdout
    assert len(json.loads((out / "log.txt").read_text())) > 5
    assert sorted(p.name for p in tmp_path.iterdir()) == [odd.name]


def test_namespaces_of_published_checkpoints_are_inert():
    """The one class that is let through holds values, and no code that unpickling would run."""
    assert not hasattr(argparse.Namespace, "__setstate__") and "__reduce__" not in vars(argparse.Namespace)
