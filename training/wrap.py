"""A model as it is trained: compiled, captured in CUDA graphs, in DistributedDataParallel."""
import time
from collections.abc import Callable
from datetime import timedelta

import torch

from .buffers import discarded_pass
from .compiler import check_compiler, compiled
from .cuda_graphs import GraphedTraining, check_cuda_graphs
from .distributed import Distributed, warm_up_ddp, wrap_ddp
from .options import MachineOptions, Settings
from .precision import Precision


def check_wrappers(settings: Settings, distributed: Distributed):
    """Raises a UserError where what is asked for cannot work here. Evaluation replays no graphs."""
    if settings.machine.compile:
        check_compiler(distributed.device)
    if settings.machine.cuda_graph and not settings.evaluation.eval:
        check_cuda_graphs(distributed)


def compiled_as_asked(network: torch.nn.Module, machine: MachineOptions, distributed: Distributed) -> torch.nn.Module:
    """The network, compiled where that is asked for."""
    return compiled(network, distributed.is_main) if machine.compile else network


def wrap(
    model: torch.nn.Module, machine: MachineOptions, precision: Precision, distributed: Distributed
) -> torch.nn.Module:
    """The model with the wrappers that are asked for, which `check_wrappers` has passed."""
    network = compiled_as_asked(model, machine, distributed)
    return GraphedTraining(network, precision) if machine.cuda_graph else wrap_ddp(network, distributed)


def warm_up(
    network: torch.nn.Module, machine: MachineOptions, distributed: Distributed, loss: Callable[[], torch.Tensor]
):
    """Take the pass that compiles a network, with a word about it, or the one that DistributedDataParallel needs.

    Args:
        network: What `wrap` returned.
        machine: Which wrappers were asked for.
        distributed: This process.
        loss: `training.task.Task.dummy_loss` of `network`.
    """
    if machine.compile:
        start = time.perf_counter()
        discarded_pass(network, loss)
        if distributed.is_main:
            print(f"compiled in {timedelta(seconds=round(time.perf_counter() - start))}", flush=True)
    else:
        warm_up_ddp(network, distributed, loss)
