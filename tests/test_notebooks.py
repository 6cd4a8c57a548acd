"""The notebook runs from its first cell to its last, in a clone and with the package installed.

To store its pictures in it, which GitHub shows: jupyter execute --inplace notebooks/routing.ipynb
"""
import itertools
import json
import shutil
import sys

import pytest

from helpers import ROOT

NOTEBOOK = ROOT / "notebooks/routing.ipynb"
# Run behind the last cell. What is drawn is read at the middle of each region.
REPORT = """
import json
kept = [(panel.images[0].get_array() == pixels).all(-1)[16::32, 24::48] for panel in panels]
lit = [regions.ravel().nonzero()[0].tolist() for regions in kept]
routes = [
    routings[f"stages.{stage}.blocks.{block}.attn"].routes[0, 7 * ROW + COL].sort().values.tolist()
    for stage, block in ((0, 0), (1, 0), (2, 2))
]
print(json.dumps(dict(
    ops=ops.__name__, best=names[best.indices[0]], lit=lit, routes=routes, points=points.shape, starts=starts.shape,
    attended=attended.shape, crossed=crossed.shape, log=log, classes=tuned_names, probabilities=probabilities.tolist(),
)))
"""


@pytest.fixture
def clone(tmp_path):
    """The folder of the notebook in a clone: Jupyter starts it there."""
    (tmp_path / "clone").symlink_to(ROOT)
    return tmp_path / "clone/notebooks"


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """A folder with the notebook and a photograph, outside of any clone, where `routedvit` can be imported.

    pyproject.toml lays the package out in this way; tests/test_package.py builds and installs it, which takes longer.
    """
    package, folder = tmp_path / "site/routedvit", tmp_path / "mine/notebooks"
    package.mkdir(parents=True)
    folder.mkdir(parents=True)
    for path in (*(ROOT / "package").glob("*.py"), *(p for p in ROOT.iterdir() if p.is_dir() and p.name[0] != ".")):
        (package / path.name).symlink_to(path)
    (package / "program").symlink_to(ROOT)
    shutil.copy(ROOT / "docs/church.jpg", folder)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"))
    return folder


@pytest.fixture
def execute(tmp_path, monkeypatch):
    """Executes the notebook in a folder by this Python, whatever kernels are installed; returns what it found."""
    nbclient, nbformat = (pytest.importorskip(name) for name in ("nbclient", "nbformat"))
    pytest.importorskip("ipykernel")
    argv = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    kernel = tmp_path / "jupyter/kernels/python3/kernel.json"
    kernel.parent.mkdir(parents=True)
    kernel.write_text(json.dumps(dict(argv=argv, display_name="Python 3", language="python")))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "jupyter"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("TMPDIR", str(tmp_path))  # where the notebook writes

    def run(folder):
        notebook = nbformat.read(NOTEBOOK, as_version=4)
        notebook.cells.append(nbformat.v4.new_code_cell(REPORT))
        resources = dict(metadata=dict(path=str(folder)))
        nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3", resources=resources).execute()
        codes = [cell for cell in notebook.cells if cell.cell_type == "code"]
        assert [cell.execution_count for cell in codes] == list(range(1, len(codes) + 1))
        pictures = [output for cell in codes for output in cell.outputs if "image/jpeg" in output.get("data", {})]
        assert len(pictures) == 2
        return json.loads(codes[-1].outputs[0].text)

    return run


@pytest.mark.long
@pytest.mark.parametrize("place,ops", [("clone", "ops"), ("installed", "routedvit.ops")])
def test_the_notebook_runs(request, execute, place, ops):
    found = execute(request.getfixturevalue(place))
    assert found["ops"] == ops
    assert found["best"].startswith("church")
    assert found["lit"] == found["routes"] and [len(routes) for routes in found["routes"]] == [1, 4, 16]
    assert found["points"] == [1, 4, *found["starts"]]
    assert found["attended"] == [1, 50, 61, 64] and found["crossed"] == [1, 20, 30, 2, 32]
    accuracies = [float(line.split()[2]) for line in found["log"] if line.startswith("* Acc@1")]
    assert len(accuracies) == 3 and accuracies[-1] > 80, found["log"]
    assert found["classes"] == ["church", "flower", "temple"]
    assert max(found["probabilities"]) == found["probabilities"][0]


def test_what_is_stored_is_small_and_without_errors():
    assert NOTEBOOK.stat().st_size < 300_000
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    codes = [cell for cell in cells if cell["cell_type"] == "code"]
    assert len(codes) == 10
    for cell in codes:
        assert not any(output["output_type"] == "error" for output in cell["outputs"])
    for before, cell in itertools.pairwise(cells):
        assert cell["cell_type"] == "markdown" or before["cell_type"] == "markdown"
