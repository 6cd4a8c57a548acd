"""Which room may import which; see the table in the README."""
import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
OURS = {
    "checkpoints", "datasets", "engine", "hydra_main", "losses", "main", "models", "ops", "optim_factory", "options",
    "runs", "scripts", "shards", "token_labels", "utils",
}
ALLOWED = {
    "ops": set(),
    "models": {"ops"},
    "utils": set(),
    "checkpoints": {"utils"},
    "losses": set(),
    "shards": {"utils"},
    "datasets": {"shards", "utils"},
    "optim_factory": set(),
    "token_labels": {"utils"},
    "engine": {"utils"},
    "options": {"utils"},
    "runs": {"checkpoints", "engine", "utils"},
    "hydra_main": {"main", "options", "utils"},
    "main": {
        "checkpoints", "datasets", "engine", "losses", "models", "optim_factory", "options", "runs", "token_labels",
        "utils",
    },
}
FORBIDDEN = {
    "ops": {"timm"},
    "engine": {"argparse", "hydra"},
    "main": {"hydra", "submitit"},
    "hydra_main": {"torch", "timm"},
}


def files_of(room):
    folder = ROOT / room
    return sorted(folder.rglob("*.py")) if folder.is_dir() else [ROOT / f"{room}.py"]


def imports_of(path):
    """Top-level names of what a file imports; relative imports as paths within its room."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add("." * node.level + (node.module or ""))
    return names


@pytest.mark.parametrize("room", ALLOWED)
def test_rooms(room):
    for path in files_of(room):
        absolute = {name.partition(".")[0] for name in imports_of(path) if not name.startswith(".")}
        assert absolute & OURS <= ALLOWED[room] | {room}, path
        assert not absolute & FORBIDDEN.get(room, set()), path


def test_models_use_the_public_face_of_ops():
    for path in files_of("models"):
        assert not any(name.startswith("ops.") for name in imports_of(path)), path


def test_implementations_do_not_import_one_another():
    folder = ROOT / "ops" / "impl"
    names = {path.stem for path in folder.glob("*.py")} | {path.name for path in folder.iterdir() if path.is_dir()}
    for path in folder.glob("*.py"):
        assert not imports_of(path) & {f".{name}" for name in names}, path
    for path in folder.glob("*/*.py"):
        assert not imports_of(path) & {f"..{name}" for name in names}, path


def test_only_the_fused_implementation_imports_triton():
    for path in files_of("ops"):
        if path.relative_to(ROOT / "ops" / "impl" if "impl" in path.parts else ROOT).parts[0] != "triton":
            assert not any(name.partition(".")[0] == "triton" for name in imports_of(path)), path


def test_only_hydra_main_imports_hydra_and_submitit():
    for path in (p for p in ROOT.rglob("*.py") if ".venv" not in p.parts and "tests" not in p.parts):
        uses = {name.partition(".")[0] for name in imports_of(path)} & {"hydra", "omegaconf", "submitit"}
        assert not uses or path == ROOT / "hydra_main.py", path


def test_nothing_imports_scripts():
    for room in ALLOWED:
        for path in files_of(room):
            assert not any(name.partition(".")[0] == "scripts" for name in imports_of(path)), path


def test_every_import_is_in_a_requirements_file():
    distributions = {"PIL": "pillow", "hydra": "hydra-core", "sklearn": "scikit-learn", "yaml": "pyyaml"}
    text = "".join(path.read_text() for path in ROOT.glob("requirements*.txt"))
    listed = {line.partition("#")[0].strip().partition(">")[0].lower() for line in text.splitlines()}
    paths = [p for p in ROOT.rglob("*.py") if ".venv" not in p.parts]
    local = OURS | {p.stem for p in paths}
    for path in paths:
        for name in {n.partition(".")[0] for n in imports_of(path) if not n.startswith(".")}:
            if name and name not in sys.stdlib_module_names and name not in local:
                assert distributions.get(name, name) in listed, f"{path.name} imports {name}"


def test_importing_models_needs_only_torch_timm_and_einops():
    code = (
        "import sys, torch, timm, einops; before = set(sys.modules); import models;"
        "new = {n.partition('.')[0] for n in set(sys.modules) - before};"
        "print(sorted(n for n in new if n in ('fvcore', 'tensorboard', 'triton', 'sklearn', 'yaml', 'tqdm', 'utils')))"
    )
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert out.strip() == "[]"
