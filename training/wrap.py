"""A model as it is trained: compiled, captured in CUDA graphs, in DistributedDataParallel."""
import torch

from .compiler import check_compiler
from .cuda_graphs import GraphedTraining, check_cuda_graphs
from .distributed import Distributed, wrap_ddp
from .options import MachineOptions, Settings
from .precision import Precision


def check_wrappers(settings: Settings, distributed: Distributed):
    """Raises a UserError where what is asked for cannot work here. Evaluation replays no graphs."""
    if settings.machine.compile:
        check_compiler(distributed.device)
    if settings.machine.cuda_graph and not settings.evaluation.eval:
        check_cuda_graphs(distributed)


def wrap(
    model: torch.nn.Module, machine: MachineOptions, precision: Precision, distributed: Distributed
) -> torch.nn.Module:
    """The model with the wrappers that are asked for, which `check_wrappers` has passed."""
    if machine.cuda_graph:
        return GraphedTraining(model, precision)
    return wrap_ddp(torch.compile(model) if machine.compile else model, distributed)
