"""Tasks whose network stands on a backbone of timm's: how it is built, and which weights it starts from."""
from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from timm.layers import convert_sync_batchnorm

from models import NetworkRecipe
from models.segmentation import NoMapsError, load_backbone
from storage.remote import public
from storage.weights import MismatchError, check_finite, class_difference, class_names, default_weights, unwrap
from training.options import Settings
from training.task import Task, reading_weights
from utils import UsageError, UserError

from . import networks
from .errors import NothingFitsError, OtherNetworkError

Weights = Mapping[str, torch.Tensor]


class TaskOnBackbone(Task):
    """A task with a network that has a `backbone`.

    Attributes:
        kind: What its network is called.
    """

    kind: ClassVar[str]

    @classmethod
    def check_names(cls, settings: Settings):
        networks.check_model(settings.model.model)

    # --- what a task says of its network ------------------------------------------------------------------------------

    @abstractmethod
    def create(self, pretrained: bool, **kwargs: Any) -> torch.nn.Module:
        """The network, on a backbone with these arguments."""

    @abstractmethod
    def is_own(self, weights: Weights) -> bool:
        """Whether weights are those of a network of this kind."""

    @abstractmethod
    def has_same_parts(self, network: torch.nn.Module, weights: Weights) -> bool:
        """Whether such weights have all that the network has beside its backbone."""

    @abstractmethod
    def load_own(
        self, network: torch.nn.Module, weights: Weights, new_classes: bool = False, other_classes: bool = False
    ) -> bool:
        """Load such weights in full; returns whether the network's own layers of the classes were kept.

        Args:
            network: The network, without wrappers.
            weights: Of this kind.
            new_classes: Keep the network's own layers of the classes where their number differs.
            other_classes: Keep those too where it is the same.
        """

    # --- building -----------------------------------------------------------------------------------------------------

    def network(self) -> torch.nn.Module:
        settings = self.settings
        network, training = self._build(), not settings.evaluation.eval
        if settings.model.grad_checkpointing:
            networks.checkpoint_gradients(network, settings.model.model)
        if training and settings.checkpoint.finetune and not settings.checkpoint.resumes_here():
            self._fine_tune(network, settings.checkpoint.finetune)
        if training and settings.model.sync_bn and self.distributed.is_distributed:
            if self.distributed.device.type == "cuda":
                network = convert_sync_batchnorm(network)
            else:
                self.tell(["batch norms are of each process alone: SyncBN needs GPUs"])
        return network

    def _build(self) -> torch.nn.Module:
        """The network; without stochastic depth if the backbone has none."""
        if self.settings.model.model_kwargs:
            networks.check_asserts(self.settings.model.model)
        try:
            return self._create(drop_path_rate=self.settings.model.drop_path)
        except UsageError as error:
            try:
                network = self._create()
            except UserError:
                raise error from None
        self.tell([f"{self.settings.model.model} has no stochastic depth: drop path is left out"])
        return network

    def _create(self, **kwargs: Any) -> torch.nn.Module:
        asked, checkpoint = self.settings.model, self.settings.checkpoint
        # A run that resumes has its weights in its checkpoint.
        pretrained = asked.load_release and not checkpoint.resumes_here()
        with networks.building(asked.model, pretrained):
            try:
                return self.create(pretrained, **{**kwargs, **asked.model_kwargs})
            except NoMapsError as error:  # which names the model
                raise UsageError(str(error)) from error

    # --- weights ------------------------------------------------------------------------------------------------------

    def _read(self, source: str) -> tuple[dict[str, Any], dict[str, torch.Tensor], list[str]]:
        """A checkpoint, the weights to take from it, and lines about these."""
        checkpoint, key = networks.read(source), self.settings.checkpoint.model_key
        key, notes = (key, []) if key else default_weights(checkpoint, source)
        with reading_weights():
            return checkpoint, unwrap(checkpoint, key), notes

    def _fine_tune(self, network: torch.nn.Module, source: str):
        """Start from weights of this kind, or for the backbone alone from a classifier's or those of a network with
        other parts; tells which.
        """
        (checkpoint, weights, notes), source = self._read(source), public(source)
        with reading_weights():
            try:
                if self.is_own(weights) and self.has_same_parts(network, weights):
                    notes.append(self._load_own(network, weights, class_difference(checkpoint, self.classes), source))
                else:
                    notes += [f"{source}: {note}" for note in load_backbone(network, weights)]
            except MismatchError as error:
                raise NothingFitsError(f"{source}: {error}{NetworkRecipe.of(checkpoint).owner}") from error
            check_finite(network, source)
        self.tell(notes)

    def _load_own(self, network: torch.nn.Module, weights: Weights, difference: str | None, source: str) -> str:
        is_new = self.load_own(network, weights, new_classes=True, other_classes=difference is not None)
        reason = difference or "has another number of classes"
        return f"{source} {reason}: the classifiers are re-initialised" if is_new else f"{source}: all is loaded"

    def load(self, network: torch.nn.Module, source: str):
        (checkpoint, weights, notes), source = self._read(source), public(source)
        if not self.is_own(weights):
            raise OtherNetworkError(f"{source} holds no {self.kind}")
        difference = class_difference(checkpoint, self.classes)
        names = class_names(checkpoint) or []
        if difference and (len(names) != len(self.classes) or sorted(names) == sorted(self.classes)):
            raise UserError(f"{source} {difference}")
        with reading_weights():
            self.load_own(network, weights)
            check_finite(network, source)
        self.tell([*notes, *([f"warning: {source} {difference}"] if difference else [])])
