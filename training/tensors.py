"""Tensors in nested containers: of a batch, of the state of a run."""
from collections.abc import Callable
from typing import Any

import torch


def map_tensors(value: Any, function: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """`value` in new dictionaries, lists and (named) tuples, with `function` of each tensor; all else as it is."""
    if isinstance(value, torch.Tensor):
        return function(value)
    if isinstance(value, dict):
        return {key: map_tensors(item, function) for key, item in value.items()}
    if isinstance(value, list | tuple):
        items = [map_tensors(item, function) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)  # a namedtuple has names
    return value


def copy_to_memory(state: Any) -> Any:
    """A copy of `state` that does not change with it, its tensors on the CPU."""
    return map_tensors(state, lambda tensor: tensor.detach().to("cpu", copy=True))
