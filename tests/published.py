"""What the published implementations compute and how their checkpoints are laid out, from the files in `data`."""
import json
from pathlib import Path

import numpy as np
import torch
from golden import fill_, image

DATA = Path(__file__).parent / "data"


def published_state_dict(name):
    """A checkpoint as it was published, with values made from the names."""
    layout = json.loads(str(np.load(DATA / f"{name}.npz")["state_dict"]))
    integers = ("num_batches_tracked", "relative_position_index")
    return {
        name: fill_(name, torch.empty(shape, dtype=torch.int64 if name.endswith(integers) else torch.float64))
        for name, shape in layout
    }


def assert_agrees(model, name):
    """The float64 `model`, with the weights of `published_state_dict(name)`, computes what the published one does."""
    golden = np.load(DATA / f"{name}.npz")
    with torch.inference_mode():
        features, stages = model.forward_intermediates(image(224, 224))
        logits = model.forward_head(features)[0]

    def relative_error(ours, expected):
        return np.abs(ours.numpy() - expected).max() / np.abs(expected).max()

    assert relative_error(logits, golden["logits"]) < 1e-8
    for i, stage in enumerate(stages):
        assert list(stage.shape) == list(golden[f"stage{i}_shape"])
        assert relative_error(stage[0].flatten(1).mean(1), golden[f"stage{i}_mean"]) < 1e-8
        assert relative_error(stage[0].flatten(1).std(1), golden[f"stage{i}_std"]) < 1e-8
