"""Five of the faults of `make test-faults`."""
import random
import signal

import pytest

from helpers import faults

pytestmark = [pytest.mark.slow, pytest.mark.distributed]


def test_five_faults_cost_nothing(tmp_path):
    chosen = [fault for fault in faults.FAULTS if fault.name in faults.SHORT]
    campaign = faults.strike_all(chosen, tmp_path, random.Random(0), say=print)
    assert campaign.failures == [] and campaign.lost == []
    assert campaign.tried.total() == campaign.survived.total() == 5


def test_three_processes_resume_exactly(tmp_path):
    """Sums over three processes depend on how gradients lie in DDP's buckets; over two they do not."""
    fault = faults.Fault("SIGTERM", faults._ask_to_leave(signal.SIGTERM), world_size=3)
    campaign = faults.strike_all([fault, fault], tmp_path, random.Random(0), say=print)
    assert campaign.failures == [] and campaign.lost == [] and campaign.tried.total() == 2
