"""Flags, declared by the fields of frozen dataclasses; `training/parsing.py` reads command lines and recipes by them.

    @dataclass(frozen=True)
    class Loader(Group):
        "Data loading"                                  # the group's title in --help
        batch_size: int = flag(128, "images for each GPU and forward pass", type=int, check=at_least(1))

    @dataclass(frozen=True)
    class Settings:
        loader: Loader

    settings = parse(Settings, ["--batch_size", "64"])  # settings.loader.batch_size == 64
"""
import argparse
import dataclasses
import inspect
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, ClassVar, get_type_hints

from storage.remote import public
from utils import UsageError

from .recipes import literal

Check = Callable[[Any], str | None]
# Flag -> (whether it has an effect, "without --that").
Needs = Mapping[str, tuple[Any, str]]

# --- what a field says of its flag ------------------------------------------------------------------------------------


def flag(default: Any, help: str = "", *, check: Check | None = None, alias: str | None = None, **argument: Any) -> Any:
    """A dataclass field that is also a flag.

    Args:
        default: Its value where nothing is given; a boolean makes a flag that may stand alone.
        help: One line for --help.
        check: Value -> what is wrong with it ("must be at least 1"), or None.
        alias: A second name.
        argument: `type`, `choices`, `nargs`, `metavar` of `argparse.ArgumentParser.add_argument`.
    """
    metadata = dict(help=help, check=check, alias=alias, argument=argument)
    if isinstance(default, list | dict):
        return dataclasses.field(default_factory=default.copy, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def at_least(least: int) -> Check:
    """A check that a number is at least `least`."""
    return lambda value: None if value >= least else f"must be at least {least}"


def not_negative(value: float) -> str | None:
    """Check that a number is at least 0, and finite."""
    return None if 0 <= value < math.inf else "must be finite and not negative"


def positive(value: float) -> str | None:
    """Check that a number is above 0, and finite."""
    return None if 0 < value < math.inf else "must be above 0 and finite"


def fraction(value: float) -> str | None:
    """Check that a number is between 0 and 1."""
    return None if 0 <= value <= 1 else "must be 0 to 1"


def share(value: float | str) -> str | None:
    """Check that a number is at least 0, and finite, or that a percentage is 0 % to 100 %."""
    if isinstance(value, str):
        return None if 0 <= share_of(value, 100) <= 100 else "must be 0% to 100%"
    return not_negative(value)


def check_field(field: dataclasses.Field, value: Any):
    """Raises UsageError where a value is out of a field's range; None is in every range."""
    check = field.metadata["check"]
    wrong = check(value) if check is not None and value is not None else None
    if wrong:
        raise UsageError(f"--{field.name} {wrong}, got {value}")


class ContradictionError(UsageError):
    """Values contradict each other; `names` are their flags."""

    def __init__(self, message: str, names: Sequence[str]):
        super().__init__(message)
        self.names = names


class Group:
    """Base of a group of flags: checks each field, then what fields say together, whenever one is made.

    Raises:
        UsageError: A value is out of range, or two contradict each other; names the flags.

    Attributes:
        alternatives: Pairs of flags of which the one that is given covers a lower value of the other.
        parts_of: Flag -> the flag that it is a part of: of a run with another value of that one, or that is not taken
            either, it is not taken.
    """

    alternatives: ClassVar[tuple[tuple[str, str], ...]] = ()
    parts_of: ClassVar[Mapping[str, str]] = MappingProxyType({})

    def __post_init__(self):
        for field in dataclasses.fields(self):
            check_field(field, getattr(self, field.name))
        self.check()

    def check(self):
        """Raises UsageError where fields contradict each other."""

    def needs(self) -> Needs:
        """Of the flags that have an effect beside certain others alone, whether they have it, and what prevents it."""
        return {}


# --- types of values --------------------------------------------------------------------------------------------------


def boolean(text: str) -> bool:
    """True or false, in any of the usual words."""
    if text.lower() in ("true", "yes", "on", "1"):
        return True
    if text.lower() in ("false", "no", "off", "0"):
        return False
    raise argparse.ArgumentTypeError(f"takes true or false, not {text!r}")


def number_or_percentage(text: str) -> float | str:
    """A number, or as text a percentage such as "1%"; see `share_of`."""
    number = text.removesuffix("%")
    try:
        value = float(number)
    except ValueError:
        raise argparse.ArgumentTypeError(f"takes a number or a percentage, not {text!r}") from None
    return value if number == text else f"{number.strip()}%"


def share_of(value: float | str, whole: float) -> float:
    """The number that a value of `number_or_percentage` stands for; percentages are of `whole`."""
    return float(value.removesuffix("%")) / 100 * whole if isinstance(value, str) else value


def key_value(text: str) -> tuple[str, Any]:
    """KEY=VALUE, where VALUE is as in `literal`."""
    key, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"takes KEY=VALUE, not {text!r}")
    return key, literal(value)


def path(text: str) -> str:
    """A file or folder, where ~ is the home folder, or a URL; as text, which recipes hold. See `utils.user_path`."""
    return os.path.expanduser(text)


# --- settings ---------------------------------------------------------------------------------------------------------


def group_classes(settings_class: type) -> dict[str, type[Group]]:
    """The groups of a settings class by field; those that a class adds come before those of its base."""
    hints = get_type_hints(settings_class)
    names = [field.name for field in dataclasses.fields(settings_class)]
    own = [name for name in names if name in inspect.get_annotations(settings_class)]
    return {name: hints[name] for name in [*own, *(name for name in names if name not in own)]}


def default_of(field: dataclasses.Field) -> Any:
    """The value of a field of a group where nothing is given."""
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def _as_list(value: Any) -> Any:
    """A value with lists in the place of tuples, as YAML gives it back."""
    return [_as_list(item) for item in value] if isinstance(value, list | tuple) else value


def plain(default: Any, value: Any) -> Any:
    """A value as a recipe has it: of KEY=VALUE pairs the dictionary, of an image size HEIGHTxWIDTH."""
    if isinstance(default, dict):
        return {name: _as_list(item) for name, item in dict(value).items()}
    return "x".join(map(str, value)) if isinstance(value, tuple) else value


def kept(value: Any) -> Any:
    """A plain value as it is kept and shown: without the passwords and signatures of addresses in it."""
    if isinstance(value, dict):
        return {name: kept(item) for name, item in value.items()}
    if isinstance(value, list):
        return [kept(item) for item in value]
    return public(value) if isinstance(value, str) else value


def as_recipe(settings: Any) -> dict[str, Any]:
    """The settings as a recipe that `--config` takes: plain values alone, without passwords and signatures."""
    return dict(_flat(settings))


def _flat(settings: Any) -> Iterator[tuple[str, Any]]:
    for group in (getattr(settings, name) for name in group_classes(type(settings))):
        for field in dataclasses.fields(group):
            yield field.name, kept(plain(default_of(field), getattr(group, field.name)))
