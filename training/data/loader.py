"""Data loading that is seeded and can resume at any batch: every random choice about a sample follows from (seed,
epoch, position in the epoch), never from what was read before or by which process.
"""
import errno
import os
import random
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from multiprocessing import parent_process
from multiprocessing.queues import Queue
from types import TracebackType
from typing import Any, Protocol

import numpy as np
import torch
from timm.data.distributed_sampler import RepeatAugSampler
from torch._utils import ExceptionWrapper
from torch.utils.data import DataLoader, Dataset, DistributedSampler, Sampler, default_collate, get_worker_info

from utils import UserError, count, derive_seed, printable, seed_generators

from ..distributed import Distributed
from ..options import LoaderOptions
from ..process import end_with_parent
from ..signals import OpenFilesFault, SharedMemoryFault
from ..tensors import map_tensors
from ..waits import GaveUpWaiting, NoDataFault, wait_for

# Errors that end the run, whose frames hold the loader. Freed, it would wait for each of its processes, of which some
# may never answer, and that have nothing left to say; as it is, they end with this one.
_of_ended_loaders: list[Exception] = []
# Errors, with which a data loading process also exits.
_TOO_MANY_FILES = {errno.EMFILE, errno.ENFILE}
# How many of the images that were skipped are named.
_NAMED = 5


# --- randomness -------------------------------------------------------------------------------------------------------


@contextmanager
def seeded(seed: int, device: torch.device | None = None) -> Iterator[None]:
    """Seed the generators of Python, NumPy and torch (CPU, and `device` if it is CUDA); restores them at the end."""
    # torch.manual_seed would also reseed every CUDA device, permanently
    generators = [torch.default_generator]
    if device is not None and device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
        generators.append(torch.cuda.default_generators[index])
    before = random.getstate(), np.random.get_state(), [generator.get_state() for generator in generators]
    seed_generators(seed, *(generator.manual_seed for generator in generators))
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        for generator, state in zip(generators, before[2], strict=True):
            generator.set_state(state)


def seeded_sample(seed: int) -> AbstractContextManager[None]:
    """`seeded`, but without restoring in a worker: nothing else draws there, and NumPy's state takes 60 us a time."""
    if get_worker_info() is None:
        return seeded(seed)
    seed_generators(seed, torch.default_generator.manual_seed)
    return nullcontext()


class SeededSampler(Sampler):
    """Yields (index, seed) for each index of `sampler`, which has a method `set_epoch`.

    The seed follows from the index's position among the indices of all processes: augmentation is the same on any
    number of processes.
    """

    def __init__(self, sampler: Sampler, seed: int, rank: int, world_size: int):
        self.sampler, self.seed, self.rank, self.world_size = sampler, seed, rank, world_size
        self.set_epoch(0)

    def set_epoch(self, epoch: int, start: int = 0):
        """Make the next pass that of `epoch`, without its first `start` indices."""
        self.epoch, self.start = epoch, start
        self.sampler.set_epoch(self.seed + epoch)  # RepeatAugSampler takes no seed of its own

    def __iter__(self) -> Iterator[tuple[int, int]]:
        for position, index in enumerate(self.sampler):
            if position >= self.start:
                yield index, derive_seed(self.seed, self.epoch, position * self.world_size + self.rank)

    def __len__(self) -> int:
        """Indices of a whole epoch."""
        return len(self.sampler)

    @property
    def ranges(self) -> int:
        """Into how many ranges an epoch is cut, one for each process; 1 where its indices are dealt out in turn."""
        return getattr(self.sampler, "ranges", 1)


# --- batches ----------------------------------------------------------------------------------------------------------


class Transfer(Protocol):
    """Brings the batches of a DataLoader to the device, and does there what a task does to whole batches."""

    def start(self, key: tuple[int, ...], first_batch: int):
        """Begin the epoch of `key` (seed, epoch, rank) at its batch `first_batch`."""

    def __iter__(self) -> Iterator[Any]:
        """The batches on the device."""


