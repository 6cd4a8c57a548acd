"""scripts/compare.py: learning rates chosen, runs stopped and resumed, what is reported, and mistakes in the file."""
import json
import signal
import subprocess
import sys
import time

import pytest
import torch
import yaml

from helpers import ROOT
from scripts import compare
from scripts.comparison import results, runs
from scripts.comparison.plan import Plan
from training import flags, options
from training.recipes import read_recipe
from training.signals import EXIT_NON_FINITE, EXIT_RESUME
from utils import UserError

SETTINGS = dict(data_set="image_folder", input_size=32, batch_size=4, num_workers=0, device="cpu", aa="none", mixup=0.0,
                cutmix=0.0, repeated_aug=False, model_ema=False, amp="off")
PLANS = {path.stem for path in (ROOT / "configs/comparison").glob("*.yaml")}
RECORDS = sorted(PLANS & {path.stem for path in (ROOT / "benchmarks/comparison").glob("*.json")})


def write_plan(path, **changed):
    plan = dict(settings=SETTINGS, lr=[0.004, 0.008], lr_epochs=1, epochs=2, runs=dict(biformer_nano=None))
    path.write_text(yaml.safe_dump(plan | changed, sort_keys=False))
    return path


def log(folder, *accuracies, seconds=2.0):
    folder.mkdir(parents=True)
    records = (
        dict(epoch=epoch, train_seconds=seconds, train_images_per_second=50 / seconds, val_acc1=value)
        for epoch, value in enumerate(accuracies)
    )
    (folder / "log.txt").write_text("".join(json.dumps(record) + "\n" for record in records))


# --- the file ---------------------------------------------------------------------------------------------------------


def test_a_recipe_says_what_the_plan_says(tmp_path):
    """In the words of the file: `aa: none` stays a word; without `model`, the contender's name is the model."""
    shared = dict(SETTINGS, amp="off")
    plan = Plan.read(write_plan(tmp_path / "plan.yaml", settings=shared, runs={
        "biformer_nano": None, "dense": dict(model="biformer_nano", model_kwargs=dict(topk=49), drop_path=0.1),
    }))
    (tmp_path / "recipe.yaml").write_text(plan.recipe("dense", lr=0.004, seed=3, epochs=2))
    recipe = read_recipe(str(tmp_path / "recipe.yaml"))
    assert recipe["model"] == "biformer_nano" and recipe["model_kwargs"] == dict(topk=49) and recipe["aa"] == "none"
    assert [recipe[key] for key in ("lr", "seed", "epochs", "drop_path")] == ["0.004", "3", "2", "0.1"]
    assert yaml.safe_load(plan.recipe("biformer_nano", lr=0.004))["model"] == "biformer_nano"


