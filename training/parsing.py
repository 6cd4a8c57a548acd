"""Command lines and recipes are read as settings: frozen dataclasses whose fields declare the flags, see `flags`.

Order of precedence: the command line, then the recipe given by `--config`, then `below`, then the defaults.
"""
import argparse
import dataclasses
import re
import shlex
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any, NoReturn, TypeVar

from utils import UsageError, nearest

from .flags import ContradictionError, boolean, check_field, default_of, group_classes, plain
from .recipes import as_tokens, read_recipe

SettingsT = TypeVar("SettingsT")
# What other programs call a flag, where no spelling leads to ours.
OTHER_NAMES = {
    "auto_augment": "aa", "base_lr": "lr", "batch": "batch_size", "bs": "batch_size", "checkpoint": "resume",
    "data": "data_path", "data_dir": "data_path", "early_stopping": "patience", "ema": "model_ema",
    "grad_clip": "clip_grad", "gradient_accumulation_steps": "update_freq", "learning_rate": "lr", "optimizer": "opt",
    "pretrained": "load_release", "random_erasing": "reprob", "warmup": "warmup_epochs", "wd": "weight_decay",
    "weights": "finetune",
}


def similar(name: str, known: Collection[str], prefix: str = "") -> str:
    """`utils.nearest` among flags, with what other programs call them; all of them behind `prefix` in the message."""
    meant = OTHER_NAMES.get(name)
    if meant in known:
        return f"; did you mean {prefix}{meant}?"
    return nearest(prefix + name, [prefix + flag for flag in known])


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Leaves out the default where there is none, or where the help says it."""

    def _get_help_string(self, action: argparse.Action) -> str:
        says_default = action.default in (None, [], {}) or "(default" in (action.help or "")
        return action.help if says_default else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """The parser of a settings class; raises `UsageError`, one line, where argparse would print its usage and exit.

    --help starts with the flags that the settings class names in `most_used`, where it does.

    Args:
        settings_class: Whose flags it knows.
        elsewhere: Flags of other tasks, and the task of each, for messages.
        kwargs: As of ArgumentParser.
    """

    def __init__(self, settings_class: type, elsewhere: Mapping[str, str] = MappingProxyType({}), **kwargs: Any):
        usage = "%(prog)s [--config YAML] [--FLAG VALUE ...]"
        super().__init__(usage=usage, formatter_class=_HelpFormatter, allow_abbrev=False, **kwargs)
        self.elsewhere = elsewhere
        # argparse takes -1 for a number but -1e-4, -1% and -inf for flags.
        self._negative_number_matcher = re.compile(r"-(\d|\.\d|inf|nan)")
        self.add_argument("--config", metavar="YAML", help="recipe to start from; flags given here win over it")
        # Old launchers pass it; the environment says the same.
        self.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
        groups = group_classes(settings_class).values()
        most_used = getattr(settings_class, "most_used", ())
        by_name = {field.name: field for group_class in groups for field in dataclasses.fields(group_class)}
        group = self.add_argument_group("Most used")
        for name in most_used:
            _add_flag(group, by_name[name])
        for group_class in groups:
            group = self.add_argument_group(group_class.__doc__.partition("\n")[0])
            for field in dataclasses.fields(group_class):
                if field.name not in most_used:
                    _add_flag(group, field)

    def names(self) -> list[str]:
        """All flags but --help."""
        return list(dict.fromkeys(self.by_name().values()))

    def by_name(self) -> dict[str, str]:
        """The flag of each name, the second names of flags too."""
        return {
            option.removeprefix("--"): action.dest
            for action in self._actions for option in action.option_strings if action.dest != "help"
        }

    def takes_several(self, name: str) -> bool:
        """Whether a flag takes any number of values."""
        return any(action.dest == name and action.nargs not in (None, "?") for action in self._actions)

    def parse_all(self, tokens: Sequence[str]) -> argparse.Namespace:
        """The values of words that must all be understood. Raises UsageError; names the nearest flag."""
        args, unknown = self.parse_known_args(tokens)
        if unknown:
            name = unknown[0].partition("=")[0]
            if task := self.elsewhere.get(name.removeprefix("--")):
                raise UsageError(f"{name} is a flag of --task {task}")
            if name.startswith("--"):
                raise UsageError(f"unknown flag {name}{similar(name.removeprefix('--'), self.names(), '--')}")
            raise UsageError(f"unexpected argument {unknown[0]!r}")
        return args

    def error(self, message: str) -> NoReturn:
        raise UsageError(message.removeprefix("argument "))


def _add_flag(group: argparse._ArgumentGroup, field: dataclasses.Field):
    default, argument = default_of(field), dict(field.metadata["argument"])
    if isinstance(default, bool):
        argument.update(type=boolean, nargs="?", const=True, metavar="BOOL")
    names = [f"--{name}" for name in (field.name, field.metadata["alias"]) if name]
    group.add_argument(*names, default=default, help=field.metadata["help"], **argument)


def _underscored(token: str) -> str:
    """--drop-path=0.1 -> --drop_path=0.1"""
    name, equals, value = token.partition("=")
    return f"{name.replace('-', '_').replace('__', '--', 1)}{equals}{value}" if token.startswith("--") else token


def _split_nulls(tokens: list[str], known: Collection[str]) -> tuple[list[str], list[str]]:
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


def check_words(parser: Parser, argv: Sequence[str]):
    """Print --help and exit, or check each flag and value of a command line by itself, whatever else is asked for.

    Raises:
        UsageError: A flag is unknown, or a value is none of its flag; names the nearest one.
    """
    parser.parse_all(_split_nulls([_underscored(token) for token in argv], parser.by_name())[0])


def recipe_of(argv: Sequence[str]) -> dict[str, Any]:
    """The recipe that a command line names, as `read_recipe` gives it; empty without one.

    It may come from a pipe, which can be read once: what needs it takes it from here.

    Raises:
        UsageError: It cannot be read.
    """
    config = given_value(argv, "config")
    return {} if config is None else read_recipe(config)


def parse(
    settings_class: type[SettingsT],
    argv: Sequence[str],
    parser: Parser | None = None,
    recipe: Mapping[str, Any] | None = None,
    below: Mapping[str, Any] = MappingProxyType({}),
) -> SettingsT:
    """Read a command line. `--flag null` undoes what its recipe says of a flag.

    Args:
        settings_class: A frozen dataclass whose fields are groups.
        argv: The words of the command line.
        parser: Its parser, where --help should say more than the flags.
        recipe: What `recipe_of` returned, where it was read before.
        below: Values in place of the defaults, of flags that neither gives; see `remaining`.

    Raises:
        UsageError: A flag, key or value is unknown or out of range; names the nearest one.
    """
    parser = parser or Parser(settings_class)
    known = parser.by_name()
    tokens, nulls = _split_nulls([_underscored(token) for token in argv], known)
    config = _config(tokens, parser, recipe)
    typed = _typed(parser, tokens) | dict.fromkeys(known[name] for name in nulls)
    of_recipe = remaining(settings_class, config, typed)
    lower, source = {**below, **of_recipe}, given_value(tokens, "config")
    args = parser.parse_all(as_tokens(lower) + tokens)
    groups = group_classes(settings_class)
    # Every single value before what values say together: the first error is about what was typed.
    for field in (field for group_class in groups.values() for field in dataclasses.fields(group_class)):
        with _naming(source if field.name in of_recipe else None, field.name):
            check_field(field, _value(args, field))
    try:
        return settings_class(**{
            name: group_class(**{field.name: _value(args, field) for field in dataclasses.fields(group_class)})
            for name, group_class in groups.items()
        })
    except ContradictionError as error:
        theirs = ", ".join(f"{name}: {of_recipe[name]}" for name in error.names if name in of_recipe)
        raise UsageError(f"{error}; {source} has {theirs}" if theirs else str(error)) from error


def given(
    settings_class: type, argv: Sequence[str], recipe: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The values that a command line and its recipe, as for `parse`, give to flags of a settings class.

    Flags of others are passed over, in the recipe too. Given as null, a value is None.

    Raises:
        UsageError: A value is of the wrong type, or the recipe cannot be read.
    """
    parser = Parser(settings_class, add_help=False)
    known = parser.by_name()
    tokens, nulls = _split_nulls([_underscored(token) for token in argv], known)
    config = _config(tokens, parser, recipe, strict=False)
    return {**typed(parser, config), **_typed(parser, tokens), **dict.fromkeys(known[name] for name in nulls)}


