"""The commands `routedvit` (also `python -m routedvit`) and `routedvit-hydra`: main.py and hydra_main.py, installed.

`routedvit view` is scripts/visualize.py, and `routedvit predict`, `export` and `knn` are the scripts of these names.

They import one another, the tasks, the models and the operations under their names in the repository. An installed copy
has the folders that hold them on the search path of these commands alone: `import routedvit` leaves `models`, `utils`
and the like to others.
"""
import importlib.util
import os
import runpy
import sys
from pathlib import Path

# What the commands import beside the requirements of the bare package. Where it is missing, an extra was not installed.
_TRAIN = ("PIL", "numpy", "torchvision", "tqdm", "yaml")
_SCRIPTS = dict(
    view="scripts/visualize.py", predict="scripts/predict.py", export="scripts/export.py", knn="scripts/knn.py",
)
_SLURM = (*_TRAIN, "hydra", "omegaconf", "submitit")


def _folders() -> list[str]:
    """The folders that hold main.py and what it imports; of an editable install, the repository."""
    package = Path(__file__).absolute().parent
    program = package / "program"
    return [str(program), str(package)] if program.is_dir() else [str(package.parent)]


def _share_modules():
    """Give the modules that `import routedvit` has imported their names in the repository."""
    for name, module in list(sys.modules.items()):
        if name.startswith(("routedvit.models", "routedvit.ops", "routedvit.storage")):
            sys.modules[name.removeprefix("routedvit.")] = module


def _run(script: str, extra: str, modules: tuple[str, ...]):
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        sys.exit(f"error: {', '.join(missing)} not found; install what this needs: pip install 'routedvit[{extra}]'")
    folders = _folders()
    sys.path[:0] = folders
    # For the jobs that hydra_main.py submits.
    os.environ["PYTHONPATH"] = os.pathsep.join([*folders, *filter(None, [os.environ.get("PYTHONPATH")])])
    _share_modules()
    runpy.run_path(str(Path(folders[0], script)), run_name="__main__")


def main():
    """Run main.py, or the script that the first argument names, with the command line; exits with its exit code."""
    script = _SCRIPTS.get(sys.argv[1]) if len(sys.argv) > 1 else None
    if script is not None:
        sys.argv[:2] = [f"{sys.argv[0]} {sys.argv[1]}"]  # as its help names it
    _run(script or "main.py", "train", _TRAIN)


def hydra():
    """Run hydra_main.py with the command line of this process; exits with its exit code."""
    _run("hydra_main.py", "slurm", _SLURM)


if __name__ == "__main__":
    main()
