"""What `all` measures, and in which order: the dear and the less important last."""
from dataclasses import dataclass

import torch

from ops import IMPLS

from . import attention, breakdown, ceilings, growth, networks
from .attention import BACKWARD, DENSE, FLEX, FORWARD, REFERENCE, AttentionCase
from .goals import AT_224, FINER
from .networks import INFER, TRAIN, Contender, Group, Setting
from .session import Section, Task

# (side of the map, heads, top-k) of the routed stages for a 224 image; heads are of 32 channels
STAGES_AT_224 = ((56, 2, 1), (28, 4, 4), (14, 8, 16))
BASE_HEADS = (3, 6, 12)
STRIDES = (4, 8, 16)
SIZES = ("small", "tiny", "base")
DTYPES = {"off": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Scale:
    """How much of everything a machine can do in minutes.

    Args:
        amp: Of the models, as of `engine.Numerics.on`; a key of DTYPES for the op.
        batch: Images at 224, and of the op.
        photo: (height, width) of the large image that the op sees the maps of, and how many at once.
        sides: Of growing images, multiples of 224; the number of pixels in a batch stays the same.
        growth_batch: Of growing images at 224.
        copy_bytes, matrix_side: Of the ceilings.
        patience, compile_patience: Seconds without news after which a contender counts as hung.
        least_rounds: However late it is.
        compiled: Models to compile as (size, mode, seconds that compiling one of them may take).
    """
    amp: str
    batch: int
    op_batch: int
    photo: tuple[int, int]
    photo_batch: int
    sides: tuple[int, ...]
    growth_batch: int
    copy_bytes: int
    matrix_side: int
    patience: float
    compile_patience: float
    least_rounds: int
    compiled: tuple[tuple[str, str, float], ...]


COMPILED_ON_GPU = (
    ("small", TRAIN, 80), ("small", INFER, 35), ("tiny", TRAIN, 50), ("tiny", INFER, 25), ("base", TRAIN, 80),
    ("base", INFER, 35),
)
SCALES = {
    "cuda": Scale("bf16", 128, 128, (800, 1333), 2, (224, 448, 896, 1344), 128, 2**32, 8192, 90, 200, 5,
                  COMPILED_ON_GPU),
    "cpu": Scale("off", 1, 1, (200, 333), 1, (224, 448, 672), 1, 2**28, 1024, 300, 300, 3, (("tiny", INFER, 60),)),
}


def attention_cases(scale: Scale) -> list[AttentionCase]:
    """The shapes of the op: T and S at 224, large images with finer and usual regions, Base at 224."""
    dtype = DTYPES[scale.amp]
    contenders = (*IMPLS, DENSE)
    height, width = scale.photo
    # -(-a // b): a strided convolution with padding rounds a map's size up.
    maps = [(-(-height // stride), -(-width // stride)) for stride in STRIDES]
    shapes = []
    for i, (side, heads, topk) in enumerate(STAGES_AT_224):
        shapes.append((f"{AT_224} {i + 1}", scale.op_batch, side, side, heads, 7, topk))
    photo = f"{height} x {width}"
    for of, regions in ((f"{photo}, {FINER}", 16), (f"{photo}, stage", 7)):
        for i, (_, heads, topk) in enumerate(STAGES_AT_224):
            shapes.append((f"{of} {i + 1}", scale.photo_batch, *maps[i], heads, regions, topk))
    for i, (side, _, topk) in enumerate(STAGES_AT_224):
        shapes.append((f"Base, stage {i + 1}", scale.op_batch, side, side, BASE_HEADS[i], 7, topk))
    return [
        AttentionCase(*shape, mode, contenders, dtype=dtype) for shape in shapes for mode in (BACKWARD, FORWARD)
    ]


def _attention_section(scale: Scale) -> Section:
    cases = attention_cases(scale)
    tasks = [Task(f"{c.stage}, {c.mode}", attention.measure, c, scale.patience) for c in cases]
    # Compiling flex_attention for a shape takes long: after all else, beside the reference once more for the ratio.
    for case in cases[:12]:
        changed = dict(vars(case), contenders=(REFERENCE, FLEX))
        tasks.append(Task(f"{case.stage}, {case.mode}, {FLEX}", attention.measure, AttentionCase(**changed),
                          scale.compile_patience))
    return Section("attention", 0.28, tuple(tasks))


def _models_section(name: str, share: float, scale: Scale, order: tuple, compile: bool) -> Section:
    tasks = []
    for size, mode, seconds in order:
        swin = f"swin_{size}_patch4_window7_224"
        # Ours and the reference first: where time is short, the third is left out.
        contenders = tuple(Contender(model) for model in (f"biformer_{size}", swin, f"convnext_{size}"))
        group = Group(contenders, swin, Setting(mode, scale.batch, amp=scale.amp, compile=compile), seconds)
        tasks.append(Task(f"{size}, {mode}", networks.measure, group,
                          scale.compile_patience if compile else scale.patience))
    return Section(name, share, tuple(tasks))


def _growth_section(scale: Scale) -> Section:
    tasks = []
    for side in scale.sides:
        for mode in (TRAIN, INFER):
            batch = max(1, scale.growth_batch * 224**2 // side**2)
            setting = Setting(mode, batch, side, scale.amp)
            size = growth.Size(growth.contenders_at(side), "swin_tiny_patch4_window7_224", setting)
            tasks.append(Task(f"{side}, {mode}", growth.measure, size, scale.patience))
    return Section("growth", 0.18, tuple(tasks))


def sections(scale: Scale) -> list[Section]:
    """Everything, with each section's part of the time. What a section leaves goes to those after it."""
    how = ceilings.Ceilings(scale.copy_bytes, scale.matrix_side, DTYPES[scale.amp])
    step = breakdown.Step(Contender("biformer_small"), Setting(TRAIN, scale.batch, amp=scale.amp))
    eager = tuple((size, mode, 0) for mode in (TRAIN, INFER) for size in SIZES)
    return [
        Section("ceilings", 0.04, (Task("copy and product", ceilings.measure, how, scale.patience),)),
        _attention_section(scale),
        _models_section("models", 0.22, scale, eager, compile=False),
        Section("breakdown", 0.05, (Task("biformer_small", breakdown.measure, step, scale.patience),)),
        _growth_section(scale),
        _models_section("compiled", 0.23, scale, scale.compiled, compile=True),
    ]
