"""How the threads of a computation on the CPU wait for one another; said before torch, whose OpenMP reads it once.

Between two operations, and at the end of each, threads wait for one another. GNU's OpenMP, which torch's wheels come
with, lets them spin for several milliseconds before they sleep. Where other programs use the cores, the thread that is
waited for has often been taken off its core, and the one that spins keeps it from that core. A training step has a
thousand such waits. Whoever spins no longer than a thread takes to sleep and to wake loses little on cores of its own,
and gives way on cores that it shares.

The number of threads stays: the last digits of a result depend on it, but not on how they wait.
"""
import os
from collections.abc import MutableMapping

# About 0.1 ms, two or three times what it takes to wake a thread.
SPINS = 5000


def limit_spinning(environment: MutableMapping[str, str] = os.environ) -> bool:
    """Limit how long threads spin, unless the environment says how they wait, or that there is one thread alone.

    Returns:
        Whether the environment was changed.
    """
    says = "GOMP_SPINCOUNT" in environment or "OMP_WAIT_POLICY" in environment
    if says or environment.get("OMP_NUM_THREADS") == "1":
        return False
    environment["GOMP_SPINCOUNT"] = str(SPINS)
    return True
