"""Cost an image against the image's side, drawn from a record."""
from .networks import INFER, TRAIN

COLOURS = ("#0b6e4f", "#5fb49c", "#c8553d", "#3d5a80")
MARKERS = ("o", "s", "^", "D")
LINES = {TRAIN: "-", INFER: "--"}
PANELS = (("milliseconds", "Time an image (ms)"), ("mb_per_image", "Memory an image (MiB)"))


def growth_figure(record: dict):
    """A matplotlib Figure of two panels, time and memory of one image against its side, all axes logarithmic.

    Raises:
        ValueError: The record holds no such results.
    """
    rows = [row for row in record.get("sections", {}).get("growth", {}).get("rows", []) if "failed" not in row]
    if not rows:
        raise ValueError("the record holds no results of growing images")
    # Here, so that everything else runs where it is not installed.
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    figure = Figure(figsize=(9, 4.4), dpi=150, layout="constrained")
    sides = sorted({row["side"] for row in rows})
    for axes, (key, label) in zip(figure.subplots(1, 2), PANELS, strict=True):
        for model, colour, marker in zip(dict.fromkeys(row["model"] for row in rows), COLOURS, MARKERS, strict=False):
            for mode, line in LINES.items():
                points = sorted((r["side"], r[key]) for r in rows if (r["model"], r["mode"]) == (model, mode))
                if points:
                    axes.plot(*zip(*points, strict=True), line, color=colour, marker=marker, markersize=5,
                              label=f"{model.replace('_patch4_window7_224', '').replace('_patch16_224', '')}, {mode}")
        axes.set(xscale="log", yscale="log", xlabel="Side of the image (pixels)", ylabel=label)
        axes.set_xticks(sides, [str(side) for side in sides])
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_minor_locator(NullLocator())
        axes.grid(True, which="major", color="0.88")
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    figure.suptitle(record["machine"]["device"], fontsize=11)
    return figure
