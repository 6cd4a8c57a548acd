"""What a program does before its other imports."""
import importlib
import os
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pkgutil import iter_modules
from types import TracebackType
from typing import Any

from . import launcher, missing, process, threads


def _report(kind: type[BaseException], error: BaseException, trace: TracebackType | None):
    """Ctrl-C, as of a program that is still importing, and a missing package in one line; all else as Python does."""
    if isinstance(error, KeyboardInterrupt):
        sys.stderr.write("error: interrupted\n")
        sys.stderr.flush()
        # Python would call what libraries want called, which takes a while that a second Ctrl-C falls into, and then
        # end with 1 or by the signal.
        os._exit(130)
    if message := missing.missing_package(error):
        sys.stderr.write(f"error: {message}\n")
    else:
        sys.__excepthook__(kind, error, trace)


def _quiet_after_interrupts(unraisable: Any, otherwise: Callable[[Any], None] = sys.unraisablehook):
    """Say nothing of Ctrl-C where Python goes on in spite of it, as in what a process calls when it ends."""
    if not issubclass(unraisable.exc_type, KeyboardInterrupt):
        otherwise(unraisable)


threads.limit_spinning()
process.open_closed_streams()
if "TORCHELASTIC_RUN_ID" in os.environ:  # torchrun ends its processes, unless it is killed itself
    process.end_with_parent(signal.SIGTERM)  # upon which a run saves itself
sys.excepthook, sys.unraisablehook = _report, _quiet_after_interrupts


def _names_run(argv: Sequence[str], recipe: Mapping[str, Any]) -> bool:
    """Whether a run is evaluated or resumed, or may be: it knows its task, and torch reads what it knows."""
    given = {word.partition("=")[0].lstrip("-").replace("-", "_") for word in argv if word.startswith("--")}
    return bool((given | recipe.keys()) & {"resume", "finetune", "auto_resume"}) or launcher.restart_count() > 0


def _settings(task: str) -> type:
    """The settings class of a task."""
    return getattr(importlib.import_module(f"tasks.{task}.options"), f"{task.title()}Settings")


def _other_tasks(task: str) -> list[str]:
    """The names of the tasks beside one; a folder without options is none."""
    names = [module.name for module in iter_modules(importlib.import_module("tasks").__path__) if module.ispkg]
    return [name for name in names if name != task and find_spec(f"tasks.{name}.options") is not None]


def check_command_line(argv: Sequence[str], description: str):
    """Answer --help, or words of main.py's command line that no settings could make right, and end the process.

    This imports the options of a task alone: torch takes seconds. All else is left to the program.
    """
    from utils import UsageError, fail, user_path

    from . import options, parsing, recipes

    process.outlive_readers()
    try:
        config = parsing.given_value(argv, "config")
        if config is not None and user_path(config).exists() and not user_path(config).is_file():
            return  # a pipe, which can be read once
        recipe = {} if config is None else recipes.read_recipe(config)
        task = parsing.given_value(argv, "task", recipe)
        if task is None and _names_run(argv, recipe):
            return
        task = task or options.TaskOptions().task
        if not task.isidentifier() or find_spec(f"tasks.{task}") is None:
            return
        elsewhere = {flag: other for other in _other_tasks(task) for flag in parsing.flags_of(_settings(other))}
        parser = parsing.Parser(_settings(task), elsewhere, prog="main.py", description=description)
        parsing.check_words(parser, argv)
    except UsageError as error:
        sys.exit(fail(str(error), error.exit_code))
