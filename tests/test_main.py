"""Whole runs of main.py on small photos: what a user types, and what comes out."""
import json
import os
import re
import subprocess
import sys
from math import nan

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file

import main as program
import models
from helpers import ROOT
from helpers.ports import free_port
from helpers.web import served
from scripts import make_shards
from tasks.classification.metrics import Accuracy
from tasks.classification.task import ClassificationTask
from training.checkpoints import CheckpointStore
from training.distributed import Distributed
from training.precision import Precision

SMALL = ["--model", "biformer_nano", "--input_size", "32", "--batch_size", "4", "--num_workers", "0", "--device", "cpu"]
SHORT = ["--epochs", "2", "--warmup_epochs", "1", "--lr", "1e-2", "--log_every", "2"]
RESULT = re.compile(r"\* Acc@1 (\d+\.\d{3}) Acc@5 (\d+\.\d{3}) loss (\d+\.\d{3}) of the .* on (\d+) val images\n")


def run(capfd, *arguments):
    """Exit code, standard output, standard error of a command line."""
    code = program.main([str(argument) for argument in arguments])
    return code, *capfd.readouterr()


def train(photos, folder, *arguments):
    arguments = [*SMALL, *SHORT, "--data_path", photos, "--output_dir", folder, *arguments]
    assert program.main([str(argument) for argument in arguments]) == 0


def launch(processes, *arguments, launcher="torch.distributed.run"):
    command = [sys.executable, "-W", "ignore", "-m", launcher, f"--nproc_per_node={processes}"]
    return subprocess.run(
        [*command, f"--master_port={free_port()}", "main.py", *map(str, arguments)],
        cwd=ROOT, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=300,
    )


def weights(path, key="model"):
    return torch.load(path, weights_only=True)[key]


