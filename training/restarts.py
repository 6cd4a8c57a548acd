"""How often in a row a run was started, and asked to leave before it got any further: a scheduler would never stop."""
import json
from pathlib import Path

from utils import UserError, replace_file

# So many starts in a row, and the run does not ask for another.
MOST = 3


class NoProgressError(UserError):
    """The run was asked to leave several times in a row before it took a step."""


def count_starts(folder: Path, position: list[int]) -> int:
    """Count a start of a run that leaves where it was; returns how many in a row have left there.

    Args:
        folder: The run's.
        position: Where it is, in its epoch and step: a run that gets any further counts from 1 again.

    Raises:
        OSError: The count cannot be written.
    """
    file = folder / ".starts.json"
    try:
        last, starts = json.loads(file.read_text())
    except (FileNotFoundError, ValueError, TypeError):  # none, or not one of ours
        last, starts = None, 0
    starts = int(starts) + 1 if last == position else 1
    replace_file(file, lambda output: output.write(json.dumps([position, starts]).encode()))
    return starts
