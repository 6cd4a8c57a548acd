"""Which room may import which, and what no room does; README shows the rooms."""
import ast
import re
import shutil
import subprocess
import sys
from fnmatch import fnmatch

import pytest

from helpers import ROOT

# What each room may import of ours, itself aside.
ALLOWED = {
    "ops": set(),
    "storage": set(),
    "utils": set(),
    "models": {"ops", "storage"},
    "hubconf": {"models"},
    "optim_factory": {"utils"},
    "training": {"storage", "utils"},
    "datasets": {"training", "utils"},
    "engine": {"training", "utils"},
    "tasks": {"datasets", "models", "storage", "training", "utils"},
    "main": {"engine", "optim_factory", "training", "utils"},
    "hydra_main": {"main", "tasks", "training", "utils"},
}
ROOT_MODULES = {"main", "engine", "datasets", "optim_factory", "utils", "hydra_main", "hubconf"}
# `package` gives all of it one name for others; users run scripts.
OURS = {*ALLOWED, "package", "scripts"}
# The one file of `models` that imports a room.
SEAMS = {"ops": "models/_ops.py", "storage": "models/_pretrained.py"}
FORBIDDEN = {
    "ops": {"timm"},
    "engine": {"argparse", "hydra", "training.options", "training.flags"},
    "main": {"argparse", "hydra", "submitit"},
    "training": {"argparse"},
}
# Files that declare flags, or say what a user of the command line can do about an error.
NAME_FLAGS = (
    "main.py", "hydra_main.py", "package/*", "scripts/*", "training/flags.py", "training/parsing.py",
    "training/options.py", "training/advice.py", "training/command_line.py", "training/recipes.py",
    "tasks/options.py", "tasks/errors.py", "tasks/*/options.py", "tasks/*/errors.py",
)
# They build on argparse.
PARSE = ("training/flags.py", "training/parsing.py")
# Options of sbatch, srun and squeue.
NAME_SLURMS_FLAGS = {
    "training/slurm.py": {"--cpus-per-task=", "--kill-on-bad-exit=", "--noheader", "--jobs=", "--format="},
}
# Errors of torch, gloo and Pillow that have no class of their own; in scripts/bench memory that ran out.
READ_ERRORS = {
    "training/signals.py:fault_of", "storage/weights.py:_foreign_objects", "storage/weights.py:system_fault",
    "training/data/images.py:_is_out_of_memory",
    "scripts/bench/*",
}
FUSED = ("ops/impl/triton/*", "ops/fused/*")
OPERATORS = (*FUSED, "ops/impl/blocks/op.py")
NETWORKS = ("models/*", "ops/bra.py")


# --- what is read -----------------------------------------------------------------------------------------------------
STANDARD = sys.stdlib_module_names | {"tomllib"}  # of Python 3.11


def name_of(path):
    return path.relative_to(ROOT).as_posix()


def sources():
    """The Python files of the repository but for its tests."""
    ignored = {".venv", "tests", "outputs", "data", "build"}
    return [p for p in sorted(ROOT.rglob("*.py")) if p.relative_to(ROOT).parts[0] not in ignored]


def files_of(room):
    folder = ROOT / room
    return sorted(folder.rglob("*.py")) if folder.is_dir() else [ROOT / f"{room}.py"]


def matches(name, patterns):
    return any(fnmatch(name, pattern) for pattern in patterns)


def imported(source, package=()):
    """Full names of what Python source in `package` imports: modules, and what is taken from them."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*above, *([node.module] if node.module else [])])
            # What is taken may be a module itself: `from . import masked`.
            names |= {module, *(f"{module}.{alias.name}".lstrip(".") for alias in node.names)} - {""}
    return names


def imports_of(path):
    return imported(path.read_text(), path.relative_to(ROOT).parts[:-1])


def is_within(name, module):
    """Whether an imported name is a module, or lies in it."""
    return name == module or name.startswith(f"{module}.")


def rooms_of(names):
    return {name.partition(".")[0] for name in names}


def functions(tree):
    return [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]


def arguments(function):
    """All parameters but `self` and `cls`."""
    given = function.args
    named = [*given.posonlyargs, *given.args, *given.kwonlyargs, given.vararg, given.kwarg]
    return [argument for argument in named if argument is not None and argument.arg not in ("self", "cls")]


def docstrings(tree):
    """The ids of all docstrings' nodes."""
    bodies = (getattr(node, "body", []) for node in ast.walk(tree))
    statements = (statement for body in bodies if isinstance(body, list) for statement in body)
    return {id(s.value) for s in statements if isinstance(s, ast.Expr) and isinstance(s.value, ast.Constant)}


