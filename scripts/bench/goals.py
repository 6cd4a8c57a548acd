"""What the results are held to, and whether they meet it."""
import operator
from collections.abc import Callable

from .attention import BACKWARD, FORWARD, REFERENCE
from .networks import INFER, TRAIN

FUSED = "triton"
# Relative error of a bfloat16 result above which it is wrong, not rounded.
LARGEST_ERROR = 0.02
STAGES = (1, 2, 3)
FINER = "finer regions, stage"
AT_224, AT_800 = "224, stage", f"800 x 1333, {FINER}"


def find(rows: list[dict], **wanted) -> dict:
    """The first row with these values; one that says that there is none if so."""
    for row in rows:
        if all(row.get(key) == value for key, value in wanted.items()):
            return row
    return dict(failed="no such row")


def _goal(text: str, value: float | None, holds: Callable, limit: float, problem: str | None = None) -> dict:
    if problem is not None:
        return dict(goal=text, value=None, outcome=f"not measured: {problem}")
    return dict(goal=text, value=value, outcome="met" if holds(value, limit) else "missed")


def _wrong(row: dict) -> bool:
    # NaN is wrong too.
    return "error" in row and not row["error"] <= LARGEST_ERROR


def _attention_goal(text: str, rows: list[dict], stage: str, mode: str, measure: Callable, holds: Callable,
                    limit: float) -> dict:
    row = find(rows, stage=stage, mode=mode, impl=FUSED)
    reference = find(rows, stage=stage, mode=mode, impl=REFERENCE)
    problems = [f"{name}: {r['failed']}" for name, r in ((FUSED, row), (REFERENCE, reference)) if "failed" in r]
    if problems:
        return _goal(text, None, holds, limit, problems[0])
    goal = _goal(text, measure(row, reference), holds, limit)
    if _wrong(row):
        goal["outcome"] = f"missed: wrong by {row['error']:.2g}"
    return goal


def attention_goals(rows: list[dict]) -> list[dict]:
    """Of the fused implementation. Rows are of attention.measure, with `times_floor`."""
    goals = []
    for of in (AT_224, AT_800):
        for stage in STAGES:
            text = f"{of} {stage}: {BACKWARD} at least 4 times as fast as {REFERENCE}"
            goals.append(_attention_goal(text, rows, f"{of} {stage}", BACKWARD, lambda row, _: row["ratio"],
                                         operator.ge, 4))
    for stage in STAGES:
        text = f"{AT_800} {stage}: {BACKWARD} in at most a tenth of {REFERENCE}'s extra memory"
        goals.append(_attention_goal(text, rows, f"{AT_800} {stage}", BACKWARD,
                                     lambda row, other: row["peak_memory_mb"] / other["peak_memory_mb"],
                                     operator.le, 0.1))
    goals.append(_attention_goal(f"{AT_224} 1: {FORWARD} in at most twice the floor", rows, f"{AT_224} 1", FORWARD,
                                 lambda row, _: row["times_floor"], operator.le, 2))
    fused = [row for row in rows if row.get("impl") == FUSED and "failed" not in row]
    for text, key in (("output", "output_repeats"), ("gradients", "gradients_repeat")):
        repeats = [row[key] for row in fused if key in row]
        goals.append(_goal(f"{FUSED}: two launches give bit-equal {text} in every case",
                           sum(repeats) / len(repeats) if repeats else None, operator.ge, 1,
                           None if repeats else find(rows, impl=FUSED)["failed"]))
    return goals


def model_goals(rows: list[dict]) -> list[dict]:
    """Ours against Swin of the same size. Rows are of networks.measure."""
    goals = []
    for compiled in (False, True):
        for size in ("small", "tiny"):
            for mode, verb in ((TRAIN, "trains"), (INFER, "infers")):
                row = find(rows, model=f"biformer_{size}", mode=mode, compiled=compiled)
                if compiled and "failed" in row:
                    continue
                problem = row.get("failed") or (None if "ratio" in row else f"swin_{size} failed")
                text = f"biformer_{size} {verb} faster than swin_{size}, {'compiled' if compiled else 'eager'}"
                goals.append(_goal(text, row.get("ratio"), operator.gt, 1, problem))
    return goals