class ToDevice:
    """Moves the tensors of (nested tuples, lists and dictionaries of) a batch to a device."""

    def __init__(self, loader: DataLoader, device: torch.device):
        self.loader, self.device = loader, device

    def start(self, key: tuple[int, ...], first_batch: int):
        """Nothing here is random."""

    def __iter__(self) -> Iterator[Any]:
        return (map_tensors(batch, self._move) for batch in self.loader)

    def _move(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(self.device, non_blocking=True)


class EpochLoader:
    """Batches on the device; each epoch follows from the seed, the epoch and the rank alone.

    Args:
        loader: Its generator seeds the data loading processes. Where its dataset has a method `arriving`, see
            `wait_for`.
        transfer: DataLoader -> `Transfer`.
        seed: The run's.
        rank: This process's.
        timeout: Seconds that a batch may take; 0 for no limit.
    """

    def __init__(
        self,
        loader: DataLoader,
        transfer: Callable[[DataLoader], Transfer],
        seed: int = 0,
        rank: int = 0,
        timeout: float = 0.0,
    ):
        self.loader, self.transfer, self.seed, self.rank = loader, transfer(loader), seed, rank
        self.timeout = timeout
        self.arriving = getattr(loader.dataset, "arriving", lambda: None)
        self.set_epoch(0)

    def __len__(self) -> int:
        """Batches of a whole epoch."""
        return len(self.loader)

    @property
    def dataset(self) -> Dataset:
        return self.loader.dataset

    @property
    def sampler(self) -> Iterable:
        return self.loader.sampler

    @property
    def ranges(self) -> int:
        """As of `SeededSampler`."""
        return self.sampler.ranges if isinstance(self.sampler, SeededSampler) else 1

    def set_epoch(self, epoch: int, first_batch: int = 0):
        """Make the next pass that of `epoch`, from its batch `first_batch` on; earlier ones are not read."""
        self.epoch, self.first_batch = epoch, first_batch

    def __iter__(self) -> Iterator[Any]:
        """Raises `NoDataFault` or `GaveUpWaiting` as `wait_for` does."""
        self._start_epoch()
        try:
            batches = wait_for(lambda: iter(self.transfer), self.timeout)
            while (batch := wait_for(lambda: next(batches, None), self.timeout, self.arriving)) is not None:
                yield batch
            return
        except (NoDataFault, GaveUpWaiting, OSError, RuntimeError, MemoryError) as error:
            _of_ended_loaders.append(error)
            if cause := self._cause(error):
                raise cause from error
            raise
        except UserError as error:
            # From a worker its text is a traceback that ends in the line we want, and its frames hold the iterator in
            # a cycle. Left to the garbage collector, the iterator would wait five seconds for each of its workers.
            line = re.split(r"^[\w.]+Error: ", str(error), flags=re.MULTILINE)[-1].strip()
            kind = type(error)
            error.__traceback__ = None
        raise kind(line)

    def _cause(self, error: Exception) -> UserError | None:
        """What is known of an error beyond what it says."""
        workers = getattr(getattr(self.loader, "_iterator", None), "_workers", [])
        if _TOO_MANY_FILES & {worker.exitcode for worker in workers}:
            return OpenFilesFault("too many open files in a data loading process")
        # The semaphores of its processes lie there too.
        if isinstance(error, OSError) and error.errno == errno.ENOSPC and error.filename is None:
            return SharedMemoryFault(f"shared memory, /dev/shm, is too small or full ({error.strerror})")
        return None

    def _start_epoch(self):
        key = self.seed, self.epoch, self.rank
        self.loader.generator.manual_seed(derive_seed(*key))
        self.transfer.start(key, self.first_batch)
        if isinstance(self.sampler, SeededSampler):
            self.sampler.set_epoch(self.epoch, start=self.first_batch * self.loader.batch_size)


# --- workers ----------------------------------------------------------------------------------------------------------


def _report_error(kind: type[BaseException], error: BaseException, traceback: TracebackType | None):
    if isinstance(error, OSError) and error.errno in _TOO_MANY_FILES:
        os._exit(error.errno)  # the thread that hands batches over would try again for ever
    # That thread finds its connection closed where the main process stops before the last one.
    if not issubclass(kind, ConnectionError | EOFError):
        sys.__excepthook__(kind, error, traceback)


def _hand_over_error(queue: Queue, error: Exception, batch: tuple[int, Any] | bytes):
    # In place of the batch that cannot be handed over, for which the main process would wait for ever.
    if isinstance(batch, bytes):  # pickled: the connection itself is at fault
        os._exit(1)
    wrapped = ExceptionWrapper((RuntimeError, error, error.__traceback__), f"in data loading process {os.getpid()}")
    queue.put((batch[0], wrapped))


def _follow_main_process(worker: int):
    sys.excepthook, Queue._on_queue_feeder_error = _report_error, _hand_over_error
    # A terminal and Slurm send signals to every process; the run's main process decides what comes of them.
    for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    if sys.platform == "linux":
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_exit_on_sigterm_of_main, daemon=True).start()
        # A worker that waits for a lock which a killed process held would outlive the main process forever.
        end_with_parent()


