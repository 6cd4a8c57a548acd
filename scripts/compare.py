"""Train several networks by one recipe, and compare them: accuracy, images/s, memory, and accuracy by training time.

    python scripts/compare.py configs/comparison/imagenette_128.yaml --data_path /path/to/imagenette2 --output_dir out
    python scripts/compare.py configs/comparison/imagenette_128.yaml --output_dir out --draw   # what is there

The YAML file says what all runs share, what each contender has of its own, and which learning rates and seeds it gets.
Each run is one of main.py, in a folder of its own, with its messages beside it. The same command again resumes where
it was stopped, by Ctrl-C, SIGTERM, `--minutes` or a fault. What has been found is in `results.json`, `table.md` and
`plot.png` of the output folder, written again after every run.
"""
import argparse
import math
import sys
import time
from itertools import islice
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import training.startup  # before torch, as main.py does  # noqa: F401  # isort: skip
from scripts.comparison import results, runs
from scripts.comparison.plan import LOGGED, Plan
from training.cuda_graphs import check_cuda_graphs
from training.distributed import init_distributed
from training.options import Settings
from training.signals import EXIT_RESUME
from utils import UserError, count, positive_count, run_script, user_path


def compare(args: argparse.Namespace):
    plan = Plan.read(args.plan)
    if plan.speed == LOGGED and args.jobs > 1:
        raise UserError(f"{args.plan} takes speeds from the runs' logs: leave out --jobs, or they slow each other")
    pool = runs.Pool(args.jobs, deadline=time.monotonic() + 60 * args.minutes)
    data_path = args.data_path or (args.output_dir if args.draw else None)  # to draw, no data are read
    given = dict(cuda_graph=args.cuda_graph) | ({} if data_path is None else dict(data_path=str(data_path)))
    settings = {name: plan.parse(name, lr=plan.rates(name)[0], epochs=plan.epochs, **given) for name in plan.runs}
    if args.cuda_graph and not args.draw:
        check_cuda_graphs(init_distributed(next(iter(settings.values())).machine.device))
    runs.check_settings(plan, args.output_dir, **given)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    failed = [] if args.draw else train_all(plan, settings, args.output_dir, pool, **given)
    speeds = results.speeds(plan, settings, args.output_dir, measure=not args.draw)
    table = results.write(plan, speeds, args.output_dir)
    print(f"\n{table}\n{args.output_dir / 'results.json'}")
    if failed:
        raise UserError(f"{count(len(failed), 'run')} failed; the same command tries them again")


def train_all(
    plan: Plan, settings: dict[str, Settings], folder: Path, pool: runs.Pool, **given: Any
) -> list[runs.PlannedRun]:
    """Train what remains, while time is left; returns the runs that failed. To diverge is a result, not a failure."""
    def write():
        results.write(plan, results.speeds(plan, settings, folder, measure=False), folder)

    failed = []
    try:
        with runs.interrupted_by_sigterm(), pool:
            while True:
                fill(pool, plan, settings, folder, failed, **given)
                if not pool.going:
                    return failed
                run = pool.wait()
                if not run.has_ended:
                    failed.append(run)
                print(f"{run}: {outcome(run)}", flush=True)
                runs.check_settings(plan, folder, **given)  # those of a learning rate that has just been chosen too
                write()
    finally:
        write()  # some of the runs that were interrupted may just have ended


def fill(
    pool: runs.Pool, plan: Plan, settings: dict[str, Settings], folder: Path, failed: list[runs.PlannedRun],
    **given: Any,
):
    """Begin the next of the runs that remain and have not failed, as many as the pool has room for."""
    waiting = (run for run in runs.remaining(plan, folder) if run not in failed and run not in pool.going)
    for run in islice(waiting, pool.free):
        results.write_machine(run, settings[run.contender])
        pool.begin(run, plan.recipe(run.contender, lr=run.lr, seed=run.seed, epochs=run.epochs, **given))
        print(f"{run} ...", flush=True)


def outcome(run: runs.PlannedRun) -> str:
    if run.has_diverged:
        return "diverged"
    return f"failed, see {run.beside('txt')}" if run.accuracy is None else f"{run.accuracy:.2f} %"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("plan", type=user_path, metavar="FILE.yaml", help="what is compared")
    parser.add_argument("--data_path", type=user_path, metavar="FOLDER", help="the data, where FILE does not say it")
    parser.add_argument("--output_dir", type=user_path, required=True, metavar="FOLDER", help="for runs and results")
    parser.add_argument("--jobs", type=positive_count, default=1, metavar="N",
                        help="train N runs at once, which pays where one alone leaves a GPU idle; speeds are measured "
                        "alone, in the end")
    parser.add_argument("--cuda_graph", action="store_true", help="main.py's --cuda_graph, for all runs and for their "
                        "speeds, which then have no MiB; for a GPU")
    parser.add_argument("--minutes", type=float, default=math.inf,
                        help="stop after so long, with exit code 75; the same command resumes")
    parser.add_argument("--draw", action="store_true", help="train and measure nothing: draw what is there")
    args = parser.parse_args(argv)
    try:
        return run_script(lambda: compare(args))
    except runs.OutOfTime:
        print("stopped; the same command resumes")
        return EXIT_RESUME


if __name__ == "__main__":
    sys.exit(main())
