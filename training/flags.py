"""The parser of command lines and recipes: frozen dataclasses whose fields define the flags.

    @dataclass(frozen=True)
    class Loader(Group):
        "Data loading"                                  # the group's title in --help
        batch_size: int = flag(128, "images for each GPU and forward pass", type=int, check=at_least(1))

    @dataclass(frozen=True)
    class Settings:
        loader: Loader

    settings = parse(Settings, ["--batch_size", "64"])  # settings.loader.batch_size == 64

Order of precedence: the command line, then the recipe given by `--config`, then `base`, then the defaults.
"""
import argparse
import ast
import dataclasses
import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, NoReturn, TypeVar, get_type_hints

import yaml

from utils import UsageError, nearest, one_line

SettingsT = TypeVar("SettingsT")
Check = Callable[[Any], str | None]

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


def check_field(field: dataclasses.Field, value: Any):
    """Raises UsageError where a value is out of a field's range; None is in every range."""
    check = field.metadata["check"]
    wrong = check(value) if check is not None and value is not None else None
    if wrong:
        raise UsageError(f"--{field.name} {wrong}, got {value}")


class Group:
    """Base of a group of flags: checks each field, then what fields say together, whenever one is made.

    Raises:
        UsageError: A value is out of range, or two contradict each other; names the flags.

    Attributes:
        alternatives: Pairs of flags of which the one that is given covers a lower value of the other.
    """

    alternatives: ClassVar[tuple[tuple[str, str], ...]] = ()

    def __post_init__(self):
        for field in dataclasses.fields(self):
            check_field(field, getattr(self, field.name))
        self.check()

    def check(self):
        """Raises UsageError where fields contradict each other."""


# --- types of values --------------------------------------------------------------------------------------------------


def boolean(text: str) -> bool:
    """True or false, in any of the usual words."""
    if text.lower() in ("true", "yes", "on", "1"):
        return True
    if text.lower() in ("false", "no", "off", "0"):
        return False
    raise argparse.ArgumentTypeError(f"takes true or false, not {text!r}")


def key_value(text: str) -> tuple[str, object]:
    """KEY=VALUE, where VALUE is a Python literal or else a string."""
    key, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"takes KEY=VALUE, not {text!r}")
    try:
        return key, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return key, value


