"""What this machine can do at most: the two numbers that floors are made of."""
from dataclasses import dataclass

import torch

from .timing import interleave, quartiles, warm
from .trial import Trial


@dataclass(frozen=True)
class Ceilings:
    """How to measure them.

    Args:
        copy_bytes: Size of the buffer copied; several times the cache.
        side: Of the square matrices multiplied.
        dtype: Of the matrices.
    """
    copy_bytes: int
    side: int
    dtype: torch.dtype


def measure(how: Ceilings, trial: Trial) -> list[dict]:
    """One row: bytes read plus bytes written a second, and operations (two for a multiply-add) a second."""
    source = torch.randn(how.copy_bytes // 4, device=trial.device)
    target = torch.empty_like(source)
    # Random data: a product of zeros runs faster than any real one.
    a, b = (torch.randn(how.side, how.side, device=trial.device).to(how.dtype) for _ in range(2))
    runs = {"copy": lambda: target.copy_(source), "product": lambda: a @ b}
    for run in runs.values():
        warm(run, trial.device)
    seconds = interleave(runs, trial)
    for name in runs:
        if name not in seconds:
            raise RuntimeError(f"{name}: {trial.failures[name]}")
    amounts = dict(copy=2 * how.copy_bytes, product=2 * how.side**3)
    low, high = {}, {}
    for name, samples in seconds.items():
        low[name], high[name] = quartiles([amounts[name] / s for s in samples])
    median = {name: amounts[name] / sorted(samples)[len(samples) // 2] for name, samples in seconds.items()}
    return [
        dict(
            bytes_per_second=median["copy"],
            bytes_quartiles=[low["copy"], high["copy"]],
            operations_per_second=median["product"],
            operations_quartiles=[low["product"], high["product"]],
            copy_mib=how.copy_bytes / 2**20,
            product=f"{how.side} x {how.side} x {how.side} {str(how.dtype).removeprefix('torch.')}",
        )
    ]


def floor_milliseconds(row: dict, ceilings: dict) -> float:
    """The least time for a row's `bytes` and `operations`: no version runs much faster."""
    at_copy_speed = row["bytes"] / ceilings["bytes_per_second"]
    at_product_speed = row["operations"] / ceilings["operations_per_second"]
    return 1e3 * max(at_copy_speed, at_product_speed)
