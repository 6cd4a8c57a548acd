"""A command line is understood: its task, its settings, and what these take from the run that it evaluates or resumes.

What is asked for stands above what the run had, and the run above the defaults: the command line, then `--config`, then
the recipe in the checkpoint (or in the folder of the run), then the defaults.
"""
import importlib
import os
import shlex
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from storage.remote import is_shortened, public
from storage.weights import WeightsError, read_checkpoint
from utils import UsageError, UserError, check_name

from . import flags, parsing
from .launcher import has_peers, restart_count
from .options import NO_RESULT, NOT_OF_RUN, START, Settings, TaskOptions, holds_checkpoint
from .recipes import read_recipe
from .task import Task

# The package's commands.
_INSTALLED = ("routedvit", "routedvit-hydra")
TaskRegistry = Mapping[str, str | type[Task]]


class CommandLine(NamedTuple):
    """What a command line asks for; `notes` are lines about what was taken from a run, and what differs from it."""

    task_class: type[Task]
    settings: Settings
    notes: list[str]


class RunRecipe(NamedTuple):
    """The recipe of the run that is evaluated or resumed.

    Attributes:
        source: Where it is; empty where no run is evaluated or resumed.
        values: Empty where there is none.
        has_trained: Whether there is a checkpoint of the run.
        is_missing: Whether `source` is a folder that a run was to be resumed in, and holds none.
        problem: Why it could not be read.
    """

    source: str = ""
    values: Mapping[str, Any] = {}
    has_trained: bool = True
    is_missing: bool = False
    problem: str | None = None


def choose_task(
    argv: Sequence[str], tasks: TaskRegistry, recipe: Mapping[str, Any] = MappingProxyType({})
) -> type[Task]:
    """The task that `--task`, or else the recipe, names."""
    name = parsing.given_value(argv, "task", recipe) or TaskOptions().task
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
    recipe = parsing.recipe_of(argv)
    run = _run_recipe(parsing.given(Settings, argv, recipe))
    if parsing.given_value(argv, "task", recipe) not in (None, run.values.get("task")):
        run = run._replace(values={})  # another task's, whose flags are others
    task_class = choose_task(argv, tasks, {**run.values, **recipe})
    settings_class = task_class.settings_class
    parser = parsing.Parser(settings_class, prog="main.py", description=description)
    given = parsing.given(settings_class, argv, recipe)
    words = parsing.given(settings_class, argv, {})
    settings_class.check_words(words)
    scope = settings_class.evaluated if given.get("eval") else _resumed(parser, run)
    of_run = {name: value for name, value in parsing.typed(parser, run.values).items() if name in scope}
    asked = {name: parser.get_default(name) if value is None else value for name, value in given.items()}
    left = settings_class.not_taken(flags.kept(asked), of_run)
    taken = {
        name: value for name, value in parsing.remaining(settings_class, of_run, given).items()
        if name not in left and value != parser.get_default(name)
    }
    note = [f"from {run.source}: {_listed(taken)}"] if taken else []
    missing = [f"{run.source} holds no run to resume"] if run.is_missing else []
    try:
        settings = parsing.parse(settings_class, argv, parser, recipe, taken)
    except UsageError as error:
        if run.problem is not None:
            raise UserError(run.problem) from error
        raise UsageError("; ".join([str(error), *note, *missing])) from error
    differences = _differences(settings_class, of_run, flags.as_recipe(settings), given)
    warning = [f"warning: {run.source} has {'; '.join(differences)} as asked for"] if differences else []
    return CommandLine(task_class, settings, note + warning + _without_effect(settings, words))


def how_to_resume(folder: Path) -> str:
    """What resumes the run in `folder`: a few words and, on a line of its own, the command as a shell takes it; with a
    launcher, what it is given. Addresses that the run has kept only a part of are to be given again.
    """
    path = folder / "args.yaml"
    recipe = read_recipe(str(path)) if path.is_file() else {}
    shortened = {
        f"--{name}": value for name, value in recipe.items()
        if name not in START and isinstance(value, str) and is_shortened(value)
    }
    again = f"put the password or signature into {' and '.join(shortened)}, and " if shortened else ""
    words = sys.orig_argv[: len(sys.orig_argv) - len(sys.argv[1:])]
    resume = ["--config", str(path), "--output_dir", str(folder), "--auto_resume"]
    resume += [word for pair in shortened.items() for word in pair]
    if has_peers():
        return f"{again}resume with the same launcher and\n{shlex.join([*_program(words), *resume])}"
    return f"{again}resume with\n{shlex.join([*_command(words), *resume])}"


