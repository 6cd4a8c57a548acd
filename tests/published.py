"""Checkpoints in the published layouts, and what the published implementations compute with them."""
import json
from pathlib import Path

import numpy as np
import torch
from golden import fill_, image

DATA = Path(__file__).parent / "data"


def published_state_dict(golden_name):
    """A checkpoint as it was published, with float64 values made from the names."""
    layout = json.loads(str(np.load(DATA / f"{golden_name}.npz")["state_dict"]))
    state_dict = {}
    for name, shape in layout:
        integer = name.endswith(("num_batches_tracked", "relative_position_index"))
        state_dict[name] = fill_(name, torch.empty(shape, dtype=torch.int64 if integer else torch.float64))
    return state_dict


def relative_error(ours, expected):
    return np.abs(ours.numpy() - expected).max() / np.abs(expected).max()


def assert_agrees_with_golden(model, golden_name, checkpoint_filter_fn):
    """Logits, and the mean and spread of every channel after each stage, to 1e-8 in float64."""
    golden = np.load(DATA / f"{golden_name}.npz")
    model = model.double().eval()
    model.load_state_dict(checkpoint_filter_fn({"model": published_state_dict(golden_name)}, model))
    with torch.inference_mode():
        features, stages = model.forward_intermediates(image(224, 224))
        logits = model.forward_head(features)[0]
    assert relative_error(logits, golden["logits"]) < 1e-8
    for i, stage in enumerate(stages):
        assert list(stage.shape) == list(golden[f"stage{i}_shape"])
        assert relative_error(stage[0].flatten(1).mean(1), golden[f"stage{i}_mean"]) < 1e-8
        assert relative_error(stage[0].flatten(1).std(1), golden[f"stage{i}_std"]) < 1e-8
