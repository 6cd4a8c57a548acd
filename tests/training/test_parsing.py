"""The parser and the recipes, on settings of their own."""
from dataclasses import FrozenInstanceError, dataclass
from typing import Any

import pytest
import yaml

from training import parsing, recipes
from training.flags import Group, as_recipe, at_least, flag, key_value, positive
from utils import UsageError


@dataclass(frozen=True)
class Loader(Group):
    """Data loading

    This is not for --help.
    """

    batch_size: int = flag(128, "images", type=int, check=at_least(1))
    pin_mem: bool = flag(True, "page-locked memory")


@dataclass(frozen=True)
class Optimizer(Group):
    """Optimizer"""

    lr: float = flag(5e-4, "learning rate", type=float, check=positive)
    clip_grad: float | None = flag(None, "clip the gradients", type=float, check=positive)
    betas: list[float] | None = flag(None, "betas (default: its own)", type=float, nargs="+", metavar="BETA")
    sched: str = flag("cosine", "schedule", choices=["cosine", "poly"])

    def check(self):
        if self.sched == "poly" and self.lr > 1:
            raise UsageError("--sched poly needs an --lr of at most 1")


@dataclass(frozen=True)
class Settings:
    loader: Loader
    optimizer: Optimizer


@dataclass(frozen=True)
class Model(Group):
    """Model"""

    model: str = flag("small", "its name", alias="arch")
    size: int | tuple[int, int] = flag(8, "its size", type=lambda text: tuple(map(int, text.split("x"))))
    model_kwargs: dict[str, Any] = flag({}, "its arguments", type=key_value, nargs="*", metavar="KEY=VALUE")
    scale: list[float] = flag([0.5, 1.0], "a range", type=float, nargs=2, metavar=("MIN", "MAX"))


@dataclass(frozen=True)
class TaskSettings(Settings):
    model: Model


def parse(*tokens):
    return parsing.parse(TaskSettings, tokens)


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "recipe.yaml"

    def write(text):
        path.write_text(text)
        return str(path)

    return write


# --- settings ---------------------------------------------------------------------------------------------------------


def test_defaults():
    assert parse() == TaskSettings(Loader(), Optimizer(), Model())


def test_settings_are_frozen():
    settings = parse()
    for target, name in ((settings, "loader"), (settings.loader, "batch_size"), (settings.model, "model_kwargs")):
        with pytest.raises(FrozenInstanceError):
            setattr(target, name, None)


def test_equal_lines_are_equal_settings():
    line = ["--lr", "1e-3", "--model_kwargs", "a=1", "--betas", "0.9", "0.99"]
    assert parse(*line) == parse(*line) != parse(*line, "--lr", "1e-2")


def test_defaults_are_not_shared():
    parse().model.model_kwargs["a"] = 1
    parse().model.scale.append(3)
    assert parse().model == Model() == Model(model_kwargs={}, scale=[0.5, 1.0])


# --- the command line -------------------------------------------------------------------------------------------------


def test_underscores_and_hyphens_are_one():
    assert parse("--batch-size", "3", "--clip-grad=2") == parse("--batch_size=3", "--clip_grad", "2")
    for name in parsing.Parser(TaskSettings).names():
        assert parsing._underscored(f"--{name.replace('_', '-')}=x-y") == f"--{name}=x-y"


@pytest.mark.parametrize("tokens,value", [
    (["--pin_mem"], True), (["--pin_mem", "true"], True), ([], True), (["--pin_mem=no"], False),
    (["--pin_mem", "off"], False), (["--pin_mem", "--lr", "1"], True), (["--pin_mem", "0"], False),
])
def test_booleans_bare_or_with_a_value(tokens, value):
    assert parse(*tokens).loader.pin_mem is value


@pytest.mark.parametrize("given,shown", [
    ("-1e-4", "-0.0001"), ("-1", "-1.0"), ("-.5", "-0.5"), ("-1.5E+3", "-1500.0"), ("-inf", "-inf"), ("-nan", "nan"),
])
def test_a_negative_number_is_a_value_however_it_is_written(given, shown):
    for tokens in (["--lr", given], [f"--lr={given}"]):
        with pytest.raises(UsageError) as error:
            parse(*tokens)
        assert str(error.value) == f"--lr must be above 0 and finite, got {shown}"
    assert parse("--betas", "-1e-4", "0.5", "-2").optimizer.betas[::2] == [-1e-4, -2]
    with pytest.raises(UsageError, match="--batch_size: invalid int value: '-1e-4'"):
        parse("--batch_size", "-1e-4")