def _program(words: Sequence[str]) -> list[str]:
    """What the interpreter was given, by its words: the installed package, or main.py."""
    path = Path(words[-1] if words else "")
    if path.name in _INSTALLED:
        return ["-m", "routedvit"]
    return [str(path.with_name("main.py")) if path.name in ("main.py", "hydra_main.py") else "main.py"]


def _command(words: Sequence[str]) -> list[str]:
    """How this program was started: as the installed command, or by the interpreter; by path where the shell does not
    find this environment's own.
    """
    path = Path(words[-1] if words else "")
    if path.name in _INSTALLED and words[-2:-1] != ["-m"]:
        command = path.with_name("routedvit")
        return ["routedvit" if shutil.which("routedvit") == str(command) else str(command)]
    python = shutil.which("python")
    is_own = python is not None and all(
        part(python) == part(sys.executable) for part in (os.path.dirname, os.path.realpath)
    )
    return ["python" if is_own else sys.executable, *_program(words)]


def _run_recipe(given: Mapping[str, Any]) -> RunRecipe:
    """The recipe of the run that these flags evaluate or resume; fine-tuning is a run of its own."""
    is_evaluation = given.get("eval")
    source = given.get("resume") or (is_evaluation and given.get("finetune"))
    if (given.get("auto_resume") or restart_count()) and not is_evaluation and given.get("output_dir"):
        folder = Path(given["output_dir"])
        path = folder / "args.yaml"
        if os.path.lexists(path):
            return RunRecipe(str(path), _recipe_left_in(path), has_trained=holds_checkpoint(folder))
        # Without it, the newest checkpoint says the same.
        source = max(map(str, folder.glob("checkpoint-*.pth")), default=source)
        if not source:
            return RunRecipe(given["output_dir"], is_missing=True)
    if not source:
        return RunRecipe()
    try:
        recipe = read_checkpoint(source, mmap=True).get("args")
    except WeightsError as error:
        return RunRecipe(public(source), problem=str(error))
    # Checkpoints of others hold other things by this name.
    is_ours = isinstance(recipe, dict) and "task" in recipe
    return RunRecipe(public(source), recipe if is_ours else {})


def _recipe_left_in(path: Path) -> dict[str, Any]:
    """The recipe that a run has left in its folder. Raises UserError where something else is there."""
    recipe = {}
    if path.is_file():
        try:
            recipe = read_recipe(str(path))
        except UsageError as error:
            if isinstance(error.__cause__, OSError):
                raise
    if "task" not in recipe:
        raise UserError(f"{path} is no recipe of a run; once it is moved away, the newest checkpoint says what it said")
    return recipe


def _resumed(parser: parsing.Parser, run: RunRecipe) -> set[str]:
    """The flags that are taken from a run that is resumed; before its first checkpoint, what it starts from too."""
    return set(parser.names()) - (NOT_OF_RUN if run.has_trained else NOT_OF_RUN - START)


def _differences(
    settings_class: type[Settings], of_run: Mapping[str, Any], now: Mapping[str, Any], given: Mapping[str, Any]
) -> list[str]:
    """What was given and is another in the run, where it decides the result: "lr=0.1, not 0.2"."""
    pairs = [pair for group in flags.group_classes(settings_class).values() for pair in group.alternatives]
    found = {}
    for name in (name for name in given if name in of_run.keys() - NO_RESULT):
        names = next((pair for pair in pairs if name in pair), (name,))
        (name_then, then), (name_now, value) = (_counting(names, recipe) for recipe in (of_run, now))
        if (name_then, then) != (name_now, value):
            found[names] = f"{name_then}={then}, not {'' if name_now == name_then else f'{name_now}='}{value}"
    return list(found.values())


def _without_effect(settings: Settings, words: Mapping[str, Any]) -> list[str]:
    """A warning of each flag on the command line itself that can have no effect; recipes of runs hold all flags."""
    return [
        f"warning: --{name} has no effect {why}" for name, (has_effect, why) in settings.needs().items()
        if not has_effect and words.get(name) not in (None, False)
    ]


def _counting(names: Sequence[str], recipe: Mapping[str, Any]) -> tuple[str, Any]:
    """Of a flag and the alternative to it, the one that counts, and its value."""
    name = next((name for name in reversed(names) if recipe.get(name) is not None), names[0])
    return name, recipe.get(name)


def _listed(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={flags.kept(value)}" for name, value in values.items())
