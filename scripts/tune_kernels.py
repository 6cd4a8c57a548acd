"""Time the fused kernels on this GPU with other tiles, warps and stages than `ops` chooses, by list and dense.

    python scripts/tune_kernels.py --batch_size 128 --map "28 x 28, top-4" --dtype bf16 --budget 200 --output tiles.json

Each kernel runs alone, many times in a CUDA graph, so that no time of the host is measured. One or two settings of its
tile change, to half and to twice, and the graphs of all tiles take turns. A tile is timed once its results agree with
those of the tile that `ops` chooses. Prints the time with the chosen tile, and for every other one how many times as
fast it is, with quartiles over the rounds: what exceeds 1 by more than "chosen, again" does is what
`ops/impl/triton/tuning.py` should choose on this GPU. All tiles are compiled before, by several processes.
"""
import argparse
import itertools
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import training.startup  # before torch  # noqa: F401  # isort: skip
import torch
import triton

from ops import route_regions
from ops.impl.triton import op
from ops.impl.triton.tuning import MAX_BITS, Tile, choose_one_pass_tile, fits_one_pass, is_dense, make_plan
from scripts.bench.timing import machine, quartiles
from scripts.compile_kernels import DTYPES, MAPS
from utils import user_path

KERNELS = ("forward", "queries", "keys", "one pass")
LIMITS = Tile(block_m=(16, 128), block_n=(16, 128), num_warps=(1, 8), num_stages=(1, 3))
AGAIN = "chosen, again"
SAMPLE_SECONDS = 0.002  # of one replay of a graph, at most: a launch outside of it, by which this is judged, is slower
LAUNCHES = (3, 20)  # in one graph
LATEST_TO_COMPILE = 0.6  # of the budget