@pytest.mark.parametrize(("changed", "error"), [
    (dict(lr=["1e-3"]), "`lr` needs a list of learning rates; YAML reads 1e-3 as a word"),
    (dict(lr=[]), "`lr` needs a list"),
    (dict(lr=[1e-3, 1e-3]), "`lr` needs a list"),
    (dict(seeds=[0.5]), "`seeds` needs a list of whole numbers"),
    (dict(epochs="2"), "`epochs` needs a number of epochs"),
    (dict(lr_epochs=0), "`lr_epochs` needs a number of epochs"),
    (dict(runs={}), "`runs` names nothing to compare"),
    (dict(runs=dict(a=3)), "`a` needs lines of `flag: value`, or none"),
    (dict(runs={"../a": None}), "`../a` cannot be the name of a folder"),
    (dict(runs=dict(a=dict(seed=1))), "seed: the comparison itself gives these"),
    (dict(settings=dict(SETTINGS, cuda_graph=True)), "cuda_graph: the comparison itself gives these"),
    (dict(settings=dict(SETTINGS, patience=5)), "patience: what is compared is the accuracy after `epochs` epochs"),
    (dict(runs=dict(a=dict(disable_eval=True))), "disable_eval: what is compared is the accuracy"),
    (dict(settings=dict(SETTINGS, grad_checkpointing=True)), "steps are not measured with grad_checkpointing: add"),
    (dict(settings=dict(SETTINGS, lr=1e-3)), "lr: the comparison itself gives these"),
    (dict(runs=dict(a=dict(lr="1e-3"))), "`lr` of `a` needs a learning rate; YAML reads 1e-3 as a word"),
    (dict(runs=dict(a=dict(lr=[1e-3]))), "`lr` of `a` needs a learning rate"),
    (dict(lr=None), "`lr` needs a list"),
    (dict(seed=3), "unknown seed; there are epochs, lr, lr_epochs, runs, seeds, settings, speed"),
    (dict(speed="fast"), "`speed` is measured or logged"),
    (dict(runs=dict(a=dict(token_label="maps"))), "`a` differs in token_label, not in its network alone"),
    (dict(settings=None), "needs `settings` and `runs`"),
    (dict(runs=dict(biformer_nono=None)), "biformer_nano"),
    (dict(settings=dict(SETTINGS, mixupp=1)), "did you mean mixup"),
])
def test_mistakes_in_the_file(tmp_path, photos, capsys, changed, error):
    """Before anything is written."""
    plan = write_plan(tmp_path / "plan.yaml", **changed)
    code = compare.main([str(plan), "--data_path", str(photos), "--output_dir", str(tmp_path / "out")])
    assert code in (1, 2) and not (tmp_path / "out").exists()
    said = capsys.readouterr().err
    assert said.startswith("error: ") and error in said and len(said.splitlines()) == 1


@pytest.mark.parametrize("text", ["a: [", "- 1", "", "&a [*a]"])
def test_files_that_are_no_plan(tmp_path, capsys, text):
    (tmp_path / "plan.yaml").write_text(text)
    assert compare.main([str(tmp_path / "plan.yaml"), "--output_dir", str(tmp_path / "out")]) == 1
    assert str(tmp_path / "plan.yaml") in capsys.readouterr().err
    assert compare.main([str(tmp_path / "missing.yaml"), "--output_dir", str(tmp_path / "out")]) == 1
    assert "No such file" in capsys.readouterr().err


# --- which run is next ------------------------------------------------------------------------------------------------


@pytest.fixture
def plan(tmp_path):
    return Plan.read(write_plan(tmp_path / "plan.yaml", seeds=[0, 1], runs=dict(a=None, b=None)))


def test_runs_follow_their_order(plan, tmp_path):
    """The short ones first; then each contender by the first seed, with the best learning rate of its own."""
    def waiting():
        return [str(run) for run in runs.remaining(plan, tmp_path)]

    assert waiting() == [f"{name}, lr {lr}, seed 0, 1 epochs" for name in "ab" for lr in ("0.004", "0.008")]
    log(tmp_path / "a" / "lr-0.004", 40.0)
    log(tmp_path / "a" / "lr-0.008", 50.0)
    assert waiting() == ["b, lr 0.004, seed 0, 1 epochs", "b, lr 0.008, seed 0, 1 epochs",
                         "a, lr 0.008, seed 0, 2 epochs", "a, lr 0.008, seed 1, 2 epochs"]
    log(tmp_path / "b" / "lr-0.004", 30.0)
    (tmp_path / "b" / "lr-0.008").mkdir()
    (tmp_path / "b" / "lr-0.008" / runs.DIVERGED).touch()
    log(tmp_path / "a" / "seed-0", 60.0)  # one of two epochs
    assert waiting() == ["a, lr 0.008, seed 0, 2 epochs", "b, lr 0.004, seed 0, 2 epochs",
                         "a, lr 0.008, seed 1, 2 epochs", "b, lr 0.004, seed 1, 2 epochs"]


def test_of_equal_learning_rates_the_lower_is_taken(plan, tmp_path):
    for rate, value in (("0.004", 40.0), ("0.008", 40.0)):
        log(tmp_path / "a" / f"lr-{rate}", value)
        log(tmp_path / "b" / f"lr-{rate}", 30.0)
        (tmp_path / "b" / f"lr-{rate}" / runs.DIVERGED).touch()
    short = runs.short_runs(plan, tmp_path)
    assert runs.chosen_lr(short["a"]) == runs.chosen_lr(short["b"]) == 0.004


