"""What a comparison found: a record, a table, and a plot of accuracy against training time or epochs."""
import json
from contextlib import suppress
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

import torch
from timm.layers import to_2tuple

from scripts.bench import models, tables
from scripts.bench.timing import Trial, machine
from training.distributed import init_distributed
from training.options import Settings
from training.precision import Precision
from utils import replace_file

from .plan import LOGGED, Plan
from .runs import METRIC, PlannedRun, long_runs, short_runs

ROUNDS = 10
SPEED = "speed.json"


# --- machine and speed ------------------------------------------------------------------------------------------------


def write_machine(run: PlannedRun, settings: Settings):
    """Keep beside a run the machine that it is going to be trained on, and whether from CUDA graphs."""
    found = machine(init_distributed(settings.machine.device).device) | dict(cuda_graph=settings.machine.cuda_graph)
    run.folder.parent.mkdir(parents=True, exist_ok=True)
    replace_file(run.beside("json"), lambda file: file.write(json.dumps(found).encode()))


def machine_of(run: PlannedRun) -> dict[str, Any] | None:
    """The machine that a run was trained on last, where that is known."""
    file = run.beside("json")
    return json.loads(file.read_text()) if file.is_file() else None


def speeds(plan: Plan, settings: dict[str, Settings], folder: Path, measure: bool) -> dict[str, Any]:
    """The "machine", and "rows" of the speed of training steps by contender; measured where that was not done before.

    Empty where speed is taken from the logs, or is not measured yet, or was of other settings. What is not to be
    measured may have been measured with or without CUDA graphs.
    """
    file = folder / SPEED
    if plan.speed == LOGGED:
        return {}
    found = json.loads(file.read_text()) if file.is_file() else {}
    asked, of_file = steps_of(settings), found.get("steps", {})
    if of_file == asked or (not measure and without_graphs(of_file) == without_graphs(asked)):
        return found
    if not measure:
        return {}
    found = dict(steps=steps_of(settings), **measure_speeds(settings))
    replace_file(file, lambda opened: opened.write(json.dumps(found, indent=1).encode()))
    return found


def steps_of(settings: dict[str, Settings]) -> dict[str, Any]:
    """What is measured, by contender, as JSON keeps it."""
    of_machine = ("device", "amp", "channels_last", "compile", "cuda_graph")
    return {
        name: dict(model=own.model.model, model_kwargs=own.model.model_kwargs, batch_size=own.loader.batch_size,
                   input_size=list(to_2tuple(own.model.input_size)),
                   **{key: getattr(own.machine, key) for key in of_machine})
        for name, own in settings.items()
    }


def without_graphs(steps: dict[str, Any]) -> dict[str, Any]:
    return {name: {key: value for key, value in own.items() if key != "cuda_graph"} for name, own in steps.items()}


def measure_speeds(settings: dict[str, Settings]) -> dict[str, Any]:
    """Training steps of every contender, in turns: images/s with quartiles, ratio to the first, MiB beyond weights."""
    shared = next(iter(settings.values()))
    device = init_distributed(shared.machine.device).device
    contenders = [models.Contender(own.model.model, hashable(own.model.model_kwargs), name)
                  for name, own in settings.items()]
    dtype = Precision.on(device, shared.machine.amp).amp_dtype
    amp = {torch.bfloat16: "bf16", torch.float16: "fp16", None: "off"}[dtype]
    setting = models.Setting(
        models.TRAIN, shared.loader.batch_size, to_2tuple(shared.model.input_size), amp, shared.machine.channels_last,
        shared.machine.compile, shared.machine.cuda_graph,
    )
    rows = models.measure(contenders, contenders[0].name, setting, Trial(device, ROUNDS, ROUNDS))
    return dict(machine=machine(device) | dict(amp=amp), rows={row["model"]: row for row in rows})


def hashable(kwargs: dict[str, Any]) -> tuple[tuple[str, Any], ...]:
    """Arguments of a model as pairs, by which it can be cached."""
    return tuple((key, tuple(value) if isinstance(value, list) else value) for key, value in kwargs.items())


# --- record -----------------------------------------------------------------------------------------------------------


def record(plan: Plan, measured: dict[str, Any], folder: Path) -> dict[str, Any]:
    """All that is known so far, of plain values.

    "machine" is where the speeds were measured; seconds, images/s and "machine" of a run are those of its training.
    """
    short, long = short_runs(plan, folder), long_runs(plan, folder)
    contenders = {
        name: dict(
            settings=plan.own(name), lr_tried={f"{run.lr:g}": run.accuracy for run in short[name]},
            runs=[run_record(run) for run in long[name]], speed=measured.get("rows", {}).get(name),
        )
        for name in plan.runs
    }
    return dict(
        plan=plan.name, machine=measured.get("machine"), shared=plan.settings, epochs=plan.epochs,
        lr_epochs=plan.lr_epochs, speed=plan.speed, contenders=contenders,
    )


