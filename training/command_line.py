"""A command line is understood: its task, its settings, and what these take from the run that it evaluates or resumes.

What is asked for stands above what the run had, and the run above the defaults: the command line, then `--config`, then
the recipe in the checkpoint (or in the folder of the run), then the defaults.
"""
import importlib
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from storage.weights import WeightsError, read_checkpoint
from utils import UsageError, UserError, check_name

from . import flags
from .launcher import has_peers, restart_count
from .options import NO_RESULT, NOT_OF_RUN, Settings, TaskOptions
from .recipes import read_recipe
from .task import Task

TaskRegistry = Mapping[str, str | type[Task]]


class CommandLine(NamedTuple):
    """What a command line asks for; `notes` are lines about what was taken from a run, and what differs from it."""

    task_class: type[Task]
    settings: Settings
    notes: list[str]


class RunRecipe(NamedTuple):
    """The recipe of the run that is evaluated or resumed, empty where it has none, and why it could not be read."""

    source: str = ""
    recipe: Mapping[str, Any] = {}
    problem: str | None = None


def choose_task(argv: Sequence[str], tasks: TaskRegistry, base: Mapping[str, Any] | None = None) -> type[Task]:
    """The task that `--task`, or else the recipe, or else that of the run, names."""
    config = flags.given_value(argv, "config")
    recipe = {**(base or {}), **({} if config is None else read_recipe(config))}
    name = flags.given_value(argv, "task", recipe) or TaskOptions().task
    check_name("task", name, tasks)
    if isinstance(tasks[name], type):
        return tasks[name]
    module, _, task_class = tasks[name].partition(":")
    return getattr(importlib.import_module(module), task_class)


def understand(argv: Sequence[str], tasks: TaskRegistry, description: str) -> CommandLine:
    """The task of a command line, its settings, and what to say about them; `description` is for --help.

    Raises:
        UserError: The command line, or the recipe that it names, is wrong.
    """
    run = _run_recipe(flags.given(Settings, argv))
    task_class = choose_task(argv, tasks, run.recipe)
    settings_class = task_class.settings_class
    parser = flags.Parser(settings_class, prog="main.py", description=description)
    given = flags.given(settings_class, argv)
    scope = settings_class.evaluated if given.get("eval") else set(parser.names()) - NOT_OF_RUN
    recipe = {name: value for name, value in flags.typed(parser, run.recipe).items() if name in scope}
    base = _without_parts_of_others(settings_class, recipe, given)
    lower = flags.beneath(settings_class, base, given)
    taken = {name: value for name, value in lower.items() if value != parser.get_default(name)}
    note = [f"from {run.source}: {_listed(taken)}"] if taken else []
    try:
        settings = flags.parse(settings_class, argv, parser, lower)
    except UsageError as error:
        if run.problem is not None:
            raise UserError(run.problem) from error
        raise UsageError("; ".join([str(error), *note])) from error
    now = flags.as_recipe(settings)
    others = [
        f"{name}={base[name]}, not {now[name]}" for name in given
        if name in base.keys() - NO_RESULT and _plain(base[name]) != _plain(now[name])
    ]
    warning = [f"warning: {run.source} has {'; '.join(others)} as asked for"] if others else []
    return CommandLine(task_class, settings, note + warning)


def resume_command(folder: Path) -> str:
    """The command that resumes the run in `folder`, as a shell takes it; with a launcher, what it is given."""
    words = _program(sys.orig_argv[: len(sys.orig_argv) - len(sys.argv[1:])])
    flags = ["--config", str(folder / "args.yaml"), "--output_dir", str(folder), "--auto_resume"]
    if has_peers():
        return f"the same launcher and {shlex.join([*words[1 if words[0] == 'python' else 0 :], *flags])}"
    return shlex.join([*words, *flags])


def _program(words: Sequence[str]) -> list[str]:
    """How this program was started, by the words of the interpreter: as the installed command, or as main.py."""
    path = Path(words[-1] if words else "")
    if words[-2:] == ["-m", "routedvit"]:
        return ["python", "-m", "routedvit"]
    if path.name in ("routedvit", "routedvit-hydra"):
        return ["routedvit"] if not has_peers() else ["python", "-m", "routedvit"]
    return ["python", str(path.with_name("main.py")) if path.name in ("main.py", "hydra_main.py") else "main.py"]


def _run_recipe(given: Mapping[str, Any]) -> RunRecipe:
    """The recipe of the run that these flags evaluate or resume; fine-tuning is a run of its own."""
    if (given.get("auto_resume") or restart_count()) and not given.get("eval") and given.get("output_dir"):
        path = Path(given["output_dir"]) / "args.yaml"
        if path.is_file():
            return RunRecipe(str(path), read_recipe(str(path)))
    source = given.get("resume")
    if not source:
        return RunRecipe()
    try:
        recipe = read_checkpoint(source, mmap=True).get("args")
    except WeightsError as error:
        return RunRecipe(source, problem=str(error))
    # Checkpoints of others hold other things by this name.
    is_ours = isinstance(recipe, dict) and "task" in recipe
    return RunRecipe(source, recipe if is_ours else {})


def _without_parts_of_others(
    settings_class: type[Settings], recipe: dict[str, Any], given: Mapping[str, Any]
) -> dict[str, Any]:
    """The values of a recipe, without parts of what is given as another one, such as the arguments of another model."""
    parts = {k: v for group in flags.group_classes(settings_class).values() for k, v in group.parts_of.items()}
    others = {name for name, whole in parts.items() if given.get(whole) not in (None, recipe.get(whole))}
    return {name: value for name, value in recipe.items() if name not in others}


def _listed(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value}" for name, value in values.items())


def _plain(value: Any) -> Any:
    """A value as YAML writes it: without tuples."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value