def test_one_learning_rate_needs_no_short_runs(tmp_path):
    plan = Plan.read(write_plan(tmp_path / "plan.yaml", lr=[0.004]))
    assert [str(run) for run in runs.remaining(plan, tmp_path)] == ["biformer_nano, lr 0.004, seed 0, 2 epochs"]


def test_a_learning_rate_of_its_own_needs_no_short_runs(tmp_path):
    """Beside contenders that try several; and where all have their own, the plan needs none."""
    plan = Plan.read(write_plan(tmp_path / "plan.yaml", runs=dict(a=None, b=dict(lr=0.002, model="biformer_nano"))))
    assert [str(run) for run in runs.remaining(plan, tmp_path)] == [
        "a, lr 0.004, seed 0, 1 epochs", "a, lr 0.008, seed 0, 1 epochs", "b, lr 0.002, seed 0, 2 epochs"]
    values = dict(settings=SETTINGS, epochs=2, runs=dict(biformer_nano=dict(lr=0.002)))
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(values))
    plan = Plan.read(tmp_path / "own.yaml")
    assert [str(run) for run in runs.remaining(plan, tmp_path)] == ["biformer_nano, lr 0.002, seed 0, 2 epochs"]


def test_settings_are_compared_as_they_are_read(tmp_path):
    """As TRAINING.md has recipes written: `off` and 5e-2 are words, keys may have hyphens, nothing is the default."""
    (tmp_path / "plan.yaml").write_text("""
settings: {data_set: image_folder, input-size: 32, amp: off, weight_decay: 5e-2, drop_path: , device: cpu}
epochs: 2
lr: [4.0e-3]
runs: {biformer_nano: {model_kwargs: {mlp_ratio: 2e0}}}
""")
    plan = Plan.read(tmp_path / "plan.yaml")
    ((run,),) = runs.long_runs(plan, tmp_path).values()
    given = dict(data_path=str(tmp_path))
    settings = plan.parse("biformer_nano", lr=run.lr, seed=run.seed, epochs=run.epochs, **given)
    run.folder.mkdir(parents=True)
    options.save(flags.as_recipe(settings), run.folder / "args.yaml")
    runs.check_settings(plan, tmp_path, **given)
    runs.check_settings(plan, tmp_path, cuda_graph=True, **given)  # how it runs
    text = (run.folder / "args.yaml").read_text()
    assert "weight_decay: 0.05" in text
    (run.folder / "args.yaml").write_text(text.replace("weight_decay: 0.05", "weight_decay: 0.1"))
    with pytest.raises(UserError, match=r"weight_decay 0\.1, not 0\.05; give another"):
        runs.check_settings(plan, tmp_path, **given)


# --- what is reported -------------------------------------------------------------------------------------------------


def test_the_table(plan, tmp_path):
    """Mean and standard deviation over the seeds; minutes at the rate that was measured, and none where that failed."""
    for name, values in (("a", (60.0, 64.0)), ("b", (50.0,))):
        for rate, value in (("0.004", 10.0), ("0.008", 20.0)):
            log(tmp_path / name / f"lr-{rate}", value)
        for seed, value in enumerate(values):
            log(tmp_path / name / f"seed-{seed}", value - 5, value)
    row = dict(images_per_second=10.0, quartiles=[9.0, 11.0], peak_memory_mb=123.4)
    (tmp_path / "b" / "seed-1").mkdir()
    (tmp_path / "b" / "seed-1" / runs.DIVERGED).touch()
    speed = dict(machine=dict(device="x", threads=3), rows=dict(a=row))
    table = results.write(plan, speed, tmp_path)
    assert table.splitlines()[2:] == [
        "| a | 0.008 (highest) | 62.00 ± 2.83 | 2 | 10.00 (9.000 to 11.00) | 123 | 0 |",
        "| b | 0.008 (highest) | 50.00 | 1, 1 diverged |  |  |  |",
    ]
    found = json.loads((tmp_path / "results.json").read_text())
    first = found["contenders"]["a"]["runs"][0]
    assert first["curve"] == [[1, 55.0], [2, 60.0]] and first["images_an_epoch"] == 50 and first["seconds"] == 4.0
    assert found["contenders"]["a"]["lr_tried"] == {"0.004": 10.0, "0.008": 20.0}
    (axes,) = results.draw(found).axes
    (line,) = axes.lines
    assert line.get_xydata().tolist() == [pytest.approx((50 / 10 / 60, 57.0)), pytest.approx((100 / 10 / 60, 62.0))]
    (band,) = (band.get_paths()[0].get_extents() for band in axes.collections)
    assert (band.ymin, band.ymax) == (55.0, 64.0)
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["a"]
    assert axes.get_xlabel() == "minutes of training steps, x, 3 threads"


