"""What every test may use; and Triton's interpreter, for machines without a GPU."""
import os

import pytest
import torch

from helpers.photos import write_photos

# It must be chosen before Triton is imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(scope="session")
def photos(tmp_path_factory):
    """A folder of 13 training and 7 validation images of three classes, each of a colour; only to be read."""
    return write_photos(tmp_path_factory.mktemp("photos"), train=13, val=7)
