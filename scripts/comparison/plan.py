"""What is compared: a YAML file of the settings that all runs share, and of those in which they differ."""
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

import main
from training.options import Settings
from training.recipes import MOST_CHARACTERS
from utils import UserError, one_line

# Flags that the comparison itself gives to its runs.
GIVEN = frozenset({
    "lr", "seed", "epochs", "output_dir", "auto_resume", "resume", "eval", "config", "task", "cuda_graph",
})  # fmt: skip
OF_NUMBERS = "YAML reads 1e-3 as a word, 1.0e-3 as a number"
MEASURED, LOGGED = "measured", "logged"
# Flags with which a run may end before its last epoch, or without the accuracy after it.
WITHOUT_END = frozenset({"max_steps", "patience", "disable_eval"})
# Flags that change what a training step costs. Steps are not measured with those of the first set; those of the second
# are measured with as long as they are the same for all contenders.
UNMEASURED = frozenset({"grad_checkpointing", "update_freq", "distillation_type", "token_label", "freeze_backbone"})
OF_STEPS = UNMEASURED | {"batch_size", "input_size", "amp", "channels_last", "compile"}


class PlanError(UserError):
    """The file of a comparison is not as it should be."""


@dataclass(frozen=True)
class Plan:
    """A comparison of networks, or of ways to train one.

    Args:
        name: Of the file, without its ending.
        shared: Settings of every run, as a YAML mapping of main.py's flags.
        runs: By the name of each contender, the settings in which it differs; without `model`, its name is the model,
            and with `lr`, that is its learning rate.
        lr: The learning rates that the others try, for 512 images. Where there are several, each contender is trained
            with each of them for `lr_epochs` epochs, and then from scratch with the one of the highest accuracy.
        lr_epochs: Epochs of these short runs.
        epochs: Epochs of the runs that are compared.
        seeds: Of these; the short runs have the first.
        speed: "measured": training steps side by side, one network after the other; "logged": from the runs' logs,
            where contenders differ in more than their networks, as by a teacher.
    """

    name: str
    shared: yaml.MappingNode
    runs: dict[str, yaml.MappingNode]
    epochs: int
    lr: list[float] = field(default_factory=list)
    lr_epochs: int = 0
    seeds: list[int] = field(default_factory=lambda: [0])
    speed: str = MEASURED

    @classmethod
    def read(cls, path: Path) -> "Plan":
        """Raises PlanError where the file cannot be read, or does not say what it should."""
        try:
            with path.open(encoding="utf-8") as file:
                text = file.read(MOST_CHARACTERS)
            root, values = yaml.compose(text, yaml.SafeLoader), yaml.safe_load(text)
        except OSError as error:
            raise PlanError(f"{path}: {error.strerror}") from error
        except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
            raise PlanError(f"{path} is no YAML: {one_line(error)}") from error
        check(path, values)
        nodes = {key.value: node for key, node in root.value}
        runs = {key.value: _mapping(node) for key, node in nodes["runs"].value}
        own = {key: value for key, value in values.items() if key not in ("settings", "runs")}
        return cls(path.stem, nodes["settings"], runs, **own)

    def recipe(self, name: str, **given: Any) -> str:
        """The recipe of a run of the contender `name`, as YAML for `--config`; `given` stand above the plan's."""
        own = yaml.compose(yaml.safe_dump(given))
        settings = {"model": (yaml.ScalarNode("tag:yaml.org,2002:str", "model"),
                              yaml.ScalarNode("tag:yaml.org,2002:str", name))}
        for node in (self.shared, self.runs[name], own):
            settings |= {key.value.replace("-", "_"): (key, value) for key, value in node.value}
        return yaml.serialize(yaml.MappingNode("tag:yaml.org,2002:map", list(settings.values())))

    @property
    def settings(self) -> dict[str, Any]:
        """What all runs share, as plain values."""
        return yaml.safe_load(yaml.serialize(self.shared))

    def own(self, name: str) -> dict[str, Any]:
        """What the contender `name` has of its own, as plain values."""
        return yaml.safe_load(yaml.serialize(self.runs[name]))

    def rates(self, name: str) -> list[float]:
        """The learning rates that the contender `name` tries, or its own one."""
        own = self.own(name)
        return [own["lr"]] if "lr" in own else self.lr

    def parse(self, name: str, **given: Any) -> Settings:
        """The settings of a run of the contender `name`, with `given` above the plan's.

        Raises:
            UserError: main.py refuses them.
        """
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder, f"{name}.yaml")
            file.write_text(self.recipe(name, **given))
            task, settings = main.parse(["--config", str(file)])
        main.check_names(task, settings)
        return settings