@pytest.mark.parametrize(("speed", "cells", "points", "label"), [
    ("logged", "25 |  | 0", [(50 / 25 / 60, 45.0), (100 / 25 / 60, 50.0)], "minutes of training"),
    ("measured", " |  | ", [(1, 45.0), (2, 50.0)], "epochs"),
])
def test_rates_of_the_logs_are_shown_where_they_are_asked_for(tmp_path, speed, cells, points, label):
    """Beside rates that were measured, those of runs that shared a machine would be compared with them."""
    plan = Plan.read(write_plan(tmp_path / "plan.yaml", lr=[0.004], speed=speed))
    log(tmp_path / "biformer_nano" / "seed-0", 45.0, 50.0)
    assert results.write(plan, {}, tmp_path).splitlines()[2] == f"| biformer_nano | 0.004 | 50.00 | 1 | {cells} |"
    (axes,) = results.draw(json.loads((tmp_path / "results.json").read_text())).axes
    (line,) = axes.lines
    assert line.get_xydata().tolist() == [pytest.approx(point) for point in points] and axes.get_xlabel() == label


@pytest.mark.parametrize(("tried", "cell"), [
    ((30.0, 20.0, 10.0), "0.002 (lowest)"), ((20.0, 30.0, 10.0), "0.004"), ((10.0, 20.0, 30.0), "0.008 (highest)"),
])
def test_a_learning_rate_at_the_end_of_those_tried_is_named(tmp_path, tried, cell):
    plan = Plan.read(write_plan(tmp_path / "plan.yaml", lr=[0.002, 0.004, 0.008]))
    for rate, value in zip(plan.lr, tried, strict=True):
        log(tmp_path / "biformer_nano" / f"lr-{rate:g}", value)
    assert results.write(plan, {}, tmp_path).splitlines()[2].split(" | ")[1] == cell


def test_nothing_yet(plan, tmp_path):
    lines = results.write(plan, {}, tmp_path).splitlines()
    assert lines[2:] == ["| a |  |  | 0 |  |  |  |", "| b |  |  | 0 |  |  |  |"]


@pytest.mark.parametrize("name", RECORDS)
def test_the_tables_of_the_documents_follow_from_the_records(name):
    record = json.loads((ROOT / f"benchmarks/comparison/{name}.json").read_text())
    plan = Plan.read(ROOT / f"configs/comparison/{name}.yaml")
    assert results.table(record) in (ROOT / "docs/comparison.md").read_text()
    assert record["contenders"].keys() == plan.runs.keys() and record["shared"] == plan.settings
    assert [record[key] for key in ("epochs", "lr_epochs", "speed")] == [plan.epochs, plan.lr_epochs, plan.speed]
    for name, contender in record["contenders"].items():
        assert contender["settings"] == plan.own(name) and [run["seed"] for run in contender["runs"]] == plan.seeds
        rates = plan.rates(name)
        assert [float(lr) for lr in contender["lr_tried"]] == (rates if len(rates) > 1 else [])
        assert {run["lr"] for run in contender["runs"]} <= {*rates}


