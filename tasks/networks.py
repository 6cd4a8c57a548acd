"""Networks by timm's names: built, described, and given the weights of checkpoints; with one-line errors."""
import sys
from collections.abc import Callable
from typing import Any

import timm
import torch
from timm.data import resolve_data_config

import models  # noqa: F401, registers our models with timm
from storage.weights import class_difference, load_weights, read_checkpoint, unwrap
from training.checkpoints import translate_weights_errors
from utils import UsageError, UserError, check_name


def check_model(name: str):
    """Raises UsageError where timm knows no model, or no weights, of this name."""
    architecture, _, tag = name.partition(".")
    check_name("model", architecture, timm.list_models())
    if tag:
        check_name("weights", name, timm.list_models(f"{architecture}.*", include_tags=True))


def size_kwargs(name: str, input_size: int | tuple[int, int]) -> dict:
    """The input size, for those of timm's models that are built for one size."""
    return dict(img_size=input_size) if timm.models.get_pretrained_cfg_value(name, "fixed_input_size") else {}


def build_model(name: str, pretrained: bool, kwargs: dict) -> torch.nn.Module:
    """`timm.create_model`, with its errors as ours."""
    try:
        return timm.create_model(name, pretrained=pretrained, **kwargs)
    except (TypeError, ValueError) as error:
        raise UsageError(f"{name} cannot be built: {error}") from error
    except (RuntimeError, OSError) as error:
        advice = "; a file of weights is taken by --finetune of main.py, and by --checkpoint of scripts/predict.py"
        raise UserError(f"{name} cannot be built: {error}{advice if pretrained else ''}") from error


def family_filter(model: torch.nn.Module) -> Callable | None:
    """The function by which the model's family, ours or timm's, reads published checkpoints."""
    return getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)


@translate_weights_errors()
def load_from(
    model: torch.nn.Module,
    source: str,
    key: str | None,
    new_classifier: bool = False,
    trained_on: list[str] | None = None,
):
    """Load the weights of a checkpoint of ours, of a published one, or of a bare state dict.

    Args:
        model: The model, not wrapped.
        source: File or URL.
        key: Which weights to take; None for the model's.
        new_classifier: Keep the model's own classifier where that of the checkpoint is of other classes.
        trained_on: Classes that the checkpoint should know; a line is printed where it names others.

    Raises:
        UserError: The file cannot be read, or its weights do not fit.
    """
    load_checkpoint(model, read_checkpoint(source), source, key, new_classifier, trained_on)


@translate_weights_errors()
def load_checkpoint(
    model: torch.nn.Module,
    checkpoint: dict[str, Any],
    source: str,
    key: str | None,
    new_classifier: bool = False,
    trained_on: list[str] | None = None,
):
    """`load_from` of a `checkpoint` that was read from `source` already."""
    classifier = model.default_cfg.get("classifier") or () if new_classifier else ()
    classifier = (classifier,) if isinstance(classifier, str) else tuple(classifier)
    if load_weights(model, unwrap(checkpoint, key), family_filter(model), classifier):
        print(f"{source} is of another number of classes: the classifier starts anew")
    difference = class_difference(checkpoint, trained_on)
    if difference:
        print(f"careful: {source} {difference}")


def released_classes(name: str) -> int:
    """How many classes the published classifier has, and with it a model of which no other number is asked."""
    return timm.get_pretrained_cfg(name).num_classes


def check_released_classes(name: str, num_classes: int, advice: str):
    """Raises UserError where the published classifier is of other classes: timm would put a random one in its place."""
    released = released_classes(name)
    if released != num_classes:
        raise UserError(
            f"the published weights of {name} are of {released} classes, the data has {num_classes}; {advice}"
        )


def model_data_config(name: str) -> dict:
    """Mean, std, interpolation and crop that the model was published with."""
    return resolve_data_config(pretrained_cfg=timm.get_pretrained_cfg(name).to_dict())


def create_teacher(
    name: str, num_classes: int, input_size: int | tuple[int, int], source: str | None, key: str | None, advice: str
) -> torch.nn.Module:
    """A model that is to teach, with the weights of the checkpoint `source`, or its published ones.

    Args:
        name: Any of timm's.
        num_classes: Of the data.
        input_size: Of the images that it will see.
        source: File or URL; None for the published weights.
        key: Which weights of the checkpoint to take.
        advice: What to do where the published weights are of other classes.

    Raises:
        UserError: There are no weights, or they do not fit.
    """
    if source is None:
        check_released_classes(name, num_classes, advice)
    teacher = build_model(name, source is None, dict(num_classes=num_classes, **size_kwargs(name, input_size)))
    if source is not None:
        load_from(teacher, source, key)
    return teacher
