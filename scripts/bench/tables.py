"""Results as Markdown."""
from .attention import BACKWARD, FORWARD, REFERENCE


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def number(value: float | None, digits: int = 3) -> str:
    """At least `digits` significant digits, and no exponent for what a reader would count in."""
    if value is None:
        return ""
    if value == 0 or 1e-4 <= abs(value) < 1e7:
        whole = len(str(int(abs(value))))
        return f"{value:.{max(0, digits - whole) if abs(value) >= 1 else digits + (abs(value) < 0.1)}f}"
    return f"{value:.{digits - 1}e}"


def spread(value: float, ends: list[float], digits: int = 3) -> str:
    """A median and its quartiles."""
    return f"{number(value, digits)} ({number(ends[0], digits)} to {number(ends[1], digits)})"


def ratio(row: dict) -> str:
    return spread(row["ratio"], row["ratio_quartiles"]) if "ratio" in row else ""


def repeats(row: dict) -> str:
    kept = [row[key] for key in ("output_repeats", "gradients_repeat") if key in row]
    return "yes" if all(kept) else "no" if not kept[0] else "output only"


def attention_table(rows: list[dict]) -> str:
    """One line for each case and contender; where a case was measured twice, the first time counts."""
    by_line: dict[tuple, dict[str, dict]] = {}
    for row in rows:
        by_line.setdefault((row["stage"], row["case"], row["impl"]), {}).setdefault(row["mode"], row)
    head = ["stage", "map, heads, regions", "contender"]
    for mode in (FORWARD, BACKWARD):
        head += [f"{mode}, ms", f"x {REFERENCE}", "x floor", "MiB"]
    cases = list(dict.fromkeys(key[:2] for key in by_line))
    lines = []
    for (stage, case, impl), modes in sorted(by_line.items(), key=lambda item: cases.index(item[0][:2])):
        line = [stage, case, impl + (" (auto)" if any(row["auto"] for row in modes.values()) else "")]
        for mode in (FORWARD, BACKWARD):
            line += _attention_cells(modes.get(mode))
        kept = [row for row in modes.values() if "failed" not in row]
        errors = [row["error"] for row in kept if "error" in row]
        prepared = max((row["prepare_milliseconds"] for row in kept), default=0)
        line += [number(max(errors), 2) if errors else "", ", ".join(dict.fromkeys(repeats(row) for row in kept)),
                 number(max(row["host_milliseconds"] for row in kept)) if kept else "",
                 number(prepared) if prepared else ""]
        lines.append(line)
    return table([*head, "error", "repeats bit for bit", "host, ms", "made before, ms"], lines)


def _attention_cells(row: dict | None) -> list[str]:
    if row is None:
        return ["", "", "", ""]
    if "failed" in row:
        return [row["failed"].replace("|", "/"), "", "", ""]
    return [spread(row["milliseconds"], row["milliseconds_quartiles"]), ratio(row), number(row.get("times_floor"), 2),
            number(row["peak_memory_mb"])]


def models_table(rows: list[dict]) -> str:
    lines = []
    for row in rows:
        line = [row["model"], row["mode"], "compiled" if row["compiled"] else "eager", str(row["batch"])]
        if "failed" in row:
            line += [row["failed"].replace("|", "/"), "", "", ""]
        else:
            line += [spread(row["images_per_second"], row["quartiles"], 4), ratio(row), number(row["milliseconds"]),
                     number(row["peak_memory_mb"])]
        lines.append(line)
    references = list(dict.fromkeys(row["reference"] for row in rows))
    against = references[0] if len(references) == 1 else "the Swin of its size"
    return table(["model", "mode", "", "batch", "images/s (quartiles)", f"x {against} (quartiles)", "ms",
                  "peak memory, MiB"], lines)


def growth_table(rows: list[dict]) -> str:
    lines = []
    for row in rows:
        line = [str(row["side"]), row["mode"], row["model"]]
        if "failed" in row:
            line += ["", row["failed"].replace("|", "/"), "", ""]
        else:
            line += [str(row["batch"]), spread(row["milliseconds"], row["milliseconds_quartiles"]), ratio(row),
                     number(row["mb_per_image"])]
        lines.append(line)
    return table(["side", "mode", "model", "batch", "ms an image (quartiles)", "x Swin-T (quartiles)",
                  "MiB an image"], lines)


def breakdown_table(rows: list[dict]) -> str:
    step = rows[0]
    idle = "" if step["idle_share"] is None else f", the device waits {step['idle_share']:.0%} of it"
    lines = [
        [row["name"].replace("|", "/"), row.get("group", ""), number(row["milliseconds"]), f"{row['share']:.1%}"]
        for row in rows if row["kind"] != "step"
    ]
    text = f"One step of {step['model']}, batch {step['batch']}: {number(step['milliseconds'])} ms{idle}.\n\n"
    return text + table(["group, then the largest kernels or ops", "of group", "ms a step", "share"], lines)