def run_record(run: PlannedRun) -> dict[str, Any]:
    log = run.log
    seconds = [epoch["train_seconds"] for epoch in log]
    rates = [epoch["train_images_per_second"] for epoch in log]
    images = round(seconds[0] * rates[0]) if log else None
    curve = [(epoch["epoch"] + 1, epoch[METRIC]) for epoch in log if epoch.get(METRIC) is not None]
    return dict(lr=run.lr, seed=run.seed, accuracy=run.accuracy, diverged=run.has_diverged, images_an_epoch=images,
                seconds=sum(seconds), images_per_second=median(rates) if rates else None, machine=machine_of(run),
                curve=curve)


def write(plan: Plan, measured: dict[str, Any], folder: Path) -> str:
    """Write the record, the table and the plot; returns the table. Without matplotlib there is no plot."""
    found = record(plan, measured, folder)
    text = table(found)
    replace_file(folder / "results.json", lambda file: file.write((json.dumps(found, indent=1) + "\n").encode()))
    replace_file(folder / "table.md", lambda file: file.write(f"{text}\n".encode()))
    with suppress(ImportError):
        draw(found).savefig(folder / "plot.png")
    return text


# --- table and plot ---------------------------------------------------------------------------------------------------


def accuracies(contender: dict[str, Any]) -> list[float]:
    """Of the runs that have ended."""
    return [run["accuracy"] for run in contender["runs"] if run["accuracy"] is not None]


def rate(found: dict[str, Any], contender: dict[str, Any]) -> float | None:
    """Images/s in training, as measured side by side or as logged by the runs; None where neither was, or it failed."""
    if found["speed"] == LOGGED:
        logged = [run["images_per_second"] for run in contender["runs"] if run["images_per_second"]]
        return median(logged) if logged else None
    return (contender["speed"] or {}).get("images_per_second")


def table(found: dict[str, Any]) -> str:
    """Markdown, a line for each contender: accuracy of its last epochs, mean and standard deviation over the seeds."""
    titles = ("", "lr", "Acc@1", "runs", "images/s", "MiB", "minutes")
    lines = [titles, ("---",) * len(titles)]
    for name, contender in found["contenders"].items():
        values, speed, images = accuracies(contender), contender["speed"] or {}, images_seen(contender, found["epochs"])
        spread = f" ± {stdev(values):.2f}" if len(values) > 1 else ""
        per_second, diverged = rate(found, contender), sum(run["diverged"] for run in contender["runs"])
        lines.append((
            name,
            lr_cell(contender),
            f"{mean(values):.2f}{spread}" if values else speed.get("failed", ""),
            f"{len(values)}{f', {diverged} diverged' if diverged else ''}",
            tables.CELLS["images/s"](speed) if "quartiles" in speed else f"{per_second:.4g}" if per_second else "",
            tables.CELLS["MiB"](speed),
            f"{images / per_second / 60:.0f}" if images and per_second else "",
        ))
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def lr_cell(contender: dict[str, Any]) -> str:
    """The learning rate of the runs, and whether it is the end of those tried: one beyond it might have been better."""
    if not contender["runs"]:
        return ""
    lr, tried = contender["runs"][0]["lr"], [float(value) for value in contender["lr_tried"]]
    end = {max(tried): " (highest)", min(tried): " (lowest)"} if len(tried) > 1 else {}
    return f"{lr:g}{end.get(lr, '')}"


def images_seen(contender: dict[str, Any], epochs: int) -> int | None:
    """Images that a run trains on, with repetitions."""
    known = [run["images_an_epoch"] for run in contender["runs"] if run["images_an_epoch"]]
    return epochs * known[0] if known else None


def curve(contender: dict[str, Any]) -> list[tuple[int, list[float]]]:
    """(epochs, accuracies) with an accuracy of every run that has begun, where all of them have come so far."""
    curves = [dict(run["curve"]) for run in contender["runs"] if run["curve"]]
    epochs = sorted(set.intersection(*map(set, curves))) if curves else []
    return [(epoch, [values[epoch] for values in curves]) for epoch in epochs]


def draw(found: dict[str, Any]):
    """A matplotlib Figure: accuracy against minutes of training, at the rate of the table, or epochs where it has none.

    A line for each contender, the mean over its seeds, in a band from the least to the most of them. One without a rate
    is left out where others have one.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), dpi=150, layout="constrained")
    axes = figure.subplots()
    by_time = any(rate(found, contender) for contender in found["contenders"].values())
    for number, (name, contender) in enumerate(found["contenders"].items()):
        per_second, images, points = rate(found, contender), images_seen(contender, 1), curve(contender)
        if not points or (by_time and not per_second):
            continue
        each = images / per_second / 60 if by_time else 1
        along = [each * epoch for epoch, _ in points]
        least, means, most = zip(*((min(values), mean(values), max(values)) for _, values in points), strict=True)
        axes.plot(along, means, color=f"C{number}", marker=".", label=name)
        axes.fill_between(along, least, most, color=f"C{number}", alpha=0.15, linewidth=0)
    on = found["machine"]
    of_steps = f"minutes of training steps, {on['device']}, {on['threads']} threads" if on else "minutes of training"
    axes.set_xlabel(of_steps if by_time else "epochs")
    axes.set_ylabel("top-1 accuracy (%)")
    axes.grid(alpha=0.4)
    if axes.lines:
        axes.legend(frameon=False, fontsize="small")
    return figure
