"""Where the device time of a training step goes, by torch.profiler, and how long the device waits."""
import re
import statistics
from collections import Counter
from unittest.mock import patch

from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

from ops import BiLevelRoutingAttention

from .models import Contender, Setting, build
from .timing import Trial, interleave, timed, warm_up

CONVOLUTION, DEPTHWISE, OTHER = "other convolution", "depthwise convolution", "other"
# A kernel belongs to the first group whose pattern matches its name, or the name of an op that launched it or called
# that op. Linear layers are mm and addmm; in these models bmm is attention's alone.
GROUPS = {
    "optimizer": r"optimizer|fused_adam",
    "routing": r"bi_level_routing|routing_|topk|sort|searchsorted|bitwise",
    "attention": r"attention|attn|routed|flash|fmha|softmax|bmm|baddbmm|index_select|index_add|^forward_kernel"
                 r"|^(query|key_value|one_pass)_gradients?_kernel",
    "layer norm": r"layer_?norm",
    "batch norm": r"batch_?norm|bn_fw|bn_bw",
    DEPTHWISE: r"depthwise",
    CONVOLUTION: r"conv",
    "GEMM": r"gemm|::mm\b|addmm|matmul|nvjet|cutlass|MmBackward",
    "elementwise and copies": r"elementwise|copy|memcpy|memset|cat\b|stack|fill|zero_|gelu|relu|reduce|contiguous"
                              r"|AccumulateGrad|::(add|mul|sub|div|sum|mean|clone|to|pad)\b",
}
STEPS = 2
LARGEST_KERNELS = 12


def group_of(names: list[str], depthwise: bool) -> str:
    """The group of a kernel, by its name and those of the ops around it; `depthwise` as of the convolution there."""
    text = "\n".join(names)
    for group, pattern in GROUPS.items():
        if re.search(pattern, text, re.IGNORECASE):
            return DEPTHWISE if group == CONVOLUTION and depthwise else group
    return OTHER


def _is_depthwise(op) -> bool:
    """Whether an op is a convolution by a weight of (C, 1, k, k)."""
    shapes = (op.input_shapes or [])[1:3]
    return "conv" in op.name and any(len(shape) == 4 and shape[1] == 1 for shape in shapes)


def attribute(events: list, on_gpu: bool) -> tuple[Counter, Counter]:
    """Microseconds by group, and by (group, kernel or op), of a profile's events."""
    groups, kernels = Counter(), Counter()
    for event in events:
        if event.device_type != DeviceType.CPU:
            continue
        ops = [event]  # with its callers, innermost first
        while ops[-1].cpu_parent is not None:
            ops.append(ops[-1].cpu_parent)
        if on_gpu:
            # A range that a user named spans kernels and is none.
            pieces = [(k.name, k.duration) for k in event.kernels if not event.is_user_annotation]
        else:
            pieces = [(event.name, event.self_cpu_time_total)]
        for name, microseconds in pieces:
            group = group_of([name, *(op.name for op in ops)], any(map(_is_depthwise, ops)))
            groups[group] += microseconds
            kernels[group, name] += microseconds
    return groups, kernels


def busy_microseconds(intervals: list[tuple[float, float]]) -> float:
    """Length of the union of (start, end) intervals: the time during which at least one kernel runs."""
    busy, reached = 0.0, float("-inf")
    for start, end in sorted(intervals):
        busy += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return busy


def measure(contender: Contender, setting: Setting, trial: Trial) -> list[dict]:
    """One row for the step as a whole, then rows for each group of kernels and for the largest kernels.

    The step is timed without the profiler, whose own work would look like waiting.
    """
    on_gpu = trial.device.type == "cuda"
    run = build(contender, setting, trial.device)
    warm_up(run, trial.device)
    seconds = interleave({contender.name: run}, trial)
    if not seconds:
        raise RuntimeError(trial.failures[contender.name])
    milliseconds = 1e3 * statistics.median(seconds[contender.name])

    # Its sums and products look like any others: what calls them says whose they are.
    route = record_function("bi_level_routing")(BiLevelRoutingAttention._route)
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_gpu
    with (
        patch.object(BiLevelRoutingAttention, "_route", route),
        profile(activities=activities, record_shapes=True) as recorded,
    ):
        for _ in range(STEPS):
            timed(run, trial.device)
    groups, kernels = attribute(recorded.events(), on_gpu)
    total, idle = groups.total(), None
    if on_gpu:
        launched = [e for e in recorded.events() if e.device_type == DeviceType.CUDA and not e.is_user_annotation]
        busy = busy_microseconds([(e.time_range.start, e.time_range.end) for e in launched])
        idle = max(0.0, 1 - busy / STEPS / (1e3 * milliseconds))
        groups[OTHER] += max(0.0, busy - total)  # kernels that the profiler could not tie to an op
        total = max(total, busy)

    def row(kind: str, microseconds: float, **names: str) -> dict:
        about = dict(model=contender.name, batch=setting.batch, kind=kind, **names)
        return dict(about, milliseconds=microseconds / 1e3 / STEPS, share=microseconds / total)

    step = dict(model=contender.name, batch=setting.batch, kind="step", milliseconds=milliseconds, idle_share=idle)
    return [
        step,
        *(row("group", microseconds, name=group) for group, microseconds in groups.most_common()),
        *(row("kernel", microseconds, name=kernel[:80], group=group)
          for (group, kernel), microseconds in kernels.most_common(LARGEST_KERNELS)),
    ]