def test_a_second_name():
    assert parse("--arch", "large").model.model == parse("--model=large").model.model == "large"


def test_local_rank_as_old_launchers_pass_it():
    assert parse("--local-rank=1") == parse("--local_rank", "3") == parse()


def test_pairs_of_key_and_value():
    given = parse("--model_kwargs", "num_regions=8", "topk=(1,4,9)", "layout=stl").model.model_kwargs
    assert given == {"num_regions": 8, "topk": (1, 4, 9), "layout": "stl"}
    assert parse("--model_kwargs").model.model_kwargs == {}


@pytest.mark.parametrize("tokens,message", [
    (["--btach_size", "3"], "unknown flag --btach_size; did you mean --batch_size?"),
    (["--learning-rate", "3"], "unknown flag --learning_rate; did you mean --lr?"),
    (["--batch", "3"], "unknown flag --batch; did you mean --batch_size?"),
    (["--weights", "x"], "unknown flag --weights"),
    (["--pin-mme=0"], "unknown flag --pin_mme; did you mean --pin_mem?"),
    (["stray"], "unexpected argument 'stray'"),
    (["--batch_size", "many"], "--batch_size: invalid int value: 'many'"),
    (["--batch_size"], "--batch_size: expected one argument"),
    (["--sched", "linear"], "--sched: invalid choice: 'linear'"),
    (["--pin_mem", "perhaps"], "takes true or false, not 'perhaps'"),
    (["--model_kwargs", "topk"], "takes KEY=VALUE, not 'topk'"),
    (["--batch", "3"], "unknown flag --batch; did you mean --batch_size?"),
    (["--config", "missing.yaml"], "--config missing.yaml: No such file or directory"),
    (["--config"], "--config: expected one argument"),
    (["--config", ""], "--config : Is a directory"),
])
def test_mistakes_are_explained_in_one_line(tokens, message):
    with pytest.raises(UsageError) as error:
        parse(*tokens)
    assert message in str(error.value) and "\n" not in str(error.value) and error.value.exit_code == 2


def test_help(capsys):
    with pytest.raises(SystemExit) as end:
        parse("--help")
    out = capsys.readouterr().out
    assert end.value.code == 0
    titles = [out.index(f"{title}:\n") for title in ("Model", "Data loading", "Optimizer")]
    assert titles == sorted(titles), "a task's own come first"
    assert "images (default: 128)" in out and "betas (default: its own)\n" in out and "clip the gradients\n" in out
    assert "--arch" in out and "--local_rank" not in out and "not for" not in out and "(default: None)" not in out


# --- recipes ----------------------------------------------------------------------------------------------------------


def test_command_line_over_recipe_over_defaults(recipe):
    text = "lr: 1e-3\nbatch-size: 7\nscale: [0.1, 0.5]\npin_mem: false\nmodel_kwargs: {topk: [1, 2, 3]}\n"
    settings = parse("--config", recipe(text), "--lr", "2e-3")
    assert settings.optimizer.lr == 2e-3 and settings.optimizer.sched == "cosine"
    assert settings.loader == Loader(7, False)
    assert settings.model == Model(scale=[0.1, 0.5], model_kwargs={"topk": [1, 2, 3]})


@pytest.mark.parametrize("null", [["--clip_grad", "null"], ["--clip-grad=null"]])
def test_null_undoes_what_a_recipe_says(null, recipe):
    path = recipe("clip_grad: 5\nbetas: [0.9, 0.95]\nlr: null\n")
    settings = parse("--config", path, *null, "--batch_size", "1")
    assert settings == TaskSettings(Loader(1), Optimizer(betas=[0.9, 0.95]), Model())
    assert parse("--config", path, "--betas=null").optimizer.betas is None
    with pytest.raises(UsageError, match="unknown flag --clip_grat"):
        parse("--clip_grat=null")


@pytest.mark.parametrize("null", [["--config", "null"], ["--config=null"]])
def test_no_recipe_at_all(null):
    assert parse(*null) == parse() and parsing.given_value(null, "config") is None


def test_one_flag_before_the_others_are_understood(recipe):
    assert parsing.given_value(["--lr", "x", "--arch-name=big", "-q"], "arch_name") == "big"
    assert parsing.given_value([], "task") is None
    assert parsing.given_value([], "task", dict(task="detection")) == "detection"
    assert parsing.given_value(["--task", "other"], "task", dict(task="detection")) == "other"
    assert parsing.given_value(["--task", "null"], "task", dict(task="detection")) is None
    assert parsing.given_value([], "task", dict(task=None)) is None
    assert parsing.given_value([], "task", dict(task=3)) == "3"
    with pytest.raises(UsageError, match="--task: expected one argument"):
        parsing.given_value(["--task"], "task")


