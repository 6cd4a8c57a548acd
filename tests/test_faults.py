"""Five of the faults of `make test-faults`."""
import random
import signal

import pytest

from helpers.faults.campaign import FAULTS, SHORT, strike_all
from helpers.faults.kills import ask_to_leave
from helpers.faults.runs import Fault

pytestmark = [pytest.mark.slow, pytest.mark.distributed]


@pytest.mark.long
def test_five_faults_cost_nothing(tmp_path):
    chosen = [fault for topic in FAULTS.values() for fault in topic if fault.name in SHORT]
    campaign = strike_all(chosen, tmp_path, random.Random(0), say=print)
    assert campaign.failures == [] and campaign.lost == []
    assert campaign.tried.total() == campaign.survived.total() == 5


def test_three_processes_resume_exactly(tmp_path):
    """Sums over three processes depend on how gradients lie in DDP's buckets; over two they do not."""
    fault = Fault("SIGTERM", ask_to_leave(signal.SIGTERM), world_size=3)
    campaign = strike_all([fault, fault], tmp_path, random.Random(0), say=print)
    assert campaign.failures == [] and campaign.lost == [] and campaign.tried.total() == 2
