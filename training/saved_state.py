"""What a checkpoint must hold to be a run that can be resumed: `Run.state_dict` and the recipe."""
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from utils import UserError, one_line

from .signals import fault_of

# Without these it holds weights, and was not meant to hold more.
_OF_RUNS = {"optimizer", "meter", "args"}
_KINDS: dict[str, type | tuple[type, ...]] = dict(
    model=dict, model_ema=(dict, type(None)), optimizer=dict, scaler=dict, meter=dict, best=dict, args=dict,
    epoch=int, step=int, total_steps=int, steps=int,
)
# Checkpoints of earlier versions lack some of these.
_OPTIONAL: dict[str, type | tuple[type, ...]] = dict(
    global_batch=int, ranges=int, best_epoch=(int, type(None)), seconds=(int, float), images=(int, type(None)),
    fingerprint=(str, type(None)), held_out=(str, type(None)), held_out_images=(torch.Tensor, type(None)),
)


class NoRunError(UserError):
    """A checkpoint that holds weights alone, or the run of another data set: it can be fine-tuned, not resumed."""


class BrokenRunError(UserError):
    """A checkpoint whose run lacks something, or holds something else in its place."""


def check_is_run(checkpoint: Mapping[str, Any], path: Path):
    """Raises NoRunError or BrokenRunError where a checkpoint does not hold a run, and says what is wrong."""
    if not checkpoint.keys() >= _OF_RUNS:
        raise NoRunError(f"{path} holds only weights, no run to resume")
    kinds = _KINDS | {name: kind for name, kind in _OPTIONAL.items() if name in checkpoint}
    wrong = [name for name, kind in kinds.items() if not _is_of(kind, checkpoint.get(name))]
    wrong += [name for name in ("meter", "best") if name not in wrong and not _are_numbers(checkpoint[name])]
    if wrong:
        raise BrokenRunError(f"{path} cannot be resumed: it holds no run's {', no '.join(wrong)}")


@contextmanager
def taking_state(path: Path) -> Iterator[None]:
    """Raise what is raised by the content of a checkpoint, which is of the right kinds but not as it should be.

    A fault of the machine, of which memory that runs out is one, is raised as it is.
    """
    try:
        yield
    except (LookupError, TypeError, AttributeError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and fault_of(error):
            raise
        raise BrokenRunError(f"{path} cannot be resumed: {type(error).__name__}: {one_line(error)}") from error


def _is_of(kind: type | tuple[type, ...], value: Any) -> bool:
    is_count = kind is not int or (value.__class__ is int and 0 <= value < 2**63)
    return isinstance(value, kind) and is_count


def _are_numbers(value: Any) -> bool:
    """Whether nested dictionaries and lists hold numbers, and None, alone."""
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
    return value is None or isinstance(value, int | float) if parts is None else all(map(_are_numbers, parts))
