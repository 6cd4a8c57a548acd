"""Networks by timm's names: built, described, and given the weights of checkpoints; with one-line errors."""
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import timm
import torch
from timm.data import resolve_data_config

from models import NetworkRecipe, NoWeightsError, family_filter, size_kwargs
from models.detection import is_detector
from models.segmentation import is_segmenter
from storage.remote import public
from storage.weights import (
    MismatchError,
    WeightsError,
    check_finite,
    class_difference,
    class_names,
    default_weights,
    load_weights,
    read_checkpoint,
    unwrap,
)
from training.task import NonFiniteOutputError, reading_weights
from utils import UsageError, UserError, as_user_error, check_name


class PretrainedWeightsError(UserError):
    """The published weights of a model cannot be loaded."""


class UncheckedArgumentsError(UsageError):
    """Nothing would check the arguments of a model."""


class OtherModelError(UserError):
    """The weights are those of another model."""


class SegmenterWeightsError(UserError):
    """The weights of a segmenter, where a classifier's are needed."""


class DetectorWeightsError(UserError):
    """The weights of a detector, where a classifier's are needed."""


class PretrainedClassesError(UserError):
    """The published classifier of a model has other classes than the data."""


def check_model(name: str):
    """Raises UsageError where timm has no model, or no weights, of this name."""
    architecture, _, tag = name.partition(".")
    check_name("model", architecture if architecture.isidentifier() else name, timm.list_models())
    if tag:
        check_name("weights", name, timm.list_models(f"{architecture}.*", include_tags=True))


def check_asserts(name: str):
    """Raises UncheckedArgumentsError where this Python leaves out asserts, by which timm checks a model's arguments."""
    if not __debug__ and timm.model_entrypoint(name).__module__.startswith("timm."):
        raise UncheckedArgumentsError(f"python -O leaves out the asserts by which timm checks the arguments of {name}")


def build_model(name: str, pretrained: bool, kwargs: dict[str, Any]) -> torch.nn.Module:
    """`timm.create_model`, with its errors as ours."""
    with building(name, pretrained):
        return timm.create_model(name, pretrained=pretrained, **kwargs)


@contextmanager
def building(name: str, pretrained: bool) -> Iterator[None]:
    """Raise what goes wrong while a model, or a network on it, is built as a UserError."""
    try:
        yield
    except UserError:
        raise
    except (TypeError, ValueError) as error:
        raise UsageError(f"{name} cannot be built: {error}") from error
    except (ArithmeticError, AssertionError, AttributeError, LookupError) as error:  # whose text alone may say little
        raise UsageError(f"{name} cannot be built: {error!r}") from error
    except NoWeightsError as error:  # not its text, which tells programs what to pass
        raise PretrainedWeightsError(error.reason) from error
    except (RuntimeError, OSError) as error:
        raise (PretrainedWeightsError if pretrained else UserError)(f"{name} cannot be built: {error}") from error


def takes(name: str, kwargs: dict[str, Any], without: set[str]) -> bool:
    """Whether a model can be built with these arguments except those in `without`; draws no random number."""
    try:
        with torch.random.fork_rng(devices=[]):
            build_model(name, False, {key: value for key, value in kwargs.items() if key not in without})
    except UserError:
        return False
    return True


def read(source: str) -> dict[str, Any]:
    """A checkpoint file or URL.

    Raises:
        UserError: It cannot be read.
    """
    with as_user_error(WeightsError):
        return read_checkpoint(source)


def trained_classes(source: str) -> list[str] | None:
    """The names of the classes that the checkpoint `source`, a file or URL, was trained on; None where it has none.

    Raises:
        UserError: It cannot be read.
    """
    with as_user_error(WeightsError):
        return class_names(read_checkpoint(source, mmap=True))


def load_from(model: torch.nn.Module, source: str, key: str | None = None, **kwargs: Any) -> list[str]:
    """`load_checkpoint` of a file or URL."""
    return load_checkpoint(model, read(source), source, key, **kwargs)


def load_checkpoint(
    model: torch.nn.Module,
    checkpoint: dict[str, Any],
    source: str,
    key: str | None = None,
    new_classifier: bool = False,
    trained_on: list[str] | None = None,
) -> list[str]:
    """Load the weights of a checkpoint of ours, of a published one, or of a bare state dict; returns what to say of it.

    Args:
        model: The model, without wrappers.
        checkpoint: What was read from `source`.
        source: File or URL, for messages.
        key: Which weights to take; None for `storage.weights.default_weights`.
        new_classifier: Keep the model's own classifier where the checkpoint's has other classes, or another number.
        trained_on: Classes that the checkpoint should have been trained on.

    Returns:
        Lines: that EMA weights were taken, that the classifier is re-initialised, or that the classes are others.

    Raises:
        UserError: The weights do not fit, or are NaN or infinite; OtherModelError where they are another model's.
    """
    classifiers = _classifiers(model) if new_classifier else ()
    difference = class_difference(checkpoint, trained_on)
    key, notes = (key, []) if key else default_weights(checkpoint, source)
    with reading_weights():
        try:
            weights, own_filter = unwrap(checkpoint, key), family_filter(model)
            check_is_classifier(weights, source)
            kept = load_weights(model, weights, own_filter, classifiers, other_classes=difference is not None)
        except MismatchError as error:
            recipe = NetworkRecipe.of(checkpoint)
            is_other = recipe.model and recipe.model.partition(".")[0] != model.default_cfg.get("architecture")
            raise (OtherModelError if is_other else WeightsError)(f"{error}{recipe.owner}") from error
        check_finite(model, source)
    if kept:
        reason = difference or "has another number of classes"
        notes.append(f"{public(source)} {reason}: the classifier is re-initialised")
    elif difference:
        notes.append(f"warning: {public(source)} {difference}")
    return notes


