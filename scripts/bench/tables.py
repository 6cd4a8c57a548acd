"""A record as Markdown tables, and its growing images as a plot."""
import math
from collections.abc import Callable
from typing import NamedTuple

from .models import INFER, TRAIN


def number(value: float, digits: int = 3) -> str:
    """At least `digits` significant digits, with an exponent only for very small and very large numbers."""
    if value == 0:
        return "0"
    if 1e-4 <= abs(value) < 1e7:
        whole = len(str(int(abs(value))))
        return f"{value:.{max(0, digits - whole) if abs(value) >= 1 else digits + (abs(value) < 0.1)}f}"
    return f"{value:.{digits - 1}e}"


def _number(key: str, digits: int = 3) -> Callable[[dict], str]:
    return lambda row: number(row[key], digits) if key in row else ""


def _spread(key: str, ends: str, digits: int = 3) -> Callable[[dict], str]:
    """A median and its quartiles."""
    def cell(row: dict) -> str:
        if ends not in row:
            return _number(key, digits)(row)
        low, high = (number(end, digits) for end in row[ends])
        return f"{number(row[key], digits)} ({low} to {high})"

    return cell


def _percent(key: str, digits: int) -> Callable[[dict], str]:
    return lambda row: f"{row[key]:.{digits}%}" if key in row else ""


def _repeats(row: dict) -> str:
    kept = [row[key] for key in ("output_repeats", "gradients_repeat") if key in row]
    return "" if not kept else "yes" if all(kept) else "no" if not kept[0] else "output only"


# What stands in a column; in any other, the value of the row's key of that name.
CELLS: dict[str, Callable[[dict], str]] = {
    "auto": lambda row: "yes" if row.get("auto") else "",
    "compiled": lambda row: ("compiled" if row.get("compiled") else "eager") + ", graphed" * bool(row.get("graphed")),
    "group or kernel": lambda row: row.get("name", "").replace("|", "/"),
    "of group": lambda row: row.get("group", ""),
    "images/s": _spread("images_per_second", "quartiles", 4),
    "ms": _spread("milliseconds", "milliseconds_quartiles"),
    "ms a step": _number("milliseconds"),
    "ms an image": lambda row: number(1e3 / row["images_per_second"]),
    "share": lambda row: f"{row['share']:.1%}" if "share" in row else "",
    "idle": lambda row: f"{row['idle_share']:.0%}" if row.get("idle_share") is not None else "",
    "ratio": _spread("ratio", "ratio_quartiles"),
    "x floor": _number("times_floor", 2),
    "slower": lambda row: f"{row['slower']:.0%}",
    "median": _number("median"),
    "decile": _number("decile"),
    "worst": _number("worst"),
    "MiB": _number("peak_memory_mb"),
    "MiB an image": _number("mb_per_image"),
    "error": _number("error", 2),
    "repeats": _repeats,
    "host, ms": _number("host_milliseconds"),
    "prepared, ms": _number("prepare_milliseconds"),
    "rate": _number("rate"),
    "difference": _number("difference", 2),
    "top-1": _percent("accuracy", 2),
    "same class": _percent("alike", 2),
    "changed routes, %": lambda row: ", ".join(f"{100 * share:.1f}" for share in row.get("changed_routes", ())),
}


def table(rows: list[dict], about: tuple[str, ...], measured: tuple[str, ...]) -> str:
    """A line for each row; where it failed, the reason takes the place of the columns that are `measured`."""
    lines = [[*about, *measured], ["---"] * len(about + measured)]
    for row in rows:
        columns = about if "failed" in row else about + measured
        cells = [CELLS[column](row) if column in CELLS else str(row.get(column, "")) for column in columns]
        if "failed" in row:
            cells += [row["failed"].replace("|", "/"), *[""] * (len(measured) - 1)]
        lines.append(cells)
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


class Table(NamedTuple):
    title: str
    note: str
    about: tuple[str, ...]
    measured: tuple[str, ...]


