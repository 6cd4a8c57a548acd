"""A run that is stopped at any step and resumed ends as one that never stopped, bit for bit."""
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

import main as program
from helpers import ROOT
from helpers.launch import signal_after
from helpers.run_state import differences
from helpers.web import served
from scripts import make_shards
from tasks.classification.metrics import Accuracy
from tasks.classification.token_labels import label_map_path
from training import flags, options
from training.checkpoints import CheckpointStore
from training.command_line import how_to_resume
from training.data import loader
from training.run import BestMetric, Clock, Run
from training.signals import EXIT_RESUME
from training.waits import GaveUpWaiting

# With mixup, cutmix, random erasing, repeated augmentation, stochastic depth and EMA weights, as by default; batch norm
# is in the stem.
COMMAND = ["--model", "biformer_nano", "--input_size", "32", "--batch_size", "2", "--update_freq", "2",
           "--num_workers", "0", "--device", "cpu", "--epochs", "2", "--warmup_epochs", "1", "--lr", "1e-2",
           "--log_every", "2", "--model_ema_eval", "--model_ema_decay", "0.9"]
STEPS = 3


def train(photos, folder, *arguments):
    return program.main([*COMMAND, "--data_path", str(photos), "--output_dir", str(folder), *map(str, arguments)])


@pytest.fixture(scope="module")
def whole(photos, tmp_path_factory):
    """A run that never stopped."""
    folder = tmp_path_factory.mktemp("whole")
    assert train(photos, folder) == 0
    return folder


def score(monkeypatch, accuracies):
    """Have the evaluation after each epoch find one of these top-1 accuracies."""
    runs, create = [], program.create_run
    monkeypatch.setattr(program, "create_run", lambda *arguments: runs.append(create(*arguments)) or runs[-1])
    measured = dict(acc5=100.0, loss=1.0, images=7)
    monkeypatch.setattr(Accuracy, "compute", lambda self, _: dict(measured, acc1=accuracies[runs[-1].clock.epoch]))


@pytest.mark.slow
def test_stopped_at_every_step(photos, whole, tmp_path, capfd):
    """Each start takes one step; at an epoch's end it also takes the next epoch's first before it looks."""
    for start in range(2 * STEPS):
        with signal_after(1) as taken:
            code = train(photos, tmp_path, "--auto_resume", "--num_workers", start % 3)
        if code == 0:
            break
        assert code == EXIT_RESUME and len(taken) == 1
        assert "SIGTERM: stopped in epoch" in capfd.readouterr().err
    assert code == 0 and start >= 3
    assert differences(tmp_path, whole) == []


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGUSR1])
def test_stopped_in_the_middle_of_an_epoch(photos, whole, tmp_path, monkeypatch, number, capfd):
    on_path(monkeypatch, sys.executable)
    with signal_after(2, number) as taken:
        assert train(photos, tmp_path) == EXIT_RESUME
    assert len(taken) == 2
    left = tmp_path / "checkpoint-00000002.pth"
    assert capfd.readouterr().err == (
        f"{number.name}: stopped in epoch 0 after step 2 of 3, saved as {left}; resume with\npython main.py "
        f"--config {tmp_path}/args.yaml --output_dir {tmp_path} --auto_resume\n"
    )
    assert train(photos, tmp_path, "--auto_resume") == 0
    assert f"resuming from {left}: epoch 0, step 2 of 3" in capfd.readouterr().out
    assert differences(tmp_path, whole) == []


@pytest.mark.slow
@pytest.mark.parametrize("batch,saved", [(1, 0), (4, 1), (5, 2), (7, 3)])
def test_stopped_while_waiting_for_data(photos, whole, tmp_path, monkeypatch, capfd, batch, saved):
    """Before the first step; after one of a step's two batches, which has changed the statistics of batch norm; between
    two steps; and in the evaluation."""
    wait_for = loader.wait_for
    given = []

    def wait(get, *limits):
        value = wait_for(get, *limits)
        if hasattr(value, "__next__"):
            return value
        given.append(value)
        if len(given) == batch:
            os.kill(os.getpid(), signal.SIGTERM)
            raise GaveUpWaiting
        return value

    with monkeypatch.context() as patch:
        patch.setattr(loader, "wait_for", wait)
        assert train(photos, tmp_path) == EXIT_RESUME
    loader._of_ended_loaders.clear()
    assert CheckpointStore(tmp_path).steps() == [saved]
    assert f"stopped in epoch 0 after step {saved} of 3, saved as" in capfd.readouterr().err
    assert train(photos, tmp_path, "--auto_resume") == 0
    assert differences(tmp_path, whole) == []


@pytest.mark.slow
def test_the_command_that_the_stop_message_names(photos, whole, tmp_path, monkeypatch, capfd):
    """Also where the run named its folder itself, of any name."""
    monkeypatch.chdir(tmp_path)
    on_path(monkeypatch, sys.executable)
    with signal_after(2):
        assert program.main([*COMMAND, "--data_path", str(photos)]) == EXIT_RESUME
    command = capfd.readouterr().err.splitlines()[-1]
    python, script, *words = shlex.split(command)
    assert (python, script) == ("python", "main.py") and program.main(words) == 0
    (folder,) = (tmp_path / "outputs" / "biformer_nano").iterdir()
    assert differences(folder, whole) == []


def start(monkeypatch, words, processes):
    """Have this be a program that was started by these words and some flags."""
    arguments = ["--model", "x", "--lr", "1"]
    monkeypatch.setattr("sys.orig_argv", [*words, *arguments])
    monkeypatch.setattr("sys.argv", [words[-1], *arguments])
    monkeypatch.setenv("WORLD_SIZE", str(processes))


