"""The package `routedvit`: built, installed into an empty folder, and used from a project with names like ours."""
import os
import re
import shutil
import subprocess
import sys

import pytest

from helpers import ROOT
from helpers.objects import write_objects
from helpers.segments import write_segments

try:
    import tomllib
except ImportError:  # Python 3.10
    tomllib = pytest.importorskip("tomli")

PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
# Folders of the repository whose modules are in the package; `package/` itself is its top.
# Scripts that the command `routedvit` runs, and the folder of each one's parts.
SCRIPTS = {"export": "exporting", "knn": "probing", "predict": "prediction", "visualize": "viewer"}
LIBRARY, PROGRAM = ("models", "ops", "storage", "weights"), ("configs", "tasks", "training")


def requirements(lines):
    """Name -> the rest of the requirement, without spaces and quotes; extras of our own are left out."""
    found = {}
    for line in lines:
        line = re.sub(r"\s|['\"]", "", line.partition("#")[0])
        name = re.match(r"[\w-]*", line)[0]
        if name and name not in ("-r", "routedvit"):
            found[name] = line.removeprefix(name)
    return found


def requirements_file(name):
    lines = (ROOT / name).read_text().splitlines()
    return requirements(line for line in lines if not line.startswith("-r"))


def test_requirements_files_say_the_same():
    project = PYPROJECT["project"]
    extras = {name: requirements(lines) for name, lines in project["optional-dependencies"].items()}
    assert requirements(project["dependencies"]).keys() == {"torch", "timm"}
    assert requirements(project["dependencies"]) | extras["train"] == requirements_file("requirements.txt")
    assert extras["export"].items() <= extras["dev"].items()
    assert extras["slurm"] == requirements_file("requirements-slurm.txt")
    assert extras["dev"] == requirements_file("requirements-dev.txt")


def test_nothing_is_left_out_of_the_package():
    tools = PYPROJECT["tool"]["setuptools"]
    others = {
        "benchmarks", "build", "checkpoints", "data", "docs", "notebooks", "outputs", "package", "scripts", "tests",
    }
    folders = {path.name for path in ROOT.iterdir() if path.is_dir() and not path.name.startswith((".", "_"))}
    assert {name for name in folders - others if not name.endswith(".egg-info")} == {*LIBRARY, *PROGRAM}
    expected = {
        ".".join((top, *path.parent.relative_to(ROOT).parts))
        for top, rooms in (("routedvit", LIBRARY), ("routedvit.program", PROGRAM))
        for room in rooms
        for path in (ROOT / room).rglob("*")
        if path.suffix in (".py", ".yaml", ".safetensors")
    }
    parts = (path for part in SCRIPTS.values() for path in (ROOT / "scripts" / part).rglob("*") if path.is_file())
    parts = {path.parent.relative_to(ROOT).parts for path in parts if path.suffix != ".pyc"}
    expected |= {".".join(("routedvit.program", *part)) for part in parts}
    assert set(tools["packages"]) - {"routedvit"} == expected
    modules = {path.stem for path in ROOT.glob("*.py")} - {"hubconf"}
    assert {name.rpartition(".")[2] for name in tools["py-modules"]} == modules | SCRIPTS.keys()


# --- installed --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A folder that holds the installed package and nothing else; the rest comes from this environment."""
    folder = tmp_path_factory.mktemp("package")
    # Of a copy: setuptools leaves what it builds beside the sources.
    for name in (*LIBRARY, *PROGRAM, "package", "scripts"):
        shutil.copytree(ROOT / name, folder / "source" / name, ignore=shutil.ignore_patterns("__pycache__"))
    for path in (*ROOT.glob("*.py"), ROOT / "pyproject.toml", ROOT / "README.md", ROOT / "LICENSE"):
        shutil.copy(path, folder / "source")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    built = [*pip, "wheel", "--no-deps", "--no-index", "--no-build-isolation", "-w", folder, folder / "source"]
    subprocess.run(built, check=True, capture_output=True)
    (wheel,) = folder.glob("routedvit-*.whl")
    installed = [*pip, "install", "--no-deps", "--no-index", "--target", folder / "site", wheel]
    subprocess.run(installed, check=True, capture_output=True)
    return folder / "site"


