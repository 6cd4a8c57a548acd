"""What `choose_impl` takes on the CPU, beside every implementation and dense attention, on shapes drawn from a grid."""
import random
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from itertools import product
from statistics import median, quantiles

import torch

from ops import IMPLS, choose_impl, route_regions

from .attention import BACKWARD, DENSE, FORWARD, PRODUCTS, REFERENCE, AttentionCase, build
from .timing import Trial, interleave, warm_up

SIDES = (7, 10, 14, 20, 28, 40, 56, 80, 112, 160, 200)
REGIONS = (4, 7, 8, 16)
SHARES = (0.0, 0.02, 0.08, 0.15, 0.33, 0.5, 1.0)  # of all regions that each is routed to, one at the least
HEADS = (1, 2, 4, 8, 16)
BATCHES = (1, 8, 64)
DTYPES = (torch.float32, torch.bfloat16)
CONTENDERS = (*(impl for impl in IMPLS if impl != "triton"), DENSE)
# Shapes that take longer than about 0.1 s, or of which `gather` copies more, are left out.
MOST_OPERATIONS, MOST_BYTES = 1e10, 2**28
SECONDS_OF_SHAPE = 0.8
SLOWER = 1.05  # what counts as slower
KINDS = tuple(product((1, 2), DTYPES, (FORWARD, BACKWARD)))  # threads, type, mode


def shapes(dtype: torch.dtype, mode: str, seed: int = 0) -> Iterator[AttentionCase]:
    """Shapes drawn from the grid, the same ones every time, without end."""
    draw = random.Random(seed)
    while True:
        side, regions = draw.choice(SIDES), draw.choice(REGIONS)
        case = AttentionCase(
            "grid", draw.choice(BATCHES), side, side, draw.choice(HEADS), regions, 1, mode, CONTENDERS, dtype=dtype
        )
        num_regions = case.grid.num_regions
        case = replace(case, topk=max(1, round(draw.choice(SHARES) * num_regions)))
        tokens = case.batch * case.heads * side**2
        operations = 2 * PRODUCTS[mode] * tokens * side**2 * case.head_dim
        copies = 2 * case.map_bytes * case.topk
        logits = tokens * case.topk * case.grid.tokens_per_region * dtype.itemsize
        if operations <= MOST_OPERATIONS and copies + 2 * logits <= MOST_BYTES:
            yield case


def measure_shape(case: AttentionCase, device: torch.device) -> dict:
    """A row: milliseconds of each contender, which one `auto` is, and how much slower than the best and than dense."""
    sets = case.inputs(device)
    routing = route_regions(*sets[0][:2], case.grid, case.grid, case.topk)
    calls = {name: build(name, case, sets, routing.routes) for name in case.contenders}
    for call in calls.values():
        warm_up(call, device)
    seconds = interleave(calls, Trial(device, 5, 25, deadline=time.time() + SECONDS_OF_SHAPE))
    milliseconds = {name: 1e3 * median(values) for name, values in seconds.items()}
    auto = choose_impl(sets[0][0], routing)
    best = min((name for name in milliseconds if name != DENSE), key=milliseconds.get)
    return dict(
        case=case.describe(), side=case.height, regions=case.regions, topk=case.topk, heads=case.heads,
        batch=case.batch, mode=case.mode, dtype=str(case.dtype).removeprefix("torch."), auto=auto, best=best,
        milliseconds=milliseconds, of_best=milliseconds[auto] / milliseconds[best],
        of_dense=milliseconds[auto] / milliseconds[DENSE], of_gather=milliseconds[auto] / milliseconds[REFERENCE],
        everything_routed=case.topk == case.grid.num_regions,
    )


def measure(threads: int, dtype: torch.dtype, mode: str, trial: Trial) -> list[dict]:
    """Rows of as many shapes as fit before the trial's deadline."""
    before, rows = torch.get_num_threads(), []
    torch.set_num_threads(threads)
    try:
        for case in shapes(dtype, mode):
            if time.time() > trial.deadline:
                break
            rows.append(dict(threads=threads, **measure_shape(case, trial.device)))
    finally:
        torch.set_num_threads(before)
    return rows


def summary(rows: list[dict]) -> list[dict]:
    """A row for each number of threads, type and mode, and one for the chosen implementation against each reference."""
    found = []
    for threads, dtype, mode in dict.fromkeys((row["threads"], row["dtype"], row["mode"]) for row in rows):
        group = [row for row in rows if (row["threads"], row["dtype"], row["mode"]) == (threads, dtype, mode)]
        for reference in ("best", DENSE, REFERENCE):
            ratios = [row[f"of_{reference}"] for row in group]
            deciles = quantiles(ratios, n=10, method="inclusive") if len(ratios) > 1 else ratios
            found.append(dict(
                threads=threads, dtype=dtype, mode=mode, reference=reference, shapes=len(ratios),
                slower=sum(ratio > SLOWER for ratio in ratios) / len(ratios), median=median(ratios),
                decile=deciles[-1], worst=max(ratios),
            ))
    return found


def cases() -> list[tuple[str, partial]]:
    """(name, measure) of each kind of call."""
    return [
        (f"{threads} threads, {dtype}, {mode}", partial(measure, threads, dtype, mode))
        for threads, dtype, mode in KINDS
    ]
