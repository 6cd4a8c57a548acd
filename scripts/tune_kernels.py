"""Time the fused kernels on this GPU with other tiles, warps and stages than `ops` chooses, by list and dense.

    python scripts/tune_kernels.py --batch_size 128 --map "28 x 28, top-4" --dtype bf16

One setting of one kernel changes at a time, to half and to twice, while the other kernels keep their plan. Prints the
time of each pass, and for every change how many times as fast it makes the pass: what exceeds 1 by more than the spread
is what `ops/impl/triton/tuning.py` should choose on this GPU.
"""
import argparse
import sys
from pathlib import Path

import torch
import triton

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from ops import RegionGrid, route_regions
from ops.impl.triton import op
from ops.impl.triton.tuning import MAX_BITS, Tile, is_dense, make_plan
from scripts.compile_kernels import DTYPES, MAPS

DEVICE = "cuda"
LIMITS = Tile(block_m=(16, 128), block_n=(16, 128), num_warps=(1, 8), num_stages=(1, 4))


def neighbours(tile: Tile) -> list[Tile]:
    """The tiles that differ in one setting, by a factor of two (stages: by one)."""
    tiles = []
    for name, (low, high) in LIMITS._asdict().items():
        value = getattr(tile, name)
        others = (value - 1, value + 1) if name == "num_stages" else (value // 2, value * 2)
        tiles += [tile._replace(**{name: other}) for other in others if low <= other <= high]
    return tiles


def with_tile(inverse: bool, tile: Tile | None):
    """A `make_plan` that gives `tile` to the kernels of the queries, or to that of the keys if `inverse`."""
    return lambda *arguments: make_plan(*arguments, tile if arguments[3] == inverse else None)


class Pass:
    """The forward or the backward pass on one map, with any tiles."""

    def __init__(self, grid: RegionGrid, topk: int, dense: bool, backward: bool, args: argparse.Namespace):
        shape = (args.batch_size, grid.height, grid.width, 3, args.heads, args.head_dim)
        maps = torch.randn(shape, device=DEVICE, dtype=DTYPES[args.dtype]).unbind(3)
        routing = route_regions(*maps[:2], grid, grid, topk)
        routes, bits = op.route_bits(routing) if dense else (routing.routes, None)
        settings = ([grid.rows, grid.cols], [grid.rows, grid.cols], args.head_dim**-0.5)
        out, lse = op.forward(*maps, routes, bits, *settings)
        grad_out = torch.randn_like(out)
        if backward:
            self._run = lambda: op.backward(*maps, routes, bits, out, grad_out, lse, *settings)
        else:
            self._run = lambda: op.forward(*maps, routes, bits, *settings)

    def milliseconds(self, inverse: bool = False, tile: Tile | None = None) -> list[float]:
        """Quartiles of the time, or infinities where the tile does not fit or compile."""
        op.make_plan = with_tile(inverse, tile)
        try:
            return triton.testing.do_bench(self._run, warmup=10, rep=50, quantiles=[0.25, 0.5, 0.75])
        except (triton.runtime.errors.OutOfResources, triton.runtime.errors.PTXASError, triton.CompilationError):
            return [float("inf")] * 3
        finally:
            op.make_plan = make_plan


def tune(name: str, dense: bool, args: argparse.Namespace):
    grid, topk = MAPS[name]
    chosen_way = is_dense(grid, grid, topk) == dense
    for kernel, backward, inverse in (("forward", False, False), ("queries", True, False), ("keys", True, True)):
        timed = Pass(grid, topk, dense, backward, args)
        tile = make_plan(grid, grid, topk, inverse, dense, args.head_dim, DTYPES[args.dtype]).tile
        low, median, high = timed.milliseconds()
        way = ("dense" if dense else "by list") + (", chosen" if chosen_way else "")
        print(f"{name} ({way}), {kernel}: {median:.4f} ms ({low:.4f} to {high:.4f}) with {tuple(tile)}", flush=True)
        for other in neighbours(tile):
            print(f"    {median / timed.milliseconds(inverse, other)[1]:.2f} x as fast with {tuple(other)}", flush=True)


def main(argv: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--map", nargs="+", choices=MAPS, default=list(MAPS)[:3])
    parser.add_argument("--batch_size", type=int, default=128)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--head_dim", type=int, default=32)
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    args = parser.parse_args(argv)
    if DEVICE == "cuda" and not torch.cuda.is_available():
        parser.error("there is no GPU to measure on")
    for name in args.map:
        for dense in (False, True) if MAPS[name][0].num_regions <= MAX_BITS else (False,):
            tune(name, dense, args)


if __name__ == "__main__":
    main()
