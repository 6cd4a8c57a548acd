"""A package that is not installed, told in one line with what installs it."""
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FILES = ("requirements.txt", "requirements-slurm.txt", "requirements-dev.txt")
# What pip calls a package that is imported under another name.
DISTRIBUTIONS = {"PIL": "pillow", "hydra": "hydra-core", "sklearn": "scikit-learn", "yaml": "pyyaml"}


def missing_package(error: BaseException, root: Path = ROOT, prefix: str = sys.prefix) -> str | None:
    """What is missing, and what installs it; None where the error is not of a package that `root` requires.

    Args:
        error: What was raised.
        root: The repository.
        prefix: The environment of this Python.
    """
    if not isinstance(error, ModuleNotFoundError) or error.name is None:
        return None
    module = error.name.partition(".")[0]
    distribution = DISTRIBUTIONS.get(module, module)
    file = next((name for name in FILES if distribution in _listed(root / name)), None)
    if file is None:
        return None
    environment = root / ".venv"
    if (environment / "bin" / "python").exists() and Path(prefix).resolve() != environment.resolve():
        return f"{distribution} is not installed in this Python; it may be in {environment}: . .venv/bin/activate"
    return f"{distribution} is not installed: {sys.executable} -m pip install -r {root / file}"


def _listed(file: Path) -> set[str]:
    """The distributions in a requirements file; none where there is no such file, as in an installed package."""
    lines = file.read_text().splitlines() if file.is_file() else []
    return {match.group() for line in lines if (match := re.match(r"[\w-]+(?=[>=\s]|$)", line))}