@pytest.fixture
def python(site, tmp_path):
    """Runs Python in a project that has `models`, `ops`, `utils` and `datasets` of its own."""
    project = tmp_path / "project"
    for name, content in {
        "models/__init__.py": "",
        "models/yolo.py": "class Detect:\n    pass\n",
        "ops/__init__.py": "OPS = 'theirs'\n",
        "utils.py": "UTILS = 'theirs'\n",
        "datasets.py": "DATASETS = 'theirs'\n",
    }.items():
        (project / name).parent.mkdir(parents=True, exist_ok=True)
        (project / name).write_text(content)
    environment = {**os.environ, "PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"}

    def run(*arguments):
        command = [sys.executable, *map(str, arguments)]
        return subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True)

    return run


def output_of(done):
    assert done.returncode == 0, done.stderr
    return done.stdout


THEIRS = """
import models, ops, utils, datasets
from models.yolo import Detect
"""
OURS = """
import routedvit, timm
from routedvit.ops import BiLevelRoutingAttention
from routedvit.models import collect_routing
"""
USE = """
import torch
assert (ops.OPS, utils.UTILS, datasets.DATASETS) == ("theirs",) * 3 and Detect.__module__ == "models.yolo"
model = timm.create_model("biformer_nano", num_classes=3).eval()
images = torch.randn(1, 3, 64, 64)
assert model(images).shape == (1, 3) and "stages.0.blocks.0.attn" in collect_routing(model, images)
assert isinstance(model.stages[0].blocks[0].attn, BiLevelRoutingAttention)
import routedvit.storage.weights
from models.yolo import Detect as again
assert again is Detect
print(type(model).__module__, routedvit.__file__)
"""


@pytest.mark.slow
@pytest.mark.parametrize("order", [THEIRS + OURS, OURS + THEIRS])
def test_in_a_project_with_names_like_ours(python, site, order):
    assert output_of(python("-c", order + USE)) == f"routedvit.models.biformer {site}/routedvit/__init__.py\n"


@pytest.mark.slow
def test_what_it_loads(python):
    """Nothing that timm does not load."""
    code = (
        "import sys, timm; before = {n.partition('.')[0] for n in sys.modules}; import routedvit;"
        "print(sorted({n.partition('.')[0] for n in sys.modules} - before - set(sys.stdlib_module_names)));"
        "print(sorted({'.'.join(n.split('.')[:2]) for n in sys.modules if n.startswith('routedvit.')}))"
    )
    ours = "['routedvit.models', 'routedvit.ops', 'routedvit.storage']"
    assert output_of(python("-c", code)) == f"['routedvit']\n{ours}\n"


SHIPPED = """
import socket, sys
def refuse(*arguments, **_):
    raise AssertionError("a connection was asked for")
socket.getaddrinfo = socket.socket.connect = refuse
import routedvit, timm, torch
from PIL import Image
for name in ("biformer_nano", "debiformer_nano"):
    model = timm.create_model(name, pretrained=True).eval()
    network, transform = routedvit.load(model.pretrained_cfg["file"])
    image = transform(Image.open(sys.argv[1]))[None]
    assert model(image).equal(network(image))
    label = model.pretrained_cfg["label_names"][model(image).argmax()]
    print(model.pretrained_cfg["label_descriptions"][label], model.pretrained_cfg["file"])
"""


@pytest.mark.slow
def test_the_shipped_weights_are_in_it_and_need_no_network(python, site):
    folder = site / "routedvit" / "weights"
    assert {path.name for path in folder.iterdir()} == {path.name for path in (ROOT / "weights").iterdir()}
    lines = [f"church {folder}/{name}_nano.safetensors\n" for name in ("biformer", "debiformer")]
    assert output_of(python("-c", SHIPPED, ROOT / "docs" / "church.jpg")) == "".join(lines)


