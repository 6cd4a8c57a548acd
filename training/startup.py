"""What a program does before its other imports."""
import importlib
import sys
from collections.abc import Sequence
from importlib.util import find_spec

from . import missing, threads

threads.limit_spinning()
missing.report_missing_packages()


def check_command_line(argv: Sequence[str], description: str):
    """Answer --help, or words of main.py's command line that no settings could make right, and end the process.

    This imports the options of a task alone: torch takes seconds. All else is left to the program.
    """
    from utils import UsageError, fail, user_path

    from . import options, parsing, recipes

    try:
        config = parsing.given_value(argv, "config")
        if config is not None and user_path(config).exists() and not user_path(config).is_file():
            return  # a pipe, which can be read once
        recipe = {} if config is None else recipes.read_recipe(config)
        task = parsing.given_value(argv, "task", recipe) or options.TaskOptions().task
        if not task.isidentifier() or find_spec(f"tasks.{task}") is None:
            return
        settings_class = getattr(importlib.import_module(f"tasks.{task}.options"), f"{task.title()}Settings")
        parsing.check_words(parsing.Parser(settings_class, prog="main.py", description=description), argv)
    except UsageError as error:
        sys.exit(fail(str(error), error.exit_code))