def typed(parser: Parser, recipe: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a recipe, None or of its flag's type as `as_recipe` gives it; unknown keys are left out.

    Raises:
        UsageError: A value is of another type.
    """
    known = set(parser.names())
    values = {name: value for name, value in recipe.items() if name in known}
    return values | _typed(parser, as_tokens({name: value for name, value in values.items() if value is not None}))


def flags_of(settings_class: type) -> set[str]:
    """The names of all flags of a settings class."""
    return {field.name for group in group_classes(settings_class).values() for field in dataclasses.fields(group)}


def remaining(settings_class: type, values: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Those of `values`, but for None, of flags of a settings class that are not `given`, nor an alternative to them.

    See `Group.alternatives`.
    """
    groups, known = group_classes(settings_class).values(), flags_of(settings_class)
    covered = set(given)
    for pair in (pair for group in groups for pair in group.alternatives):
        if any(given.get(name) is not None for name in pair):
            covered |= set(pair)
    return {k: v for k, v in values.items() if k in known - covered and v is not None}


def _config(
    tokens: Sequence[str], parser: Parser, recipe: Mapping[str, Any] | None = None, strict: bool = True
) -> dict[str, Any]:
    """The recipe of a command line, by flag; empty without one. `strict` refuses keys that are no flags."""
    config = given_value(tokens, "config")
    if config is None:
        return {}
    known, values, keys = parser.by_name(), {}, {}
    for key, value in (read_recipe(config) if recipe is None else recipe).items():
        name = known.get(key)
        if name in (None, "config"):
            if strict:
                raise UsageError(f"--config {config}: unknown key {key!r}{similar(key, parser.names())}")
            continue
        if name in keys:
            raise UsageError(f"--config {config}: {keys[name]} and {key} are the same flag")
        keys[name] = key
        if isinstance(value, str) and parser.takes_several(name):  # on one line, as on the command line
            try:
                value = shlex.split(value)
            except ValueError as error:
                raise UsageError(f"--config {config}: {key}: {error}") from error
        with _naming(config, name):
            parser.parse_all(as_tokens({name: value}) if value is not None else [])
        values[name] = value
    return values


@contextmanager
def _naming(config: str | None, name: str) -> Iterator[None]:
    """Have the error of a recipe's value say in which file and under which key it stands; None is the command line."""
    try:
        yield
    except UsageError as error:
        if config is None:
            raise
        raise UsageError(f"--config {config}: {name}: {str(error).removeprefix(f'--{name}').lstrip(': ')}") from error


def _typed(parser: Parser, tokens: Sequence[str]) -> dict[str, Any]:
    """The flags that are among the words of a command line, and their values."""
    not_given = object()
    blank = argparse.Namespace(**dict.fromkeys(parser.names(), not_given))
    args, _ = parser.parse_known_args(tokens, blank)
    return {
        name: plain(parser.get_default(name), value)
        for name, value in vars(args).items() if value is not not_given
    }


def _value(args: argparse.Namespace, field: dataclasses.Field) -> Any:
    """What was given for a field; of KEY=VALUE pairs the dictionary."""
    value = getattr(args, field.name)
    return dict(value) if isinstance(default_of(field), dict) else value