def flags_in(source):
    """Command-line flags that string literals name."""
    tree = ast.parse(source)
    skipped = docstrings(tree)
    strings = (node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and id(node) not in skipped)
    return {flag for text in strings if isinstance(text, str) for flag in re.findall(r"--[a-z_][\w-]*=?", text)}


def readers_of_errors(source):
    """Functions that decide something by the text of an error."""
    found = set()
    for function in functions(ast.parse(source)):
        errors = {node.name for node in ast.walk(function) if isinstance(node, ast.ExceptHandler) and node.name}
        kinds = {a.arg: ast.unparse(a.annotation) for a in arguments(function) if a.annotation}
        errors |= {name for name, kind in kinds.items() if "Error" in kind or "Exception" in kind}
        texts = {f"str({error})" for error in errors} | {f"{error}.args" for error in errors}
        for node in ast.walk(function):
            if isinstance(node, ast.Assign) and any(text in ast.unparse(node.value) for text in texts):
                texts |= {ast.unparse(target) for target in node.targets}
        for node in ast.walk(function):
            is_call = isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
            if is_call and node.func.attr not in ("startswith", "endswith", "search", "match", "fullmatch"):
                continue
            if is_call or isinstance(node, ast.Compare):
                words = ast.unparse(node)
                if any(re.search(rf"(?<![\w.]){re.escape(text)}(?!\w)", words) for text in texts):
                    found.add(function.name)
    return found


# --- the tests' own tools ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source,expected", [
    ("import ops.impl", {"ops.impl"}),
    ("import torch, timm as t", {"torch", "timm"}),
    ("from ops import impl", {"ops", "ops.impl"}),
    ("from ops.impl import masked as m", {"ops.impl", "ops.impl.masked"}),
    ("from . import masked, gather", {"a.b", "a.b.masked", "a.b.gather"}),
    ("from .masked import attend", {"a.b.masked", "a.b.masked.attend"}),
    ("from .. import gather", {"a", "a.gather"}),
    ("from ...storage import weights", {"storage", "storage.weights"}),
    ("from ... import storage", {"storage"}),
    ("def f():\n    from ..gather import attend", {"a.gather", "a.gather.attend"}),
])
def test_every_way_to_import_is_seen(source, expected):
    assert imported(source, ("a", "b")) == expected


@pytest.mark.parametrize("source,expected", [
    ("x = 'lower --batch_size'", {"--batch_size"}),
    ("f(f'{x}: --aa {y}')", {"--aa"}),
    ("def f():\n    '''As --lr says.'''\n    return 'no flag - here -- either'", set()),
    ("['--jobs=3', \"--format=%T\"]", {"--jobs=", "--format="}),
])
def test_every_flag_is_seen(source, expected):
    assert flags_in(source) == expected


@pytest.mark.parametrize("source,is_reader", [
    ("try: f()\n  except E as error:\n    if 'x' in str(error): g()", True),
    ("try: f()\n  except E as e:\n    text = str(e).lower()\n    g() if text.startswith('x') else h()", True),
    ("try: f()\n  except E as e:\n    if re.search('x', str(e)): g()", True),
    ("try: f()\n  except OSError as e:\n    if e.errno == 3: g()", False),
    ("try: f()\n  except E as error:\n    raise F(f'{error}') from error", False),
])
def test_every_reader_of_errors_is_seen(source, is_reader):
    assert readers_of_errors(f"def run():\n  {source}") == ({"run"} if is_reader else set())
    assert not readers_of_errors("def run(text):\n  if text in 'abc': pass")
    assert readers_of_errors("def run(error: OSError):\n  if 'abc' in str(error): pass") == {"run"}
    assert readers_of_errors("def run(error: Exception):\n  if 'abc' in str(error): pass") == {"run"}


# --- rooms ------------------------------------------------------------------------------------------------------------