# --- the parser -------------------------------------------------------------------------------------------------------


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Leaves out the default where there is none, or where the help says it."""

    def _get_help_string(self, action: argparse.Action) -> str:
        says_default = action.default in (None, [], {}) or "(default" in (action.help or "")
        return action.help if says_default else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """The parser of a settings class; raises `UsageError`, one line, where argparse would print its usage and exit."""

    def __init__(self, settings_class: type, **kwargs: Any):
        usage = "%(prog)s [--config YAML] [--FLAG VALUE ...]"
        super().__init__(usage=usage, formatter_class=_HelpFormatter, allow_abbrev=False, **kwargs)
        self.add_argument("--config", metavar="YAML", help="recipe to start from; flags given here win over it")
        # Old launchers pass it; the environment says the same.
        self.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
        for group_class in group_classes(settings_class).values():
            group = self.add_argument_group(group_class.__doc__.partition("\n")[0])
            for field in dataclasses.fields(group_class):
                _add_flag(group, field)

    def names(self) -> list[str]:
        """All flags but --help."""
        return [action.dest for action in self._actions if action.dest != "help"]

    def error(self, message: str) -> NoReturn:
        raise UsageError(message.removeprefix("argument "))


def group_classes(settings_class: type) -> dict[str, type[Group]]:
    """The groups of a settings class by field; those that a class adds come before those of its base."""
    hints = get_type_hints(settings_class)
    names = [field.name for field in dataclasses.fields(settings_class)]
    own = [name for name in names if name in inspect.get_annotations(settings_class)]
    return {name: hints[name] for name in [*own, *(name for name in names if name not in own)]}


def _default(field: dataclasses.Field) -> Any:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def _add_flag(group: argparse._ArgumentGroup, field: dataclasses.Field):
    default, argument = _default(field), dict(field.metadata["argument"])
    if isinstance(default, bool):
        argument.update(type=boolean, nargs="?", const=True, metavar="BOOL")
    names = [f"--{name}" for name in (field.name, field.metadata["alias"]) if name]
    group.add_argument(*names, default=default, help=field.metadata["help"], **argument)


def _underscored(token: str) -> str:
    """--drop-path=0.1 -> --drop_path=0.1"""
    name, equals, value = token.partition("=")
    return f"{name.replace('-', '_').replace('__', '--', 1)}{equals}{value}" if token.startswith("--") else token


def _split_nulls(tokens: list[str], known: list[str]) -> tuple[list[str], list[str]]:
    """The tokens without `--flag null` and `--flag=null`, and the flags that were given so."""
    kept, nulls = [], []
    for token in tokens:
        if token == "null" and kept and kept[-1].removeprefix("--") in known:
            nulls.append(kept.pop().removeprefix("--"))
        elif token.endswith("=null") and token.removeprefix("--").removesuffix("=null") in known:
            nulls.append(token.removeprefix("--").removesuffix("=null"))
        else:
            kept.append(token)
    return kept, nulls


def given_value(argv: Sequence[str], name: str, recipe: Mapping[str, Any] = MappingProxyType({})) -> str | None:
    """The value of one flag on a command line, or else in a recipe, before the rest of them is understood.

    None where it is not given, or given as null.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument(f"--{name}")
    tokens, nulls = _split_nulls([_underscored(token) for token in argv], [name])
    try:
        value = getattr(parser.parse_known_args(tokens)[0], name)
    except argparse.ArgumentError as error:
        raise UsageError(str(error)) from None
    if value is None and not nulls and recipe.get(name) is not None:
        return str(recipe[name])
    return value


def parse(
    settings_class: type[SettingsT],
    argv: Sequence[str],
    parser: Parser | None = None,
    base: Mapping[str, Any] = MappingProxyType({}),
) -> SettingsT:
    """Read a command line, and the recipe that it names. `--flag null` undoes what the recipe says of a flag.

    Args:
        settings_class: A frozen dataclass whose fields are groups.
        argv: The words of the command line.
        parser: Its parser, where --help should say more than the flags.
        base: Values that stand beneath both, in place of the defaults; see `beneath`.

    Raises:
        UsageError: A flag, key or value is unknown or out of range; names the nearest one.
    """
    parser = parser or Parser(settings_class)
    known = parser.names()
    tokens, nulls = _split_nulls([_underscored(token) for token in argv], known)
    recipe = _config(tokens, known)
    typed = _typed(parser, tokens) | dict.fromkeys(nulls)
    lower = beneath(settings_class, base, {**recipe, **typed}) | beneath(settings_class, recipe, typed)
    args, unknown = parser.parse_known_args(as_tokens(lower) + tokens)
    if unknown:
        name = unknown[0].partition("=")[0]
        if name.startswith("--"):
            raise UsageError(f"unknown flag {name}{nearest(name, [f'--{flag}' for flag in known])}")
        raise UsageError(f"unexpected argument {unknown[0]!r}")
    groups = group_classes(settings_class)
    # Every single value before what values say together: the first error is about what was typed.
    for field in (field for group_class in groups.values() for field in dataclasses.fields(group_class)):
        check_field(field, _value(args, field))
    return settings_class(**{
        name: group_class(**{field.name: _value(args, field) for field in dataclasses.fields(group_class)})
        for name, group_class in groups.items()
    })