def on_path(monkeypatch, python):
    """Have the shell find this interpreter, and beside it the installed commands."""
    places = {} if python is None else {"python": python, "routedvit": str(Path(python).with_name("routedvit"))}
    monkeypatch.setattr("shutil.which", lambda name, *_, **__: places.get(name))


@pytest.mark.parametrize("started,processes,expected", [
    (["python", "main.py"], 1, "resume with\npython main.py --config"),
    (["/usr/bin/python3", "-u", "../code/main.py"], 1, "resume with\npython ../code/main.py --config"),
    (["python", "hydra_main.py"], 1, "resume with\npython main.py --config"),
    ([sys.executable, str(Path(sys.executable).with_name("routedvit"))], 1, "resume with\nroutedvit --config"),
    ([sys.executable, str(Path(sys.executable).with_name("routedvit-hydra"))], 1, "resume with\nroutedvit --config"),
    (["python", "-m", "routedvit"], 1, "resume with\npython -m routedvit --config"),
    (["python", "-u", "main.py"], 2, "resume with the same launcher and\nmain.py --config"),
    (["python", "-u", "-m", "routedvit"], 2, "resume with the same launcher and\n-m routedvit --config"),
    (["python", "-m", "submitit.core._submit"], 1, "resume with\npython main.py --config"),
])
def test_the_command_that_resumes_is_named_as_the_run_was_started(monkeypatch, started, processes, expected):
    on_path(monkeypatch, sys.executable)
    start(monkeypatch, started, processes)
    assert how_to_resume(Path("a run")) == f"{expected} 'a run/args.yaml' --output_dir 'a run' --auto_resume"


@pytest.mark.parametrize("started,processes,expected", [
    (["/v/bin/python", "main.py"], 1, "resume with\n/v/bin/python main.py --config"),
    (["/v/bin/python", "-m", "routedvit"], 1, "resume with\n/v/bin/python -m routedvit --config"),
    (["/v/bin/python", "/v/bin/routedvit"], 1, "resume with\n/v/bin/routedvit --config"),
    (["/v/bin/python", "/v/bin/routedvit-hydra"], 1, "resume with\n/v/bin/routedvit --config"),
    (["/v/bin/python", "-u", "main.py"], 2, "resume with the same launcher and\nmain.py --config"),
])
@pytest.mark.parametrize("found", [None, "/usr/bin/python"])
def test_the_command_that_resumes_runs_where_the_environment_is_not_activated(
    monkeypatch, started, processes, expected, found
):
    monkeypatch.setattr("sys.executable", "/v/bin/python")
    on_path(monkeypatch, found)
    start(monkeypatch, started, processes)
    said = how_to_resume(Path("run"))
    assert said == f"{expected} run/args.yaml --output_dir run --auto_resume"


def test_the_command_that_resumes_says_what_was_not_kept(monkeypatch, tmp_path):
    """A password or signature of what a resumed run reads again, and not of what it started from."""
    on_path(monkeypatch, sys.executable)
    start(monkeypatch, ["python", "main.py"], 1)
    settings = program.parse(["--data_path", "https://me:secret@host/x?sig=secret", "--data_set", "wds/x",
                              "--finetune", "https://host/w.pth?sig=secret", "--output_dir", str(tmp_path)])[1]
    options.save(flags.as_recipe(settings), tmp_path / "args.yaml")
    assert how_to_resume(tmp_path) == (
        "put the password or signature into --data_path, and resume with\n"
        f"python main.py --config {tmp_path}/args.yaml --output_dir {tmp_path} --auto_resume "
        "--data_path 'https://***@host/x?***'"
    )
    assert "secret" not in (tmp_path / "args.yaml").read_text()


