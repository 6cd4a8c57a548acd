"""The interface that every task implements: everything that a run asks of classification, or of your own task.

A run uses a task in this order (`main.py`):

    task = MyTask(settings, distributed, precision)
    data = Data.of(task)                     # task.dataset("train") and "val", and a task.loader(...) for each
    network = task.network()                 # built for these data, with the weights that it starts from
    task.check_input(network)                # a mistake is found before anything is written
    loss, parts = task.loss(network, batch)  # for every batch
    evaluator = task.evaluator()             # after every epoch: update(network, batch), then compute(...)

Optimizer, schedule, EMA, checkpoints, exact resume, logs, signals and processes are the same for every task.
"""
import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from torch.utils.data import Dataset

from storage.weights import (
    WeightsError,
    WeightsKeyError,
    check_finite,
    default_weights,
    load_weights,
    read_checkpoint,
    unwrap,
)
from utils import UsageError, UserError, as_user_error, count

from .buffers import unchanged_buffers
from .data.held_out import HeldOut
from .data.loader import EpochLoader
from .distributed import Distributed
from .options import Settings
from .precision import Precision
from .run import Clock
from .signals import fault_of

Batch = Any


class ShortEpochError(UserError):
    """An epoch has fewer batches than an optimizer step accumulates."""


class SingleImageError(UsageError):
    """A network that cannot be trained on a batch of one image, for example by batch norm of a single value."""


class WeightsUnderKeysError(UserError):
    """A checkpoint holds its weights under other keys; names them."""


class NonFiniteOutputError(UserError):
    """The outputs of a network are NaN or infinite."""


@contextmanager
def reading_weights() -> Iterator[None]:
    """Raise the errors of weights as a `UserError` with the same text."""
    with as_user_error(WeightsError):
        try:
            yield
        except WeightsKeyError as error:
            raise WeightsUnderKeysError(str(error)) from error


class Evaluator(Protocol):
    """Accumulates the results of a network batch by batch, and then computes the task's metrics."""

    def update(self, network: torch.nn.Module, batch: Batch):
        """Evaluate one batch; called under autocast and without gradients, the network in evaluation mode."""

    def compute(self, distributed: Distributed) -> dict[str, float]:
        """The metrics over the images of all processes, each counted once, and "images", their number.

        Raises:
            UserError: There was no image.
        """


@contextmanager
def refusal(kind: type[UserError], message: str) -> Iterator[None]:
    """Raise the error of a network that does not take its input as one of ours."""
    try:
        yield
    except UserError:
        raise
    except (AssertionError, RuntimeError, ValueError) as error:
        if isinstance(error, RuntimeError) and fault_of(error) is not None:  # the machine's, as in any later batch
            raise
        raise kind(f"{message}: {error}") from error