def given(settings_class: type, argv: Sequence[str]) -> dict[str, Any]:
    """The values that a command line, and the recipe that it names, give to flags of a settings class.

    Flags of others are passed over, in the recipe too. Given as null, a value is None.

    Raises:
        UsageError: A value is of the wrong type, or the recipe cannot be read.
    """
    parser = Parser(settings_class, add_help=False)
    tokens, nulls = _split_nulls([_underscored(token) for token in argv], parser.names())
    recipe = {name: value for name, value in _config(tokens).items() if name in parser.names()}
    from_recipe = _typed(parser, as_tokens({name: value for name, value in recipe.items() if value is not None}))
    return {**recipe, **from_recipe, **_typed(parser, tokens), **dict.fromkeys(nulls)}


def beneath(settings_class: type, values: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Those of `values`, for flags of a settings class, that remain below values that were `given`.

    A value is covered by another one of its flag, and of an alternative to it (`Group.alternatives`).
    """
    groups = group_classes(settings_class).values()
    known = {field.name for group in groups for field in dataclasses.fields(group)}
    covered = set(given)
    for pair in (pair for group in groups for pair in group.alternatives):
        if any(given.get(name) is not None for name in pair):
            covered |= set(pair)
    return {k: v for k, v in values.items() if k in known and k not in covered and v is not None}


def _config(tokens: Sequence[str], known: Sequence[str] | None = None) -> dict[str, Any]:
    """The recipe that a command line names, empty without one; its keys must be among those `known`."""
    config = given_value(tokens, "config")
    if config is None:
        return {}
    recipe = read_recipe(config)
    for name in recipe if known is not None else ():
        if name not in known or name == "config":
            raise UsageError(f"--config {config}: unknown key {name!r}{nearest(name, known)}")
    return recipe


def _typed(parser: Parser, tokens: Sequence[str]) -> dict[str, Any]:
    """The flags that are among the words of a command line, and their values."""
    not_given = object()
    blank = argparse.Namespace(**dict.fromkeys(parser.names(), not_given))
    args, _ = parser.parse_known_args(tokens, blank)
    return {name: value for name, value in vars(args).items() if value is not not_given}


def _value(args: argparse.Namespace, field: dataclasses.Field) -> Any:
    """What was given for a field; of KEY=VALUE pairs the dictionary."""
    value = getattr(args, field.name)
    return dict(value) if isinstance(_default(field), dict) else value


# --- recipes ----------------------------------------------------------------------------------------------------------


def read_recipe(path: str) -> dict[str, Any]:
    """The recipe in a YAML file, its flags in underscores.

    Raises:
        UsageError: It cannot be read, or is no mapping.
    """
    try:
        recipe = yaml.safe_load(Path(path).read_text()) or {}
    except OSError as error:
        raise UsageError(f"--config {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"--config {path}: not YAML ({one_line(error)})") from error
    if not isinstance(recipe, dict):
        raise UsageError(f"--config {path}: must be lines of `flag: value`")
    return {str(key).replace("-", "_"): value for key, value in recipe.items()}


def as_tokens(recipe: dict[str, Any]) -> list[str]:
    """A recipe, of flag names and plain values, as the words of a command line that says the same."""
    tokens = []
    for name, value in recipe.items():
        if value is None:
            value = "null"
        if isinstance(value, dict):
            value = [f"{k}={v!r}" for k, v in value.items()]
        values = value if isinstance(value, list) else [value]
        # --flag=value keeps a negative number from being read as a flag.
        tokens += [f"--{name}={values[0]}"] if len(values) == 1 else [f"--{name}", *map(str, values)]
    return tokens


def as_recipe(settings: Any) -> dict[str, Any]:
    """The settings as a recipe that `--config` takes; plain values alone."""
    return dict(_flat(settings))


def _flat(settings: Any) -> Iterator[tuple[str, Any]]:
    for group in (getattr(settings, name) for name in group_classes(type(settings))):
        for field in dataclasses.fields(group):
            value = getattr(group, field.name)
            # A pair is an image size, which a recipe writes as the command line does.
            yield field.name, "x".join(map(str, value)) if isinstance(value, tuple) else value
