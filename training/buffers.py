"""Passes of a network that count for nothing."""
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch


def copy_buffers(network: torch.nn.Module) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Batch norm's running statistics and all other buffers, each with a copy of what it is now."""
    return [(buffer, buffer.clone()) for buffer in network.buffers()]


@torch.no_grad()
def put_back(copies: list[tuple[torch.Tensor, torch.Tensor]]):
    """Make the buffers what they were when they were copied."""
    for buffer, before in copies:
        buffer.copy_(before)


@contextmanager
def unchanged_buffers(network: torch.nn.Module) -> Iterator[None]:
    """Put all buffers back in the end."""
    copies = copy_buffers(network)
    try:
        yield
    finally:
        put_back(copies)


def discarded_pass(network: torch.nn.Module, loss: Callable[[], torch.Tensor]):
    """Take a forward and a backward pass of `network`, which change nothing in it but its mode.

    Args:
        network: The network with its wrappers.
        loss: Puts it into the mode in which it is trained, and computes a loss of it.
    """
    with unchanged_buffers(network):
        loss().backward()
        network.zero_grad()