@pytest.mark.slow
def test_its_scripts(python, tmp_path):
    photo, page = ROOT / "docs" / "church.jpg", tmp_path / "routes.html"
    assert f"{photo}: church " in output_of(python("-m", "routedvit", "predict", photo, "--num_workers", 0))
    done = python("-m", "routedvit", "view", photo, "--input_size", 64, "--output", page)
    output_of(done)
    assert "church.jpg: church " in done.stderr and page.read_text().startswith("<!DOCTYPE html>")
    assert output_of(python("-m", "routedvit", "view", "--help")).startswith("usage: ")
    assert python("-m", "routedvit", "view").returncode == 2
    for split in ("train", "val"):
        for name in ("one", "two"):
            (tmp_path / "photos" / split / name).mkdir(parents=True)
            shutil.copy(photo, tmp_path / "photos" / split / name)
    found = python("-m", "routedvit", "knn", "biformer_nano", "--data_path", tmp_path / "photos", "--input_size", 32,
                   "--k", 1, "--num_workers", 0, "--device", "cpu")
    assert "biformer_nano" in output_of(found)


@pytest.mark.slow
def test_evaluating_the_shipped_weights(python, tmp_path):
    (tmp_path / "photos" / "val" / "n03028079").mkdir(parents=True)
    shutil.copy(ROOT / "docs" / "church.jpg", tmp_path / "photos" / "val" / "n03028079")
    done = python("-m", "routedvit", "--model", "biformer_nano", "--eval", "--load_release", "--input_size", 160,
                  "--data_path", tmp_path / "photos", "--num_workers", 0, "--device", "cpu")
    assert "* Acc@1 100.000" in output_of(done) and "of 9 of the network's 10 classes" in done.stdout


@pytest.mark.long
def test_models_are_pickled(python, tmp_path):
    write = (
        "import pickle, sys, routedvit, timm, torch; torch.manual_seed(0)\n"
        "model = timm.create_model('debiformer_tiny', num_classes=3, depths=(1, 1, 1, 1)).eval()\n"
        "pickle.dump(model, open(sys.argv[1] + '/m.pickle', 'wb')); torch.save(model, sys.argv[1] + '/m.pt')\n"
        "print(model(torch.ones(1, 3, 64, 64)).tolist())"
    )
    read = (
        "import models.yolo, pickle, sys, torch\n"
        "for model in (pickle.load(open(sys.argv[1] + '/m.pickle', 'rb')),\n"
        "              torch.load(sys.argv[1] + '/m.pt', weights_only=False)):\n"
        "    print(model(torch.ones(1, 3, 64, 64)).tolist())"
    )
    written = output_of(python("-c", write, tmp_path))
    assert output_of(python("-c", read, tmp_path)) == 2 * written


# --- its commands -----------------------------------------------------------------------------------------------------

TINY = {
    "model": "biformer_nano", "data_set": "digits", "input_size": 32, "epochs": 1, "warmup_epochs": 0, "device": "cpu",
    "num_workers": 1,
}  # fmt: skip
FLAGS = [word for name, value in TINY.items() for word in (f"--{name}", value)]


@pytest.mark.slow
def test_training(python, tmp_path):
    assert "--drop_path" in output_of(python("-m", "routedvit", "--help"))
    done = python("-m", "routedvit", *FLAGS, "--output_dir", tmp_path / "run")
    assert "Acc@1" in output_of(done) and "Overwriting" not in done.stderr
    again = python("-m", "routedvit", *FLAGS, "--eval", "--resume", tmp_path / "run" / "best.pth")
    assert "of the network on 360 val images" in output_of(again)