@pytest.mark.slow
def test_the_command_that_resumes_a_program(photos, whole, tmp_path):
    """As a shell runs it."""
    folder = tmp_path / "a run"
    command = [sys.executable, "main.py", *COMMAND, "--epochs", "90", "--data_path", photos, "--output_dir", folder]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as running:
        while not running.stdout.readline().startswith("epoch 0 "):
            pass
        running.send_signal(signal.SIGTERM)
        _, err = running.communicate()
    assert running.returncode == EXIT_RESUME
    resume = err.splitlines()[-1]
    path = f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path}
    done = subprocess.run(f"{resume} --epochs 2", shell=True, cwd=ROOT, env=environment, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert b"resuming from" in done.stdout


def test_the_comparison_finds_differences(photos, whole, tmp_path):
    assert train(photos, tmp_path, "--seed", "1") == 0
    found = differences(tmp_path, whole)
    for where in (".model.", ".model_ema.", ".optimizer.state", ".args.seed"):
        assert any(line.startswith(f"last.pth {where}") for line in found), where
    assert any(line.startswith("log.txt") for line in found)
    assert not any(line.startswith("last.pth .args.seed") for line in differences(tmp_path, whole, {"seed"}))


@pytest.mark.slow
def test_stopped_while_evaluating(photos, whole, tmp_path, monkeypatch, capfd):
    """The evaluation is finished and logged, and not done again."""
    evaluate = program.evaluate

    def interrupted(*arguments, **kwargs):
        os.kill(os.getpid(), signal.SIGTERM)
        return evaluate(*arguments, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(program, "evaluate", interrupted)
        assert train(photos, tmp_path) == EXIT_RESUME
    assert len((tmp_path / "log.txt").read_text().splitlines()) == 1
    capfd.readouterr()
    assert train(photos, tmp_path, "--auto_resume") == 0
    assert capfd.readouterr().out.count("of the network on") == 1
    assert differences(tmp_path, whole) == []


@pytest.mark.slow
def test_ended_after_the_log_line_of_an_epoch(photos, whole, tmp_path, monkeypatch):
    """The line is written again, not twice; nor is what a longer run had logged kept, or half a line."""
    with monkeypatch.context() as patch:
        patch.setattr(Run, "next_epoch", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
        assert train(photos, tmp_path) == 130
    with open(tmp_path / "log.txt", "a") as file:
        file.write('{"epoch": 1, "train_loss": 0.1}\n{"epoch": 2, "tra')
    assert train(photos, tmp_path, "--auto_resume") == 0
    assert differences(tmp_path, whole) == []


@pytest.mark.slow
def test_saved_by_steps_and_kept(photos, tmp_path):
    assert train(photos, tmp_path, "--save_every_steps", "2", "--keep_checkpoints", "3") == 0
    assert CheckpointStore(tmp_path).steps() == [3, 4, 6]


@pytest.mark.slow
def test_the_end_of_an_epoch_is_a_step_too(photos, tmp_path):
    assert train(photos, tmp_path, "--save_every", "10", "--save_every_steps", "3", "--keep_checkpoints", "3") == 0
    assert CheckpointStore(tmp_path).steps() == [3, 6]


@pytest.mark.slow
def test_another_batch_size_between_epochs(photos, whole, tmp_path):
    """Epochs of fewer steps: what is newer must not be taken for older."""
    shutil.copytree(whole, tmp_path / "run", symlinks=True)
    assert train(photos, tmp_path / "run", "--auto_resume", "--epochs", "4", "--batch_size", "6") == 0
    assert CheckpointStore(tmp_path / "run").steps() == [7, 8]
    assert torch.load(tmp_path / "run" / "last.pth", weights_only=True)["epoch"] == 3
    curves = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    assert [point.step for point in curves.Scalars("val/loss")] == [3, 6, 6, 7, 8]  # an epoch is evaluated again
    assert [point.step for point in curves.Scalars("train/loss")] == [2, 3, 5, 6, 7, 8]


@pytest.mark.slow
def test_a_best_that_was_damaged_between_stops_is_noticed(photos, whole, tmp_path, capfd):
    shutil.copytree(whole, tmp_path / "run", symlinks=True)
    best = tmp_path / "run" / "best.pth"
    best.write_bytes(best.read_bytes()[:100_000])
    assert train(photos, tmp_path / "run", "--auto_resume", "--epochs", "3") == 0
    out = capfd.readouterr().out
    assert f"{best} is damaged, and renamed to best.pth.damaged\n" in out and "the best is reset" in out
    assert torch.load(best, weights_only=True)["epoch"] == 2


@pytest.mark.slow
def test_a_run_that_is_over_keeps_its_log(photos, whole, tmp_path):
    shutil.copytree(whole, tmp_path / "run", symlinks=True)
    assert train(photos, tmp_path / "run", "--auto_resume") == 0
    assert differences(tmp_path / "run", whole) == []
    (tmp_path / "run" / "log.txt").chmod(0o640)
    assert train(photos, tmp_path / "run", "--auto_resume", "--epochs", "1", "--warmup_epochs", "0") == 0
    assert differences(tmp_path / "run", whole) == []


@pytest.mark.slow
def test_a_resumed_run_has_the_best_of_before(photos, tmp_path, monkeypatch, capfd):
    """In a new folder too; where its best.pth is not to be found, the best is reset."""
    score(monkeypatch, [30.0, 20.0, 10.0])
    keep = ["--keep_checkpoints", "9", "--epochs", "3"]
    assert train(photos, tmp_path / "whole", *keep) == 0
    out = capfd.readouterr().out
    assert f"best: acc1 30.000 after epoch 0 of 0 to 2, {tmp_path / 'whole' / 'best.pth'}\ntime: 0:0" in out
    second = tmp_path / "whole" / "checkpoint-00000006.pth"
    assert train(photos, tmp_path / "new", *keep, "--resume", second) == 0
    assert f"best: acc1 30.000 after epoch 0 of 0 to 2, {tmp_path / 'new' / 'best.pth'}\n" in capfd.readouterr().out
    assert [line for line in differences(tmp_path / "new", tmp_path / "whole") if not line.startswith("log.txt")] == []
    (tmp_path / "whole" / "best.pth").unlink()
    assert train(photos, tmp_path / "reset", *keep, "--resume", second) == 0
    out = capfd.readouterr().out
    assert f"the best.pth of acc1 30.000 is not beside {second}: the best is reset\n" in out
    assert "best: acc1 20.000 after epoch 1 of 0 to 2, " in out and (tmp_path / "reset" / "best.pth").exists()


@pytest.mark.slow
def test_patience_ends_a_run(photos, tmp_path, monkeypatch, capfd):
    """After so many epochs without a better metric, of the whole run, wherever it was stopped."""
    score(monkeypatch, [10.0, 20.0, 15.0, 20.0, 30.0, 30.0])
    patient = ["--epochs", "6", "--patience", "2"]
    assert train(photos, tmp_path / "whole", *patient) == 0
    out = capfd.readouterr().out
    assert "ended early, after epoch 3: 2 epochs without a better acc1\n" in out and "acc1 20.000 after epoch 1" in out
    assert len((tmp_path / "whole" / "log.txt").read_text().splitlines()) == 4
    with signal_after(3 * STEPS + 1):
        assert train(photos, tmp_path / "left", *patient) == EXIT_RESUME
    for _ in range(2):  # the second time, a run that has ended
        assert train(photos, tmp_path / "left", *patient, "--auto_resume") == 0
        assert differences(tmp_path / "left", tmp_path / "whole") == []
    assert train(photos, tmp_path / "left", *patient, "--auto_resume", "--patience", "3") == 0
    assert "acc1 30.000 after epoch 4" in capfd.readouterr().out


@pytest.mark.slow
def test_a_run_ended_by_patience_has_saved_itself(photos, tmp_path, monkeypatch, capfd):
    """Between two saves too; and where patience ends with the last epoch, nothing ended early."""
    score(monkeypatch, [20.0, 10.0, 10.0])
    patient = ["--save_every", "9", "--patience", "1"]
    assert train(photos, tmp_path, *patient, "--epochs", "3") == 0
    out = capfd.readouterr().out
    assert f"checkpoint: {tmp_path / 'last.pth'}\n" in out
    assert CheckpointStore(tmp_path).steps() == [3, 6]  # the best, and the last
    assert train(photos, tmp_path, *patient, "--auto_resume") == 0
    out = capfd.readouterr().out
    assert "epoch 1, step 3 of 3" in out and "ended early" not in out
    assert len((tmp_path / "log.txt").read_text().splitlines()) == 2


@pytest.mark.slow
@pytest.mark.parametrize("saves", [["--save_every", "9"], ["--save_every", "9", "--save_every_steps", "2"]])
def test_the_best_of_an_epoch_that_was_not_saved_resumes(photos, whole, tmp_path, saves, monkeypatch):
    """And logs the losses of the whole epoch; its folder gets a checkpoint of where it started."""
    score(monkeypatch, [20.0, 10.0])
    assert train(photos, tmp_path / "one", *saves) == 0
    again = ["--save_every", "1", "--keep_checkpoints", "9", "--resume"]
    assert train(photos, tmp_path / "two", *again, tmp_path / "one" / "best.pth") == 0
    assert {3, 6} <= set(CheckpointStore(tmp_path / "two").steps())
    logs = [[json.loads(line)["train_loss"] for line in (folder / "log.txt").read_text().splitlines()]
            for folder in (tmp_path / "one", tmp_path / "two", whole)]
    assert logs[0] == logs[1] == logs[2]
    last = tmp_path / "two" / "last.pth"
    assert train(photos, tmp_path / "three", "--resume", last) == 0
    assert CheckpointStore(tmp_path / "three").steps() == [6]


def test_patience_needs_an_evaluation(photos, tmp_path, capfd):
    assert train(photos, tmp_path, "--patience", "2", "--disable_eval") == 2
    assert capfd.readouterr().err == (
        "error: --patience waits for a better evaluation, which --disable_eval leaves out\n"
    )


def test_the_time_of_a_run_is_that_of_all_its_parts():
    run = Run(nn.Linear(1, 1), None, None, None, Clock(3, 6), 4, seconds=100.0)
    run.started -= 20
    assert 120 <= run.total_seconds < 121


@pytest.mark.slow
def test_saved_by_minutes(photos, tmp_path):
    assert train(photos, tmp_path, "--save_every_minutes", "1e-9", "--keep_checkpoints", "9") == 0
    assert CheckpointStore(tmp_path).steps() == [1, 2, 3, 4, 5, 6]


@pytest.mark.slow
def test_resuming_from_the_one_before_a_damaged_one(photos, whole, tmp_path, capfd):
    assert train(photos, tmp_path, "--save_every_steps", "1", "--epochs", "2") == 0
    newest = tmp_path / "checkpoint-00000006.pth"
    newest.write_bytes(newest.read_bytes()[:-100])
    capfd.readouterr()
    assert train(photos, tmp_path, "--auto_resume") == 0
    out = capfd.readouterr().out
    assert f"{newest} is damaged" in out and "resuming from" in out and "epoch 1, step 2 of 3" in out
    assert differences(tmp_path, whole) == []


@pytest.fixture(scope="module")
def label_maps(photos, tmp_path_factory):
    """A map for each training image, of two classes at each of 3 x 3 places."""
    root = tmp_path_factory.mktemp("maps")
    generator = torch.Generator().manual_seed(0)
    for image in (photos / "train").rglob("*.png"):
        path = label_map_path(root, image.relative_to(photos / "train"))
        path.parent.mkdir(parents=True, exist_ok=True)
        classes = torch.rand(3, 3, 3, generator=generator).argsort(0)[:2]
        torch.save(torch.stack([torch.randn(2, 3, 3, generator=generator), classes]).half(), path)
    return root


@pytest.fixture(params=["fp16", "teacher", "token labels", "linear probe"])
def methods(request, whole, label_maps):
    """Flags of what has a state, or random draws, of its own."""
    return {
        "fp16": ["--amp", "fp16"],
        "teacher": ["--distillation_type", "soft", "--teacher_model", "biformer_nano", "--teacher_path",
                    whole / "last.pth"],
        "token labels": ["--token_label", label_maps],
        "linear probe": ["--freeze_backbone", "--finetune", whole / "last.pth"],
    }[request.param]


@pytest.mark.slow
def test_stopped_with_other_ways_to_train(photos, whole, tmp_path, methods):
    assert train(photos, tmp_path / "whole", *methods) == 0
    with signal_after(2) as taken:
        assert train(photos, tmp_path / "left", *methods) == EXIT_RESUME
    assert len(taken) == 2
    assert train(photos, tmp_path / "left", *methods, "--auto_resume") == 0
    assert differences(tmp_path / "left", tmp_path / "whole") == []
    changed = [line for line in differences(tmp_path / "whole", whole) if ".args." not in line]
    assert changed != [], "the flags change nothing"


@pytest.mark.slow
def test_the_scaler_of_gradients_is_live(photos, tmp_path):
    """It counts the steps since the last overflow, and an overflow halves its scale: steps never leave it as it was."""
    assert train(photos, tmp_path, "--amp", "fp16", "--keep_checkpoints", "2") == 0
    one, other = (torch.load(path, weights_only=True)["scaler"] for path in sorted(tmp_path.glob("checkpoint-*.pth")))
    assert one != other


@pytest.mark.slow
def test_shards_of_a_web_server(photos, tmp_path):
    """Stopped in the middle of an epoch, and resumed with other numbers of workers, with nothing in the cache."""
    assert make_shards.main([str(photos), str(tmp_path / "shards"), "--size", "4"]) == 0
    with served(tmp_path / "shards") as url:
        shards = ["--data_set", "wds/photos", "--nb_classes", "3", "--data_path", url, "--shard_cache"]
        assert train(photos, tmp_path / "whole", *shards, tmp_path / "one") == 0
        for start in range(2 * STEPS):
            with signal_after(2):
                code = train(photos, tmp_path / "left", *shards, tmp_path / f"cache-{start}", "--auto_resume",
                             "--num_workers", start % 3)
            if code == 0:
                break
    assert code == 0 and start >= 2
    assert differences(tmp_path / "left", tmp_path / "whole") == []


@pytest.mark.slow
def test_passwords_and_signatures_are_neither_shown_nor_kept(photos, tmp_path, capfd):
    """A run that resumes needs them again, and says so."""
    assert make_shards.main([str(photos), str(tmp_path / "shards"), "--size", "4"]) == 0
    folder, shards = tmp_path / "run", ["--data_set", "wds/photos", "--shard_cache", tmp_path / "cache"]
    with served(tmp_path / "shards") as url:
        signed = f"{url.replace('//', '//me:secret@')}?sig=secret"
        with signal_after(1):
            assert train(signed, folder, *shards) == EXIT_RESUME
        out, err = capfd.readouterr()
        assert "put the password or signature into --data_path, and resume with" in err
        code = program.main(["--auto_resume", "--output_dir", str(folder), "--device", "cpu", "--num_workers", "0"])
        more = capfd.readouterr()
        assert code == 1 and "signature is not kept: give the whole address again" in more.err
        assert train(signed.replace("secret", "new-secret"), folder, *shards, "--auto_resume") in (0, EXIT_RESUME)
    shown = "".join([out, err, *more, *capfd.readouterr()])
    written = b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())
    assert "secret" not in shown and b"secret" not in written and b"data_path" in written


def test_shards_are_shared_among_as_many_as_before(photos, half, monkeypatch, capfd):
    monkeypatch.setattr("training.data.loader.EpochLoader.ranges", 2)
    assert train(photos, half, "--auto_resume") == 1
    assert capfd.readouterr().err.endswith(
        "shards shared among 1 process, which are now 2; keep the number of processes, or resume from the end of "
        "an epoch\n"
    )


@pytest.fixture
def half(photos, tmp_path):
    """A run that was stopped after its second step."""
    with signal_after(2):
        assert train(photos, tmp_path / "half") == EXIT_RESUME
    return tmp_path / "half"


@pytest.mark.slow
def test_the_same_images_in_other_batches(photos, half, capfd):
    """Accumulation may change where the global batch does not; in the middle of an epoch nothing else may."""
    assert train(photos, half, "--auto_resume", "--batch_size", "6") == 1
    error = capfd.readouterr().err
    assert error.endswith(
        "in the middle of an epoch of 3 steps of 4 images, which is now one of 1 step of 12 images; "
        "keep --batch_size x processes x --update_freq, or resume from the end of an epoch\n"
    )
    assert train(photos, half, "--auto_resume", "--batch_size", "4", "--update_freq", "1") == 0


def test_what_is_later_is_not_written_over(photos, whole, capfd):
    first = whole / "checkpoint-00000003.pth"
    assert train(photos, whole, "--resume", first) == 1
    assert "holds later checkpoints than checkpoint-00000003.pth; take another --output_dir" in capfd.readouterr().err


def test_a_damaged_checkpoint_by_name(photos, whole, tmp_path, capfd):
    data = bytearray((whole / "last.pth").read_bytes())
    data[len(data) // 2] ^= 1
    (tmp_path / "bad.pth").write_bytes(data)
    assert train(photos, tmp_path / "out", "--resume", tmp_path / "bad.pth") == 1
    assert capfd.readouterr().err.endswith(
        "bad.pth: damaged or truncated; resume from the one before it, or download it again\n"
    )


@pytest.mark.slow
def test_restarted_by_torchrun(photos, half, whole, monkeypatch, capfd):
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert train(photos, half) == 0
    assert "epoch 0, step 2 of 3" in capfd.readouterr().out
    assert differences(half, whole, {"batch_size", "update_freq"}) == []
    assert program.main([*COMMAND, "--data_path", str(photos)]) == 1
    assert "which can only resume in a folder that was named; give --output_dir" in capfd.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("metric,better", [("acc1", max), ("loss", min), ("ema_loss", min)])
def test_the_best_by_any_metric(photos, tmp_path, metric, better):
    assert train(photos, tmp_path, "--best_metric", metric, "--epochs", "3") == 0
    records = [json.loads(line) for line in (tmp_path / "log.txt").read_text().splitlines()]
    name = metric if metric.startswith("ema_") else f"val_{metric}"
    best = torch.load(tmp_path / "best.pth", weights_only=True)
    expected = better(records, key=lambda record: record[name])
    assert best["epoch"] == expected["epoch"]


def results_of(run, name, *values):
    return [run.record_best({name: value}) for value in values]


def test_a_result_that_is_no_number_is_not_the_best():
    run = Run(None, None, None, None, Clock(1, 1), global_batch=1, best_metric=BestMetric("loss", higher=False))
    assert results_of(run, "loss", float("nan"), 1.0, float("nan"), 2.0, 0.5) == [False, True, False, False, True]
    assert run.best == 0.5


def test_the_best_is_recorded_once():
    """Of equals the first; what is not the best changes nothing."""
    run = Run(None, None, None, None, Clock(1, 1), global_batch=1, best_metric=BestMetric("acc1"))
    assert results_of(run, "acc1", 0.0, 1.0, 1.0, 0.5) == [True, True, False, False] and run.best == 1.0


def test_a_complete_run_is_not_evaluated_again(photos, whole, tmp_path, capfd):
    """But what its last evaluation did not come to is done, and said: here, the process ended before the log line."""
    shutil.copytree(whole, tmp_path / "run", symlinks=True)
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "run").glob("[!.]*")}
    assert train(photos, tmp_path / "run", "--auto_resume", "--log_every", "2") == 0
    out = capfd.readouterr().out
    assert f"training is already complete: nothing is left to do after {tmp_path / 'run'}" in out
    assert "resuming" not in out and "of the network" not in out
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "run").glob("[!.]*")} == before
    log = tmp_path / "run" / "log.txt"
    log.write_text("".join(log.read_text().splitlines(keepends=True)[:-1]))
    assert train(photos, tmp_path / "run", "--auto_resume") == 0
    out = capfd.readouterr().out
    assert "epoch 1, step 3 of 3; training is complete, its last epoch is evaluated and logged again\n" in out
    assert out.count("of the network on") == 1 and differences(tmp_path / "run", whole) == []


