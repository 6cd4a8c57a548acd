"""The settings that all tasks share, with the groups of no task in particular."""
from dataclasses import dataclass, fields

import pytest
import yaml

from training import flags, options, parsing
from training.options import OptimizerOptions, ScheduleOptions
from utils import UsageError


@dataclass(frozen=True)
class AnySettings(options.Settings):
    @property
    def name(self):
        return "any"


def parse(*tokens):
    return parsing.parse(AnySettings, tokens)


def test_defaults():
    """The BiFormer paper's recipe."""
    settings = parse()
    assert settings.loader.batch_size == 128
    assert settings.optimizer == OptimizerOptions(opt="adamw", lr=5e-4, weight_decay=0.05, decay_groups="timm")
    assert settings.schedule == ScheduleOptions(epochs=300, sched="cosine", warmup_epochs=None, min_lr="1%")
    assert settings.schedule.total_warmup(1250) == 5 * 1250
    peak = 5e-4 * 1024 / 512
    assert [flags.share_of(lr, peak) for lr in (settings.schedule.warmup_lr, settings.schedule.min_lr)] == [1e-6, 1e-5]
    assert settings.ema.model_ema and settings.ema.model_ema_decay == 0.99996
    assert settings.task.task == "classification"


def test_no_flag_is_in_two_groups():
    names = [field.name for group in flags.group_classes(AnySettings).values() for field in fields(group)]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("tokens,message", [
    (["--batch_size", "0"], "--batch_size must be at least 1, got 0"),
    (["--num_workers", "-1"], "--num_workers must be finite and not negative, got -1"),
    (["--num_workers", "1025"], "--num_workers must be at most 1024, got 1025"),
    (["--loader_timeout", "-1"], "--loader_timeout must be finite and not negative, got -1"),
    (["--epochs", "0"], "--epochs must be at least 1, got 0"),
    (["--epochs", "many"], "--epochs: invalid int value: 'many'"),
    (["--lr", "-1"], "--lr must be above 0"),
    (["--lr", "nan"], "--lr must be above 0 and finite"),
    (["--opt_eps", "-1"], "--opt_eps must be above 0"),
    (["--opt_betas", "2", "3"], "--momentum and --opt_betas must be at least 0 and below 1"),
    (["--momentum", "1"], "--momentum and --opt_betas must be at least 0 and below 1"),
    (["--weight_decay=-0.1"], "--weight_decay must be finite and not negative, got -0.1"),
    (["--decay_groups", "all"], "--decay_groups: invalid choice: 'all'"),
    (["--decay_groups", "none", "--layer_decay", "0.9"], "leave out --decay_groups none"),
    (["--update_freq", "0"], "--update_freq must be at least 1, got 0"),
    (["--clip_grad", "0"], "--clip_grad must be above 0"),
    (["--seed", "99999999999"], "--seed must be below 2 ** 32, got 99999999999"),
    (["--seed=-1"], "--seed must be finite and not negative, got -1"),
    (["--model_ema_decay", "1.5"], "--model_ema_decay must be 0 to 1, got 1.5"),
    (["--auto_resume"], "--auto_resume needs the --output_dir to resume in"),
    (["--save_every_minutes", "0"], "--save_every_minutes must be above 0"),
    (["--save_every_steps", "0"], "--save_every_steps must be at least 1"),
    (["--keep_checkpoints", "0"], "--keep_checkpoints must be at least 1"),
    (["--dist_timeout", "0"], "--dist_timeout must be above 0"),
    (["--amp", "fp8"], "--amp: invalid choice: 'fp8'"),
    # the schedule
    (["--epochs", "3", "--warmup_epochs", "5"],
     "--warmup_epochs 5 must be less than --epochs 3; --warmup_epochs 0 trains without a warm-up"),
    (["--epochs", "5", "--warmup_epochs", "2", "--cooldown_epochs", "3"],
     "--warmup_epochs 2 and --cooldown_epochs 3 must be less than --epochs 5"),
    (["--epochs", "5", "--warmup_steps", "2", "--cooldown_epochs", "5"],
     "--cooldown_epochs 5 must be less than --epochs 5"),
    (["--min_lr", "101%"], "--min_lr must be 0% to 100%, got 101%"),
    (["--min_lr", "nan%"], "--min_lr must be 0% to 100%, got nan%"),
    (["--warmup_lr=-1%"], "--warmup_lr must be 0% to 100%, got -1%"),
    (["--warmup_lr", "-1e-6"], "--warmup_lr must be finite and not negative, got -1e-06"),
    (["--min_lr", "1 percent"], "--min_lr: takes a number or a percentage, not '1 percent'"),
    (["--min_lr", "%"], "--min_lr: takes a number or a percentage, not '%'"),
    (["--max_steps", "0"], "--max_steps must be at least 1, got 0"),
    (["--max_steps", "500", "--warmup_steps", "500"], "--warmup_steps 500 must be less than --max_steps 500"),
    (["--warmup_steps=-1"], "--warmup_steps must be finite and not negative, got -1"),
    (["--sched", "step"], "--sched step needs either --decay_epochs or --decay_steps"),
    (["--sched", "step", "--decay_epochs", "8", "--decay_steps", "9"], "needs either --decay_epochs or --decay_steps"),
    (["--decay_epochs", "8", "11"], "--decay_epochs is for --sched step, not cosine"),
    (["--sched", "poly", "--decay_steps", "8"], "--decay_steps is for --sched step, not poly"),
    (["--sched", "step", "--decay_epochs", "11", "8"], "--decay_epochs must be positive and strictly increasing"),
    (["--sched", "step", "--decay_steps", "0", "8"], "must be positive and strictly increasing, got [0, 8]"),
    (["--sched", "step", "--decay_steps", "8", "8"], "must be positive and strictly increasing, got [8, 8]"),
    (["--sched", "step", "--decay_epochs", "8", "--decay_rate", "0"], "--decay_rate must be above 0"),
    (["--sched", "poly", "--poly_power", "0"], "--poly_power must be above 0"),
    (["--sched", "plateau"], "--sched: invalid choice: 'plateau'"),
])
def test_mistakes_are_explained_in_one_line(tokens, message):
    with pytest.raises(UsageError) as error:
        parse(*tokens)
    assert message in str(error.value)
    assert "\n" not in str(error.value) and error.value.exit_code == 2