ATTENTION = Table(
    "Attention",
    "Device time; MiB beyond the inputs, results included. `ratio` is the speed over that of `gather`. `x floor` is "
    "the time over the larger of bytes / copy speed and operations / product speed. `error` is the largest of output "
    "and gradients against `gather` in float32; `repeats` is bit for bit. `host` is what one launch costs the CPU: an "
    "eager step cannot be faster. `dense` attends to the whole map. `flex` is PyTorch's flex_attention under a block "
    "mask; `prepared`, its mask and the order of its tokens, is not in its time.",
    ("stage", "case", "mode", "impl", "auto"),
    ("ms", "ratio", "x floor", "MiB", "error", "repeats", "host, ms", "prepared, ms"),
)
MODELS = Table(
    "Models", "MiB beyond weights and optimizer state; `ratio` is the speed over that of `reference`.",
    ("model", "mode", "compiled", "batch", "reference"), ("images/s", "ratio", "ms", "MiB"),
)
# By the sections of `all`, and by the other commands.
TABLES = {
    "attention": ATTENTION,
    "op": ATTENTION,
    "layers": Table(
        "Layers", "Device time forward and backward, as in a training step; `ratio` is the speed over PyTorch's.",
        ("layer", "stage", "case", "batch", "impl"), ("ms", "ratio", "MiB", "host, ms"),
    ),
    "models": MODELS,
    "graphed": MODELS._replace(
        title="Models, replayed from CUDA graphs", note="`ratio` is the speed over that of `reference`."
    ),
    "compiled": MODELS._replace(title="Models, compiled"),
    "growth": Table(
        "Growing images", "Of one image; MiB beyond weights and optimizer state; `ratio` is the speed over Swin-T's.",
        ("size", "mode", "model"), ("batch", "ms", "ratio", "MiB an image"),
    ),
    "breakdown": Table(
        "A training step", "Device time (of ops, on the CPU) by torch.profiler; `idle` is how long the GPU waits.",
        ("model", "batch", "kind", "group or kernel", "of group"), ("ms a step", "share", "idle"),
    ),
    "choice": Table(
        "The choice of an implementation",
        "Time of what `auto` chooses over that of the reference; `slower` is the share of shapes where it takes more "
        "than 5 % longer. `best` is the fastest implementation, `dense` attends to the whole map, without routing.",
        ("threads", "dtype", "mode", "reference"), ("shapes", "slower", "median", "decile", "worst"),
    ),
    "broad": Table("Broad attention", "Inference; MiB beyond the inputs.", ("model", "batch", "part"), ("ms", "MiB")),
    "runtimes": Table(
        "Runtimes on the CPU",
        "Inference with random weights; `ratio` is the speed over PyTorch's in float32. Compiled for the shape of the "
        "batch, by TorchInductor with frozen weights; the files of ONNX Runtime and OpenVINO take any batch.",
        ("model", "threads", "batch", "runtime", "precision"), ("images/s", "ratio", "ms"),
    ),
    "int8": Table(
        "8-bit integers",
        "`same class` is the share of images whose first class is as in float32; `changed routes` are, by routed "
        "layer, the query regions that then attend to other regions.",
        ("model", "images", "quantizer"), ("top-1", "same class", "difference", "changed routes, %"),
    ),
    "data": Table(
        "Data loading", "Files lie in memory; each process has one thread; `ratio` is the speed over decoding alone.",
        ("format", "kind", "name"), ("images/s", "ms an image", "ratio"),
    ),
}


def document(record: dict) -> str:
    """All tables of a record."""
    machine = record["machine"]
    parts = [f"# {machine['device']}, {machine['cores']} cores, torch {machine['torch']}, {machine['date']}"]
    if "ceilings" in record:
        ceilings = record["ceilings"]
        parts.append(
            f"Copies {ceilings['bytes_per_second'] / 1e9:.0f} GB/s read and written ({ceilings['copy_mib']:.0f} MiB), "
            f"multiplies {number(ceilings['operations_per_second'] / 1e12)} TFLOP/s ({ceilings['product']})."
        )
    sections = record.get("sections") or {record["benchmark"]: dict(rows=record["results"], **record)}
    for name, (title, note, about, measured) in TABLES.items():
        found = sections.get(name)
        if found is None:
            continue
        parts.append(f"## {title}")
        if found["rows"]:
            parts += [note, table(found["rows"], about, measured)]
        parts += [f"Failed: {case}: {reason}" for case, reason in found.get("failed", {}).items()]
        if found.get("left_out"):
            parts.append(f"Left out for lack of time: {', '.join(found['left_out'])}.")
    if record.get("cores"):
        parts.append("Cores for one GPU:\n\n" + table(record["cores"], ("name",), ("rate", "cores")))
    return "\n\n".join(parts) + "\n"


COLOURS = ("#0b6e4f", "#5fb49c", "#12355b", "#e0a030", "#c8553d", "#7b2d26", "#8a8f98")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
LINES = {TRAIN: "-", INFER: "--"}
PANELS = (("milliseconds", "Time an image (ms)"), ("mb_per_image", "Memory an image (MiB)"))


def growth_figure(record: dict):
    """A matplotlib Figure of two panels, time and memory of one image against its size, all axes logarithmic.

    Raises:
        ValueError: The record holds no results of growing images.
    """
    rows = [row for row in record.get("sections", {}).get("growth", {}).get("rows", []) if "failed" not in row]
    if not rows:
        raise ValueError("the record holds no results of growing images")
    # Imported here, so that everything else runs without it.
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    figure = Figure(figsize=(10, 6), dpi=150, layout="constrained")
    sizes = {math.sqrt(row["pixels"]): row["size"] for row in sorted(rows, key=lambda row: row["pixels"])}
    for axes, (key, label) in zip(figure.subplots(1, 2), PANELS, strict=True):
        for model, colour, marker in zip(dict.fromkeys(row["model"] for row in rows), COLOURS, MARKERS, strict=False):
            name = model.replace("_patch4_window7_224", "").replace("_patch16_224", "")
            for mode, line in LINES.items():
                of_line = [row for row in rows if (row["model"], row["mode"]) == (model, mode)]
                points = sorted((math.sqrt(row["pixels"]), row[key]) for row in of_line)
                if points:
                    axes.plot(*zip(*points, strict=True), line, color=colour, marker=marker, markersize=5,
                              label=f"{name}, {mode}")
        axes.set(xscale="log", yscale="log", xlabel="Size of the image (pixels)", ylabel=label)
        axes.set_xticks(list(sizes), list(sizes.values()), rotation=30)
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_minor_locator(NullLocator())
        axes.grid(True, which="major", color="0.88")
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    figure.suptitle(record["machine"]["device"], fontsize=11)
    return figure
