"""Train the same networks with the same flags by main.py and by timm's parts, in turns, and compare the two.

    PYTHONPATH=.:tests python -m helpers.peer --data_path /path/to/imagenette2 --output benchmarks/comparison/peer.json

Runs that are in the output already are not run again.
"""
import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import mean, median, stdev

import torch

from helpers import ROOT
from scripts.bench.timing import machine

PROGRAMS = OURS, TIMMS = "main.py", "timm"
LR = 1e-3  # of a step; main.py is given the one for 512 images
SHARED = dict(weight_decay=0.05, warmup_epochs=1, smoothing=0.1, clip_grad=5.0, drop_path=0.0)
# What timm's loop has no flags for.
OURS_ALONE = dict(
    data_set="image_folder", device="cpu", opt="adamw", sched="cosine", hflip=0.5, color_jitter=0.0, aa="none",
    mixup=0.0, cutmix=0.0, reprob=0.0, repeated_aug="false", model_ema="false", train_interpolation="bicubic",
)


def as_words(flags: dict) -> list[str]:
    return [f"--{name}={value}" for name, value in flags.items()]


def train(program: str, model: str, seed: int, args: argparse.Namespace, folder: Path) -> list[dict]:
    """The records of the epochs of one run."""
    given = {name: getattr(args, name) for name in ("epochs", "input_size", "data_path", "num_workers", "batch_size")}
    flags = dict(SHARED, **given, model=model, seed=seed, warmup_lr=LR / 1000, min_lr=LR / 100)
    scale = ["--scale", "0.35", "1.0"]
    if program == OURS:
        flags |= dict(OURS_ALONE, lr=LR * 512 / args.batch_size, output_dir=folder)
        subprocess.run([sys.executable, "main.py", *as_words(flags), *scale], cwd=ROOT, check=True,
                       stdout=subprocess.DEVNULL)
        lines = (folder / "log.txt").read_text()
    else:
        flags |= dict(lr=LR, num_classes=args.num_classes)
        words = [sys.executable, "-m", "helpers.peer.timm_train", *as_words(flags), *scale]
        paths = {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
        done = subprocess.run(words, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True, env=os.environ | paths)
        lines = done.stdout
    return [json.loads(line) for line in lines.splitlines()]


def table(runs: list[dict]) -> str:
    lines = ["| network | program | runs | Acc@1 | images/s |", "|---|---|---|---|---|"]
    for model in dict.fromkeys(run["model"] for run in runs):
        for program in PROGRAMS:
            own = [run for run in runs if (run["model"], run["program"]) == (model, program)]
            values = [run["epochs"][-1]["val_acc1"] for run in own]
            rates = [epoch["train_images_per_second"] for run in own for epoch in run["epochs"]]
            if own:
                spread = f" ± {stdev(values):.2f}" if len(values) > 1 else ""
                lines.append(f"| {model} | {program} | {len(own)} | {mean(values):.2f}{spread} | {median(rates):.1f} "
                             f"({min(rates):.1f} to {max(rates):.1f}) |")
    return "\n".join(lines)


def main(argv: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_path", required=True, help="train/ and val/")
    parser.add_argument("--output", type=Path, required=True, help="the record")
    parser.add_argument("--models", nargs="+", default=["resnet18", "biformer_nano"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--input_size", type=int, default=64)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--num_workers", type=int, default=1)
    parser.add_argument("--num_classes", type=int, default=10)
    args = parser.parse_args(argv)
    shared = dict(epochs=args.epochs, input_size=args.input_size)
    found = json.loads(args.output.read_text()) if args.output.is_file() else dict(runs=[], **shared)
    if any(found[key] != value for key, value in shared.items()):
        parser.error(f"{args.output} holds runs of other --epochs or --input_size")
    found["machine"] = machine(torch.device("cpu"))
    done = {(run["model"], run["seed"], run["program"]) for run in found["runs"]}
    with tempfile.TemporaryDirectory() as folder:
        for seed in args.seeds:
            for model in args.models:
                # in turns, and in another order each time
                for program in PROGRAMS[:: 1 if seed % 2 == 0 else -1]:
                    if (model, seed, program) not in done:
                        epochs = train(program, model, seed, args, Path(folder, f"{model}-{seed}"))
                        found["runs"].append(dict(model=model, seed=seed, program=program, epochs=epochs))
                        args.output.write_text(json.dumps(found, indent=1) + "\n")
                        print(model, seed, program, f"{epochs[-1]['val_acc1']:.2f} %", flush=True)
    print(f"\n{table(found['runs'])}")


if __name__ == "__main__":
    main()
