"""Recipes: YAML files of flags, whose values mean what they mean on the command line."""
import ast
from typing import Any, ClassVar

import yaml

from utils import UsageError, one_line, user_path

# A recipe with every flag has some 5,000 characters. YAML's aliases make any number of values of a short text.
MOST_CHARACTERS, MOST_VALUES = 100_000, 10_000


def literal(text: str) -> Any:
    """The value that a text stands for: true, false, none, a Python literal, or else the text."""
    words = dict(true=True, false=False, none=None, null=None)
    if text.lower() in words:
        return words[text.lower()]
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return text


class _Quoted(str):
    """A text that stands in quotes in YAML: it is no other literal."""


class _RefusedError(yaml.composer.ComposerError):
    """What YAML allows, and no recipe: a key that a mapping has twice, or more values than there is memory for."""


class _Loader(yaml.SafeLoader):
    """YAML in which every scalar is a text but null, no key is given twice, and aliases do not multiply for ever."""

    yaml_constructors: ClassVar = {
        tag: construct for tag, construct in yaml.SafeLoader.yaml_constructors.items()
        if tag is None or tag.endswith((":null", ":map", ":seq"))
    }
    yaml_implicit_resolvers: ClassVar = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag.endswith((":null", ":merge"))]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def __init__(self, text: str):
        super().__init__(text)
        self.count, self.sizes = 0, {}

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node:
        is_alias, before = self.check_event(yaml.AliasEvent), self.count
        node = super().compose_node(parent, index)
        self.count += self.sizes.get(id(node), 1) if is_alias else 1
        self.sizes[id(node)] = self.count - before
        if self.count > MOST_VALUES:
            raise _RefusedError(None, None, f"more than {MOST_VALUES:,} values", node.start_mark)
        return node

    def compose_mapping_node(self, anchor: str | None) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            name = str(key.value).replace("-", "_")
            if name in seen:
                raise _RefusedError(None, None, f"{key.value} is given twice", key.start_mark)
            seen.add(name)
        return node

    def construct_yaml_str(self, node: yaml.ScalarNode) -> str:
        text = self.construct_scalar(node)
        return _Quoted(text) if node.style in ("'", '"') else text


_Loader.add_constructor("tag:yaml.org,2002:str", _Loader.construct_yaml_str)


class _Dumper(yaml.SafeDumper):
    """YAML that `_Loader` reads as it was."""

    def represent_text(self, text: str) -> yaml.ScalarNode:
        is_other = text != "" and literal(text) is not text
        return self.represent_scalar("tag:yaml.org,2002:str", text, style="'" if is_other else None)


_Dumper.add_representer(str, _Dumper.represent_text)


def _literals(value: Any) -> Any:
    """The values in a part of a recipe, where texts stand for them."""
    if isinstance(value, dict):
        return {str(key): _literals(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_literals(part) for part in value]
    return literal(value) if type(value) is str else value and str(value)


def read_recipe(source: str) -> dict[str, Any]:
    """The recipe in a YAML file, its flags in underscores: to each a text, None, a list, or a mapping.

    Values are texts, as on the command line: `amp: off` is no boolean. Those of a mapping are as in `literal`.

    Raises:
        UsageError: It cannot be read, is no mapping, or is longer than any recipe.
    """
    loader = None
    try:
        with open(user_path(source), encoding="utf-8") as file:
            text = file.read(MOST_CHARACTERS + 1)
        if len(text) > MOST_CHARACTERS:
            raise UsageError(f"--config {source}: more than {MOST_CHARACTERS:,} characters are no recipe")
        loader = _Loader(text)
        recipe = loader.get_single_data() or {}
        if isinstance(recipe, dict):
            recipe = {key: _literals(value) if isinstance(value, dict) else value for key, value in recipe.items()}
    except OSError as error:
        raise UsageError(f"--config {source}: {error.strerror}") from error
    except RecursionError as error:
        raise UsageError(f"--config {source}: nested too deeply") from error
    except _RefusedError as error:
        raise UsageError(f"--config {source}: {error.problem}, in line {error.problem_mark.line + 1}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"--config {source}: not YAML ({one_line(error)})") from error
    finally:
        if loader is not None:
            loader.dispose()
    if not isinstance(recipe, dict):
        raise UsageError(f"--config {source}: must be lines of `flag: value`")
    return {str(key).replace("-", "_"): value for key, value in recipe.items()}


def dump_recipe(recipe: dict[str, Any]) -> str:
    """A recipe of plain values as YAML, for `read_recipe`."""
    return yaml.dump(recipe, Dumper=_Dumper, sort_keys=False)


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
