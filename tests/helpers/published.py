"""Checkpoints as they were published, and the costs that papers list, for the tests of every family."""
import argparse
import json
import math
from pathlib import Path

import numpy as np
import torch
from fvcore.nn import FlopCountAnalysis
from fvcore.nn.jit_handles import get_shape

from helpers.golden import fill_, image

DATA = Path(__file__).parents[1] / "data"


def golden_tensors(name: str) -> dict[str, np.ndarray]:
    """What the published implementation computes in float64."""
    return np.load(DATA / f"{name}.npz")


def published_state_dict(name: str) -> dict[str, torch.Tensor]:
    """A checkpoint as it was published, with values made from the names."""
    layout = json.loads(str(golden_tensors(name)["state_dict"]))
    integers = ("num_batches_tracked", "relative_position_index")
    return {
        name: fill_(name, torch.empty(shape, dtype=torch.int64 if name.endswith(integers) else torch.float64))
        for name, shape in layout
    }


def save_published(name: str, path: Path, key: str = "model") -> Path:
    """Write a published file, in float32: the command line of the training lies beside the weights."""
    weights = {k: v.float() if v.is_floating_point() else v for k, v in published_state_dict(name).items()}
    torch.save({key: weights, "args": argparse.Namespace(lr=5e-4, model=name)}, path)
    return path


def relative_error(ours: torch.Tensor, expected: np.ndarray) -> float:
    """Largest difference, relative to the largest value expected."""
    return np.abs(ours.numpy() - expected).max() / np.abs(expected).max()


def assert_agrees(model, name):
    """The float64 `model`, with the weights of `published_state_dict(name)`, computes what the published one does."""
    golden = golden_tensors(name)
    with torch.inference_mode():
        features, stages = model.forward_intermediates(image(224, 224))
        logits = model.forward_head(features)[0]

    assert relative_error(logits, golden["logits"]) < 1e-8
    for i, stage in enumerate(stages):
        assert list(stage.shape) == list(golden[f"stage{i}_shape"])
        assert relative_error(stage[0].flatten(1).mean(1), golden[f"stage{i}_mean"]) < 1e-8
        assert relative_error(stage[0].flatten(1).std(1), golden[f"stage{i}_std"]) < 1e-8


def _attention_macs(inputs: list, outputs: list) -> int:
    *batch, queries, head_dim = get_shape(inputs[0])
    keys, value_dim = get_shape(inputs[2])[-2:]
    return math.prod(batch) * queries * keys * (head_dim + value_dim)


def gmacs(model: torch.nn.Module, size: int = 224) -> float:
    """Multiply-accumulate operations for one image, in 1e9; fvcore alone leaves fused attention out."""
    counter = FlopCountAnalysis(model.eval(), torch.randn(1, 3, size, size))
    counter.set_op_handle("aten::scaled_dot_product_attention", _attention_macs)
    return counter.unsupported_ops_warnings(False).uncalled_modules_warnings(False).total() / 1e9
