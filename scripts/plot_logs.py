"""Draw the training curves of several runs from their log.txt.

    python scripts/plot_logs.py outputs/biformer_tiny outputs/debiformer_tiny --output curves.png

Each folder is the `--output_dir` of a run; its name labels the curve. The left panel shows the training loss of each
epoch, the right one the top-1 accuracy on the validation images, which runs with `--disable_eval` do not have.
"""
import argparse
import json
from pathlib import Path

PANELS = (("train_loss", "training loss"), ("val_acc1", "top-1 accuracy (%)"))


def read_log(folder: Path) -> list[dict]:
    """The entries of a run's log, one for each epoch.

    Raises:
        ValueError: There is no log, or it has neither of the values to plot.
    """
    path = folder / "log.txt"
    if not path.is_file():
        raise ValueError(f"no log at {path}")
    log = [json.loads(line) for line in path.read_text().splitlines()]
    if not any(key in entry for entry in log for key, _ in PANELS):
        raise ValueError(f"{path} holds no {' and no '.join(key for key, _ in PANELS)}")
    return log


def draw(folders: list[Path]):
    """A matplotlib Figure of the logged values against the number of epochs, one panel for each of `PANELS`.

    Raises:
        ValueError: A log is missing, or has neither of the values to plot.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(9, 3.6), dpi=150, layout="constrained")
    panels = figure.subplots(1, 2)
    for folder in folders:
        log = read_log(folder)
        for axes, (key, _) in zip(panels, PANELS, strict=True):
            held = [entry for entry in log if key in entry]
            epochs, values = [entry["epoch"] + 1 for entry in held], [entry[key] for entry in held]
            axes.plot(epochs, values, marker="o", label=folder.name)
    for axes, (_, label) in zip(panels, PANELS, strict=True):
        axes.set_xlabel("epochs")
        axes.set_ylabel(label)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.4)
    panels[0].legend(frameon=False)
    return figure


def main(argv: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--output", type=Path, default=Path("curves.png"))
    args = parser.parse_args(argv)
    try:
        draw(args.folders).savefig(args.output)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    print(args.output)


if __name__ == "__main__":
    main()