def check_is_classifier(weights: dict[str, torch.Tensor], source: str):
    """Raises SegmenterWeightsError or DetectorWeightsError where weights are such, by their names."""
    if is_detector(weights):
        raise DetectorWeightsError(f"{public(source)} holds a detector, and no classifier")
    if is_segmenter(weights):
        raise SegmenterWeightsError(f"{public(source)} holds a segmenter, and no classifier")


def _classifiers(model: torch.nn.Module) -> tuple[str, ...]:
    """Names of a model's layers of classes: timm's classifiers, and the head that classifies each token."""
    names = model.default_cfg.get("classifier") or ()
    return (*((names,) if isinstance(names, str) else names), "token_head")


def check_outputs(outputs: torch.Tensor, what: str):
    """Raises NonFiniteOutputError where the outputs for `what`, the name of an image, are NaN or infinite."""
    if not outputs.isfinite().all():
        raise NonFiniteOutputError(f"{what}: the outputs of the network are NaN or infinite")


def checkpoint_gradients(model: torch.nn.Module, name: str):
    """Have a network recompute activations in the backward pass; raises UsageError where it cannot, by its name."""
    try:
        model.set_grad_checkpointing()
    except (AssertionError, AttributeError, NotImplementedError) as error:
        raise UsageError(f"{name} does not support gradient checkpointing") from error


def freeze_backbone(model: torch.nn.Module):
    """Freeze all parameters of one of timm's models but its classifier's.

    Raises:
        UsageError: It has no classifier.
    """
    classifier = model.get_classifier()
    heads = classifier if isinstance(classifier, tuple) else (classifier,)
    parameters = [parameter for head in heads for parameter in head.parameters()]
    if not parameters:
        raise UsageError(f"{type(model).__name__} has no classifier to train")
    model.requires_grad_(False)
    for parameter in parameters:
        parameter.requires_grad_(True)


def hold_frozen(model: torch.nn.Module):
    """Put all modules in which no parameter is trained into evaluation mode: batch norms keep their statistics."""
    for module in model.modules():
        module.training = module.training and any(parameter.requires_grad for parameter in module.parameters())


def pretrained_num_classes(name: str) -> int:
    """The number of classes of the published classifier, which a model has unless another number is asked for."""
    return timm.get_pretrained_cfg(name).num_classes


def published_classes(name: str) -> list[str] | None:
    """The names of the published classifier's classes, in order; None where timm does not know them."""
    names = timm.get_pretrained_cfg(name).label_names
    return list(names) if names else None


def renew_classifier(model: torch.nn.Module, name: str, classes: list[str] | None) -> list[str]:
    """Give a model with published weights a new classifier where theirs is of other classes; returns what to say of it.

    Where their number differs, timm has done so.

    Args:
        model: The model, as timm has built it.
        name: Its name.
        classes: Those of the data, where it names them.
    """
    published = pretrained_num_classes(name)
    if model.num_classes != published:
        difference = f"has {published} classes, not {model.num_classes}"
    elif difference := class_difference(dict(classes=published_classes(name)), classes):
        model.reset_classifier(model.num_classes)
    return [f"the published {name} {difference}: the classifier is re-initialised"] if difference else []


def check_pretrained_classes(name: str, num_classes: int):
    """Raises PretrainedClassesError where timm would replace the published classifier by a random one."""
    pretrained = pretrained_num_classes(name)
    if pretrained != num_classes:
        raise PretrainedClassesError(
            f"the published weights of {name} have {pretrained} classes, the data has {num_classes}"
        )


def model_data_config(name: str, use_test_size: bool = False) -> dict[str, Any]:
    """Size, mean, std, interpolation and crop that the model was published with.

    Args:
        name: The model's.
        use_test_size: Give the size and the crop of evaluation where they are others, as timm's validate.py does.
    """
    return resolve_data_config(pretrained_cfg=timm.get_pretrained_cfg(name).to_dict(), use_test_size=use_test_size)


def create_teacher(
    name: str,
    num_classes: int,
    input_size: int | tuple[int, int],
    source: str | None,
    key: str | None = None,
    trained_on: list[str] | None = None,
) -> tuple[torch.nn.Module, list[str]]:
    """A model to learn from, with the weights of the checkpoint `source`, or its published ones; and what to say of it.

    Args:
        name: Any of timm's.
        num_classes: Classes of the data.
        input_size: Of the images that it will see.
        source: File or URL; None for the published weights.
        key, trained_on: As of `load_checkpoint`.

    Raises:
        UserError: There are no weights, or they do not fit; OtherModelError as `load_checkpoint`.
    """
    if source is None:
        check_pretrained_classes(name, num_classes)
    teacher = build_model(name, source is None, dict(num_classes=num_classes, **size_kwargs(name, input_size)))
    return teacher, [] if source is None else load_from(teacher, source, key, trained_on=trained_on)