def test_seven_modules_at_the_root():
    assert {path.stem for path in ROOT.glob("*.py")} == ROOT_MODULES
    assert len((ROOT / "main.py").read_text().splitlines()) < 250


@pytest.mark.parametrize("room", ALLOWED)
def test_rooms(room):
    for path in files_of(room):
        names = imports_of(path)
        assert rooms_of(names) & OURS <= ALLOWED[room] | {room}, name_of(path)
        if name_of(path) not in PARSE:
            assert not [n for n in names for module in FORBIDDEN.get(room, ()) if is_within(n, module)], name_of(path)


def test_every_room_is_known():
    assert {name_of(path).partition("/")[0].removesuffix(".py") for path in sources()} <= OURS


def test_models_reach_other_rooms_by_one_file_each():
    for path in files_of("models"):
        for room, file in SEAMS.items():
            assert room not in rooms_of(imports_of(path)) or name_of(path) == file, f"{name_of(path)} imports {room}"


def test_models_use_the_public_face_of_ops():
    inner = {f"ops.{path.stem}" for path in (ROOT / "ops").iterdir() if path.stem != "__init__"}
    for path in files_of("models"):
        assert not any(is_within(name, module) for name in imports_of(path) for module in inner), name_of(path)


def test_other_rooms_take_what_models_offer():
    for path in sources():
        if not matches(name_of(path), ["models/*"]):
            assert not any(name.startswith("models._") for name in imports_of(path)), name_of(path)


def test_data_sets_know_loaders_and_shards_of_training_alone():
    assert all(is_within(name, "training.data") for name in imports_of(ROOT / "datasets.py") if "training" in name)


def test_tasks_do_not_import_one_another():
    tasks = {path.name for path in (ROOT / "tasks").iterdir() if (path / "task.py").exists()}
    assert "classification" in tasks
    for path in files_of("tasks"):
        others = tasks - {path.relative_to(ROOT / "tasks").parts[0]}
        assert not any(is_within(name, f"tasks.{other}") for name in imports_of(path) for other in others), path


def test_implementations_do_not_import_one_another():
    folder = ROOT / "ops" / "impl"
    names = {path.stem for path in folder.iterdir() if path.suffix == ".py" or path.is_dir()} - {"__init__"}
    for path in folder.rglob("*.py"):
        others = names - {path.relative_to(folder).parts[0].removesuffix(".py")}
        found = [n for n in imports_of(path) for other in others if is_within(n, f"ops.impl.{other}")]
        assert not found, name_of(path)


def test_only_fused_kernels_import_triton():
    for path in files_of("ops"):
        assert "triton" not in rooms_of(imports_of(path)) or matches(name_of(path), FUSED), name_of(path)


def test_only_hydra_main_imports_hydra_and_submitit():
    for path in sources():
        uses = rooms_of(imports_of(path)) & {"hydra", "omegaconf", "submitit"}
        assert not uses or path == ROOT / "hydra_main.py", name_of(path)


def test_nothing_imports_scripts():
    for path in sources():
        if not matches(name_of(path), ["scripts/*"]):
            assert "scripts" not in rooms_of(imports_of(path)), name_of(path)


@pytest.fixture(scope="module")
def loaded():
    """What a fresh process has loaded after `import models`, beyond what models need, and after `import main`."""
    code = (
        "import sys, torch, timm; before = set(sys.modules); import models;"
        "print(*sorted(set(sys.modules) - before)); import main; print(*sorted(sys.modules))"
    )
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [set(line.split()) for line in out.splitlines()]


def test_importing_models_needs_only_torch_and_timm(loaded):
    others = {"einops", "fvcore", "tensorboard", "triton", "sklearn", "yaml", "tqdm", *OURS}
    assert not rooms_of(loaded[0]) & (others - {"models", "ops", "storage"})
    assert not loaded[0] & {"models.detection", "models.segmentation"}


def test_importing_main_loads_no_task(loaded):
    assert "main" in loaded[1] and "tasks" not in rooms_of(loaded[1])