@pytest.mark.slow
def test_a_segmenter_is_trained_and_loaded(python, tmp_path):
    """In a project that has `models` and `utils` of its own."""
    data = write_segments(tmp_path / "segments", train=4, val=2)
    flags = ["--task", "segmentation", "--model", "biformer_nano", "--head", "semantic_fpn", "--input_size", 32,
             "--short_side", 48, "--batch_size", 2, "--max_steps", 1, "--num_workers", 0, "--device", "cpu"]
    done = python("-m", "routedvit", *flags, "--data_path", data, "--output_dir", tmp_path / "run")
    assert "* mIoU " in output_of(done)
    code = (
        "import models.yolo, sys; from routedvit import segmentation; from PIL import Image\n"
        "network, transform = segmentation.load(sys.argv[1])\n"
        "print(network.classes, network(transform(Image.new('RGB', (96, 48)))[None]).shape[1:])"
    )
    assert output_of(python("-c", code, tmp_path / "run" / "last.pth")) == (
        "['red', 'green', 'blue'] torch.Size([3, 12, 24])\n"
    )


@pytest.mark.slow
def test_a_detector_is_trained_by_a_recipe_and_loaded(python, site, tmp_path):
    """The recipe is one of the package."""
    recipe = site / "routedvit/program/configs/detection/retinanet_biformer_small_1x.yaml"
    data = write_objects(tmp_path / "objects", train=2, val=1)
    flags = ["--task", "detection", "--config", recipe, "--model", "biformer_nano", "--fpn_channels", 16,
             "--short_side", 64, "--long_side", 96, "--warmup_steps", 0, "--max_steps", 1, "--num_workers", 0,
             "--device", "cpu"]
    done = python("-m", "routedvit", *flags, "--data_path", data, "--output_dir", tmp_path / "run")
    assert "* box_AP " in output_of(done)
    code = (
        "import models.yolo, sys; from routedvit import detection; from PIL import Image\n"
        "network, transform = detection.load(sys.argv[1])\n"
        "found, = network([transform(Image.new('RGB', (96, 48)))])\n"
        "print(network.classes, sorted(found), network.training)"
    )
    assert output_of(python("-c", code, tmp_path / "run" / "last.pth")) == (
        "['red', 'green', 'blue'] ['boxes', 'labels', 'scores'] False\n"
    )


@pytest.mark.slow
def test_a_detector_in_code_of_another_project(python):
    code = (
        "import models.yolo, torch; from routedvit import detection\n"
        "network = detection.mask_rcnn('biformer_nano', 2, channels=16, head_channels=32, short=64, long=96)\n"
        "target = dict(boxes=torch.tensor([[4., 4, 40, 40]]), labels=torch.tensor([2]), masks=torch.ones(1, 64, 96))\n"
        "print(sorted(network.train()([torch.rand(3, 64, 96)], [target])))"
    )
    expected = "['loss_box_reg', 'loss_classifier', 'loss_mask', 'loss_objectness', 'loss_rpn_box_reg']\n"
    assert output_of(python("-c", code)) == expected


@pytest.mark.slow
def test_training_described_by_overrides(python, site, tmp_path):
    overrides = [f"{name}={value}" for name, value in TINY.items()]
    done = python(site / "bin" / "routedvit-hydra", *overrides, f"output_dir={tmp_path / 'run'}")
    assert "Acc@1" in output_of(done) and (tmp_path / "run" / "last.pth").exists()


@pytest.mark.slow
@pytest.mark.parametrize("arguments, message", [
    (["--model", "biformer_nan"], "unknown model 'biformer_nan'; did you mean biformer_nano"),
    (["--epoch", "3"], "unknown flag --epoch; did you mean --epochs?"),
])  # fmt: skip
def test_mistakes_are_one_line(python, site, arguments, message):
    done = python(site / "bin" / "routedvit", "--data_set", "digits", *arguments)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and done.stderr.startswith(f"error: {message}")


@pytest.mark.slow
@pytest.mark.parametrize("command, module, extra", [("main", "tqdm", "train"), ("hydra", "submitit", "slurm")])
def test_a_missing_extra_is_named(python, command, module, extra):
    code = (
        "import importlib.util as util; find = util.find_spec\n"
        f"util.find_spec = lambda name, *rest: None if name == {module!r} else find(name, *rest)\n"
        f"from routedvit.__main__ import {command}; {command}()"
    )
    done = python("-c", code)
    expected = f"error: {module} not found; install what this needs: pip install 'routedvit[{extra}]'\n"
    assert (done.returncode, done.stderr) == (1, expected)