def neighbours(tile: Tile) -> list[Tile]:
    """The tiles that differ in one setting by a factor of two (stages: by one), and those with twice or half the warps
    for twice or half the tokens; each of them also with one stage and with two."""
    if tile.block_m > LIMITS.block_m[1]:  # a whole map, of which a smaller tile would be a part
        choices = itertools.product((16, 32, 64), (4, 8), (1, 2))
        return sorted({Tile(tile.block_m, *choice) for choice in choices} - {tile})
    tiles = {tile}
    for name, (low, high) in LIMITS._asdict().items():
        value = getattr(tile, name)
        others = (value - 1, value + 1) if name == "num_stages" else (value // 2, value * 2)
        tiles |= {tile._replace(**{name: other}) for other in others if low <= other <= high}
    for tokens, warps in ((tile.block_m // 2, tile.num_warps // 2), (tile.block_m * 2, tile.num_warps * 2)):
        if LIMITS.block_m[0] <= tokens <= LIMITS.block_m[1] and warps in (1, 2, 4, 8):
            tiles.add(tile._replace(block_m=tokens, num_warps=warps))
    tiles |= {other._replace(num_stages=stages) for other in tiles for stages in (1, 2)}
    return sorted(tiles - {tile})


class Case(NamedTuple):
    """One of `MAPS`, by list or dense, and the settings that all cases share."""
    map: str
    dense: bool
    heads: int
    head_dim: int
    dtype: str
    device: str

    def chosen(self, kernel: str) -> Tile:
        """The tile that `ops` chooses."""
        grid, topk = MAPS[self.map]
        if kernel == "one pass":
            return choose_one_pass_tile(grid.height * grid.width, self.head_dim)
        return make_plan(grid, grid, topk, kernel == "keys", self.dense, self.head_dim, DTYPES[self.dtype]).tile

    def kernels(self, names: list[str]) -> list[str]:
        """Those of the kernels that can run: all gradients in one pass only of a small map."""
        grid, _ = MAPS[self.map]
        one_pass = self.dense and fits_one_pass(grid, grid, self.head_dim, DTYPES[self.dtype])
        return [name for name in names if name != "one pass" or one_pass]

    def __str__(self) -> str:
        grid, topk = MAPS[self.map]
        chosen = ", chosen" if is_dense(grid, grid, topk) == self.dense else ""
        return f"{self.map} ({'dense' if self.dense else 'by list'}{chosen})"


class Bench:
    """The kernels on one batch, each to be launched alone with any tile."""

    def __init__(self, case: Case, batch_size: int):
        grid, topk = MAPS[case.map]
        torch.manual_seed(0)
        shape = (batch_size, grid.height, grid.width, 3, case.heads, case.head_dim)
        maps = torch.randn(shape, device=case.device, dtype=DTYPES[case.dtype]).unbind(3)
        routing = route_regions(*maps[:2], grid, grid, topk)
        routes, bits = op.route_bits(routing) if case.dense else (routing.routes, None)
        settings = ([grid.rows, grid.cols], [grid.rows, grid.cols], case.head_dim**-0.5)
        self.problem = op.make_problem(*maps, routes, bits, *settings)
        out, lse = op.forward(*maps, routes, bits, *settings)
        grad_out, delta = torch.randn_like(out), torch.empty_like(lse)
        grads = [torch.empty_like(out) for _ in maps]
        inverse = op.inverse_of(self.problem)
        self._launches = {
            "forward": (op.launch_forward, (out, lse)),
            "queries": (op.launch_query_gradient, (out, grad_out, lse, delta, grads[0])),
            "keys": (op.launch_key_value_gradient, (inverse, grad_out, lse, delta, grads[1:])),
            "one pass": (op.launch_one_pass_gradients, (out, grad_out, lse, grads)),
        }
        self._results = {"forward": (out, lse), "queries": (delta, grads[0]), "keys": grads[1:], "one pass": grads}
        self.launch("queries")  # the keys read delta

    def launch(self, kernel: str, tile: Tile | None = None):
        function, arguments = self._launches[kernel]
        function(self.problem, *arguments, tile=tile)

    def results(self, kernel: str, tile: Tile | None = None) -> list[torch.Tensor]:
        """Copies of what a kernel writes; what it does not write would be NaN."""
        for x in self._results[kernel]:
            x.fill_(float("nan"))
        self.launch(kernel, tile)
        return [x.clone() for x in self._results[kernel]]


def compile_all(case: Case, kernel: str, tiles: list[Tile]):
    """Leave the kernels with these tiles in Triton's cache: launch each on one image."""
    bench = Bench(case, 1)
    for tile in tiles:
        try:
            bench.launch(kernel, tile)
        except Exception:  # the reason is seen where it is timed
            continue


def groups_of(cases: list[Case], kernels: list[str]) -> list[tuple[Case, str]]:
    """Every case with each of the kernels that can run there."""
    return [(case, kernel) for case in cases for kernel in case.kernels(kernels)]


def compile_in_parallel(cases: list[Case], kernels: list[str], jobs: int, deadline: float):
    """Compile every tile of every case in processes of their own, which end at the deadline at the latest."""
    with multiprocessing.get_context("spawn").Pool(jobs) as pool:
        work = []
        for case, kernel in groups_of(cases, kernels):
            tiles = neighbours(case.chosen(kernel))
            work += [pool.apply_async(compile_all, (case, kernel, tiles[i : i + 4])) for i in range(0, len(tiles), 4)]
        while not all(group.ready() for group in work) and time.time() < deadline:
            time.sleep(0.1)
        print(f"{sum(group.ready() for group in work)} of {len(work)} groups of tiles compiled", flush=True)


def disagreement(results: list[torch.Tensor], expected: list[torch.Tensor], dtype: torch.dtype) -> str | None:
    """How results differ by more than rounding, which depends on the tile."""
    for ours, theirs in zip(results, expected, strict=True):
        known = theirs.isfinite()
        if not ours[known].isfinite().all():
            return "wrong: not finite"
        error = (ours[known].double() - theirs[known].double()).abs().max().item()
        # Sums in float32 are added in another order; their results, or what is multiplied next, are rounded.
        allowed = (64 if dtype == torch.float32 else 4) * torch.finfo(dtype).eps * theirs[known].abs().max().item()
        if error > allowed:
            return f"wrong: off by {error:.2g}, {allowed:.2g} allowed"
    return None


def on_device(launch: Callable, device: str) -> Callable[[], float]:
    """A function that returns the seconds of one launch: on a GPU the mean over a graph of many.

    Must be compiled. What it returns is called again and again.
    """
    if device != "cuda":

        def once() -> float:
            start = time.perf_counter()
            launch()
            return time.perf_counter() - start

        return once

    def seconds(run: Callable) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3

    seconds(launch)
    launches = min(max(round(SAMPLE_SECONDS / seconds(launch)), LAUNCHES[0]), LAUNCHES[1])
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    # Not in `torch.cuda.graph`: it collects garbage each time, which takes longer than all that is timed.
    with torch.cuda.stream(torch.cuda.Stream()):
        graph.capture_begin()
        try:
            for _ in range(launches):
                launch()
        finally:
            graph.capture_end()
    torch.cuda.synchronize()
    seconds(graph.replay)
    return lambda: seconds(graph.replay) / launches


def prepare(bench: Bench, kernel: str, case: Case, deadline: float) -> tuple[dict[str, Callable], dict[str, str]]:
    """Timers of all tiles that compute what the chosen one does, and why there is none of the others."""
    expected = bench.results(kernel)
    timers, failures = {}, {}
    chosen = case.chosen(kernel)
    for tile in [chosen, *neighbours(chosen)]:
        name = str(tuple(tile))
        if time.time() > deadline:
            failures[name] = "no time"
            continue
        try:
            wrong = disagreement(bench.results(kernel, tile), expected, bench.problem.query.dtype)
            if wrong:
                failures[name] = wrong
            else:
                timers[name] = on_device(lambda tile=tile: bench.launch(kernel, tile), case.device)
        except Exception as error:  # does not compile, or takes more shared memory than there is
            failures[name] = f"{type(error).__name__}: {error}".splitlines()[0][:120]
    bench.launch(kernel)  # others read what it writes
    return timers, failures


def tune(bench: Bench, kernel: str, case: Case, rounds: int, deadline: float) -> dict:
    """Time a kernel with all tiles, in turns; the chosen one first and last in each round."""
    timers, failures = prepare(bench, kernel, case, deadline)
    chosen = str(tuple(case.chosen(kernel)))
    row = dict(map=case.map, way=str(case), kernel=kernel, chosen=chosen, failed=failures)
    if chosen not in timers:
        return row
    turns = {**timers, AGAIN: timers[chosen]}
    seconds = {name: [] for name in turns}
    for turn in range(rounds):
        if turn >= 2 and time.time() > deadline:
            break
        for name, timer in turns.items():
            seconds[name].append(timer())
    ratios = {name: [a / b for a, b in zip(seconds[chosen], seconds[name], strict=True)] for name in turns}
    row.update(
        milliseconds=1e3 * median(seconds[chosen]), quartiles=[1e3 * q for q in quartiles(seconds[chosen])],
        rounds=len(seconds[chosen]),
        tiles={n: dict(milliseconds=1e3 * median(seconds[n]), ratio=median(r), quartiles=quartiles(r))
               for n, r in ratios.items() if n != chosen},
    )  # fmt: skip
    return row


def report(row: dict):
    if "tiles" not in row:
        print(f"{row['way']}, {row['kernel']}: not timed, {row['failed'].get(row['chosen'])}", flush=True)
        return
    low, high = row["quartiles"]
    print(f"{row['way']}, {row['kernel']}: {row['milliseconds']:.4f} ms ({low:.4f} to {high:.4f}) with {row['chosen']}")
    for name, tile in sorted(row["tiles"].items(), key=lambda item: -item[1]["ratio"]):
        low, high = tile["quartiles"]
        print(f"    {tile['ratio']:.2f} x as fast ({low:.2f} to {high:.2f}) with {name}")
    for name, reason in row["failed"].items():
        print(f"    {name}: {reason}")
    sys.stdout.flush()


def cases_of(args: argparse.Namespace) -> list[Case]:
    """Every map in the way that `ops` chooses, then in the other one where it is possible."""
    chosen = {name: is_dense(grid, grid, topk) for name, (grid, topk) in MAPS.items()}
    pairs = [(name, chosen[name]) for name in args.map]
    pairs += [(name, not dense) for name, dense in pairs if dense or MAPS[name][0].num_regions <= MAX_BITS]
    return [Case(*pair, args.heads, args.head_dim, args.dtype, args.device) for pair in pairs]


def main(argv: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--map", nargs="+", choices=MAPS, default=list(MAPS)[:3])
    parser.add_argument("--kernel", nargs="+", choices=KERNELS, default=list(KERNELS))
    parser.add_argument("--batch_size", type=int, default=128)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--head_dim", type=int, default=32)
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--budget", type=float, default=float("inf"), help="seconds; what does not fit is left out")
    parser.add_argument("--jobs", type=int, default=min(16, os.cpu_count() or 1), help="processes that compile, or 0")
    parser.add_argument("--output", type=user_path, help="also write the times here, as JSON")
    parser.add_argument("--device", default="cuda", help="cpu: in Triton's interpreter, to try the script")
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no GPU to measure on")
    start = time.time()
    cases = cases_of(args)
    if args.jobs:
        compile_in_parallel(cases, args.kernel, args.jobs, start + LATEST_TO_COMPILE * args.budget)
    settings = dict(batch_size=args.batch_size, heads=args.heads, head_dim=args.head_dim, dtype=args.dtype)
    record = dict(**machine(torch.device(args.device)), triton=triton.__version__, settings=settings, rows=[])
    groups = groups_of(cases, args.kernel)
    for i, (case, kernel) in enumerate(groups):
        # Each takes its share of the time that is left.
        now = time.time()
        deadline = now + (start + args.budget - now) / (len(groups) - i)
        if now >= start + args.budget:
            print(f"{case}, {kernel}: left out for lack of time", flush=True)
            continue
        if i == 0 or groups[i - 1][0] != case:
            bench = Bench(case, args.batch_size)
        record["rows"].append(tune(bench, kernel, case, args.rounds, deadline))
        report(record["rows"][-1])
        if args.output:
            args.output.write_text(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