def test_every_import_is_in_a_requirements_file():
    distributions = {
        "PIL": "pillow", "faster_coco_eval": "faster-coco-eval", "hydra": "hydra-core", "sklearn": "scikit-learn",
        "yaml": "pyyaml",
    }
    text = "".join(path.read_text() for path in ROOT.glob("requirements*.txt"))
    listed = {line.partition("#")[0].strip().partition(">")[0].lower() for line in text.splitlines()}
    paths = [p for p in ROOT.rglob("*.py") if ".venv" not in p.parts]
    local = OURS | {p.stem for p in paths} | {"helpers", "routedvit", "tests"}
    for path in paths:
        for name in rooms_of(imports_of(path)):
            if name not in STANDARD and name not in local:
                assert distributions.get(name, name) in listed, f"{path.name} imports {name}"


# --- what no room does ------------------------------------------------------------------------------------------------


def test_only_modules_of_the_command_line_name_flags():
    for path in sources():
        name = name_of(path)
        if not matches(name, NAME_FLAGS):
            assert flags_in(path.read_text()) <= NAME_SLURMS_FLAGS.get(name, set()), name


def test_nothing_below_main_gets_the_command_line():
    for path in sources():
        if matches(name_of(path), ["scripts/*", "package/*", *PARSE]):
            continue
        for function in functions(ast.parse(path.read_text())):
            assert function.name != "args", name_of(path)
            for argument in arguments(function):
                annotation = ast.unparse(argument.annotation) if argument.annotation else ""
                is_variadic = argument is function.args.vararg
                assert "Namespace" not in annotation, f"{name_of(path)}:{function.name}"
                assert argument.arg != "args" or is_variadic, f"{name_of(path)}:{function.name}"


def test_functions_are_short_and_have_few_parameters():
    """Kernels, custom operators and the constructors of networks aside."""
    for path in sources():
        name = name_of(path)
        for function in functions(ast.parse(path.read_text())):
            if matches(name, OPERATORS) or (function.name == "__init__" and matches(name, NETWORKS)):
                continue
            assert len(arguments(function)) <= 8, f"{name}:{function.name}"
            assert function.end_lineno - function.lineno < 60, f"{name}:{function.name}"


def test_paths_begin_at_home_in_one_place():
    """As a path, and as the text of a flag."""
    places = {name_of(path) for path in sources() if "expanduser" in path.read_text()}
    assert places == {"utils.py", "training/flags.py"}


def test_nothing_is_decided_by_the_text_of_an_error():
    found = {f"{name_of(path)}:{reader}" for path in sources() for reader in readers_of_errors(path.read_text())}
    assert not [reader for reader in found if not matches(reader, READ_ERRORS)]


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_make_runs_every_test_that_needs_a_gpu():
    commands = subprocess.run(["make", "-n", "test-gpu"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    marked = [name_of(p) for p in (ROOT / "tests").rglob("test_*.py") if re.search(r"mark\.gpu", p.read_text())]
    assert "tests/training/data/test_loader.py" in marked and "-m gpu" in commands
    for name in [*marked, "tests/ops/test_triton.py"]:
        assert re.search(rf"{name}(\s|$)", commands), f"{name} is not run, or not all of it"


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
@pytest.mark.parametrize("failing", ["tests/ops/test_triton.py", "-m gpu", "neither"])
@pytest.mark.parametrize("has_timeout", [True, False])
def test_all_tests_on_a_gpu_run_though_some_fail(tmp_path, failing, has_timeout):
    """By the Python that is there, in several processes, each test within its time where pytest can limit it."""
    python, log = tmp_path / "python", tmp_path / "log"
    python.write_text(f"""#!/bin/sh
case "$*" in *"import pytest_timeout"*) exit {int(not has_timeout)};; esac
echo "$*" >> {log}
case "$*" in *"{failing}"*) exit 1;; esac
""")
    python.chmod(0o755)
    command = ["make", "test-gpu", f"BIN={tmp_path}/none", f"PYTHON={python}", "GPU_WORKERS=3", "GPU_TIMEOUT=50"]
    status = subprocess.run(command, cwd=ROOT, capture_output=True).returncode
    first, second = log.read_text().splitlines()
    assert "tests/ops/test_triton.py" in first and "-m gpu" in second and "tests/ops/test_triton.py" not in second
    for line in (first, second):
        assert line.startswith("-m pytest -n 3 ") and ("--timeout 50 " in line) == has_timeout
    assert (status == 0) == (failing == "neither")