def _exit_on_sigterm_of_main():
    # When it exits, the main process sends its workers a SIGTERM and waits for them.
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent_process().pid:
        pass
    os._exit(128 + signal.SIGTERM)


def training_sampler(dataset: Dataset, distributed: Distributed, repeats: int = 1) -> Sampler:
    """The order in which this process trains on a data set, each sample `repeats` (1 or 3) times; has `set_epoch`.

    A data set that is not to be read in any order has a method `sampler(world_size, rank, repeats)` of its own.
    """
    world_size, rank = distributed.world_size, distributed.rank
    own_sampler = getattr(dataset, "sampler", None)
    if own_sampler is not None:
        return own_sampler(world_size, rank, repeats)
    if repeats > 1:
        # by default the sampler rounds down to a multiple of 256 samples, most of a small data set
        return RepeatAugSampler(dataset, world_size, rank, num_repeats=repeats, selected_round=0)
    # drop_last: rather leave out a few samples than see some of them twice
    return DistributedSampler(dataset, world_size, rank, drop_last=True)


def build_loader(
    dataset: Dataset,
    options: LoaderOptions,
    distributed: Distributed,
    *,
    train: bool,
    seed: int = 0,
    repeats: int = 1,
    collate_fn: Callable = default_collate,
    transfer: Callable[[DataLoader], Transfer] | None = None,
) -> EpochLoader:
    """Batches of a data set for one process.

    In training every process gets the same number of full batches, shuffled. In evaluation each sample comes once over
    all processes, in order; the last batch may be small, and one process may get fewer batches than another, or none.

    Args:
        dataset: Samples by index; in training by (index, seed), where augmentation is a function of the seed.
        options: Batch size, data loading processes, page-locked memory.
        distributed: This process, among those that share the data.
        train: Which of the two.
        seed: The run's.
        repeats: How many times an epoch trains on a sample, 1 or 3; on different processes, or side by side on one.
        collate_fn: List of samples -> batch.
        transfer: DataLoader -> `Transfer`; by default the tensors of a batch are moved to the device.

    Raises:
        UserError: The training set is smaller than one batch over all processes.
    """
    size, world_size = options.batch_size, distributed.world_size
    if train and len(dataset) < size * world_size:
        raise UserError(
            f"the training set has {count(len(dataset), 'image')}, fewer than one batch of {size * world_size} "
            f"({size} on each of {count(world_size, 'process')}); use a smaller batch size"
        )
    sampler = range(distributed.rank, len(dataset), world_size)
    if train:
        sampler = SeededSampler(training_sampler(dataset, distributed, repeats), seed, distributed.rank, world_size)
    device = distributed.device
    loader = DataLoader(
        dataset,
        batch_size=size,
        sampler=sampler,
        num_workers=options.num_workers,
        collate_fn=collate_fn,
        pin_memory=options.pin_mem and device.type == "cuda",
        drop_last=train,
        persistent_workers=options.num_workers > 0,
        generator=torch.Generator(),  # the global one would otherwise be drawn from each epoch
        worker_init_fn=_follow_main_process,
    )
    on_device = transfer or (lambda loader: ToDevice(loader, device))
    return EpochLoader(loader, on_device, seed, distributed.rank, options.loader_timeout)


@contextmanager
def report_skipped(dataset: Dataset, shared: Distributed, is_main: bool) -> Iterator[None]:
    """Print, at the end, how many different images were skipped since the start, and the names of the first.

    Args:
        dataset: What is read. One that skips images marks them in `bad_images`, as `datasets.ImageDataset`.
        shared: This process, among those that share the images.
        is_main: Whether this process prints.
    """
    bad = getattr(dataset, "bad_images", None)
    if bad is None:
        yield
        return
    bad.zero_()
    yield
    skipped = shared.sum(bad.to(shared.device, torch.int32)).nonzero().flatten().tolist()
    if is_main and skipped:
        first = [dataset.name(index) for index in skipped[:_NAMED]]
        more = f" and {len(skipped) - _NAMED} more" if len(skipped) > _NAMED else ""
        print(f"skipped {count(len(skipped), 'image')} that could not be read: {printable(', '.join(first))}{more}")
