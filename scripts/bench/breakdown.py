"""Where the device time of one training step goes, by torch.profiler, and how long the device waits."""
import re
from collections import Counter
from dataclasses import dataclass

from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from .networks import Contender, Setting, build
from .timing import interleave, timed, warm
from .trial import Trial

ATTENTION, DEPTHWISE, CONVOLUTION, LAYER_NORM = "attention", "depthwise convolution", "other convolution", "layer norm"
PRODUCTS, ELEMENTWISE, BATCH_NORM = "GEMM", "elementwise and copies", "batch norm"
OPTIMIZER, OTHER = "optimizer", "other"
# The first pattern that one of a kernel's names matches decides: the kernel's own, its op's, and those of all ops that
# called this. Linear layers are mm and addmm; bmm is attention's alone in these models.
GROUPS = (
    (OPTIMIZER, r"optimizer|fused_adam"),
    (ATTENTION, r"attention|attn|routed|flash|fmha|softmax|bmm|baddbmm|topk|index_select|index_add"),
    (LAYER_NORM, r"layer_?norm"),
    (BATCH_NORM, r"batch_?norm|bn_fw|bn_bw"),
    (DEPTHWISE, r"depthwise"),
    (CONVOLUTION, r"conv"),
    (PRODUCTS, r"gemm|::mm\b|addmm|matmul|nvjet|cutlass|MmBackward"),
    (ELEMENTWISE, r"elementwise|copy|memcpy|memset|cat\b|stack|fill|zero_|::(add|mul|sub|div|sum|mean|clone|to|pad)\b"
                  r"|gelu|relu|reduce|contiguous|AccumulateGrad"),
)
STEPS = 2
LARGEST_KERNELS = 12


@dataclass(frozen=True)
class Step:
    """The step to take apart."""
    contender: Contender
    setting: Setting


def group_of(names: list[str], depthwise: bool) -> str:
    """The group of a kernel by its own name and those of the ops around it, innermost first."""
    text = "\n".join(names)
    for group, pattern in GROUPS:
        if re.search(pattern, text, re.IGNORECASE):
            return DEPTHWISE if group == CONVOLUTION and depthwise else group
    return OTHER


def _callers(event) -> list:
    """An op's event and those of the ops that called it, innermost first."""
    found = []
    while event is not None:
        found.append(event)
        event = event.cpu_parent
    return found


def _is_depthwise(events: list) -> bool:
    """Whether one of these ops is a convolution by a weight of (C, 1, k, k)."""
    return any(
        "conv" in event.name and any(len(shape) == 4 and shape[1] == 1 for shape in (event.input_shapes or [])[1:3])
        for event in events
    )


def attribute(events: list, on_gpu: bool) -> tuple[Counter, Counter]:
    """Microseconds by group, and by (group, kernel or op), of a profile's events."""
    groups, kernels = Counter(), Counter()
    for event in events:
        if event.device_type != DeviceType.CPU:
            continue
        callers = _callers(event)
        names = [caller.name for caller in callers]
        if on_gpu:
            # A range that a user named spans kernels and is none.
            pieces = [(k.name, k.duration) for k in event.kernels if not event.is_user_annotation]
        else:
            pieces = [(event.name, event.self_cpu_time_total)]
        for name, microseconds in pieces:
            group = group_of([name, *names], _is_depthwise(callers))
            groups[group] += microseconds
            kernels[group, name] += microseconds
    return groups, kernels


def busy_microseconds(intervals: list[tuple[float, float]]) -> float:
    """Length of the union of (start, end) intervals: time with at least one kernel running."""
    busy, reached = 0.0, float("-inf")
    for start, end in sorted(intervals):
        busy += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return busy


def measure(step: Step, trial: Trial) -> list[dict]:
    """Rows for each group of kernels and for the largest kernels, and one for the step as a whole.

    A step is timed without the profiler, whose own work would show as waiting.
    """
    name = step.contender.name
    on_gpu = trial.device.type == "cuda"
    trial.announce(name)
    run, _ = build(step.contender, step.setting, trial.device)
    warm(run, trial.device)
    samples = sorted(interleave({name: run}, trial)[name])
    milliseconds = 1e3 * samples[len(samples) // 2]

    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_gpu
    with profile(activities=activities, record_shapes=True) as recorded:
        for _ in range(STEPS):
            timed(run, trial.device)
    events = recorded.events()
    groups, kernels = attribute(events, on_gpu)
    about = dict(model=name, batch=step.setting.batch)
    total = sum(groups.values())
    idle = None
    if on_gpu:
        kernel_events = [e for e in events if e.device_type == DeviceType.CUDA and not e.is_user_annotation]
        busy = busy_microseconds([(e.time_range.start, e.time_range.end) for e in kernel_events])
        idle = max(0.0, 1 - busy / STEPS / (1e3 * milliseconds))
        # What the profiler could not tie to an op.
        groups[OTHER] += max(0.0, busy - total)
        total = max(total, busy)
    rows = [dict(about, kind="step", milliseconds=milliseconds, idle_share=idle)]
    for group, microseconds in groups.most_common():
        rows.append(dict(about, kind="group", name=group, **_cost(microseconds, total)))
    for (group, kernel), microseconds in kernels.most_common(LARGEST_KERNELS):
        rows.append(dict(about, kind="kernel", name=kernel[:80], group=group, **_cost(microseconds, total)))
    return rows


def _cost(microseconds: float, total: float) -> dict:
    return dict(milliseconds=microseconds / 1e3 / STEPS, share=microseconds / total)
