"""Passes of a network that count for nothing."""
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch


@contextmanager
def unchanged_buffers(network: torch.nn.Module) -> Iterator[None]:
    """Put batch norm's running statistics, and all other buffers, back in the end."""
    buffers = [(buffer, buffer.clone()) for buffer in network.buffers()]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)


def discarded_pass(network: torch.nn.Module, loss: Callable[[], torch.Tensor]):
    """Take a forward and a backward pass of `network`, which change nothing in it but its mode.

    Args:
        network: The network with its wrappers.
        loss: Puts it into the mode in which it is trained, and computes a loss of it.
    """
    with unchanged_buffers(network):
        loss().backward()
        network.zero_grad()
