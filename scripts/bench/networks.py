"""Whole models side by side: images a second in inference and training, and memory."""
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import timm
import torch
import torch.nn.functional as F

from engine import Numerics
from tasks.networks import size_kwargs  # the root's, which registers our models with timm

from .timing import interleave, peak_memory, summarize, warm
from .trial import NO_TIME, Trial

INFER, TRAIN = "infer", "train"
NUM_CLASSES = 1000


@dataclass(frozen=True)
class Contender:
    """A timm model and how to create it; `kwargs` as pairs, to be hashable."""
    model: str
    kwargs: tuple = ()
    label: str = ""

    @property
    def name(self) -> str:
        return self.label or self.model


@dataclass(frozen=True)
class Setting:
    """How a model is run. `side` is of the images, `amp` as of `engine.Numerics.on`."""
    mode: str
    batch: int
    side: int = 224
    amp: str = "off"
    channels_last: bool = True
    compile: bool = False


@dataclass(frozen=True)
class Group:
    """Models measured together.

    Args:
        contenders: The models; the first two are of most interest.
        reference: Name of the one that ratios are to.
        setting: How all are run.
        compile_seconds: What compiling one may take; one that has less time left is not begun.
    """
    contenders: tuple[Contender, ...]
    reference: str
    setting: Setting
    compile_seconds: float = 0.0


@lru_cache(maxsize=9)
def _create(contender: Contender, side: int, device: torch.device) -> torch.nn.Module:
    """A model on the device; cached, since drawing the weights of the large ones takes seconds."""
    torch.manual_seed(0)
    kwargs = size_kwargs(contender.model, side) | dict(contender.kwargs)
    model = timm.create_model(contender.model, num_classes=NUM_CLASSES, **kwargs)
    for module in model.modules():
        # Some factories turn it on and some do not; here all train without.
        if isinstance(module, timm.layers.DropPath):
            module.drop_prob = 0.0
    return model.to(device)


def build(contender: Contender, setting: Setting, device: torch.device) -> tuple[Callable, torch.nn.Module]:
    """One inference batch or one training step of a model, to be called again and again."""
    memory_format = torch.channels_last if setting.channels_last else torch.contiguous_format
    model = _create(contender, setting.side, device).to(memory_format=memory_format).train(setting.mode == TRAIN)
    model.zero_grad()
    shape = (setting.batch, 3, setting.side, setting.side)
    numerics = Numerics.on(device, setting.amp, setting.channels_last)
    images = numerics.arrange(torch.randn(shape, device=device))
    network = torch.compile(model) if setting.compile else model

    def infer():
        with torch.inference_mode(), numerics.autocast():
            network(images)

    if setting.mode == INFER:
        return infer, model

    targets = torch.randint(NUM_CLASSES, (setting.batch,), device=device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def train():
        with numerics.autocast():
            loss = F.cross_entropy(network(images), targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return train, model


def _prepare(group: Group, trial: Trial) -> tuple[dict[str, Callable], dict[str, dict]]:
    """The contenders that run, warm, and what is known of each before it is timed."""
    runs, details = {}, {}
    dearest = group.compile_seconds
    late = False
    for i, contender in enumerate(group.contenders):
        name = contender.name
        if name in trial.failures:
            continue
        # The first is worth nothing without the second, which it is compared with.
        needed = dearest * (2 if i == 0 else 1)
        late = late or (group.setting.compile and time.time() + needed > trial.section_deadline)
        if late:
            trial.failures[name] = NO_TIME
            continue
        start = time.time()
        with trial.guard(name):
            run, model = build(contender, group.setting, trial.device)
            warm(run, trial.device)
            details[name] = dict(
                parameters=sum(p.numel() for p in model.parameters()),
                preparation_seconds=time.time() - start,
                peak_memory_mb=peak_memory(run, trial.device),
            )
            runs[name] = run
        dearest = max(dearest, time.time() - start)
    return runs, details


def measure(group: Group, trial: Trial) -> list[dict]:
    """One row for each model of the group: rate, ratio to the reference within a round, memory; or why not."""
    if group.setting.compile:
        torch._dynamo.reset()
    runs, details = _prepare(group, trial)
    seconds = interleave(runs, trial)
    setting = group.setting
    rows = []
    for contender in group.contenders:
        name = contender.name
        row = dict(
            model=name, mode=setting.mode, compiled=setting.compile, side=setting.side, batch=setting.batch,
            reference=group.reference,
        )
        if name in seconds:
            reference = seconds.get(group.reference)
            row.update(details[name], **summarize(seconds[name], reference, setting.batch))
        else:
            row.update(failed=trial.failures[name])
        rows.append(row)
    return rows