def test_a_complete_run_is_evaluated_as_it_was_not_before(photos, whole, tmp_path, capfd):
    shutil.copytree(whole, tmp_path / "run", symlinks=True)
    assert train(photos, tmp_path / "run", "--auto_resume", "--best_metric", "loss") == 0
    assert "best: loss " in capfd.readouterr().out


def test_settings_by_which_nothing_is_trained_are_not_recorded(photos, whole, tmp_path, capfd):
    """A complete run is evaluated again where something else is asked for; its recipe remains what trained it."""
    shutil.copytree(whole, tmp_path / "run", symlinks=True)
    recipe = (tmp_path / "run" / "args.yaml").read_text()
    assert train(photos, tmp_path / "run", "--auto_resume", "--mixup", "0.3") == 0
    assert "warning: " in capfd.readouterr().out and (tmp_path / "run" / "args.yaml").read_text() == recipe
    last = whole / "last.pth"
    assert train(photos, tmp_path / "other", "--resume", last, "--mixup", "0.3") == 0
    assert (tmp_path / "other" / "args.yaml").exists()


def test_a_checkpoint_of_an_earlier_version_resumes_exactly(photos, half, whole):
    """It did not say which images there are, and summed losses over batches, here of two images, not over images."""
    path = CheckpointStore(half).path(2)
    checkpoint = torch.load(path, weights_only=True)
    meter = checkpoint["meter"]
    for name in ("fingerprint", "ranges", "global_batch"):
        del checkpoint[name]
    torch.save(checkpoint | dict(meter=meter | dict(loss_sum=meter["loss_sum"] / 2, batches=4)), path)
    assert train(photos, half, "--auto_resume") == 0
    assert differences(half, whole) == []


