"""Whole models side by side: inference and training, growing images, and BViT's broad attention."""
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial

import timm
import torch
import torch.nn.functional as F

from models.bvit import broad_attention, split_qkv
from models.detection import DETECTORS
from models.segmentation import HEADS
from tasks.networks import size_kwargs
from tasks.segmentation.losses import pixel_loss
from training.cuda_graphs import GraphedTraining
from training.flags import key_value
from training.precision import Precision

from .timing import OUT_OF_MEMORY, Trial, compare, release

INFER, TRAIN = "infer", "train"
NUM_CLASSES, PIXEL_CLASSES, OBJECT_CLASSES = 1000, 150, 80
OBJECTS = 7  # in an image to train a detector on, as in COCO's
GROWTH_REFERENCE = "swin_tiny_patch4_window7_224"
# The parts of BViT that `measure_broad` compares.
NETWORK, CLASS_TOKEN, ALL_TOKENS = "the network, without it", "class token", "all tokens"
CONCATENATED = "all tokens, layers concatenated (published)"


@dataclass(frozen=True)
class Contender:
    """A timm model, or HEAD/MODEL for a segmenter or detector on it, and keyword arguments to create it, as pairs."""
    model: str
    kwargs: tuple = ()
    label: str = ""

    @classmethod
    def parse(cls, text: str) -> "Contender":
        """`NAME`, or `NAME:KEYWORD=VALUE,...`, where a value is a number or a word.

        Raises:
            argparse.ArgumentTypeError: A keyword has no value.
        """
        model, _, keywords = text.partition(":")
        return cls(model, tuple(key_value(keyword) for keyword in keywords.split(",") if keyword), text)

    @property
    def name(self) -> str:
        return self.label or self.model

    @property
    def parts(self) -> tuple[str, str]:
        """The head of a segmenter, or the name of a detector, or "", and the timm model."""
        head, _, model = self.model.rpartition("/")
        return head, model

    def check(self):
        """Raises ValueError where there is no such head, or timm knows no such model."""
        head, model = self.parts
        if head and head not in (*HEADS, *DETECTORS):
            raise ValueError(f"unknown head {head}; choose from {', '.join([*HEADS, *DETECTORS])}")
        if not timm.is_model(model):
            raise ValueError(f"unknown model {model}")


@dataclass(frozen=True)
class Setting:
    """How a model is run: "infer" or "train", on `batch` images of `size`, (height, width).

    `cuda_graph` replays inference, or forward and backward pass of a training step, from CUDA graphs.
    """
    mode: str
    batch: int
    size: tuple[int, int] = (224, 224)
    amp: str = "off"
    channels_last: bool = True
    compile: bool = False
    cuda_graph: bool = False


@lru_cache(maxsize=9)
def _create(contender: Contender, size: tuple[int, int], device: torch.device) -> torch.nn.Module:
    """A model on the device; cached, because initialising the weights of large ones takes seconds."""
    torch.manual_seed(0)
    (head, name), kwargs = contender.parts, dict(contender.kwargs)
    if head in DETECTORS:  # images come as large as they are to be
        model = DETECTORS[head](name, OBJECT_CLASSES, short=min(size), long=max(size), **kwargs)
    elif head:
        model = HEADS[head](name, PIXEL_CLASSES, img_size=size, **kwargs)
    else:
        model = timm.create_model(name, num_classes=NUM_CLASSES, **size_kwargs(name, size) | kwargs)
    for module in model.modules():
        # Some factories turn stochastic depth on and some do not; here all train without it.
        if isinstance(module, timm.layers.DropPath):
            module.drop_prob = 0.0
    return model.to(device)


def graphed(run: Callable[[], None]) -> Callable[[], None]:
    """What replays the kernels of `run` from a CUDA graph."""
    side = torch.cuda.Stream()  # capture forbids the default one, and whatever a first call does but for kernels
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    reads = run  # what `run` holds has to live as long: the graph reads its memory

    def replay():
        graph.replay()
        return reads

    return replay


def build(contender: Contender, setting: Setting, device: torch.device) -> Callable[[], None]:
    """A function that runs one inference batch or one training step."""
    memory_format = torch.channels_last if setting.channels_last else torch.contiguous_format
    model = _create(contender, setting.size, device).to(memory_format=memory_format).train(setting.mode == TRAIN)
    model.zero_grad()
    precision = Precision.on(device, setting.amp, setting.channels_last)
    network = torch.compile(model) if setting.compile else model
    inputs, loss_of = make_batch(contender, setting, precision, device)

    def infer():
        with torch.no_grad(), precision.autocast():
            network(*inputs)

    if setting.mode == INFER:
        return graphed(infer) if setting.cuda_graph else infer
    if setting.cuda_graph:
        network = GraphedTraining(network, precision)

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def train():
        with precision.autocast():
            loss = loss_of(network(*inputs))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return train


def make_batch(
    contender: Contender, setting: Setting, precision: Precision, device: torch.device
) -> tuple[tuple, Callable[..., torch.Tensor]]:
    """What a network is called with, and the loss of its outputs in training."""
    head, shape = contender.parts[0], (setting.batch, *setting.size)
    if head in DETECTORS:
        images = list(torch.rand(setting.batch, 3, *setting.size, device=device))
        targets = [make_objects(setting.size, device) for _ in images]
        return (images, targets) if setting.mode == TRAIN else (images,), lambda losses: sum(losses.values())
    images = precision.arrange(torch.randn(setting.batch, 3, *setting.size, device=device))
    if head:
        labels = torch.randint(PIXEL_CLASSES, shape, device=device)
        return (images,), partial(segmentation_loss, labels=labels)
    return (images,), partial(F.cross_entropy, target=torch.randint(NUM_CLASSES, shape[:1], device=device))


