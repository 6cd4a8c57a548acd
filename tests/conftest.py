"""What every test may use; Triton's interpreter, for machines without a GPU; and which networks are slow."""
import os

import pytest
import torch

from helpers import costs
from helpers.photos import write_photos

pytest_plugins = ["helpers.lost_gpu"]

# It must be chosen before Triton is imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(scope="session")
def photos(tmp_path_factory):
    """A folder of 13 training and 7 validation images of three classes, each of a colour; only to be read."""
    return write_photos(tmp_path_factory.mktemp("photos"), train=13, val=7)


# All published networks but the smallest of each family; of BiFormer that is biformer_nano, which was not published.
LARGE = costs.ALL.keys() - {"bvit_5m", "debiformer_tiny", "vitae_tiny", "vitaev2_s"}
# In the tests of timm's contract, which take every network: two networks, of as many kinds, stand for all.
LARGE_FOR_CONTRACT = costs.ALL.keys() - {"bvit_5m", "vitae_tiny"}


def takes_network(item: pytest.Item, names: set[str]) -> bool:
    """Whether a parameter of a test is one of these networks, or its weights (NAME_TAG)."""
    values = item.callspec.params.values() if hasattr(item, "callspec") else ()
    prefixes = tuple(f"{name}_" for name in names)
    return any(isinstance(value, str) and (value in names or value.startswith(prefixes)) for value in values)


@pytest.hookimpl(tryfirst=True)  # before -m selects
def pytest_collection_modifyitems(items: list[pytest.Item]):
    """Mark the tests of large networks as slow: each has the same code as the smallest of its family.

    Those of Slurm, which take minutes in one file, come first: nothing would run beside them in the end.
    """
    items.sort(key=lambda item: item.get_closest_marker("slurm") is None)
    for item in items:
        if takes_network(item, LARGE_FOR_CONTRACT if item.path.name == "test_models.py" else LARGE):
            item.add_marker(pytest.mark.slow)
