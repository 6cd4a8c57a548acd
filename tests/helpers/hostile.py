"""What an attacker puts into a pickle, in a harmless form."""
import os
from pathlib import Path


class Hostile:
    """Unpickling it makes a folder at `path`."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)