LINES = [
    [],
    ["--lr=1e-3", "--size=64x96", "--model_kwargs", "topk=[1, 2, 3]", "a='x y'", "b=None", "--betas", "0.9", "0.99"],
    ["--betas", "0.5", "--pin_mem", "off", "--clip_grad=3", "--scale", "0.1", "0.2", "--sched=poly"],
    ["--arch", "none", "--lr", "1e-30"],
]


@pytest.mark.parametrize("line", LINES)
def test_settings_are_a_recipe_of_themselves(line, recipe):
    """Through YAML and, as for Slurm, as words of a command line."""
    settings = parse(*line, *([] if "--size=64x96" in line else ["--size", "8x8"]))
    said = as_recipe(settings)
    assert parse("--config", recipe(yaml.safe_dump(said))) == settings
    assert parse("--config", recipe(recipes.dump_recipe(said))) == settings
    assert parse(*recipes.as_tokens(said)) == settings


@pytest.mark.parametrize("line,words", [
    ("sched: off", ["--sched", "off"]),
    ("model: none", ["--model", "none"]),
    ("model: 20230307_1", ["--model", "20230307_1"]),
    ("model: 2023-03-07", ["--model", "2023-03-07"]),
    ("model: 1:30", ["--model", "1:30"]),
    ("batch_size: 010", ["--batch_size", "010"]),
    ("lr: 1e-3", ["--lr", "1e-3"]),
    ("pin_mem: off", ["--pin_mem", "off"]),
    ("pin_mem: 'no'", ["--pin_mem", "no"]),
    ("size: 256x384", ["--size", "256x384"]),
    ("arch: large", ["--arch", "large"]),
    ("betas: [0.5, 1e-3]", ["--betas", "0.5", "1e-3"]),
    ("betas: 0.5 1e-3", ["--betas", "0.5", "1e-3"]),
    ("model_kwargs: {ls_init_value: 1e-6}", ["--model_kwargs", "ls_init_value=1e-6"]),
    ("model_kwargs: {a: true, b: none, c: ~, d: gelu}", ["--model_kwargs", "a=true", "b=none", "c=null", "d=gelu"]),
    ("model_kwargs: {topk: [1, 4, x], z: {y: 1}}", ["--model_kwargs", "topk=[1, 4, 'x']", "z={'y': 1}"]),
    ("model_kwargs: {a: '8', b: \"none\"}", ["--model_kwargs", "a='8'", "b='none'"]),
    ("model_kwargs: num_regions=8 topk=(1,4,16)", ["--model_kwargs", "num_regions=8", "topk=(1,4,16)"]),
    ("model_kwargs: [num_regions=8]", ["--model_kwargs", "num_regions=8"]),
    ("scale: &range [0.1, 0.5]\nbetas: *range", ["--scale", "0.1", "0.5", "--betas", "0.1", "0.5"]),
    ("model_kwargs:\n  <<: {a: 1, b: 2}\n  b: 3", ["--model_kwargs", "a=1", "b=3"]),
])
def test_a_flag_means_in_a_recipe_what_it_means_on_the_command_line(recipe, line, words):
    def outcome(*tokens):
        try:
            return parse(*tokens)
        except UsageError as error:
            return str(error).replace(f"--config {recipe(line)}: ", "--")

    assert outcome("--config", recipe(line)) == outcome(*words) != parse()


def test_values_of_keys_are_python_literals_or_the_usual_words():
    given = dict(key_value(f"k={value}") for value in ["x"]) | {
        value: key_value(f"k={value}")[1]
        for value in ("1e-6", "true", "False", "none", "null", "on", "(1,2)", "'none'", "{[1]: 2}", "a=b", "")
    }
    assert given == {
        "k": "x", "1e-6": 1e-6, "true": True, "False": False, "none": None, "null": None, "on": "on", "(1,2)": (1, 2),
        "'none'": "none", "{[1]: 2}": "{[1]: 2}", "a=b": "a=b", "": "",
    }


@pytest.mark.parametrize("null", [["--arch", "null"], ["--model=null"], ["--arch=null"]])
def test_null_undoes_a_flag_by_either_of_its_names(null, recipe):
    for name in ("arch", "model"):
        assert parse("--config", recipe(f"{name}: large\n"), *null).model.model == "small"


def test_words_that_look_like_values_stay_words(recipe):
    settings = TaskSettings(Loader(), Optimizer(), Model(size=(8, 8), model_kwargs=dict(
        a="8", b="1e-6", c="none", d="(1, 2)", e="true", f=None, g=1e-6, h=[1, "2", None], i="", j="a b", k="é", l="on",
    )))
    assert parse("--config", recipe(recipes.dump_recipe(as_recipe(settings)))) == settings


