"""The processes of a run: how they start, and what they share."""
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from timm.utils import ModelEmaV3, distribute_bn
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel

from utils import UserError

from .buffers import discarded_pass
from .launcher import local_rank, rank_and_size, restart_count
from .progress import Progress


class DeviceError(UserError):
    """The device that was asked for cannot be used."""


@dataclass(frozen=True)
class Distributed:
    """This process among those of the run.

    Args:
        device: The device of this process.
        rank: Its number, 0 for the main process.
        world_size: The number of processes.
        progress: What it does now, for the watch on runs that hang.
    """

    device: torch.device
    rank: int = 0
    world_size: int = 1
    progress: Progress = field(default_factory=Progress, compare=False)

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def is_distributed(self) -> bool:
        return self.world_size > 1

    @property
    def kind(self) -> str:
        """What kind of device this is: those of another kind may round otherwise."""
        is_cuda = self.device.type == "cuda"
        return torch.cuda.get_device_name(self.device) if is_cuda else torch.backends.cpu.get_cpu_capability()

    def alone(self) -> "Distributed":
        """This process as if it were the only one: for what every process does in full."""
        return replace(self, rank=0, world_size=1)

    def print(self, line: str):
        """Print a line on the main process alone."""
        if self.is_main:
            print(line)

    def mean(self, values: torch.Tensor) -> torch.Tensor:
        """Mean of `values` over all processes."""
        return self.sum(values) / self.world_size

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Sum of `values` over all processes."""
        if self.is_distributed:
            values = values.clone()
            with self.progress.waiting():
                dist.all_reduce(values)
        return values

    def max(self, value: int) -> int:
        """The largest `value` of all processes, exchanged between CPUs: nothing waits for a GPU."""
        if not self.is_distributed:
            return value
        largest = torch.tensor(value)
        with self.progress.waiting():
            dist.all_reduce(largest, dist.ReduceOp.MAX)
        return int(largest)

    def gather(self, values: list[int]) -> list[list[int]]:
        """The `values` of each process, as many in each, exchanged between CPUs as by `max`."""
        if not self.is_distributed:
            return [values]
        own = torch.tensor(values)
        gathered = [torch.empty_like(own) for _ in range(self.world_size)]
        with self.progress.waiting():
            dist.all_gather(gathered, own)
        return [of_rank.tolist() for of_rank in gathered]

    def gather_objects(self, value: Any) -> list[Any] | None:
        """The `value` of each process on the main process, None on the others; pickled, and exchanged between CPUs."""
        if not self.is_distributed:
            return [value]
        gathered = [None] * self.world_size if self.is_main else None
        with self.progress.waiting():
            dist.gather_object(value, gathered)
        return gathered

    def broadcast_object(self, value: Any) -> Any:
        """The main process's `value` on all of them; pickled, and exchanged between CPUs."""
        if not self.is_distributed:
            return value
        shared = [value]
        with self.progress.waiting():
            dist.broadcast_object_list(shared, device=torch.device("cpu"))
        return shared[0]


def init_distributed(device: str = "auto", timeout: float = 30.0) -> Distributed:
    """Join the processes that torchrun or torch.distributed.launch started, or start a run of a single process.

    Args:
        device: "auto" (a GPU where there is one), "cuda", "cuda:1" or "cpu".
        timeout: Minutes that a process waits for another before it gives up.

    Raises:
        DeviceError: The device is not there.
        UserError: The launcher's environment variables are wrong; see `launcher.rank_and_size`.
    """
    rank, size = rank_and_size()
    resolved = _resolve(device)
    if resolved.type == "cuda":
        torch.cuda.set_device(resolved)
    if size > 1:
        # CPU tensors travel by gloo also where there are GPUs: agreeing to save or to leave waits for no kernel.
        backend = "cpu:gloo,cuda:nccl" if resolved.type == "cuda" else "gloo"
        wait = timedelta(minutes=timeout)
        store, rank, size = next(rendezvous("env://", timeout=wait))
        # With --master_port, torchrun's store survives a restart, and with it the addresses of processes that ended.
        store = dist.PrefixStore(f"start-{restart_count()}", store)
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=wait)
    return Distributed(resolved, rank, size)


def _resolve(device: str) -> torch.device:
    wanted = device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        resolved = torch.device(device)
        if resolved.type == "cuda" and resolved.index is None:
            resolved = torch.device("cuda", local_rank())
        torch.empty(1, device=resolved)
    except (RuntimeError, AssertionError) as error:
        raise DeviceError(f"device {wanted} cannot be used ({str(error).splitlines()[0]})") from error
    return resolved


def shutdown_distributed():
    """Leave the process group. Gloo's need not be left, and torch 2.6 can hang in doing so when a peer left before."""
    if dist.is_initialized() and dist.get_backend() != "gloo":
        dist.destroy_process_group()


def wrap_ddp(network: torch.nn.Module, distributed: Distributed) -> torch.nn.Module:
    """The network as it is trained: in DistributedDataParallel where there are several processes.

    A network that is compiled is compiled first. The compiler then never sees DistributedDataParallel's own code, in
    which its graph would break; it knows what it is called in all the same, and ends graphs where buckets of gradients
    are full, so that these travel while the backward pass goes on.
    """
    if not distributed.is_distributed:
        return network
    device_ids = [distributed.device] if distributed.device.type == "cuda" else None
    return DistributedDataParallel(network, device_ids=device_ids)


def warm_up_ddp(network: torch.nn.Module, distributed: Distributed, loss: Callable[[], torch.Tensor]):
    """Take one backward pass that changes nothing, so that no pass which counts is DDP's first after a start.

    In its first pass DistributedDataParallel learns in which order gradients come, and rebuilds its buckets. The sums
    of three processes or more depend on the buckets in the last digit: a resumed run would differ.

    Args:
        network: The network with its wrappers.
        distributed: This process.
        loss: As `discarded_pass` takes it, of a batch of the usual size.
    """
    if distributed.world_size < 3:
        return
    discarded_pass(network, loss)


def share_statistics(model: torch.nn.Module, ema: ModelEmaV3 | None, distributed: Distributed):
    """Make batch norm's running statistics the same on all processes; at the last step each saw its own images.

    The model's become their mean. The EMA's become the main process's, as in checkpoints within an epoch. Where all
    batch norms are frozen, they stay as they are to the bit.
    """
    norms = (module for module in model.modules() if getattr(module, "running_mean", None) is not None)
    if distributed.is_distributed and any(norm.training for norm in norms):
        distribute_bn(model, distributed.world_size, reduce=True)
        if ema is not None:
            distribute_bn(ema.module, distributed.world_size, reduce=False)