@pytest.fixture(scope="session")
def trained(photos, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    train(photos, folder / "run")
    return folder / "run"


def test_a_run_leaves_its_checkpoints_and_logs(trained):
    written = {p.name for p in trained.iterdir() if not p.name.startswith(".")}
    assert written == {"args.yaml", "best.pth", "checkpoint-00000003.pth", "checkpoint-00000006.pth", "last.pth",
                       "log.txt", "tensorboard"}
    assert (trained / "last.pth").resolve().name == "checkpoint-00000006.pth"
    records = [json.loads(line) for line in (trained / "log.txt").read_text().splitlines()]
    assert [r["epoch"] for r in records] == [0, 1] and [r["step"] for r in records] == [3, 6]
    assert {"train_loss", "train_lr", "train_images_per_second", "val_acc1", "val_loss"} <= set(records[0])
    best = torch.load(trained / "best.pth", weights_only=True)
    accuracies = [r["val_acc1"] for r in records]
    assert best["epoch"] == accuracies.index(max(accuracies))


def test_evaluation_prints_how_images_are_taken_and_one_line(photos, trained, capfd):
    code, out, _ = run(capfd, *SMALL, "--data_path", photos, "--eval", "true", "--resume", trained / "last.pth")
    size, line = out.splitlines(keepends=True)
    acc1, _, loss, images = RESULT.fullmatch(line).groups()
    assert size == "evaluated at 32 x 32, crop 0.875, bicubic\n"
    last = json.loads((trained / "log.txt").read_text().splitlines()[-1])
    assert code == 0 and images == "7"
    assert float(acc1) == pytest.approx(last["val_acc1"], abs=1e-3)
    assert float(loss) == pytest.approx(last["val_loss"], abs=2e-3)


@pytest.mark.long
@pytest.mark.distributed
def test_two_processes_on_seven_images_give_what_one_gives(photos, trained, capfd):
    arguments = [*SMALL, "--data_path", photos, "--eval", "--resume", trained / "last.pth"]
    _, alone, _ = run(capfd, *arguments)
    shared = launch(2, *arguments, launcher="torch.distributed.launch")
    assert shared.returncode == 0, shared.stderr
    assert RESULT.search(shared.stdout).group() == RESULT.search(alone).group()
    assert len(RESULT.findall(shared.stdout)) == 1
    whole = launch(2, *arguments, "--dist_eval", "false")
    assert RESULT.search(whole.stdout).group() == RESULT.search(alone).group()


@pytest.mark.long
@pytest.mark.distributed
def test_three_processes_report_what_one_reports(photos, trained, tmp_path, capfd):
    """Every image once and in order, though one process gets a batch less; also where nothing is shared."""
    arguments = [*SMALL, "--batch_size", "2", "--data_path", photos, "--eval", "--resume", trained / "last.pth"]
    assert run(capfd, *arguments, "--report", tmp_path / "one")[0] == 0
    for name, *shared in (("three", "--dist_eval"), ("each", "--dist_eval", "false")):
        done = launch(3, *arguments, *shared, "--report", tmp_path / name)
        assert done.returncode == 0, done.stderr
        for table in ("predictions.csv", "classes.csv", "confusion.csv"):
            assert (tmp_path / name / table).read_text() == (tmp_path / "one" / table).read_text()


@pytest.mark.slow
@pytest.mark.distributed
def test_two_processes_train_as_one_with_twice_the_batch(photos, tmp_path, capfd):
    """Without batch norm statistics to differ in, and without random augmentation, the weights agree."""
    plain = ["--model", "vit_tiny_patch16_224", "--input_size", "32", "--num_workers", "0", "--device", "cpu",
             "--data_path", photos, *SHORT, "--opt", "sgd", "--lr", "1e-3", "--mixup", "0", "--cutmix", "0",
             "--reprob", "0", "--hflip", "0", "--scale", "1", "1", "--aa", "none", "--color_jitter", "0",
             "--repeated_aug", "false", "--drop_path", "0", "--epochs", "1", "--warmup_epochs", "0"]
    together = launch(2, *plain, "--batch_size", "4", "--output_dir", tmp_path / "two")
    assert together.returncode == 0, together.stderr
    assert re.search(
        r"global batch 8 = 4 images x 2 processes x 1 accumulated; learning rate 1.56\de-05 = 0.001 x 8 / 512",
        together.stdout,
    )
    code, out, _ = run(capfd, *plain, "--batch_size", "8", "--output_dir", tmp_path / "one")
    assert code == 0 and "global batch 8 = 8 images x 1 process x 1 accumulated" in out
    torch.testing.assert_close(weights(tmp_path / "two" / "last.pth"), weights(tmp_path / "one" / "last.pth"))


def test_resume_by_name(photos, trained, tmp_path, capfd):
    code, out, _ = run(capfd, *SMALL, *SHORT, "--data_path", photos, "--epochs", "3", "--resume",
                       trained / "last.pth", "--output_dir", tmp_path)
    assert code == 0 and "epoch 1, step 3 of 3" in out
    assert weights(tmp_path / "last.pth", "epoch") == 2


def test_what_the_flags_say_wins_over_the_checkpoint(photos, trained, tmp_path):
    train(photos, tmp_path, "--epochs", "3", "--resume", trained / "last.pth", "--lr", "1e-4", "--weight_decay", "0.3",
          "--min_lr", "0", "--warmup_lr", "0")
    groups = weights(tmp_path / "last.pth", "optimizer")["param_groups"]
    assert {group["weight_decay"] for group in groups} == {0.0, 0.3}
    assert all(group["initial_lr"] == pytest.approx(1e-4 * 4 / 512) for group in groups)


@pytest.mark.slow
@pytest.mark.distributed
def test_two_processes_evaluate_what_they_save(photos, tmp_path, monkeypatch):
    """Batch norm statistics differ between processes while they train."""
    arguments = [*SMALL, *SHORT, "--data_path", photos, "--output_dir", tmp_path, "--batch_size", "2"]
    done = launch(2, *arguments, "--model_ema_eval", "--model_ema_decay", "0.5")
    assert done.returncode == 0, done.stderr
    last = json.loads((tmp_path / "log.txt").read_text().splitlines()[-1])
    results = []
    evaluate = program.evaluate
    monkeypatch.setattr(program, "evaluate", lambda *a, **k: results.append(evaluate(*a, **k)) or results[-1])
    for key, name in (("model", "val"), ("model_ema", "ema")):
        arguments = [*SMALL, "--data_path", photos, "--eval", "--resume", tmp_path / "last.pth", "--model_key", key]
        assert program.main([str(argument) for argument in arguments]) == 0
        assert results[-1][0]["loss"] == pytest.approx(last[f"{name}_loss"], rel=1e-6)


def test_average_is_evaluated_too(photos, tmp_path, capfd):
    train(photos, tmp_path, "--model_ema_eval", "--model_ema_decay", "0.5")
    out = capfd.readouterr().out
    assert out.count("of the network on 7 val images") == out.count("of the model EMA on 7 val images") == 2
    code, out, _ = run(capfd, *SMALL, "--data_path", photos, "--eval", "--resume", tmp_path / "last.pth",
                       "--model_key", "model_ema")
    last = json.loads((tmp_path / "log.txt").read_text().splitlines()[-1])
    assert code == 0 and float(RESULT.search(out).group(1)) == pytest.approx(last["ema_acc1"], abs=1e-3)


PROBE = ["--freeze_backbone", "--layer_decay", "0.8", "--clip_grad", "1"]


def changed(before, after):
    """What differs, to the bit, between the weights of two checkpoints."""
    return {name for name in after if not torch.equal(before[name], after[name])}


def test_a_frozen_backbone_stays_and_the_classifier_is_trained(photos, trained, tmp_path, capfd):
    """Running statistics and EMA weights too; the optimizer holds nothing else, the bias without weight decay."""
    train(photos, tmp_path, *PROBE, "--finetune", trained / "last.pth", "--lr", "10")
    assert "1.39 M parameters, of which 771 are trained, 3 classes, on cpu\n" in capfd.readouterr().out
    before = weights(trained / "last.pth")
    for key in ("model", "model_ema"):
        assert changed(before, weights(tmp_path / "last.pth", key)) == {"head.fc.weight", "head.fc.bias"}
    optimizer = weights(tmp_path / "last.pth", "optimizer")
    assert sorted((len(g["params"]), g["weight_decay"]) for g in optimizer["param_groups"]) == [(1, 0.0), (1, 0.05)]
    assert len(optimizer["state"]) == 2


def test_a_frozen_backbone_takes_batches_of_one_image(photos, trained, tmp_path, capfd):
    """Its batch norms do not train, so that one value of a channel is enough."""
    one = ["--batch_size", "1", "--mixup", "0", "--cutmix", "0", "--finetune", trained / "last.pth"]
    train(photos, tmp_path / "frozen", *PROBE, *one)
    refuses(capfd, 2, "biformer_nano cannot be trained on images of 3 x 32 x 32, one at a time", *SMALL, *SHORT, *one,
            "--data_path", photos, "--output_dir", tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.distributed
def test_a_frozen_backbone_stays_on_several_processes(photos, trained, tmp_path):
    """Of three, the mean of three equal statistics may differ from them in the last digit."""
    done = launch(3, *SMALL, *SHORT, *PROBE, "--batch_size", "2", "--data_path", photos, "--output_dir", tmp_path,
                  "--finetune", trained / "last.pth", "--lr", "10")
    assert done.returncode == 0, done.stderr
    before = weights(trained / "last.pth")
    assert changed(before, weights(tmp_path / "last.pth")) == {"head.fc.weight", "head.fc.bias"}


@pytest.mark.long
def test_average_of_a_short_run_is_as_good_as_the_network(tmp_path, capfd):
    """After six epochs of digits, with the decay that is meant for a run of 375,000 steps."""
    code, out, _ = run(capfd, "--config", ROOT / "configs" / "train" / "quickstart.yaml", "--epochs", "6", "--device",
                       "cpu", "--model_ema", "true", "--model_ema_eval", "--output_dir", tmp_path)
    last = json.loads((tmp_path / "log.txt").read_text().splitlines()[-1])
    assert code == 0 and last["val_acc1"] > 90 and last["ema_acc1"] > last["val_acc1"] - 5
    assert "EMA decay: warms up to 0.929 by the last step; 0.99996 is for runs of more than 74,892 steps\n" in out


def test_the_decay_of_a_run_that_is_long_for_it_is_not_worth_a_line(photos, tmp_path, capfd):
    train(photos, tmp_path, "--model_ema_decay", "0.5")
    assert "EMA decay" not in capfd.readouterr().out


def test_the_defaults_fit_a_small_batch_and_a_short_run(photos, tmp_path, capfd):
    """Nothing but what must be said of a folder: 4 images a step, where the published minimum is above the peak."""
    code, _, err = run(capfd, *SMALL, "--data_path", photos, "--epochs", "5", "--max_steps", "12", "--disable_eval",
                       "--output_dir", tmp_path)
    assert code == 0, err
    rates = [json.loads(line)["train_lr"] for line in (tmp_path / "log.txt").read_text().splitlines()]
    peak = 5e-4 * 4 / 512
    assert max(rates) == rates[0] < peak and rates[-1] < 0.05 * peak


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["soft", "hard"])
def test_distillation(photos, trained, tmp_path, kind):
    student = ["--model", "resnet10t", "--epochs", "1", "--warmup_epochs", "0"]
    teacher = ["--distillation_type", kind, "--teacher_model", "biformer_nano", "--teacher_path", trained / "last.pth"]

    def loss(name, *arguments):
        train(photos, tmp_path / name, *student, *arguments)
        return json.loads((tmp_path / name / "log.txt").read_text())["train_loss"]

    alone = loss("alone")
    assert loss("ignored", *teacher, "--distillation_alpha", "0") == pytest.approx(alone)
    assert loss("taught", *teacher, "--distillation_tau", "2") != pytest.approx(alone, rel=1e-3)


@pytest.mark.slow
def test_fine_tuning_with_other_classes_and_size(photos, trained, tmp_path, capfd):
    code, out, _ = run(capfd, *SMALL, *SHORT, "--data_set", "digits", "--finetune", trained / "last.pth",
                       "--input_size", "32x64", "--batch_size", "512", "--lr", "1e-9", "--min_lr", "0",
                       "--warmup_lr", "0", "--output_dir", tmp_path, "--model_ema", "false")
    reason = ("was trained on 3 classes, the data has 10, without 'class0', 'class1', 'class2' and with '0', '1', '2', "
              "'3', '4' and 5 more added")
    message = f"{trained / 'last.pth'} {reason}: the classifier is re-initialised\n"
    assert code == 0 and message in out
    before, after = weights(trained / "last.pth"), weights(tmp_path / "last.pth")
    assert after["head.fc.weight"].shape == (10, 256)
    name = "stages.0.blocks.0.mlp.fc1.weight"
    torch.testing.assert_close(after[name], before[name], rtol=0, atol=1e-6)


@pytest.mark.slow
def test_every_option_of_the_recipe_at_once(photos, tmp_path):
    train(photos, tmp_path, "--layer_decay", "0.7", "--update_freq", "2", "--clip_grad", "1", "--opt", "lamb",
          "--batch_size", "2", "--amp", "bf16", "--grad_checkpointing", "--channels_last", "false", "--drop", "0.1",
          "--opt_betas", "0.9", "0.95", "--sched", "poly", "--model_kwargs", "num_regions=4", "--num_workers", "1",
          "--save_every", "2", "--skip_bad_images", "--seed", "3", "--train_interpolation", "random")
    checkpoint = torch.load(tmp_path / "last.pth", weights_only=True)
    groups = checkpoint["optimizer"]["param_groups"]
    assert checkpoint["args"]["model_kwargs"] == {"num_regions": 4}
    assert len({group["lr_scale"] for group in groups}) > 3
    assert all(tuple(group["betas"]) == (0.9, 0.95) for group in groups)
    assert [r["step"] for r in map(json.loads, (tmp_path / "log.txt").read_text().splitlines())] == [3, 6]


def test_disable_eval(photos, tmp_path, capfd):
    train(photos, tmp_path, "--disable_eval")
    assert "Acc@1" not in capfd.readouterr().out and not (tmp_path / "best.pth").exists()


@pytest.mark.slow
def test_models_without_stochastic_depth(photos, tmp_path, capfd):
    train(photos, tmp_path, "--model", "repvit_m0_9", "--epochs", "2")
    assert "repvit_m0_9 has no stochastic depth: drop path is left out" in capfd.readouterr().out


@pytest.mark.slow
def test_models_of_one_size_get_theirs(photos, tmp_path):
    train(photos, tmp_path, "--model", "vit_tiny_patch16_224", "--input_size", "48")
    assert weights(tmp_path / "last.pth")["pos_embed"].shape == (1, 10, 192)


@pytest.mark.slow
def test_shards_are_the_folder_again(photos, trained, tmp_path, capfd):
    """The recipe trains on shards; evaluation finds the same in a folder, in its shards, and in those of a server."""
    assert make_shards.main([str(photos), str(tmp_path / "shards"), "--size", "4"]) == 0
    shards = ["--data_set", "wds/photos", "--data_path"]
    train(photos, tmp_path / "run", *shards, tmp_path / "shards")
    with served(tmp_path / "shards") as url:
        cache = ["--shard_cache", tmp_path / "cache", "--shard_cache_gb", "1e-9"]
        results = []
        for data in (["--data_path", photos], [*shards, tmp_path / "shards"], [*shards, url, *cache]):
            capfd.readouterr()
            _, out, _ = run(capfd, *SMALL, *data, "--eval", "--resume", trained / "last.pth")
            results.append(RESULT.search(out).group())
    assert results == results[:1] * 3
    assert len(list((tmp_path / "cache").glob("*.shard"))) == 1, "a bound lets the last one stay"


def test_classes_of_shards_that_the_model_has_not(photos, tmp_path, capfd):
    """As in a folder where the list of shards says how many there are, and at the first of them where it does not."""
    assert make_shards.main([str(photos), str(tmp_path / "shards"), "--size", "4"]) == 0
    shards = ["--data_set", "wds/photos", "--data_path", tmp_path / "shards", "--output_dir", tmp_path / "run"]
    message = "2 classes were asked for, fewer than the 3 that the data holds; raise --nb_classes, or leave it out"
    refuses(capfd, 2, message, *shards, "--nb_classes", "2")
    info = json.loads((tmp_path / "shards" / "_info.json").read_text())
    del info["num_classes"], info["classes"]
    (tmp_path / "shards" / "_info.json").write_text(json.dumps(info))
    message = ".tar is of class 2, which must be below 2, the number of classes of the model"
    refuses(capfd, 1, message, *shards, *SHORT, "--nb_classes", "2")


def test_without_a_number_the_classes_of_shards_are_the_models(tmp_path):
    split = dict(num_samples=1, filenames=["0.tar"], shard_lengths=[1])
    (tmp_path / "_info.json").write_text(json.dumps(dict(splits=dict(val=split))))
    (tmp_path / "0.tar").touch()
    command = ["--data_set", "wds/tiny", "--data_path", str(tmp_path), "--model", "biformer_nano"]
    task = ClassificationTask(program.parse(command)[1], Distributed(torch.device("cpu")), Precision())
    dataset = task.dataset("val")
    assert dataset.num_classes is None and dataset.source.most_classes == task.network().num_classes == 10


def original_names(state_dict):
    """timm's ConvNeXt weights under the names of the original release."""
    renames = [(r"^stem\.", "downsample_layers.0."), (r"^stages\.(\d)\.downsample\.", r"downsample_layers.\1."),
               (r"^stages\.(\d)\.blocks\.", r"stages.\1."), ("conv_dw", "dwconv"), (r"mlp\.fc1", "pwconv1"),
               (r"mlp\.fc2", "pwconv2"), (r"head\.norm", "norm"), (r"head\.fc", "head")]
    out = {}
    for name, value in state_dict.items():
        for pattern, replacement in renames:
            name = re.sub(pattern, replacement, name)
        out[name] = value
    return out


@pytest.mark.slow
def test_original_convnext_checkpoint(photos, tmp_path, capfd):
    model = timm.create_model("convnext_tiny", num_classes=3)
    names = original_names(model.state_dict())
    assert "stages.0.0.pwconv1.weight" in names
    torch.save({"model": names}, tmp_path / "convnext.pth")
    arguments = ["--model", "convnext_tiny", "--eval", "true", "--input_size", "64", "--drop_path", "0.2",
                 "--num_workers", "0", "--device", "cpu", "--data_path", photos]
    code, out, _ = run(capfd, *arguments, "--resume", tmp_path / "convnext.pth")
    assert code == 0
    torch.save(model.state_dict(), tmp_path / "ours.pth")
    _, ours, _ = run(capfd, *arguments, "--resume", tmp_path / "ours.pth")
    assert RESULT.search(ours).group() == RESULT.search(out).group()


def test_published_weights_are_for_their_own_classes(photos, capfd):
    code, _, err = run(capfd, *SMALL, "--model", "biformer_small", "--data_path", photos, "--eval", "--load_release")
    assert code == 1 and err == (
        "error: the published weights of biformer_small have 1000 classes, the data has 3; fine-tune them first, or "
        "give their number with --nb_classes if the data's first classes are the same\n"
    )


# --- bad input ------------------------------------------------------------------------------------------------------


def refuses(capfd, code, message, *arguments):
    """One line on standard error, the exit code, no traceback."""
    actual, _, err = run(capfd, *SMALL, *arguments)
    assert message in err and actual == code
    assert len([line for line in err.splitlines() if "error:" in line]) == 1 and "Traceback" not in err


def test_wrong_command_lines(photos, capfd):
    refuses(capfd, 2, "unknown flag --modle; did you mean --model?", "--modle", "x")
    refuses(capfd, 2, "unknown model 'biformer_smal'; did you mean biformer_small", "--model", "biformer_smal",
            "--data_path", photos)
    refuses(capfd, 2, "--batch_size must be at least 1", "--batch_size", "0", "--data_path", photos)
    refuses(capfd, 2, "unknown optimizer 'adamww'; did you mean adamw", "--opt", "adamww", "--data_path", photos)
    refuses(capfd, 2, "; --aa takes timm's policies, or none\n", "--aa", "nonsense", "--data_path", photos)
    refuses(capfd, 2, "cannot be built", "--model_kwargs", "regions=3", "--data_path", photos)
    refuses(capfd, 2, "cannot be built", "--model_kwargs", "attn_impl=fused", "--data_path", photos)
    vit = ["--model", "vit_tiny_patch16_224", "--data_path", photos, "--model_kwargs"]
    for argument, reason in (("num_heads=5", "AssertionError('dim should be divisible by num_heads')"),
                             ("num_heads=0", "ZeroDivisionError("), ("act_layer=nonsense", "")):
        refuses(capfd, 2, f"vit_tiny_patch16_224 cannot be built: {reason}", *vit, argument)
    refuses(capfd, 2, "unknown weights 'biformer_nano.in22k'", "--model", "biformer_nano.in22k", "--data_path", photos)
    scaled = "; --lr is for 512 images and scaled with the batch size; percentages scale with it: --min_lr 1%\n"
    refuses(capfd, 2, "error: min_lr 1e-05 is above the learning rate of this batch size, 7.81e-09" + scaled,
            "--lr", "1e-6", "--min_lr", "1e-5", "--data_path", photos)
    small = ["--data_path", photos, *SHORT]
    refuses(capfd, 2, "error: warmup_lr 1 is above the learning rate of this batch size, 7.81e-05" + scaled,
            "--warmup_lr", "1", *small)
    refuses(capfd, 2, "the optimizer adan cannot be used with these arguments: ", "--opt", "adan", "--opt_betas",
            "0.9", "0.99", *small)
    refuses(capfd, 2, "; see --opt_eps, --opt_betas, --momentum and --layer_decay\n", "--opt", "adan",
            "--opt_betas", "0.9", "0.99", *small)
    refuses(capfd, 2, "the optimizer adahessian needs second derivatives, which no training here computes\n",
            "--opt", "adahessian", *small)
    refuses(capfd, 2, "convnext_atto cannot take images of 3 x 16 x 16", "--model", "convnext_atto",
            "--input_size", "16", *small)
    refuses(capfd, 2, "biformer_nano cannot take images of 3 x 32 x 32", "--model_kwargs", "in_chans=1", *small)
    refuses(capfd, 2, "2 classes were asked for, fewer than the 3 that the data holds; raise --nb_classes",
            "--nb_classes", "2", "--data_path", photos)
    refuses(capfd, 1, "published weights of resnet10t have 1000 classes, the data has 3; fine-tune the teacher, and "
            "give it with --teacher_path\n", "--data_path", photos, "--distillation_type", "soft", "--teacher_model",
            "resnet10t", *SHORT)
    refuses(capfd, 1, "device toaster cannot be used (", "--device", "toaster", "--data_path", photos)
    refuses(capfd, 1, "; --device auto takes what is there\n", "--device", "toaster", "--data_path", photos)
    refuses(capfd, 2, "--best_metric must be one of acc1, acc5, loss, ema_acc1, ema_acc5, ema_loss, got top1",
            "--best_metric", "top1", "--data_path", photos)
    refuses(capfd, 2, "unknown model 'resnet1t'; did you mean", "--distillation_type", "soft", "--teacher_model",
            "resnet1t", "--data_path", photos)


def test_wrong_tasks(photos, tmp_path, capfd):
    message = "error: unknown task 'clasification'; choose from classification, detection, segmentation\n"
    refuses(capfd, 2, message, "--task", "clasification")
    refuses(capfd, 2, "--task: expected one argument\n", "--task")
    recipe = tmp_path / "recipe.yaml"
    for value in ("segmentatoin", "3", "[a]"):
        recipe.write_text(f"task: {value}\n")
        refuses(capfd, 2, "error: unknown task ", "--config", recipe, "--data_path", photos)
    # The command line wins over the recipe, and null undoes it.
    for task in ("classification", "null"):
        refuses(capfd, 1, "does not exist", "--config", recipe, "--task", task, "--data_path", tmp_path / "nowhere")
    refuses(capfd, 1, "does not exist", "--config", "null", "--data_path", tmp_path / "nowhere")
    refuses(capfd, 2, "--config nowhere.yaml: No such file", "--config", "nowhere.yaml", "--data_path", photos)


def test_bad_data(photos, tmp_path, capfd):
    refuses(capfd, 1, "does not exist", "--data_path", tmp_path / "nowhere")
    refuses(capfd, 1, "has no folder train", "--data_path", tmp_path)
    (tmp_path / "train" / "a").mkdir(parents=True)
    refuses(capfd, 1, "needs class folders, with images in each", "--data_path", tmp_path)


def test_classes_of_val_that_are_not_train(photos, tmp_path, capfd):
    os.symlink(photos / "train", tmp_path / "train")
    (tmp_path / "val").mkdir()
    for name in ("class0", "class1", "other"):
        os.symlink(photos / "val" / "class0", tmp_path / "val" / name)
    refuses(capfd, 1, "lacks class2 and adds other", "--data_path", tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_an_image_that_cannot_be_read(photos, tmp_path, capfd, workers):
    for split in ("train", "val"):
        for i in range(3):
            (tmp_path / split / f"class{i}").mkdir(parents=True)
            for j, image in enumerate((photos / split / f"class{i}").iterdir()):
                (tmp_path / split / f"class{i}" / f"{j}.png").write_bytes(image.read_bytes())
    (tmp_path / "val" / "class1" / "0.png").write_bytes(b"")
    common = ["--data_path", tmp_path, *SHORT, "--epochs", "1", "--warmup_epochs", "0", "--num_workers", workers]
    refuses(capfd, 1, "val/class1/0.png: not an image; remove it, or pass --skip_bad_images\n", *common,
            "--output_dir", tmp_path / "out")
    assert (tmp_path / "out" / "last.pth").exists()  # the epoch before the evaluation is not lost
    code, out, _ = run(capfd, *SMALL, *common, "--skip_bad_images", "--output_dir", tmp_path / "skipping")
    assert code == 0 and "skipped 1 image that" in out and "on 6 val images" in out


def test_bad_checkpoints(photos, trained, tmp_path, capfd):
    (tmp_path / "cut.pth").write_bytes((trained / "last.pth").read_bytes()[:5000])
    (tmp_path / "page.pth").write_text("<html>")
    torch.save(timm.create_model("resnet10t", num_classes=3).state_dict(), tmp_path / "resnet.pth")
    refuses(capfd, 1, "does not fit convnext_atto", "--model", "convnext_atto", "--data_path", photos, "--eval",
            "--resume", tmp_path / "resnet.pth")
    common = ["--data_path", photos, "--eval", "--resume"]
    refuses(capfd, 1, "truncated", *common, tmp_path / "cut.pth")
    refuses(capfd, 1, "not a PyTorch checkpoint", *common, tmp_path / "page.pth")
    refuses(capfd, 1, "no such checkpoint file", *common, tmp_path / "none.pth")
    refuses(capfd, 1, "does not fit biformer_nano with 3 classes: stem.conv1.weight is missing; stem", *common,
            tmp_path / "resnet.pth")
    common = ["--data_path", photos, *SHORT, "--output_dir", tmp_path / "out", "--resume"]
    torch.save(weights(trained / "last.pth"), tmp_path / "bare.pth")
    refuses(capfd, 1, "holds only weights, no run to resume; fine-tune from it with --finetune\n", *common,
            tmp_path / "bare.pth")
    refuses(capfd, 1, "was trained with the optimizer adamw, not sgd; --opt, --weight_decay, --decay_groups, "
            "--layer_decay and --freeze_backbone must be as in that run\n", *common, trained / "last.pth", "--opt",
            "sgd")
    refuses(capfd, 1, "weight decay or layer decay differs; --opt, --weight_decay, --decay_groups", *common,
            trained / "last.pth", "--layer_decay", "0.9")
    assert not CheckpointStore(tmp_path / "out").holds_run()


@pytest.mark.parametrize("bad", ["nan", "inf"])
def test_weights_that_are_not_finite_are_not_evaluated(photos, trained, tmp_path, capfd, bad):
    checkpoint = weights(trained / "last.pth", "model_ema")
    checkpoint["head.fc.bias"][0] = float(bad)
    torch.save(checkpoint, tmp_path / "bad.pth")
    message = f"error: {tmp_path / 'bad.pth'}: weights are NaN or infinite, head.fc.bias first\n"
    refuses(capfd, 1, message, "--data_path", photos, "--eval", "--resume", tmp_path / "bad.pth")


def test_outputs_that_are_not_finite(photos, trained, tmp_path, capfd, monkeypatch):
    """No number of an evaluation is printed; one within training is said, is no best, and ends no run."""
    checkpoint = dict(model=weights(trained / "last.pth"))
    checkpoint["model"]["head.fc.weight"].fill_(3e38)
    torch.save(checkpoint, tmp_path / "large.pth")
    code, out, err = run(capfd, *SMALL, "--data_path", photos, "--eval", "--resume", tmp_path / "large.pth")
    assert code == 1 and "Acc@1" not in out and err == (
        "error: the outputs of the network are NaN or infinite: so is the loss; see whether --amp off has finite ones\n"
    )
    update = Accuracy.update
    monkeypatch.setattr(Accuracy, "update", lambda self, model, batch: update(self, lambda x: model(x) * nan, batch))
    train(photos, tmp_path / "run", "--epochs", "2")
    warning = "warning: the outputs of the network are NaN or infinite: so is the loss\n"
    assert capfd.readouterr().out.count(warning) == 2
    assert not (tmp_path / "run" / "best.pth").exists() and weights(tmp_path / "run" / "last.pth", "epoch") == 1


def test_weights_under_other_keys(photos, trained, tmp_path, capfd):
    """Under any key that is named, in the names of any framework, in a plain number of NumPy's company."""
    checkpoint = {"net": weights(trained / "last.pth"), "epoch": 3, "best_acc": np.float64(1)}
    torch.save(checkpoint, tmp_path / "net.pth")
    common = ["--data_path", photos, "--eval", "--resume", tmp_path / "net.pth"]
    refuses(capfd, 1, "the checkpoint holds weights under net; say which; --model_key takes one of them\n", *common)
    code, out, _ = run(capfd, *SMALL, *common, "--model_key", "net")
    assert code == 0
    prefixed = {f"model.{name}": value for name, value in checkpoint["net"].items()}
    torch.save({"state_dict": prefixed}, tmp_path / "net.pth")
    assert RESULT.search(run(capfd, *SMALL, *common)[1]).group() == RESULT.search(out).group()


def test_saved_weights_are_contiguous(trained, tmp_path):
    """As safetensors asks for; here convolutions lie channels last."""
    for key in ("model", "model_ema"):
        save_file(weights(trained / "best.pth", key), tmp_path / "w.safetensors")
        network, _ = models.load(tmp_path / "w.safetensors", model="biformer_nano")
        assert all(value.equal(weights(trained / "best.pth", key)[n]) for n, value in network.state_dict().items())


def test_another_run_is_not_overwritten(photos, trained, capfd):
    before = (trained / "last.pth").read_bytes()
    refuses(capfd, 1, "already holds a run; resume it with --auto_resume, or take another --output_dir\n", *SHORT,
            "--data_path", photos, "--output_dir", trained)
    assert (trained / "last.pth").read_bytes() == before


def test_a_loss_that_is_not_finite(photos, trained, tmp_path, capfd):
    checkpoint = torch.load(trained / "last.pth", weights_only=True)
    checkpoint["model"]["head.fc.bias"][0] = float("inf")
    checkpoint.update(epoch=2, step=0, meter={})
    torch.save(checkpoint, tmp_path / "checkpoint-00000006.pth")
    run_again = ["--data_path", photos, *SHORT, "--epochs", "3", "--output_dir", tmp_path, "--auto_resume"]
    refuses(capfd, 3, "the loss became nan in epoch 2 at step 6, learning rate", *run_again, "--save_every_steps", "1")
    refuses(capfd, 3, f"; the last checkpoint is {tmp_path / 'checkpoint-00000006.pth'}; try a lower --lr, longer "
            "--warmup_epochs, --clip_grad 5 or --amp off\n", *run_again, "--save_every_steps", "1")
    assert [p.name for p in tmp_path.glob("checkpoint-*")] == ["checkpoint-00000006.pth"]


def test_a_batch_larger_than_the_training_set(photos, capfd):
    refuses(capfd, 1, "has 13 images, fewer than one batch of 64", "--data_path", photos, "--batch_size", "64")
    refuses(capfd, 1, "error: an optimizer step of 9 batches is more than the 3 of an epoch; lower --update_freq or "
            "--batch_size\n", "--data_path", photos, "--update_freq", "9")


@pytest.mark.parametrize("model", ["biformer_nano", "levit_conv_128s"])
def test_batch_norm_of_a_single_value(model, photos, tmp_path, capfd):
    """Training alone refuses it: a line before anything is written. With two images there are two values."""
    arguments = ["--data_path", photos, "--mixup", "0", "--cutmix", "0", "--epochs", "1", "--warmup_epochs", "0",
                 "--model", model, "--output_dir", tmp_path / "run", "--lr", "1e-2"]
    refuses(capfd, 2, f"error: {model} cannot be trained on images of 3 x 32 x 32, one at a time: Expected more than 1",
            *arguments, "--batch_size", "1")
    refuses(capfd, 2, "; give --batch_size 2 or more\n", *arguments, "--batch_size", "1")
    assert not (tmp_path / "run").exists()
    assert run(capfd, *SMALL, *arguments, "--batch_size", "2")[0] == 0


@pytest.mark.slow
def test_exit_code_reaches_the_shell():
    done = subprocess.run([sys.executable, "main.py", "--epochs", "0"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr == "error: --epochs must be at least 1, got 0\n"


def test_help(capsys):
    with pytest.raises(SystemExit) as end:
        program.main(["--help"])
    out = capsys.readouterr().out
    assert end.value.code == 0
    for text in ("usage: main.py [--config YAML] [--FLAG VALUE ...]", "--task TASK", "Token labels:", "--max_steps",
                 "images for each GPU and forward pass (default: 128)"):
        assert text in out


def test_a_key_that_interrupts_before_the_run(monkeypatch, capfd):
    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(program, "run_task", interrupted)
    assert run(capfd, *SMALL, "--data_set", "digits") == (130, "", "error: interrupted\n")


@pytest.mark.parametrize("error", [ValueError("a bug"), RuntimeError("a bug"), OSError(2, "a bug")])
def test_bugs_keep_their_traceback(error, monkeypatch):
    def raising(*arguments):
        raise error

    monkeypatch.setattr(program, "run_task", raising)
    with pytest.raises(type(error), match="a bug"):
        program.main([*SMALL, "--data_set", "digits"])


@pytest.mark.parametrize("error,line", [
    (torch.OutOfMemoryError("CUDA out of memory.\nSee the manual"),
     "out of memory (CUDA out of memory.); lower --batch_size and raise "),
    (MemoryError("no room"), "out of memory (no room); give fewer --num_workers"),
])
def test_a_fault_of_the_machine_is_told_in_one_line(monkeypatch, capfd, error, line):
    def raising(*arguments):
        raise error

    monkeypatch.setattr(program, "run_task", raising)
    code, _, err = run(capfd, *SMALL, "--data_set", "digits")
    assert code == 1 and err.startswith(f"error: {line}")
    assert len(err.splitlines()) == 1