def change_images(data, how):
    """Remove, add or rename an image, or have two class folders change places."""
    first, second = sorted((data / "train").iterdir())[:2]
    image = next(first.iterdir())
    if how == "removed":
        image.unlink()
    elif how == "added":
        shutil.copy(image, first / "new.png")
    elif how == "renamed":
        image.rename(first / "other.png")
    else:
        first.rename(data / "away")
        second.rename(first)
        (data / "away").rename(second)


CHANGES = {
    "removed": r"on (\d+) images, and there are \d+ now", "renamed": "on images of other names",
    "added": r"on (\d+) images, and there are \d+ now", "swapped": "in other classes",
}


@pytest.mark.parametrize("how,words", CHANGES.items())
def test_the_rest_of_an_epoch_is_of_the_same_images(photos, half, capfd, how, words):
    data = half.parent / "photos"
    shutil.copytree(photos, data)
    change_images(data, how)
    assert train(data, half, "--auto_resume") == 1
    err = capfd.readouterr().err
    assert re.search(rf"02.pth, written in the middle of an epoch, .*{words}", err) and "end of an epoch" in err


@pytest.mark.parametrize("how,words", CHANGES.items())
def test_another_epoch_may_be_of_other_images(photos, whole, tmp_path, capfd, how, words):
    shutil.copytree(photos, tmp_path / "photos")
    shutil.copytree(whole, tmp_path / "run", symlinks=True)
    change_images(tmp_path / "photos", how)
    assert train(tmp_path / "photos", tmp_path / "run", "--auto_resume", "--epochs", "3") == 0
    assert re.search(rf"warning: .*06.pth has trained .*{words}", capfd.readouterr().out)


