"""Five of the faults of `make test-faults`."""
import random

import faults


def test_five_faults_cost_nothing(tmp_path):
    chosen = [fault for fault in faults.FAULTS if fault.name in faults.SHORT]
    campaign = faults.strike_all(chosen, tmp_path, random.Random(0), say=print)
    assert campaign.failures == [] and campaign.lost == []
    assert campaign.tried.total() == campaign.survived.total() == 5
