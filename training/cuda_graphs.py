"""The forward and backward pass of a network as CUDA graphs.

A step of many small layers waits for the host, which launches thousands of kernels. A graph is launched at once, and
the kernels in it follow one another on the GPU.
"""
import torch

from utils import UserError

from .distributed import Distributed
from .precision import Precision


class CudaGraphError(UserError):
    """The training pass cannot be captured here, or was captured for other images."""


def check_cuda_graphs(distributed: Distributed):
    """Raises CudaGraphError where there is no GPU, or there are several processes, whose sums were not tested so."""
    if distributed.device.type != "cuda":
        raise CudaGraphError(f"CUDA graphs need a GPU, the device is {distributed.device.type}")
    if distributed.is_distributed:
        raise CudaGraphError(f"CUDA graphs are for a run of one process, there are {distributed.world_size}")


def capture_on_first_step(network: torch.nn.Module, precision: Precision):
    """Let the network capture its training pass when it is first called in training mode, and replay it from then on.

    Evaluation is left as it is. The gradients lie in the graph's own memory, and the next backward pass overwrites
    them: an optimizer step has to follow each pass.

    Args:
        network: Called with tensors, all of them of the same shapes at each training step.
        precision: What the network is called in.
    """
    eager = network.forward

    def first(*inputs: torch.Tensor):
        if not network.training:
            return eager(*inputs)
        network.forward = eager
        _capture(network, inputs, precision)
        network.forward = _checked(network.forward, network, [x.shape for x in inputs])
        return network(*inputs)

    network.forward = first


def _checked(replay, network: torch.nn.Module, shapes: list[torch.Size]):
    """`replay`, which would copy other shapes into its own input as far as they can be broadcast."""
    def forward(*inputs: torch.Tensor):
        if network.training and [x.shape for x in inputs] != shapes:
            got = [tuple(x.shape) for x in inputs]
            raise CudaGraphError(f"the training pass was captured for {[tuple(s) for s in shapes]}, got {got}")
        return replay(*inputs)

    return forward


def _capture(network: torch.nn.Module, inputs: tuple[torch.Tensor, ...], precision: Precision):
    """Capture, which warms up by passes that count for nothing: running statistics and random numbers are put back."""
    device = inputs[0].device
    random_state = torch.cuda.get_rng_state(device)
    buffers = [(buffer, buffer.clone()) for buffer in network.buffers()]
    examples = tuple(x.detach().clone() for x in inputs)
    # A cached cast would be made once, during capture, and never again from the weights as they are then.
    with torch.autocast(precision.device_type, precision.amp_dtype, precision.amp_dtype is not None, False):
        torch.cuda.make_graphed_callables(network, examples, allow_unused_input=True)
    with torch.no_grad():
        for buffer, before in buffers:
            buffer.copy_(before)
    torch.cuda.set_rng_state(random_state, device)