@pytest.mark.parametrize("flag,value", [
    ("seed", "1"), ("mixup", "0.1"), ("repeated_aug", "false"), ("aa", "none"), ("input_size", "64"),
    ("reprob", "0"), ("scale", "0.5 1"), ("exif_transpose", "false"), ("train_interpolation", "random"),
])
def test_the_rest_of_an_epoch_is_of_the_same_settings(photos, half, capfd, flag, value):
    assert train(photos, half, "--auto_resume", f"--{flag}", *value.split()) == 1
    err = capfd.readouterr().err
    assert re.search(rf"02.pth was written in the middle of an epoch of {flag}=.*, not .*; give what it had", err)


def test_a_resumed_run_needs_no_weights_to_start_from(photos, whole, tmp_path, capfd):
    """The same command line again, though the file is gone; nor is anything said of its classes."""
    checkpoint = torch.load(whole / "best.pth", weights_only=True)
    torch.save({**checkpoint, "classes": [f"other{i}" for i in range(3)]}, tmp_path / "first.pth")
    command = [photos, tmp_path / "run", "--finetune", tmp_path / "first.pth", "--auto_resume"]
    assert train(*command) == 0
    assert "the classifier is re-initialised" in capfd.readouterr().out
    (tmp_path / "first.pth").unlink()
    assert train(*command, "--epochs", "3") == 0
    out = capfd.readouterr().out
    assert "resuming from" in out and "re-initialised" not in out


