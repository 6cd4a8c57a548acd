"""Draw the training curves of several runs from their log.txt.

    python scripts/plot_logs.py outputs/biformer_tiny outputs/debiformer_tiny --output curves.png

Each folder is the `--output_dir` of a run; its name labels the curve. Left the training loss of each epoch, right the
top-1 accuracy on the validation images.
"""
import argparse
import json
from pathlib import Path

PANELS = (("train_loss", "training loss"), ("val_acc1", "top-1 accuracy (%)"))


def read_log(folder: Path) -> list[dict]:
    """The epochs of a run, each once: a resumed run may have written one twice, of which the last counts.

    Raises:
        ValueError: There is no log, or nothing in it.
    """
    path = folder / "log.txt"
    if not path.is_file():
        raise ValueError(f"no log at {path}")
    epochs = {}
    for line in path.read_text().splitlines():
        entry = json.loads(line)
        epochs[entry["epoch"]] = entry
    if not epochs:
        raise ValueError(f"{path} is empty")
    return [epochs[epoch] for epoch in sorted(epochs)]


def draw(folders: list[Path]):
    """A matplotlib Figure of two panels against the epochs done."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(9, 3.6), dpi=150, layout="constrained")
    panels = figure.subplots(1, 2)
    for folder in folders:
        log = read_log(folder)
        for axes, (key, _) in zip(panels, PANELS, strict=True):
            epochs, values = zip(*((entry["epoch"] + 1, entry[key]) for entry in log), strict=True)
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
        figure = draw(args.folders)
    except ValueError as error:
        parser.error(str(error))
    figure.savefig(args.output)
    print(args.output)


if __name__ == "__main__":
    main()
