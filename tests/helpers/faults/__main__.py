"""Faults in real training runs, and what they cost; `make test-faults` runs the whole campaign.

A run of a small BiFormer is started, disturbed, and resumed with --auto_resume, until it is done; then its weights, EMA
weights, optimizer and log are compared, bit for bit, with an undisturbed run's. Runs have one process or
two, data loading processes, mixup, random erasing, repeated augmentation and gradient accumulation; some train a
detector, with sizes that are drawn and masks. `--only detection` strikes these alone.
"""
import argparse
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path

from .campaign import FAULTS, strike_all


def main():
    parser = argparse.ArgumentParser(description="Strike training runs with faults, and print what they cost.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=FAULTS, nargs="+", default=list(FAULTS), help="topics")
    parser.add_argument("--output", type=Path, help="file for the table")
    args = parser.parse_args()
    faults = [fault for topic in args.only for fault in FAULTS[topic] for _ in range(fault.times)]
    rng = random.Random(args.seed)
    rng.shuffle(faults)
    work = Path(tempfile.mkdtemp(prefix="faults-"))
    start = time.monotonic()
    campaign = strike_all(faults, work, rng, say=lambda line: print(line, flush=True))
    print(f"\n{campaign.table()}\n\n{time.monotonic() - start:.0f} s")
    for line in [*campaign.failures, *campaign.lost]:
        print(line)
    if args.output:
        args.output.write_text(campaign.table() + "\n")
    if campaign.failures or campaign.lost:
        sys.exit(f"outputs are in {work}")
    shutil.rmtree(work)


if __name__ == "__main__":
    main()