def test_fewer_epochs_than_were_trained(photos, whole, tmp_path, capfd):
    shutil.copytree(whole, tmp_path / "run", symlinks=True)
    recipe = (tmp_path / "run" / "args.yaml").read_text()
    assert train(photos, tmp_path / "run", "--auto_resume", "--epochs", "1", "--warmup_epochs", "0") == 0
    assert "training is already complete" in capfd.readouterr().out
    assert (tmp_path / "run" / "args.yaml").read_text() == recipe


@pytest.mark.parametrize("name,kwargs", [("c.pth", dict(_use_new_zipfile_serialization=False)), ("c.pth", {})])
def test_weights_alone_are_no_run(photos, whole, tmp_path, name, kwargs, capfd):
    """Whatever their format, they are not said to be damaged."""
    torch.save(torch.load(whole / "last.pth", weights_only=True)["model"], tmp_path / name, **kwargs)
    assert train(photos, tmp_path / "out", "--resume", tmp_path / name) == 1
    assert "holds only weights, no run to resume; fine-tune from it with --finetune\n" in capfd.readouterr().err


def test_classes_of_other_names(photos, whole, tmp_path, capfd):
    other = tmp_path / "photos"
    shutil.copytree(photos, other)
    names = sorted(path.name for path in (other / "train").iterdir())
    for split in ("train", "val"):
        (other / split / names[0]).rename(other / split / "Zebra")
    assert train(other, tmp_path / "out", "--resume", whole / "last.pth", "--epochs", "3") == 1
    error = capfd.readouterr().err
    assert f"was trained on other classes: {names[0]!r}, where the data has 'Zebra'" in error
    assert error.endswith("; fine-tune from it with --finetune\n")
    evaluation = [*COMMAND[:4], "--device", "cpu", "--num_workers", "0", "--data_path", str(other), "--eval"]
    assert program.main([*evaluation, "--resume", str(whole / "last.pth")]) == 1
    complaint = f"{other}/val has folders that the network has no class for: Zebra; its classes are {', '.join(names)}"
    assert f"error: {complaint}\n" in capfd.readouterr().err


@pytest.mark.slow
def test_a_full_disk(photos, tmp_path, monkeypatch, capfd):
    def full(path, state):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("training.checkpoints.save_checkpoint", full)
        assert train(photos, tmp_path) == 1
    assert "No space left on device; no checkpoint was written yet" in capfd.readouterr().err
    assert train(photos, tmp_path, "--auto_resume") == 0


def test_a_checkpoint_without_the_average(photos, tmp_path, capfd):
    assert train(photos, tmp_path, "--model_ema", "false", "--model_ema_eval", "false", "--epochs", "1",
                 "--warmup_epochs", "0") == 0
    assert train(photos, tmp_path, "--auto_resume", "--epochs", "2", "--model_ema") == 1
    assert capfd.readouterr().err.endswith("holds no EMA weights; resume with --model_ema false\n")


def test_the_run_of_another_model(photos, whole, tmp_path, capfd):
    other = ["--model", "convnext_atto", "--resume", str(whole / "last.pth"), "--epochs", "3"]
    assert train(photos, tmp_path, *other) == 1
    assert capfd.readouterr().err.endswith("more; this is biformer_nano's\n")


@pytest.mark.parametrize("arguments", [
    ["--decay_groups", "layernorm"], ["--decay_groups", "none"], ["--layer_decay", "0.9"], ["--weight_decay", "0"],
])
def test_other_parameter_groups(photos, whole, tmp_path, capfd, arguments):
    assert train(photos, tmp_path, "--resume", whole / "last.pth", *arguments, "--epochs", "3") == 1
    assert capfd.readouterr().err == (
        f"error: {(whole / 'last.pth').resolve()} has other parameter groups: what is trained, weight decay "
        "or layer decay differs; --opt, --weight_decay, --decay_groups, --layer_decay and --freeze_backbone must be as "
        "in that run\n"
    )


# --- runs of so many steps --------------------------------------------------------------------------------------------


def records(folder):
    return [json.loads(line) for line in (folder / "log.txt").read_text().splitlines()]


def test_the_clock():
    clock = Clock(epoch_length=3, total=7)
    assert clock.epochs == 3
    seen = []
    while not clock.run_is_over:
        while not clock.epoch_is_over:
            clock.advance()
        seen.append((clock.epoch, clock.step, clock.epoch_steps, clock.global_step, clock.is_last_epoch))
        clock.next_epoch()
    assert seen == [(0, 3, 3, 3, False), (1, 3, 3, 6, False), (2, 1, 1, 7, True)]
    assert clock.steps_taken == 7 and clock.epoch == 3 and clock.step == 0


