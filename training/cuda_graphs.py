"""The forward and backward pass of a network as CUDA graphs.

A step of many small layers waits for the host, which launches thousands of kernels. A graph is launched at once, and
the kernels in it follow one another on the GPU.
"""
import torch

from utils import UserError, one_line

from .buffers import unchanged_buffers
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


class GraphedTraining(torch.nn.Module):
    """A network whose training pass is captured when it is first called in training mode, and replayed from then on.

    Evaluation is left as it is, and so is the network itself. The gradients lie in the graph's own memory, and the next
    backward pass overwrites them: an optimizer step has to follow each pass.

    Args:
        network: Called with tensors, of the same shapes and types at each training step.
        precision: What the network is called in.
    """

    def __init__(self, network: torch.nn.Module, precision: Precision):
        super().__init__()
        self.network = network
        self.precision = precision
        self.captured = torch.nn.Sequential(network)  # capture changes how a module is called
        self.inputs: list[tuple] | None = None

    def forward(self, *inputs: torch.Tensor):
        """What the network returns.

        Raises:
            CudaGraphError: It cannot be captured, or was for inputs of other shapes or types.
        """
        if not self.training:
            return self.network(*inputs)
        found = [(tuple(x.shape), x.dtype) for x in inputs]
        if self.inputs is None:
            _capture(self.captured, inputs, self.precision)
            self.inputs = found
        elif found != self.inputs:  # they would be copied into the graph's inputs as far as they can be broadcast
            raise CudaGraphError(f"the training pass was captured for {self.inputs}, got {found}")
        return self.captured(*inputs)


def _capture(network: torch.nn.Module, inputs: tuple[torch.Tensor, ...], precision: Precision):
    """Capture, which warms up by passes that count for nothing: running statistics and random numbers are put back."""
    device = inputs[0].device
    random_state = torch.cuda.get_rng_state(device)
    examples = tuple(x.detach().clone() for x in inputs)
    # A cached cast would be made once, during capture, and never again from the weights as they are then.
    autocast = torch.autocast(precision.device_type, precision.amp_dtype, precision.amp_dtype is not None, False)
    try:
        with unchanged_buffers(network), autocast:
            torch.cuda.make_graphed_callables(network, examples, allow_unused_input=True)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise CudaGraphError(f"the training pass cannot be captured ({one_line(error)})") from error
    torch.cuda.set_rng_state(random_state, device)
