"""A model as it is trained: compiled, captured in CUDA graphs, in DistributedDataParallel."""
import torch

from .compiler import check_compiler
from .cuda_graphs import capture_on_first_step, check_cuda_graphs
from .distributed import Distributed, wrap_ddp
from .options import MachineOptions
from .precision import Precision


def check_wrappers(machine: MachineOptions, distributed: Distributed):
    """Raises a UserError where what is asked for cannot work here."""
    if machine.compile:
        check_compiler(distributed.device)
    if machine.cuda_graph:
        check_cuda_graphs(distributed)


def wrap(
    model: torch.nn.Module, machine: MachineOptions, precision: Precision, distributed: Distributed
) -> torch.nn.Module:
    """The model with the wrappers that are asked for, which `check_wrappers` has passed."""
    if machine.cuda_graph:
        capture_on_first_step(model, precision)
    return wrap_ddp(torch.compile(model) if machine.compile else model, distributed)
