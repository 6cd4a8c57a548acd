"""Tasks for the tests of scripts/bench/session.py: light to import, since a fresh process does so."""
import os
import time


def measure(case, trial):
    """One row for each contender in `case`; "dies" ends the process, "hangs" answers no more, "raises" raises."""
    for name in case:
        if name in trial.failures:
            continue
        trial.announce(name)
        if name == "dies":
            os._exit(3)
        if name == "hangs":
            time.sleep(600)
        if name == "breaks the task":
            raise ValueError("no such case")
        with trial.guard(name):
            if name == "raises":
                raise RuntimeError("no such kernel")
    return [dict(name=name, failed=trial.failures.get(name)) for name in case]