def decoders_table(rows: list[dict]) -> str:
    lines = []
    for row in rows:
        if row["kind"] != "decode":
            continue
        line = [row["format"], row["name"]]
        if "failed" in row:
            line += [row["failed"].replace("|", "/"), "", ""]
        else:
            largest = row["largest_difference"]
            by = "another size" if largest is None else f"up to {largest}"
            equal = "all" if row["equal"] == row["images"] else f"{row['equal']} of {row['images']}; {by}"
            line += [spread(row["images_per_second"], row["quartiles"], 4), ratio(row), equal]
        lines.append(line)
    return table(["format", "decoder", "images/s (quartiles)", "x PIL (quartiles)", "PIL's very pixels"], lines)


def pipeline_table(rows: list[dict]) -> str:
    lines = []
    for row in rows:
        if row["kind"] == "decode" and (row["format"], row["name"]) != ("JPEG", "PIL"):
            continue
        line = ["decode alone" if row["kind"] == "decode" else row["name"]]
        if "failed" in row:
            line += [row["failed"].replace("|", "/"), "", ""]
        else:
            line += [spread(row["images_per_second"], row["quartiles"], 4), number(1e3 / row["images_per_second"]),
                     ratio(row)]
        lines.append(line)
    return table(["JPEG, by PIL", "images/s (quartiles)", "ms an image", "x decode alone (quartiles)"], lines)


def cores_table(needed: list[dict]) -> str:
    return table(["training on one GPU", "images/s", "cores"],
                 [[row["name"], number(row["rate"]), str(row["cores"])] for row in needed])


def goals_table(goals: list[dict]) -> str:
    return table(["goal", "measured", "outcome"],
                 [[goal["goal"], number(goal["value"]), goal["outcome"].replace("|", "/")] for goal in goals])


def broad_table(rows: list[dict]) -> str:
    """One line for each part of each BViT."""
    return table(["model", "batch", "part", "ms", "MiB"], [
        [row["model"], str(row["batch"]), row["part"], spread(row["milliseconds"], row["milliseconds_quartiles"]),
         number(row["peak_memory_mb"])] for row in rows
    ])


TABLES = {
    "attention": ("Attention", attention_table),
    "models": ("Models", models_table),
    "compiled": ("Models, compiled", models_table),
    "growth": ("Growing images", growth_table),
    "breakdown": ("A training step", breakdown_table),
}
NOTES = {
    "attention": "Device time, medians and quartiles of interleaved rounds; MiB beyond the inputs, results included. "
    "`x floor` is the time over the larger of bytes / copy speed and operations / product speed. `host` is what one "
    "launch costs the CPU: an eager step cannot be faster. `dense` attends to the whole map. `flex` is PyTorch's "
    "flex_attention under a block mask; its mask and its region order are made before, outside of its time. `error` is "
    f"that of output and gradients against `{REFERENCE}` in float32.",
    "models": "MiB beyond weights and optimizer state.",
    "compiled": "MiB beyond weights and optimizer state.",
    "breakdown": "Device time (CPU time of ops, on the CPU) by torch.profiler; what waits is left out of the shares.",
    "growth": "Milliseconds and MiB of one image, MiB beyond weights and optimizer state.",
}


def document(record: dict) -> str:
    """Everything there is in a record of `all`, goals last."""
    machine = record["machine"]
    parts = [f"# {machine['device']}, {machine['cores']} cores, torch {machine['torch']}, {machine['date']}"]
    ceilings = record.get("ceilings")
    if ceilings:
        parts.append(
            f"Copies {ceilings['bytes_per_second'] / 1e9:.0f} GB/s read and written ({ceilings['copy_mib']:.0f} MiB), "
            f"multiplies {number(ceilings['operations_per_second'] / 1e12)} TFLOP/s ({ceilings['product']})."
        )
    for name, (title, make) in TABLES.items():
        found = record["sections"].get(name)
        if found is None:
            continue
        parts.append(f"## {title}")
        if found["rows"]:
            parts += [NOTES[name], make(found["rows"])]
        parts += [f"Failed: {task}: {reason}" for task, reason in found["failed"].items()]
        if found["left_out"]:
            parts.append(f"Left out for lack of time: {', '.join(found['left_out'])}.")
    if record.get("goals"):
        parts += ["## Goals", goals_table(record["goals"])]
    return "\n\n".join(parts) + "\n"