def test_what_an_evaluation_does_not_ask():
    parse("--eval", "--epochs", "3")
    parse("--eval", "--max_steps", "1", "--warmup_steps", "1")


@pytest.mark.parametrize("options,total,warmup,milestones", [
    (dict(epochs=100), 1000, 50, []),
    (dict(epochs=100, cooldown_epochs=10), 1000, 50, []),
    (dict(max_steps=85, cooldown_epochs=2), 85, 8, []),
    (dict(epochs=2, sched="step", decay_epochs=[1], warmup_epochs=0, cooldown_epochs=2), 20, 0, [10]),
    (dict(epochs=12), 120, 12, []),
    (dict(epochs=12, warmup_epochs=5), 120, 50, []),
    (dict(epochs=1), 10, 1, []),
    (dict(max_steps=9), 9, 0, []),
    (dict(epochs=12, warmup_steps=7), 120, 7, []),
    (dict(max_steps=85), 85, 8, []),
    (dict(max_steps=85, warmup_steps=0), 85, 0, []),
    (dict(epochs=12, sched="step", decay_epochs=[8, 11], warmup_epochs=0), 120, 0, [80, 110]),
    (dict(epochs=12, sched="step", decay_steps=[85, 111]), 120, 12, [85, 111]),
])
def test_lengths_in_steps(options, total, warmup, milestones):
    asked = ScheduleOptions(**options)
    assert asked.total_steps(10) == total
    cooldown = 0 if asked.sched == "step" else 10 * asked.cooldown_epochs
    assert asked.times(10) == dict(warmup=warmup, milestones=milestones, cooldown=cooldown)


@pytest.mark.parametrize("given,value,of_a_thousandth", [
    ("1e-5", 1e-5, 1e-5), ("0", 0.0, 0.0), ("1%", "1%", 1e-5), ("0.1%", "0.1%", 1e-6), ("12.5 %", "12.5%", 1.25e-4),
    ("100%", "100%", 1e-3), ("0%", "0%", 0.0),
])
def test_learning_rates_as_numbers_and_as_percentages_of_the_peak(given, value, of_a_thousandth):
    schedule = parse("--min_lr", given, "--warmup_lr", given).schedule
    assert schedule.min_lr == schedule.warmup_lr == value
    assert flags.share_of(value, 1e-3) == of_a_thousandth


def test_the_defaults_fit_a_run_of_any_length():
    for epochs in (1, 2, 5, 49):
        schedule = parse("--epochs", str(epochs)).schedule
        assert schedule.total_warmup(7) < schedule.total_steps(7)


EMA = ["--model_ema", "--model_ema_eval"]


@pytest.mark.parametrize("tokens,best", [
    ([], "mae"), (["--best_metric", "loss"], "loss"), ([*EMA, "--best_metric", "ema_mae"], "ema_mae"),
])
def test_the_metric_that_decides(tokens, best):
    assert parse(*tokens).best_metric(["mae", "loss"]) == best


@pytest.mark.parametrize("tokens,message", [
    (["--best_metric", "acc1"], "--best_metric must be one of mae, loss, ema_mae, ema_loss, got acc1"),
    (["--best_metric", "ema_mae"], "--best_metric ema_mae needs --model_ema and --model_ema_eval"),
    ([*EMA, "--model_ema", "no", "--best_metric", "ema_mae"], "--best_metric ema_mae needs --model_ema and"),
])
def test_metrics_that_cannot_decide(tokens, message):
    with pytest.raises(UsageError) as error:
        parse(*tokens).best_metric(["mae", "loss"])
    assert message in str(error.value)


def test_what_runs_can_be_run_again(tmp_path):
    settings = parse("--lr=1e-3", "--opt_betas", "0.9", "0.99", "--sched", "step", "--decay_epochs", "9",
                     "--max_steps", "77", "--warmup_steps", "5", "--warmup_lr", "2.5%", "--decay_groups", "layernorm",
                     "--output_dir", "out")
    options.save(flags.as_recipe(settings), tmp_path / "args.yaml")
    assert yaml.safe_load((tmp_path / "args.yaml").read_text())["batch_size"] == 128
    assert parse("--config", str(tmp_path / "args.yaml")) == settings


def test_what_contradicts_a_recipe_names_it(tmp_path):
    recipe = tmp_path / "long.yaml"
    recipe.write_text("epochs: 9\nwarmup-epochs: 5\n")
    with pytest.raises(UsageError) as error:
        parse("--config", str(recipe), "--epochs", "2")
    assert str(error.value) == ("--warmup_epochs 5 must be less than --epochs 2; --warmup_epochs 0 trains without a "
                                f"warm-up; {recipe} has warmup_epochs: 5")
