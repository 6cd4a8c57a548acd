"""Which room may import which; see the table in the README."""
import ast
import re
import shutil
import subprocess
import sys

import pytest

from helpers import ROOT

OURS = {
    "checkpoints", "datasets", "engine", "hydra_main", "losses", "main", "models", "networks", "ops",
    "optim_factory", "options", "runs", "scripts", "shards", "token_labels", "utils",
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
    "networks": {"checkpoints", "models", "utils"},
    "main": {
        "checkpoints", "datasets", "engine", "losses", "networks", "optim_factory", "options", "runs", "token_labels",
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


def imported(source):
    """Names of what Python source imports, modules and what is taken from them; relative ones begin with dots."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            # What is taken may be a module itself: `from . import masked`.
            names |= {module} | {f"{module}{'.' if node.module else ''}{alias.name}" for alias in node.names}
    return names


def imports_of(path):
    return imported(path.read_text())


def is_within(name, module):
    """Whether an imported name is a module, or lies in it."""
    return name == module or name.startswith(f"{module}.")


@pytest.mark.parametrize("source,expected", [
    ("import ops.impl", {"ops.impl"}),
    ("import torch, timm as t", {"torch", "timm"}),
    ("from ops import impl", {"ops", "ops.impl"}),
    ("from ops.impl import masked as m", {"ops.impl", "ops.impl.masked"}),
    ("from . import masked, gather", {".", ".masked", ".gather"}),
    ("from .masked import attend", {".masked", ".masked.attend"}),
    ("from .. import gather", {"..", "..gather"}),
    ("def f():\n    from ..gather import attend", {"..gather", "..gather.attend"}),
])
def test_every_way_to_import_is_seen(source, expected):
    assert imported(source) == expected


@pytest.mark.parametrize("source", [
    "from ops.impl import masked", "from ops import impl", "import ops.impl.masked", "from ops import regions",
])
def test_ways_around_the_public_face_of_ops(source):
    assert reaches_inside_ops(source)
    assert not reaches_inside_ops("from ops import RegionGrid, routed_attention\nimport torch")


@pytest.mark.parametrize("source,level", [
    ("from . import masked", 1), ("from .masked import attend", 1), ("from .. import masked", 2),
    ("from ..masked import attend", 2), ("from ...impl import masked", 2), ("from ops.impl import masked", 1),
])
def test_ways_from_one_implementation_to_another(source, level):
    assert reaches_implementations(source, level, {"masked", "gather"})
    assert not reaches_implementations("from ..regions import RegionGrid\nimport triton", level, {"gather", "triton"})


@pytest.mark.parametrize("room", ALLOWED)
def test_rooms(room):
    for path in files_of(room):
        absolute = {name.partition(".")[0] for name in imports_of(path) if not name.startswith(".")}
        assert absolute & OURS <= ALLOWED[room] | {room}, path
        assert not absolute & FORBIDDEN.get(room, set()), path


def reaches_inside_ops(source):
    """Whether source takes from ops anything but what ops offers."""
    inner = {f"ops.{path.stem}" for path in (ROOT / "ops").iterdir()}
    return any(is_within(name, module) for name in imported(source) for module in inner)


def test_models_use_the_public_face_of_ops():
    for path in files_of("models"):
        assert not reaches_inside_ops(path.read_text()), path


def reaches_implementations(source, level, names):
    """Whether source, `level` folders below ops, imports one of the implementations of these names."""
    prefixes = ("." * level, "." * (level + 1) + "impl.", "ops.impl.")
    modules = {prefix + name for name in names for prefix in prefixes}
    return any(is_within(name, module) for name in imported(source) for module in modules)


def test_implementations_do_not_import_one_another():
    folder = ROOT / "ops" / "impl"
    names = {path.stem for path in folder.iterdir() if path.suffix == ".py" or path.is_dir()} - {"__init__"}
    for path in folder.rglob("*.py"):
        level = len(path.relative_to(folder).parts)
        others = names - {path.relative_to(folder).parts[0]}
        assert not reaches_implementations(path.read_text(), level, others), path


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


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_make_runs_every_test_that_needs_a_gpu():
    commands = subprocess.run(["make", "-n", "test-gpu"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    marked = [path.name for path in (ROOT / "tests").glob("test_*.py") if re.search(r"mark\.gpu", path.read_text())]
    assert "test_datasets.py" in marked and "-m gpu" in commands
    for name in [*marked, "test_ops_triton.py"]:
        assert re.search(rf"tests/{name}(\s|$)", commands), f"{name} is not run, or not all of it"


def test_importing_models_needs_only_torch_timm_and_einops():
    code = (
        "import sys, torch, timm, einops; before = set(sys.modules); import models;"
        "new = {n.partition('.')[0] for n in set(sys.modules) - before};"
        "print(sorted(n for n in new if n in ('fvcore', 'tensorboard', 'triton', 'sklearn', 'yaml', 'tqdm', 'utils')))"
    )
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert out.strip() == "[]"