def test_a_recipe_at_home(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mine.yaml").write_text("lr: 3\n")
    assert parse("--config=~/mine.yaml").optimizer.lr == 3


def test_values_that_look_like_flags():
    assert recipes.as_tokens(dict(lr=-1.0, seed=None, on=True, kwargs=dict(a="b"), betas=[1, 2])) == [
        "--lr=-1.0", "--seed=null", "--on=True", "--kwargs=a='b'", "--betas", "1", "2",
    ]


# Each of nine lists holds the one before ten times.
ALIASES = "model_kwargs:\n  a0: &a0 x\n" + "".join(f"  a{i}: &a{i} [{10 * f'*a{i - 1},'}]\n" for i in range(1, 10))


@pytest.mark.parametrize("text,message", [
    ("lrr: 1", "unknown key 'lrr'; did you mean lr?"),
    ("learning_rate: 3", "unknown key 'learning_rate'; did you mean lr?"),
    ("config: x.yaml", "unknown key 'config'"),
    ("- a\n- b", "must be lines of `flag: value`"),
    ("a: [", "not YAML"),
    ("lr: many", "e.yaml: lr: invalid float value: 'many'"),
    ("lr: [1, 2]", "e.yaml: lr: unexpected argument '2'"),
    ("batch_size: 0", "e.yaml: batch_size: must be at least 1, got 0"),
    ("3: 4", "unknown key '3'"),
    ("!!python/object/apply:os.system ['true']", "not YAML"),
    ("lr: 1\nsize: 2\nlr: 3\n", "e.yaml: lr is given twice, in line 3"),
    ("pin_mem: 1\npin-mem: 0\n", "pin-mem is given twice"),
    ("model: a\narch: b\n", "model and arch are the same flag"),
    ("model_kwargs: {a: 1, b: 2, a: 3}", "a is given twice"),
    ("lr: 1\n---\nlr: 2\n", "not YAML"),
    ("model_kwargs: &x {a: *x}", "nested too deeply"),
    ("lr: " + 10**4 * "[", "nested too deeply"),
    (f"lr: {10**4 * '['}{10**4 * ']'}", "nested too deeply"),
    (ALIASES, "more than 10,000 values, in line 5"),
    (f"a: [{9999 * '1,'}1]", "more than 10,000 values"),
    (f"lr: 1\n#{10**5 * ' '}", "more than 100,000 characters are no recipe"),
    ("lr: !!int 3", "not YAML"), ("lr: !!float x", "not YAML"), ("lr: !!timestamp 9999-99-99", "not YAML"),
    ("lr: !!str {a: b}", "not YAML"),
    ("model_kwargs: a=it's", "model_kwargs: No closing quotation"),
    ("lr: {a: 1}", "e.yaml: lr: invalid float value: 'a=1'"),
    ("lr: []", "e.yaml: lr: expected one argument"),
])
def test_bad_recipes(recipe, text, message):
    with pytest.raises(UsageError) as error:
        parse("--config", recipe(text))
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_recipe_that_is_no_text(tmp_path):
    (tmp_path / "r.yaml").write_bytes(b"\xff\xfe\x00a")
    with pytest.raises(UsageError, match="not YAML"):
        parse("--config", str(tmp_path / "r.yaml"))
    (tmp_path / "r.yaml").write_text("")
    assert parse("--config", str(tmp_path / "r.yaml")) == parse()


@pytest.mark.parametrize("text,message", [
    ("a=" + 5000 * "9", "takes at most 1000 characters for a"),
    ("a=1e999", "takes a finite number for a, not (1e999|inf)"),
    ("a=-1e999", "takes a finite number for a, not (-1e999|-inf)"),
])
def test_values_that_are_no_numbers_of_a_computer(text, message, tmp_path):
    """On the command line and in a recipe."""
    with pytest.raises(UsageError, match=message):
        parse("--model_kwargs", text)
    (tmp_path / "e.yaml").write_text(f"model_kwargs: {{{text.replace('=', ': ')}}}")
    with pytest.raises(UsageError, match=message):
        parse("--config", str(tmp_path / "e.yaml"))


@pytest.mark.parametrize("digits,message", [(13, "must be below 10 [*][*] 12"), (5000, "invalid int value")])
def test_an_integer_has_an_end(digits, message):
    with pytest.raises(UsageError, match=f"^--batch_size:? {message}"):
        parse("--batch_size", "9" * digits)
