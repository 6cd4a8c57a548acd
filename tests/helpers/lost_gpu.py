"""A plugin of pytest: no test runs in a process whose GPU is lost.

After an illegal access every further call of CUDA fails in the same process, so that later tests would all fail with
the one that is wrong.
"""
import os
import sys

import pytest
import torch

_FAILED = pytest.StashKey[bool]()
_CRASHED = pytest.StashKey[set]()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item):
    report = yield
    if report.failed:
        item.stash[_FAILED] = True
    return report


def _why_lost() -> str | None:
    """What CUDA says where nothing can be computed any more; a process that has not used it cannot have lost it."""
    if torch.cuda.is_initialized():
        try:
            torch.cuda.synchronize()
        except RuntimeError as error:
            return str(error)
    return None


# The innermost: what limits a test's time limits the wait for the GPU too.
@pytest.hookimpl(wrapper=True, trylast=True)
def pytest_runtest_protocol(item: pytest.Item):
    """Leave after the reports of a test that lost the GPU, which are sent by then; pytest-xdist starts a new worker."""
    result = yield
    reason = _why_lost() if item.stash.get(_FAILED, False) else None
    if reason is not None:
        message = f"{item.nodeid}: CUDA fails since this test, so no other can run in this process: {reason}"
        if not hasattr(item.config, "workerinput"):
            pytest.exit(message, returncode=pytest.ExitCode.TESTS_FAILED)
        print(message, file=sys.stderr, flush=True)
        os._exit(1)  # an orderly end would call CUDA, which may wait for ever
    return result


# What goes by files or modules (--dist loadfile) has a new worker begin with the test that ended the last.


@pytest.hookimpl(optionalhook=True)
def pytest_handlecrashitem(crashitem: str, sched):
    sched.config.stash.setdefault(_CRASHED, set()).add(crashitem)


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node):
    node.workerinput["crashed"] = sorted(node.config.stash.get(_CRASHED, ()))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item):
    if item.nodeid in getattr(item.config, "workerinput", {}).get("crashed", ()):
        pytest.skip("it has ended a worker before, and is reported as failed")