# --- whole comparisons ------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_comparison(photos, tmp_path, capsys):
    """Two networks, two learning rates; called again, nothing is left to do."""
    contenders = dict(
        biformer_nano=dict(model_kwargs=dict(topk=[1, 4, 4])), small=dict(model="resnet10t", drop_path=0.0),
    )
    plan = write_plan(tmp_path / "plan.yaml", runs=contenders)
    words = [str(plan), "--data_path", str(photos), "--output_dir", str(tmp_path / "out")]
    assert compare.main(words) == 0
    said = capsys.readouterr().out
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    assert list(found["contenders"]) == ["biformer_nano", "small"]
    for name, contender in found["contenders"].items():
        (run,) = contender["runs"]
        assert [epoch for epoch, _ in run["curve"]] == [1, 2] and run["accuracy"] == run["curve"][-1][1]
        tried = contender["lr_tried"]
        assert run["lr"] == min(float(lr) for lr in tried if tried[lr] == max(tried.values()))
        assert contender["speed"]["images_per_second"] > 0 and contender["speed"]["peak_memory_mb"] > 0
        assert yaml.safe_load((tmp_path / "out" / name / "seed-0" / "args.yaml").read_text())["lr"] == run["lr"]
    assert said.count("epochs ...") == 6 and (tmp_path / "out" / "plot.png").stat().st_size > 10_000
    table = (tmp_path / "out" / "table.md").read_text()
    assert table in said
    assert found["contenders"]["small"]["runs"][0]["machine"]["torch"] == torch.__version__
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.pth")}
    assert compare.main(words) == 0
    assert "epochs ..." not in capsys.readouterr().out
    assert files == {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.pth")}

    for changed, difference in (
        (dict(epochs=3), "epochs 2, not 3"), (dict(epochs=1), "epochs 2, not 1"),
        (dict(lr=[0.002]), ", not 0.002"), (dict(settings=dict(SETTINGS, smoothing=0.0)), "smoothing 0.1, not 0.0"),
    ):
        other = write_plan(tmp_path / "plan.yaml", runs=contenders, **changed)
        assert compare.main([str(other), *words[1:]]) == 1
        said = capsys.readouterr()
        assert "holds a run of other settings: " in said.err and difference in said.err
        assert "epochs ..." not in said.out
    assert (tmp_path / "out" / "table.md").read_text() == table


@pytest.mark.slow
@pytest.mark.long
def test_runs_at_once_are_as_one_after_the_other(photos, tmp_path, capsys):
    """The short runs, then what they choose."""
    plan = write_plan(tmp_path / "plan.yaml", runs=dict(small=dict(model="resnet10t")))
    found = []
    for jobs in ("2", "1"):
        words = [str(plan), "--data_path", str(photos), "--output_dir", str(tmp_path / jobs), "--jobs", jobs]
        assert compare.main(words) == 0
        begun = [line.endswith("epochs ...") for line in capsys.readouterr().out.splitlines()]
        assert begun[:2] == [True, jobs == "2"] and sum(begun) == 3
        own = json.loads((tmp_path / jobs / "results.json").read_text())["contenders"]["small"]
        found.append((own["lr_tried"], own["runs"][0]["lr"], own["runs"][0]["curve"]))
    assert found[0] == found[1]


@pytest.mark.slow
def test_all_of_the_runs_at_once_are_stopped(photos, tmp_path):
    """By SIGTERM to the comparison; each of them saves itself."""
    plan = write_plan(tmp_path / "plan.yaml", lr=[0.004], epochs=10_000, seeds=[0, 1])
    words = [str(plan), "--data_path", str(photos), "--output_dir", str(tmp_path / "out"), "--jobs", "2"]
    process = subprocess.Popen([sys.executable, "scripts/compare.py", *words], cwd=ROOT, stderr=subprocess.DEVNULL)
    folders = [tmp_path / "out" / "biformer_nano" / f"seed-{seed}" for seed in (0, 1)]
    while not all((folder / "log.txt").is_file() for folder in folders):
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 130
    for folder in folders:
        assert "SIGTERM: stopped in epoch" in folder.with_name(f"{folder.name}.txt").read_text()


class Stub:
    """A run in a pool whose process exits with `code`, at once or when it is asked to leave."""

    def __init__(self, pool, folder, code, waits=False):
        self.run = runs.PlannedRun(folder.name, 0.1, 0, 1, folder)
        folder.mkdir()
        ready = f"import signal, sys; signal.signal(signal.SIGTERM, lambda *_: sys.exit({code})); print(flush=True)"
        end = "signal.pause()" if waits else f"sys.exit({code})"
        process = subprocess.Popen([sys.executable, "-c", f"{ready}; {end}"], stdout=subprocess.PIPE)
        process.stdout.read(1)
        process.stdout.close()
        pool.going[self.run] = process


def test_a_pool_names_the_runs_that_end(tmp_path):
    """One that fails, and one that diverges, beside a third that goes on until the block is left."""
    with runs.Pool(4, deadline=time.monotonic() + 60) as pool:
        going, failed, diverged = (
            Stub(pool, tmp_path / name, code, waits=name == "going")
            for name, code in (("going", EXIT_NON_FINITE), ("failed", 1), ("diverged", EXIT_NON_FINITE))
        )
        process = pool.going[going.run]
        assert pool.free == 1 and {pool.wait(), pool.wait()} == {failed.run, diverged.run} and pool.free == 3
        assert diverged.run.has_diverged and not failed.run.has_ended and process.poll() is None
    assert process.poll() == EXIT_NON_FINITE and going.run.has_diverged  # it did so as it was asked to leave


@pytest.mark.parametrize(("code", "seconds"), [(EXIT_RESUME, 60), (0, 0)])
def test_a_pool_is_left_when_a_run_was_asked_to_leave_or_time_is_over(tmp_path, code, seconds):
    with pytest.raises(runs.OutOfTime), runs.Pool(2, deadline=time.monotonic() + seconds) as pool:
        Stub(pool, tmp_path / "first", code)
        process = pool.going[Stub(pool, tmp_path / "second", 0, waits=True).run]
        pool.wait()
    assert process.poll() == 0 and not pool.going
    with pytest.raises(runs.OutOfTime):
        runs.Pool(1, deadline=time.monotonic()).begin(Stub(pool, tmp_path / "third", 0).run, "")


def test_speeds_are_drawn_with_and_without_graphs(plan, tmp_path):
    """A flag that `--draw` needs not be given: it measures nothing."""
    def settings(graph):
        return {"a": plan.parse("a", model="biformer_nano", lr=0.1, epochs=1, data_path="x", cuda_graph=graph)}

    (tmp_path / results.SPEED).write_text(json.dumps(dict(steps=results.steps_of(settings(True)), rows={})))
    assert results.speeds(plan, settings(False), tmp_path, measure=False)["steps"]["a"]["cuda_graph"]
    other = {"a": plan.parse("a", model="resnet10t", lr=0.1, epochs=1, data_path="x")}
    assert results.speeds(plan, other, tmp_path, measure=False) == {}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_graphs_without_a_gpu_are_refused_before_anything_is_written(tmp_path, capsys):
    words = [str(write_plan(tmp_path / "plan.yaml")), "--data_path", str(tmp_path), "--output_dir"]
    assert compare.main([*words, str(tmp_path / "out"), "--cuda_graph"]) == 1
    assert "CUDA graphs need a GPU" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_logged_speeds_are_of_runs_alone(tmp_path, capsys):
    plan = write_plan(tmp_path / "plan.yaml", lr=[0.004], speed="logged")
    words = [str(plan), "--data_path", str(tmp_path), "--output_dir", str(tmp_path / "out"), "--jobs"]
    assert compare.main([*words, "2"]) == 1
    assert "takes speeds from the runs' logs: leave out --jobs" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        compare.main([*words, "none"])
    assert "must be at least 1, got none" in capsys.readouterr().err


@pytest.mark.slow
def test_a_comparison_that_is_stopped_resumes(photos, tmp_path):
    """By SIGTERM; the run that was going on has saved itself, and ends as one that was left alone."""
    plan = write_plan(tmp_path / "plan.yaml", lr=[0.004], epochs=15, runs=dict(biformer_nano=None), speed="logged")
    command = [sys.executable, "scripts/compare.py", str(plan), "--data_path", str(photos), "--output_dir"]
    process = subprocess.Popen([*command, str(tmp_path / "stopped")], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    log_file = tmp_path / "stopped" / "biformer_nano" / "seed-0" / "log.txt"
    while not log_file.is_file():
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert "interrupted" in process.communicate(timeout=60)[1] and process.returncode == 130
    epochs = len(log_file.read_text().splitlines())
    assert 0 < epochs < 15
    for folder in ("stopped", "alone"):
        done = subprocess.run([*command, str(tmp_path / folder)], cwd=ROOT, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
    records = (json.loads((tmp_path / folder / "results.json").read_text()) for folder in ("stopped", "alone"))
    curves = [record["contenders"]["biformer_nano"]["runs"][0]["curve"] for record in records]
    assert curves[0] == curves[1] and len(curves[0]) == 15


@pytest.mark.slow
@pytest.mark.long
def test_a_comparison_ends_when_its_time_is_over(photos, tmp_path, capsys):
    plan = write_plan(tmp_path / "plan.yaml", lr=[0.004], epochs=10_000, speed="logged")
    words = [str(plan), "--data_path", str(photos), "--output_dir", str(tmp_path / "out"), "--minutes", "0.3"]
    assert compare.main(words) == EXIT_RESUME
    assert "stopped; the same command resumes" in capsys.readouterr().out
    assert (tmp_path / "out" / "biformer_nano" / "seed-0" / "last.pth").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("minutes", ["0", "0.02"])
def test_a_comparison_without_time_fails_no_run(photos, tmp_path, capsys, minutes):
    """Nothing is begun after the time; a run that ends by the signal itself, as it starts, has not failed."""
    plan = write_plan(tmp_path / "plan.yaml", lr=[0.004], runs=dict(biformer_nano=None, biformer_tiny=None))
    words = [str(plan), "--data_path", str(photos), "--output_dir", str(tmp_path / "out"), "--minutes", minutes]
    assert compare.main(words) == EXIT_RESUME
    said = capsys.readouterr()
    assert "failed" not in said.out and "biformer_tiny" not in said.out and not said.err


@pytest.mark.slow
def test_a_learning_rate_that_diverges_is_not_chosen(photos, tmp_path, capsys):
    """Nor is its run tried again."""
    plan = write_plan(tmp_path / "plan.yaml", lr=[0.004, 1e30], epochs=1, speed="logged")
    words = [str(plan), "--data_path", str(photos), "--output_dir", str(tmp_path / "out")]
    assert compare.main(words) == 0
    assert "lr 1e+30, seed 0, 1 epochs: diverged\n" in capsys.readouterr().out
    contender = json.loads((tmp_path / "out" / "results.json").read_text())["contenders"]["biformer_nano"]
    assert contender["lr_tried"]["1e+30"] is None and contender["runs"][0]["lr"] == 0.004
    assert compare.main(words) == 0 and "epochs ..." not in capsys.readouterr().out


@pytest.mark.slow
def test_a_run_that_fails_leaves_the_others(photos, tmp_path, capsys):
    """A network that does not take the images."""
    plan = write_plan(tmp_path / "plan.yaml", lr=[0.004], epochs=1, speed="logged", runs=dict(
        deit=dict(model="deit_tiny_patch16_224", model_kwargs=dict(img_size=48)), biformer_nano=None,
    ))
    assert compare.main([str(plan), "--data_path", str(photos), "--output_dir", str(tmp_path / "out")]) == 1
    said = capsys.readouterr()
    assert "deit, lr 0.004, seed 0, 1 epochs: failed, see " in said.out and "1 run failed" in said.err
    assert (tmp_path / "out" / "deit" / "seed-0.txt").read_text().count("error: ") == 1
    found = json.loads((tmp_path / "out" / "results.json").read_text())["contenders"]
    assert found["biformer_nano"]["runs"][0]["accuracy"] is not None and found["deit"]["runs"][0]["accuracy"] is None


def test_half_a_line_of_a_killed_run_is_no_epoch(tmp_path):
    log(tmp_path / "run", 40.0, 50.0)
    with open(tmp_path / "run" / "log.txt", "a") as file:
        file.write('{"epoch": 2, "val')
    assert [epoch["epoch"] for epoch in runs.PlannedRun("a", 0.1, 0, 3, tmp_path / "run").log] == [0, 1]