def make_objects(size: tuple[int, int], device: torch.device) -> dict[str, torch.Tensor]:
    """`OBJECTS` boxes of a sixteenth of an image of (height, width) or less, which their masks fill."""
    height, width = size
    corner = torch.rand(OBJECTS, 2, device=device) * 0.75
    scale = torch.tensor([width, height], device=device)
    boxes = torch.cat([corner, corner + 0.05 + torch.rand(OBJECTS, 2, device=device) * 0.2], dim=1) * scale.repeat(2)
    x, y = torch.arange(width, device=device) + 0.5, torch.arange(height, device=device) + 0.5
    left, top, right, bottom = (boxes[:, i, None] for i in range(4))
    masks = ((y > top) & (y < bottom))[:, :, None] & ((x > left) & (x < right))[:, None, :]
    return dict(boxes=boxes, labels=torch.randint(1, OBJECT_CLASSES + 1, (OBJECTS,), device=device), masks=masks)


def segmentation_loss(logits: dict[str, torch.Tensor], labels: torch.Tensor) -> torch.Tensor:
    """The sum of the heads' losses, of which weights cost nothing."""
    return sum(pixel_loss(values, labels) for values in logits.values())


def measure(contenders: Sequence[Contender], reference: str, setting: Setting, trial: Trial) -> list[dict]:
    """One row for each model: rate, ratio to the model named `reference` within a round, memory; or why it failed."""
    if setting.compile:
        torch._dynamo.reset()
    how = dict(mode=setting.mode, compiled=setting.compile, graphed=setting.cuda_graph)
    height, width = setting.size
    about = dict(how, size=str(height) if height == width else f"{height} x {width}", pixels=height * width,
                 batch=setting.batch)
    rows = {contender.name: dict(model=contender.name, **about, reference=reference) for contender in contenders}
    builders = {contender.name: partial(build, contender, setting, trial.device) for contender in contenders}
    rows = compare(rows, builders, reference, setting.batch, trial)
    for row in rows:
        if setting.cuda_graph:  # its memory is the graph's own, and taken before
            row.pop("peak_memory_mb", None)
    return rows


def growing_contenders(size: tuple[int, int]) -> tuple[Contender, ...]:
    """BiFormer and DeBiFormer with 7 x 7 regions, BiFormer with regions of a fixed size, windows, and convolutions."""
    regions = int(7 * math.sqrt(size[0] * size[1]) / 224)
    return (
        Contender("biformer_tiny", label="biformer_tiny, 7 x 7 regions"),
        Contender("biformer_tiny", (("num_regions", regions),), "biformer_tiny, regions of a fixed size"),
        Contender("biformer_small", label="biformer_small, 7 x 7 regions"),
        Contender("debiformer_tiny", label="debiformer_tiny, 7 x 7 regions"),
        Contender(GROWTH_REFERENCE),
        Contender("swin_small_patch4_window7_224"),
        Contender("convnext_tiny"),
    )


def measure_growth(setting: Setting, trial: Trial) -> list[dict]:
    """One row for each model: milliseconds and MiB of one image; or why it failed.

    Where a model runs out of memory, the batch of all of them is halved.
    """
    rows = measure(growing_contenders(setting.size), GROWTH_REFERENCE, setting, replace(trial, failures={}))
    if setting.batch > 1 and any(row.get("failed") == OUT_OF_MEMORY for row in rows):
        release(trial.device)
        return measure_growth(replace(setting, batch=setting.batch // 2), trial)
    for row in rows:
        if "failed" not in row:
            row.update(
                mb_per_image=row["peak_memory_mb"] / setting.batch, milliseconds=row["milliseconds"] / setting.batch,
                milliseconds_quartiles=[end / setting.batch for end in row["milliseconds_quartiles"]],
            )
    return rows


def concatenated(qkvs: list[torch.Tensor], num_heads: int) -> torch.Tensor:
    """`broad_attention` as published: attention over (B, heads, N, L * head_dim) queries, keys and values."""
    layers = [split_qkv(qkv, num_heads) for qkv in qkvs]
    query, key, value = (torch.cat(tensors, dim=-1) for tensors in zip(*layers, strict=True))
    head_dim = layers[0][0].shape[-1]
    weights = (query * head_dim**-0.5 @ key.transpose(-2, -1)).softmax(dim=-1)
    return (weights @ value).unflatten(-1, (head_dim, len(qkvs))).mean(dim=-1).transpose(1, 2).flatten(2)


@torch.inference_mode()
def measure_broad(name: str, batch: int, trial: Trial) -> list[dict]:
    """One row for each part of a BViT at inference: time, ratio to its blocks, peak memory; or why it failed."""
    model = timm.create_model(name).eval().to(trial.device)
    images = torch.randn(batch, 3, *model.default_cfg["input_size"][1:], device=trial.device)

    def network(keep: Callable = lambda qkv: None):
        x, _ = model._embed(images)
        for block in model.blocks:
            x, qkv = block(x)
            keep(qkv)

    qkvs, heads = [], model.blocks[0].attn.num_heads
    network(keep=qkvs.append)
    parts = {
        NETWORK: network,
        CLASS_TOKEN: lambda: broad_attention(qkvs, heads, 1),
        ALL_TOKENS: lambda: broad_attention(qkvs, heads),
        CONCATENATED: lambda: concatenated(qkvs, heads),
    }
    rows = {part: dict(model=name, part=part, batch=batch) for part in parts}
    return compare(rows, {part: lambda run=run: run for part, run in parts.items()}, NETWORK, batch, trial)