class Task(ABC):
    """A task, for one run.

    Args:
        settings: What was asked for, of `settings_class`.
        distributed: This process.
        precision: The precision and the memory layout of the network.

    Attributes:
        settings_class: `training.options.Settings` with the task's own groups of flags.
        metrics: Metric name -> whether higher is better; the first is the default that selects best.pth.
        eval_processes: The processes that share an evaluation.
        advice: What a user of the command line can do about the task's own errors, by their class.
        classes: Names of the classes, once a data set that knows them was opened; saved in checkpoints.
        num_classes: Their number, where the task has classes.
        held_out: What of the training images is held out as the val split; None where that is a set of its own. Saved
            in checkpoints: a run that resumes holds out the same.
    """

    settings_class: ClassVar[type[Settings]]
    metrics: ClassVar[dict[str, bool]]
    advice: ClassVar[Mapping[type[UserError], str]] = {}

    def __init__(self, settings: Settings, distributed: Distributed, precision: Precision):
        self.settings, self.distributed, self.precision = settings, distributed, precision
        # The processes that share an evaluation; without sharing, each of them evaluates everything.
        self.eval_processes = distributed if settings.evaluation.dist_eval else distributed.alone()
        self.classes: list[str] | None = None
        self.num_classes: int | None = None
        self.held_out: HeldOut | None = None
        self._told: set[str] = set()

    def tell(self, notes: Iterable[str]):
        """Print, in the main process, lines that were not printed yet: two splits may have some in common."""
        for note in notes:
            if self.distributed.is_main and note not in self._told:
                print(note)
            self._told.add(note)

    @classmethod
    @abstractmethod
    def check_names(cls, settings: Settings):
        """Raises UsageError where the settings name a model that does not exist; needs no data and no device."""

    @property
    def name(self) -> str:
        """What the run is called: the model's name."""
        return self.settings.name

    @abstractmethod
    def dataset(self, split: str) -> Dataset:
        """The data set of a split, "train" or "val", in an evaluation also "test"; augmented where it is trained on.

        One that skips unreadable images marks them in `bad_images`; see `training.data.loader.report_skipped`. One that
        can say which images it has, by a text that is the same wherever they lie, has a method `fingerprint`.

        Raises:
            UserError: It cannot be opened, or does not fit the other split.
        """

    @abstractmethod
    def loader(self, dataset: Dataset, train: bool) -> EpochLoader:
        """Batches of a data set on the device, for this process; see `training.data.loader.build_loader`."""

    @abstractmethod
    def network(self) -> torch.nn.Module:
        """The network for the data sets opened before, with the weights that it starts from; on the CPU.

        Raises:
            UserError: It cannot be built, or the weights do not fit.
        """

    def load(self, network: torch.nn.Module, source: str):
        """Load the checkpoint to evaluate, a file or URL: what `model_key` or else `default_weights` says.

        Raises:
            UserError: It cannot be read, does not fit, or holds NaN or infinite weights.
        """
        with reading_weights():
            checkpoint, key = read_checkpoint(source), self.settings.checkpoint.model_key
            key, notes = (key, []) if key else default_weights(checkpoint, source)
            load_weights(network, unwrap(checkpoint, key))
            check_finite(network, source)
        if self.distributed.is_main:
            print("".join(f"{note}\n" for note in notes), end="")

    @abstractmethod
    def loss(self, network: torch.nn.Module, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The loss of a batch, a scalar, and its detached parts by name, for the log; called under autocast.

        `network` has its wrappers on: call it, and call it once. What else the loss needs, a teacher for example, is
        made in `network`, where a mistake is still found before anything is written.
        """

    def train_mode(self, network: torch.nn.Module):
        """Put the network, with its wrappers on, into training mode: all of it, or what a task trains of it."""
        network.train()

    @abstractmethod
    def evaluator(self) -> Evaluator:
        """A new evaluator."""

    @abstractmethod
    def dummy_batch(self, size: int, train: bool) -> Batch:
        """A batch of `size` images as `loader` gives them, of zeros, on the device."""

    @property
    def input_description(self) -> str:
        """What a batch holds, for messages."""
        return "such input"

    def dummy_loss(self, network: torch.nn.Module) -> torch.Tensor:
        """Put the network into training mode as a run does; the loss of a batch of zeros of the usual size."""
        self.train_mode(network)
        with self.precision.autocast():
            return self.loss(network, self.dummy_batch(self.settings.loader.batch_size, train=True))[0]

    def count(self, batch: Batch) -> int:
        """The number of images in a batch; for batches that are no (images, ...), override it."""
        return len(batch[0])

    def report(self, results: dict[str, float], evaluator: Evaluator, what: str):
        """Print the results of an evaluation, which is done; `what` says whose they are: "network" or "model EMA"."""
        values = " ".join(f"{name} {results[name]:.3f}" for name in self.metrics)
        print(f"* {values} {self.measured_on(results, what)}")

    def measured_on(self, results: dict[str, float], what: str) -> str:
        """The ending of a line of results: whose they are, on how many images of which split."""
        return f"of the {what} on {count(results['images'], f'{self.settings.evaluation.split} image')}"

    def problem_of(self, results: dict[str, float], what: str) -> str | None:
        """Why an evaluation's results are none, in one line; None where they are sound. `what` as `report` takes it."""
        names = [name for name in self.metrics if not math.isfinite(results[name])]
        return f"the outputs of the {what} are NaN or infinite: so is the {' and the '.join(names)}" if names else None

    def pictures(self, evaluator: Evaluator) -> dict[str, np.ndarray]:
        """What an evaluation has to show, by name: uint8 (H, W, 3); called in training, on the main process."""
        return {}

    def preview(self, dataset: Dataset, clock: Clock):
        """Show the first training batches from `clock` on, where that is asked for, on the main process alone.

        Nothing that a run draws may depend on whether it was called.
        """
        return None

    def check_input(self, network: torch.nn.Module):
        """Evaluate one image of zeros and, for a run that trains, compute the loss of a batch of one or two.

        A training pass may refuse what an evaluation takes; batches of more than two images are like those of two.

        Raises:
            SingleImageError: The network cannot be trained on batches of one image.
            UsageError: The network cannot take its input.
        """
        with torch.no_grad(), self.precision.autocast():
            with refusal(UsageError, f"{self.name} cannot take {self.input_description}"):
                self.evaluator().update(network.eval(), self.dummy_batch(1, train=False))
            if self.settings.evaluation.eval:
                return
            size = min(2, self.settings.loader.batch_size)
            kind, number = (UsageError, "two") if size == 2 else (SingleImageError, "one")
            message = f"{self.name} cannot be trained on {self.input_description}, {number} at a time"
            with refusal(kind, message), unchanged_buffers(network):
                self.train_mode(network)
                self.loss(network, self.dummy_batch(size, train=True))


@dataclass(frozen=True)
class Data:
    """The loaders of a task's splits; None for a split that the run does not read."""

    train_loader: EpochLoader | None
    val_loader: EpochLoader | None

    @property
    def fingerprints(self) -> dict[str, str]:
        """Which images there are in each split, where its data set says so."""
        loaders = {"train": self.train_loader, "val": self.val_loader}
        sets = {split: getattr(loader, "dataset", None) for split, loader in loaders.items()}
        return {split: dataset.fingerprint() for split, dataset in sets.items() if hasattr(dataset, "fingerprint")}

    @classmethod
    def of(cls, task: Task) -> "Data":
        """The data of a run; no val where it does not evaluate.

        Raises:
            UserError: It cannot be opened, or is too small for a step.
        """
        train_set = task.dataset("train")
        val_set = None if task.settings.evaluation.disable_eval else task.dataset("val")
        train_loader = task.loader(train_set, train=True)
        batches, update_freq = len(train_loader), task.settings.optimizer.update_freq
        if batches < update_freq:
            raise ShortEpochError(f"an optimizer step of {update_freq} batches is more than the {batches} of an epoch")
        return cls(train_loader, None if val_set is None else task.loader(val_set, train=False))

    @classmethod
    def for_evaluation(cls, task: Task) -> "Data":
        """The split to evaluate alone."""
        return cls(None, task.loader(task.dataset(task.settings.evaluation.split), train=False))
