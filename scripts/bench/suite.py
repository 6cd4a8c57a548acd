"""What `benchmark.py all` measures, and the loop that measures cases one after another while time is left."""
import math
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch

from ops import IMPLS

from . import attention, breakdown, layers, models
from .attention import BACKWARD, DENSE, FLEX, FORWARD, REFERENCE, AttentionCase
from .models import INFER, TRAIN, Contender, Setting
from .timing import Trial, describe, release

# By routed stage of BiFormer: stride of the map, heads (of 32 channels) of Tiny and Small and of Base, top-k.
STRIDES, HEADS, BASE_HEADS, TOPK = (4, 8, 16), (2, 4, 8), (3, 6, 12), (1, 4, 16)
REGIONS, FINER_REGIONS = 7, 16
DTYPES = {"off": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SECTIONS = ("attention", "layers", "models", "graphed", "compiled", "breakdown", "growth")
MOST_ROUNDS = 30
FLEX_SECONDS = 60.0  # that compiling flex_attention for one shape may take


@dataclass(frozen=True)
class Scale:
    """How much of everything a device can do in minutes."""
    amp: str  # precision of the models and, by DTYPES, of the op
    batch: int  # images at 224
    photo: tuple[int, int]  # (height, width) of the large image whose maps the op sees
    photo_batch: int
    sizes: tuple[tuple[int, int], ...]  # (height, width) of growing images; a batch holds as many pixels of each
    copy_bytes: int  # of `attention.measure_ceilings`, and the side of its matrices
    matrix_side: int
    least_rounds: int  # however late it is
    compiled: tuple[tuple[str, str, float], ...]  # (size, mode, seconds that compiling one model may take)
    graphs: bool = False  # whether it has CUDA graphs


COMPILED_ON_GPU = (("small", TRAIN, 80), ("small", INFER, 35), ("tiny", TRAIN, 50), ("tiny", INFER, 25),
                   ("base", TRAIN, 80), ("base", INFER, 35))
PHOTO = (800, 1333)
SIZES = ((224, 224), (448, 448), (672, 672), (896, 896), PHOTO, (1344, 1344))
SCALES = {
    "cuda": Scale("bf16", 128, PHOTO, 2, SIZES, 2**32, 8192, 5, COMPILED_ON_GPU, True),
    "cpu": Scale("off", 1, (200, 333), 1, SIZES, 2**28, 1024, 3, (("tiny", INFER, 60),)),
}


@dataclass(frozen=True)
class Case:
    """`measure(trial)` gives rows of a section. It is not started with fewer than `seconds` left."""
    section: str
    name: str
    measure: Callable[[Trial], list[dict]]
    seconds: float = 0.0


def run(cases: list[Case], device: torch.device, rounds: tuple[int, int], budget: float = math.inf) -> Iterator[dict]:
    """Measure the cases in their order while time is left; yields what was found so far after each, and at the end.

    What is yielded maps each section to a dict of `rows`, `failed` (case: reason), `left_out` (cases) and `seconds`.
    Each case has an equal part of what is left of `budget` seconds, for `rounds` (least, most); the last may exceed it.
    """
    start = time.time()
    end = start + budget
    found: dict[str, dict] = {}
    for number, case in enumerate(cases):
        section = found.setdefault(case.section, dict(rows=[], failed={}, left_out=[], seconds=0.0))
        release(device)  # a GPU that no longer works ends the benchmark here
        began = time.time()
        if began + case.seconds >= end:
            section["left_out"].append(case.name)
            continue
        trial = Trial(device, *rounds, deadline=began + (end - began) / (len(cases) - number), end=end)
        try:
            section["rows"] += case.measure(trial)
        except Exception as error:
            traceback.print_exc()
            section["failed"][case.name] = describe(error)
        seconds = time.time() - began
        section["seconds"] += seconds
        print(f"{time.time() - start:5.0f} s  {case.section}: {case.name}  {seconds:.1f} s", flush=True)
        yield found
    yield found


def attention_cases(scale: Scale) -> list[AttentionCase]:
    """The shapes of the op: at 224, of a large image with finer and with usual regions, and of Base at 224."""
    small = [(224 // stride, 224 // stride) for stride in STRIDES]
    # Rounded up, as by a strided convolution with padding.
    large = [tuple(math.ceil(side / stride) for side in scale.photo) for stride in STRIDES]
    photo = f"{scale.photo[0]} x {scale.photo[1]}"
    shapes = {
        "224": (scale.batch, small, HEADS, REGIONS),
        f"{photo}, finer regions": (scale.photo_batch, large, HEADS, FINER_REGIONS),
        photo: (scale.photo_batch, large, HEADS, REGIONS),
        "Base": (scale.batch, small, BASE_HEADS, REGIONS),
    }
    return [
        AttentionCase(f"{name}, stage {i + 1}", batch, *maps[i], heads[i], regions, TOPK[i], mode, (*IMPLS, DENSE),
                      dtype=DTYPES[scale.amp])
        for name, (batch, maps, heads, regions) in shapes.items() for i in range(3) for mode in (BACKWARD, FORWARD)
    ]


def _layer_cases(scale: Scale) -> list[Case]:
    """The layers of BiFormer-S's stages at 224."""
    dims = [32 * heads for heads in HEADS]
    shapes = [
        layers.LayerCase(layer, f"stage {i + 1}", scale.batch, 224 // STRIDES[i], dims[i], DTYPES[scale.amp])
        for layer in layers.LAYERS for i in range(3)
    ]
    return [Case("layers", f"{s.layer}, {s.stage}", partial(layers.measure, s)) for s in shapes]


def _op_case(shape: AttentionCase) -> Case:
    return Case("attention", f"{shape.stage}, {shape.mode}", partial(attention.measure, shape))


def _flex_case(shape: AttentionCase) -> Case:
    """flex_attention, which is slow to compile for each shape, beside the reference again for the ratio."""
    measure = partial(attention.measure, replace(shape, contenders=(REFERENCE, FLEX)))
    return Case("attention", f"{shape.stage}, {shape.mode}, {FLEX}", measure, FLEX_SECONDS)


def _swin(size: str) -> str:
    return f"swin_{size}_patch4_window7_224"


def _models_case(size: str, mode: str, scale: Scale, compile_seconds: float = 0.0, graphed: bool = False) -> Case:
    """Ours, the Swin of its size, which ratios are to, and the ConvNeXt, which is the first to be left out."""
    reference = _swin(size)
    contenders = [Contender(model) for model in (f"biformer_{size}", reference, f"convnext_{size}")]
    setting = Setting(mode, scale.batch, amp=scale.amp, compile=compile_seconds > 0, cuda_graph=graphed)
    measure = partial(models.measure, contenders, reference, setting)
    section = "graphed" if graphed else "compiled" if setting.compile else "models"
    return Case(section, f"{size}, {mode}", measure, 2 * compile_seconds)


def _growth_case(size: tuple[int, int], mode: str, scale: Scale) -> Case:
    setting = Setting(mode, max(1, scale.batch * 224**2 // math.prod(size)), size, scale.amp)
    return Case("growth", f"{size[0]} x {size[1]}, {mode}", partial(models.measure_growth, setting))


def _breakdown_case(model: str, scale: Scale) -> Case:
    setting = Setting(TRAIN, scale.batch, amp=scale.amp)
    return Case("breakdown", model, partial(breakdown.measure, Contender(model), setting))


def cases(scale: Scale) -> list[Case]:
    """Everything, the most important first: how fast the small models train, and what they spend their time on."""
    shapes = attention_cases(scale)
    in_float32 = [replace(s, stage=f"{s.stage}, float32", dtype=torch.float32) for s in shapes[:6]]
    ceilings = partial(attention.measure_ceilings, scale.copy_bytes, scale.matrix_side, DTYPES[scale.amp])
    kinds = [(size, mode) for mode in (TRAIN, INFER) for size in ("small", "tiny", "base")]
    headline, *others = (_models_case(*kind, scale) for kind in kinds)
    graphed = [_models_case(*kind, scale, graphed=True) for kind in kinds] if scale.graphs else []
    compiled = [_models_case(size, mode, scale, seconds) for size, mode, seconds in scale.compiled]
    return [
        Case("ceilings", "copy and product", ceilings),
        *graphed[:1],
        headline,
        compiled[0],
        *(_breakdown_case(model, scale) for model in ("biformer_small", _swin("small"), "convnext_small")),
        *map(_op_case, shapes[:6]),
        *_layer_cases(scale),
        *graphed[1:],
        *others,
        *map(_op_case, shapes[6:12]),
        *(_growth_case(size, mode, scale) for size in scale.sizes for mode in (INFER, TRAIN)),
        *map(_op_case, shapes[12:]),
        *(map(_op_case, in_float32) if scale.amp != "off" else ()),
        *compiled[1:],
        *map(_flex_case, shapes[:12]),
    ]
