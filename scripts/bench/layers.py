"""The layers around attention, as PyTorch computes them and fused: layer norm and depthwise convolution."""
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from ops import LAYER_IMPLS, add_layer_norm, depthwise_conv, layer_norm
from ops.support import triton_unsupported

from .timing import Trial, compare

REFERENCE = "torch"
NORM, ADD_NORM = "layer norm", "sum and its layer norm"
POSITION, LOCAL = "3 x 3 convolution + x", "5 x 5 convolution + attended"
LAYERS = (NORM, ADD_NORM, POSITION, LOCAL)


@dataclass(frozen=True)
class LayerCase:
    """A layer of a stage, forward and backward, as a training step calls it: maps in `dtype`, parameters in float32."""
    layer: str
    stage: str
    batch: int
    side: int
    channels: int
    dtype: torch.dtype = torch.bfloat16


def build(case: LayerCase, impl: str, device: torch.device) -> Callable[[], tuple[torch.Tensor, ...]]:
    """A function that computes output and gradients of maps and parameters."""
    generator = torch.Generator(device).manual_seed(0)

    def random(*shape: int, dtype: torch.dtype = case.dtype) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device=device, dtype=dtype).requires_grad_()

    shape = (case.batch, case.side, case.side, case.channels)
    x, other, upstream = (random(*shape) for _ in range(3))
    bias = random(case.channels, dtype=torch.float32)
    if case.layer in (NORM, ADD_NORM):
        weight = random(case.channels, dtype=torch.float32)
    else:
        kernel = 3 if case.layer == POSITION else 5
        weight = random(case.channels, 1, kernel, kernel, dtype=torch.float32)
    # The local term reads the values where the projection wrote them, beside queries and keys.
    value = random(*shape[:3], 3 * case.channels)

    def call() -> tuple[torch.Tensor, ...]:
        if case.layer == NORM:
            return (layer_norm(x, weight, bias, 1e-6, impl),)
        if case.layer == ADD_NORM:
            return add_layer_norm(x, other, weight, bias, 1e-6, impl)
        if case.layer == POSITION:
            return (depthwise_conv(x, weight, bias, x, impl),)
        return (depthwise_conv(value[..., 2 * case.channels :], weight, bias, other, impl),)

    maps = {NORM: (x,), ADD_NORM: (x, other), POSITION: (x,), LOCAL: (value, other)}[case.layer]

    def run() -> tuple[torch.Tensor, ...]:
        with torch.autocast(device.type, case.dtype, enabled=case.dtype != torch.float32):
            # What comes next in the network, a linear layer, rounds to the low precision.
            outs = tuple(out.to(case.dtype) for out in call())
        return outs + torch.autograd.grad(outs, [*maps, weight, bias], [upstream] * len(outs))

    return run


def measure(case: LayerCase, trial: Trial) -> list[dict]:
    """One row for each implementation: time on the device, ratio to PyTorch's, memory; or why it failed."""
    about = dict(layer=case.layer, stage=case.stage, case=f"{case.side} x {case.side} x {case.channels}",
                 batch=case.batch, dtype=str(case.dtype).removeprefix("torch."))
    rows = {impl: dict(about, impl=impl) for impl in LAYER_IMPLS}
    reason = triton_unsupported(torch.empty(0, dtype=case.dtype, device=trial.device))
    if reason is not None:
        trial.failures["triton"] = reason
    builders = {impl: partial(build, case, impl, trial.device) for impl in rows}
    return compare(rows, builders, REFERENCE, case.batch, trial, queued=True)