@pytest.mark.parametrize("total", [1, 2, 3, 4, 6])
def test_the_clock_stops_at_the_last_step(total):
    clock = Clock(epoch_length=3, total=total)
    while not clock.run_is_over:
        clock.advance()
        if clock.epoch_is_over:
            clock.next_epoch()
    assert clock.steps_taken == total and clock.epochs == clock.epoch == -(-total // 3)


@pytest.mark.slow
def test_the_steps_of_whole_epochs_are_those_epochs(photos, whole, tmp_path):
    assert train(photos, tmp_path, "--max_steps", 2 * STEPS, "--epochs", "9") == 0
    assert differences(tmp_path, whole, {"max_steps", "epochs"}) == []


@pytest.mark.slow
def test_the_last_epoch_is_cut_short(photos, tmp_path, capfd):
    assert train(photos, tmp_path, "--max_steps", "4") == 0
    out = capfd.readouterr().out
    assert "2 epochs (0 to 1) of 3 steps of 4 images, 4 steps in all; writes to" in out
    assert "epoch 1 [1/1]" in out and out.count("of the network on") == 2
    assert [(record["epoch"], record["step"]) for record in records(tmp_path)] == [(0, 3), (1, 4)]
    assert CheckpointStore(tmp_path).steps() == [3, 4]
    assert train(photos, tmp_path, "--max_steps", "4", "--auto_resume") == 0
    assert CheckpointStore(tmp_path).steps() == [3, 4] and len(records(tmp_path)) == 2


def test_less_than_an_epoch(photos, tmp_path, capfd):
    """What is said before it: of 13 images, 12 fill the steps of an epoch; and one of anything is one."""
    assert train(photos, tmp_path, "--max_steps", "2", "--warmup_steps", "1") == 0
    out = capfd.readouterr().out
    assert "warning: the augmentation is that of ImageNet (mixup 0.8, cutmix 1, repeated_aug), for 13 images; " in out
    assert "\n13 training images (each epoch leaves out 1, too few for a step), 7 val images\n" in out
    assert "\n1 epoch of 3 steps of 4 images, 2 steps in all; writes to " in out
    assert "\nglobal batch 4 = 2 images x 1 process x 2 accumulated; " in out
    assert re.search(r"\nbest: acc1 [\d.]+ after epoch 0, ", out)
    assert [record["step"] for record in records(tmp_path)] == [2] and CheckpointStore(tmp_path).steps() == [2]


@pytest.mark.slow
def test_stopped_in_an_epoch_that_is_cut_short(photos, tmp_path, capfd):
    assert train(photos, tmp_path / "whole", "--max_steps", "5") == 0
    with signal_after(4):
        assert train(photos, tmp_path / "left", "--max_steps", "5") == EXIT_RESUME
    assert "stopped in epoch 1 after step 1 of 2" in capfd.readouterr().err
    assert train(photos, tmp_path / "left", "--max_steps", "5", "--auto_resume") == 0
    assert "epoch 1, step 1 of 2" in capfd.readouterr().out
    assert differences(tmp_path / "left", tmp_path / "whole") == []


@pytest.mark.slow
@pytest.mark.parametrize("first", [2, 4])
def test_more_steps_after_the_end(photos, tmp_path, first, capfd):
    """The epoch that was cut short is trained to its end; steps that the schedule does not stretch are as they were."""
    schedule = ["--sched", "step", "--decay_steps", "5", "--warmup_steps", "1"]
    assert train(photos, tmp_path / "at once", *schedule, "--max_steps", "7") == 0
    assert train(photos, tmp_path / "raised", *schedule, "--max_steps", first) == 0
    capfd.readouterr()
    assert train(photos, tmp_path / "raised", *schedule, "--max_steps", "7", "--auto_resume") == 0
    assert f"epoch {first // 3}, step {first % 3} of 3" in capfd.readouterr().out
    assert [record["step"] for record in records(tmp_path / "raised")] == [3, 6, 7]
    assert [line for line in differences(tmp_path / "raised", tmp_path / "at once") if "best" not in line] == []


def test_fewer_steps_than_were_taken(photos, whole, tmp_path, capfd):
    shutil.copytree(whole, tmp_path / "run", symlinks=True)
    assert train(photos, tmp_path / "run", "--auto_resume", "--max_steps", "3", "--warmup_steps", "1") == 0
    assert "training is already complete" in capfd.readouterr().out
    assert differences(tmp_path / "run", whole) == []


@pytest.mark.slow
def test_the_learning_rate_goes_by_steps(photos, tmp_path):
    command = ["--sched", "poly", "--poly_power", "0.9", "--warmup_steps", "2", "--max_steps", "8"]
    assert train(photos, tmp_path, *command, "--min_lr", "0") == 0
    peak = 1e-2 * 4 / 512
    rates = [record["train_lr"] for record in records(tmp_path)]
    assert rates == pytest.approx([peak * (1 - step / 8) ** 0.9 for step in (2, 5, 7)])


def test_the_last_epochs_cool_down(photos, tmp_path):
    schedule = ["--sched", "poly", "--epochs", "3", "--warmup_epochs", "0", "--cooldown_epochs", "1", "--min_lr", "1%"]
    assert train(photos, tmp_path, *schedule) == 0
    rates = [record["train_lr"] / (1e-2 * 4 / 512) for record in records(tmp_path)]
    assert rates == pytest.approx([0.01 + 0.99 * (1 - 2 / 6), 0.01 + 0.99 * (1 - 5 / 6), 0.01])


@pytest.mark.slow
def test_epochs_of_the_schedule_are_steps(photos, tmp_path):
    """Warm-up and milestones in epochs and the same ones in steps are one run."""
    epochs = ["--sched", "step", "--decay_epochs", "1", "--warmup_epochs", "1"]
    steps = ["--sched", "step", "--decay_steps", STEPS, "--warmup_steps", STEPS]
    for name, schedule in (("epochs", epochs), ("steps", steps)):
        assert train(photos, tmp_path / name, *schedule) == 0
    given = {"decay_epochs", "decay_steps", "warmup_epochs", "warmup_steps"}
    assert differences(tmp_path / "epochs", tmp_path / "steps", given) == []
    assert records(tmp_path / "steps")[1]["train_lr"] == pytest.approx(0.1 * 1e-2 * 4 / 512)


@pytest.mark.parametrize("arguments,message", [
    (["--max_steps", "3"], "a warm-up of 3 steps leaves nothing of the run's 3; lower --warmup_epochs or "
                           "--cooldown_epochs, or give --warmup_steps"),
    (["--epochs", "1", "--warmup_steps", "3"], "a warm-up of 3 steps leaves nothing of the run's 3; lower"),
    (["--min_lr", "1"], "min_lr 1 is above the learning rate of this batch size, 7.81e-05; --lr is for 512 images"),
])
def test_schedules_that_do_not_fit_the_data(photos, tmp_path, capfd, arguments, message):
    assert train(photos, tmp_path / "out", *arguments) == 2
    error = capfd.readouterr().err
    assert error.startswith(f"error: {message}") and len(error.splitlines()) == 1
    assert not (tmp_path / "out").exists()