def _mapping(node: yaml.Node) -> yaml.MappingNode:
    """A contender's settings, of which `NAME:` alone has none."""
    return node if isinstance(node, yaml.MappingNode) else yaml.MappingNode("tag:yaml.org,2002:map", [])


def check(path: Path, values: Any):
    """Raises PlanError where the values in the file `path` are no plan."""
    def refuse(what: str):
        raise PlanError(f"{path}: {what}")

    known = set(Plan.__dataclass_fields__) - {"name", "shared"} | {"settings"}
    if not isinstance(values, dict) or not all(isinstance(values.get(key), dict) for key in ("settings", "runs")):
        refuse("needs `settings` and `runs`, which are lines of `flag: value`, and of `name: settings`")
    if unknown := values.keys() - known:
        refuse(f"unknown {', '.join(sorted(map(str, unknown)))}; there are {', '.join(sorted(known))}")
    check_settings_of_runs(values, refuse)
    lr, seeds = values.get("lr", []), values.get("seeds", [0])
    needs_lr = "lr" in values or any("lr" not in (own or {}) for own in values["runs"].values())
    if needs_lr and (not _is_list_of(lr, (int, float)) or min(lr) <= 0):
        refuse(f"`lr` needs a list of learning rates; {OF_NUMBERS}")
    if not _is_list_of(seeds, int) or min(seeds) < 0:
        refuse("`seeds` needs a list of whole numbers")
    for key in ("epochs", *["lr_epochs"] * (len(lr) > 1)):
        if not isinstance(values.get(key), int) or values[key] < 1:
            refuse(f"`{key}` needs a number of epochs")
    speed = values.get("speed", MEASURED)
    if speed not in (MEASURED, LOGGED):
        refuse(f"`speed` is {MEASURED} or {LOGGED}")
    if speed == LOGGED:
        return
    if costly := UNMEASURED & names_in(values["settings"]):
        refuse(f"steps are not measured with {', '.join(sorted(costly))}: add `speed: {LOGGED}`")
    for name, own in values["runs"].items():
        if costly := OF_STEPS & names_in(own or {}):
            refuse(f"`{name}` differs in {', '.join(sorted(costly))}, not in its network alone: add `speed: {LOGGED}`")


def check_settings_of_runs(values: dict[str, Any], refuse: Callable[[str], None]):
    """Call `refuse` where the settings that all runs share, or those of one, are not as they should be."""
    if not values["runs"]:
        refuse("`runs` names nothing to compare")
    for name, own in values["runs"].items():
        if not isinstance(own, dict | None):
            refuse(f"`{name}` needs lines of `flag: value`, or none")
        if "/" in str(name) or str(name).startswith("."):
            refuse(f"`{name}` cannot be the name of a folder")
        lr = (own or {}).get("lr", 1.0)
        if not _is_list_of([lr], (int, float)) or lr <= 0:
            refuse(f"`lr` of `{name}` needs a learning rate; {OF_NUMBERS}")
    for mapping, allowed in ((values["settings"], set()), *((own, {"lr"}) for own in values["runs"].values() if own)):
        if given := (GIVEN & names_in(mapping)) - allowed:
            refuse(f"{', '.join(sorted(given))}: the comparison itself gives these, see `lr`, `epochs`, `seeds` and "
                   "--help")
        if given := WITHOUT_END & names_in(mapping):
            refuse(f"{', '.join(sorted(given))}: what is compared is the accuracy after `epochs` epochs")


def names_in(mapping: dict[Any, Any]) -> set[str]:
    """The flags of a part of the file, in underscores."""
    return {str(key).replace("-", "_") for key in mapping}


def _is_list_of(values: Any, kind: type | tuple[type, ...]) -> bool:
    return isinstance(values, list) and bool(values) and all(
        isinstance(value, kind) and not isinstance(value, bool) for value in values
    ) and len(set(values)) == len(values)
