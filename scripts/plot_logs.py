"""Draw the training curves of several runs from their log.txt.

    python scripts/plot_logs.py outputs/biformer_tiny/* outputs/debiformer_tiny/* --output curves.png

Each folder is that of a run, its `--output_dir` or outputs/MODEL/DATE-TIME. The model labels its curve, with the
folder's name where runs share one. The left panel shows the training loss of each epoch, the right one the top-1
accuracy on the validation images, of segmenters the mIoU, which runs with `--disable_eval` do not have.
"""
import argparse
import json
import sys
from pathlib import Path

import yaml

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from utils import user_path

LOSS, METRICS = "train_loss", dict(val_acc1="top-1 accuracy (%)", val_mIoU="mIoU (%)")


def read_log(folder: Path) -> list[dict]:
    """The entries of a run's log, one for each epoch.

    Raises:
        ValueError: There is no log, or it has neither of the values to plot.
    """
    path = folder / "log.txt"
    if not path.is_file():
        raise ValueError(f"no log at {path}")
    log = [json.loads(line) for line in path.read_text().splitlines()]
    if not any(key in entry for entry in log for key in (LOSS, *METRICS)):
        raise ValueError(f"{path} holds no {' and no '.join((LOSS, *METRICS))}")
    return log


def metric_of(logs: list[list[dict]]) -> str:
    """The first of `METRICS` that one of the logs holds, or that all lack."""
    held = [key for key in METRICS if any(key in entry for log in logs for entry in log)]
    return (held or list(METRICS))[0]


def model_of(folder: Path) -> str | None:
    """The model of a run, of a segmenter behind its head, as its args.yaml says; None where there is none."""
    try:
        recipe = yaml.safe_load((folder / "args.yaml").read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return None
    if not isinstance(recipe, dict) or "model" not in recipe:
        return None
    return "_".join(str(recipe[key]) for key in ("head", "model") if key in recipe)


def labels(folders: list[Path]) -> list[str]:
    """A name for each run, all different where the folders are: its model, else its folder's name or path."""
    models, names = [model_of(folder) for folder in folders], [folder.resolve().name for folder in folders]
    found = []
    for folder, model, name in zip(folders, models, names, strict=True):
        place = name if names.count(name) == 1 else str(folder)
        found.append(place if model is None else model if models.count(model) == 1 else f"{model} ({place})")
    return found


def draw(folders: list[Path]):
    """A matplotlib Figure of the logged values of each epoch, from 0 as in the log: one panel for the loss, and one for
    the metric.

    Raises:
        ValueError: A log is missing, or has neither of the values to plot.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(9, 3.6), dpi=150, layout="constrained")
    panels = figure.subplots(1, 2)
    logs = [read_log(folder) for folder in folders]
    metric = metric_of(logs)
    shown = {LOSS: "training loss", metric: METRICS[metric]}
    for log, name in zip(logs, labels(folders), strict=True):
        for axes, key in zip(panels, shown, strict=True):
            held = [entry for entry in log if entry.get(key) is not None]  # null is no number: NaN
            epochs, values = [entry["epoch"] for entry in held], [entry[key] for entry in held]
            axes.plot(epochs, values, marker="o", label=name)
    for axes, label in zip(panels, shown.values(), strict=True):
        axes.set_xlabel("epoch")
        axes.set_ylabel(label)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.grid(alpha=0.4)
    panels[0].legend(frameon=False)
    return figure


def main(argv: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=user_path, metavar="FOLDER", help="of a run")
    parser.add_argument("--output", type=user_path, default=Path("curves.png"), metavar="FILE",
                        help="the figure, in the format of its ending (default: %(default)s)")
    args = parser.parse_args(argv)
    try:
        draw(args.folders).savefig(args.output)
    except ImportError as error:
        parser.exit(1, f"error: {error}; pip install matplotlib\n")
    except (OSError, ValueError) as error:
        parser.error(str(error))
    print(args.output)


if __name__ == "__main__":
    main()
