"""What was not given is taken from the run that is evaluated or resumed, and said; what differs is a warning."""
import os
import re
import shutil
from pathlib import Path

import pytest
import timm
import torch
import yaml

import main as program
from helpers.run_state import differences
from helpers.web import served
from training import flags, options
from utils import UserError

DEVICE = ["--num_workers", "0", "--device", "cpu"]
NETWORK = ["--model", "biformer_nano", "--input_size", "48", "--model_kwargs", "num_regions=2", "topk=(1,1,1)"]
RUN = [*DEVICE, *NETWORK, "--batch_size", "4", "--epochs", "1", "--warmup_epochs", "0", "--lr", "1e-2",
       "--crop_pct", "0.9"]
RESULT = re.compile(r"\* Acc@1 .*")


def run(capfd, *arguments):
    """Exit code, standard output, standard error of a command line."""
    capfd.readouterr()
    code = program.main([str(argument) for argument in arguments])
    return code, *capfd.readouterr()


def settings_of(*arguments):
    return program.parse([str(argument) for argument in arguments])[1]


def checkpoint_of(path, *arguments, **others):
    """A checkpoint that knows what was asked for, and no weights."""
    torch.save(dict(model={}, args=flags.as_recipe(settings_of("--data_path", "photos", *arguments)) | others), path)
    return path


def notes_of(*arguments):
    return program.understand([str(argument) for argument in arguments]).notes


@pytest.fixture(scope="module")
def trained(photos, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    assert program.main([*RUN, "--data_path", str(photos), "--output_dir", str(folder)]) == 0
    return folder


# --- evaluation -------------------------------------------------------------------------------------------------------


def test_evaluation_takes_network_and_data_from_the_checkpoint(photos, trained, capfd):
    """As in training with --input_size 96 and --model_kwargs, and evaluating without them."""
    last = trained / "last.pth"
    code, out, _ = run(capfd, *DEVICE, *NETWORK, "--crop_pct", "0.9", "--data_path", photos, "--eval", "--resume", last)
    assert code == 0 and "from " not in out and "warning" not in out
    code, bare, err = run(capfd, *DEVICE, "--eval", "--resume", last)
    assert code == 0, err
    assert RESULT.search(bare).group() == RESULT.search(out).group()
    taken = next(line for line in bare.splitlines() if line.startswith(f"from {last}: "))
    for said in ("model=biformer_nano", "model_kwargs={'num_regions': 2, 'topk': [1, 1, 1]}", "input_size=48",
                 "crop_pct=0.9", f"data_path={photos}"):
        assert said in taken
    assert "lr=" not in taken and "output_dir" not in taken and "warning" not in bare


def test_evaluation_by_other_settings_is_a_warning(trained, capfd):
    code, out, _ = run(capfd, *DEVICE, "--eval", "--resume", trained / "last.pth", "--input_size", "64")
    assert code == 0
    assert f"warning: {trained / 'last.pth'} has input_size=48, not 64 as asked for\n" in out
    assert "input_size" not in next(line for line in out.splitlines() if line.startswith("from "))


def test_a_recipe_is_given_too(trained, tmp_path):
    (tmp_path / "recipe.yaml").write_text("input_size: 64\nmodel_kwargs: null\n")
    settings = settings_of("--config", tmp_path / "recipe.yaml", "--eval", "--resume", trained / "last.pth")
    assert settings.model.input_size == 64 and settings.model.model == "biformer_nano"
    settings = settings_of("--model_kwargs=null", "--eval", "--resume", trained / "last.pth")
    assert settings.model.model_kwargs == {} and settings.model.input_size == 48


def test_checkpoints_of_others_change_nothing(photos, tmp_path):
    weights = timm.create_model("biformer_nano", num_classes=3).state_dict()
    paths = [tmp_path / name for name in ("bare.pth", "foreign.pth", "old.pth", "page.pth", "nowhere.pth")]
    torch.save(weights, paths[0])
    torch.save(dict(model=weights, args=dict(model="resnet50", lr=3.0, epochs="many")), paths[1])
    torch.save(weights, paths[2], _use_new_zipfile_serialization=False)
    paths[3].write_text("<html>")
    for path in paths:
        given = ["--model", "biformer_nano", "--data_path", photos, "--eval", "--resume", path]
        assert settings_of(*given) == settings_of(*given, "--config", "null")
        assert settings_of(*given).model.input_size == 224
    assert settings_of(*given).model.model == "biformer_nano"


def test_a_checkpoint_from_a_url_is_downloaded_once(trained, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with served(trained) as url:
        code, out, err = run(capfd, *DEVICE, "--eval", "--resume", f"{url}/best.pth")
    assert code == 0 and err.count("downloading") == 1
    assert f"from {url}/best.pth: " in out and "model=biformer_nano" in out


def test_a_file_that_is_not_there_is_what_is_said(capfd):
    """And not that it did not say where its data are."""
    code, _, err = run(capfd, *DEVICE, "--eval", "--resume", "nowhere.pth")
    assert code == 1 and err == "error: nowhere.pth: no such checkpoint file\n"


def test_keys_of_older_checkpoints_are_dropped(trained, tmp_path):
    checkpoint = torch.load(trained / "last.pth", weights_only=True)
    checkpoint["args"].update(input_size="32x48", dropped_long_ago=3)
    torch.save(checkpoint, tmp_path / "old.pth")
    assert settings_of("--eval", "--resume", tmp_path / "old.pth").model.input_size == (32, 48)
    with pytest.raises(ValueError, match="unknown flag --dropped_long_ago"):
        settings_of("--eval", "--resume", tmp_path / "old.pth", "--dropped_long_ago", "3")


def test_what_was_taken_is_named_where_it_is_at_fault(trained, tmp_path):
    checkpoint = torch.load(trained / "last.pth", weights_only=True)
    checkpoint["args"].update(warmup_epochs=3, epochs=9)
    torch.save(checkpoint, tmp_path / "long.pth")
    message = r"--warmup_epochs 3 must be less than --epochs 2; .*; from .*: .*warmup_epochs=3"
    with pytest.raises(ValueError, match=message):
        settings_of("--resume", tmp_path / "long.pth", "--epochs", "2")
    settings = settings_of("--resume", tmp_path / "long.pth", "--epochs", "2", "--warmup_epochs", "1")
    assert (settings.schedule.epochs, settings.schedule.warmup_epochs) == (2, 1)


def test_parts_of_what_is_another_are_not_taken(trained, tmp_path):
    """Arguments of another model, the folder of another data set, epochs of another schedule."""
    checkpoint = torch.load(trained / "last.pth", weights_only=True)
    checkpoint["args"].update(sched="step", decay_epochs=[3])
    torch.save(checkpoint, tmp_path / "step.pth")
    given = ["--resume", tmp_path / "step.pth", "--sched", "cosine", "--model", "resnet10t", "--data_set", "digits"]
    settings = settings_of(*given)
    assert settings.schedule.decay_epochs is None and settings.model.model_kwargs == {}
    assert settings.data.data_path is None and settings.model.input_size == 48
    settings = settings_of(*given[:2], "--sched", "step", "--model", "biformer_nano", "--data_set", "IMNET")
    assert settings.schedule.decay_epochs == [3] and settings.model.model_kwargs["num_regions"] == 2
    assert settings.data.data_path is not None


def test_weights_of_another_model_say_whose_they_are(photos, trained, capfd):
    other = ["--model", "convnext_atto", "--model_kwargs", "null", "--data_path", photos]
    of = "num_regions=2, topk=\\[1, 1, 1\\]"
    owner = f"and .* more; this is biformer_nano's with 3 classes, {of}; --model must name the model of the weights\n"
    for way in (["--eval", "--resume"], ["--epochs", "1", "--warmup_epochs", "0", "--finetune"]):
        code, _, err = run(capfd, *DEVICE, *other, *way, trained / "last.pth", "--batch_size", "2", "--lr", "1e-2")
        assert code == 1 and re.search(owner, err), err


def test_weights_to_evaluate_know_the_run_by_either_name(tmp_path):
    """--finetune starts a run of its own only where one is trained."""
    path = checkpoint_of(tmp_path / "c.pth", *NETWORK)
    assert settings_of("--eval", "--finetune", path).model == settings_of("--eval", "--resume", path).model
    assert settings_of("--eval", "--finetune", path).model.input_size == 48
    assert notes_of("--eval", "--finetune", path)[0].startswith(f"from {path}: model=biformer_nano")


def test_the_split_of_a_run_is_of_its_own_images(tmp_path):
    """Another folder, or one that has a val split by now, is evaluated as it is; a run that resumes holds out the same.
    """
    (tmp_path / "photos").mkdir()
    path = checkpoint_of(tmp_path / "c.pth", "--data_path", tmp_path / "photos", "--val_split", "0.1")
    given = ["--eval", "--resume", path]
    assert settings_of(*given).data.val_split == 0.1
    assert settings_of(*given, "--data_path", tmp_path / "." / "photos/").data.val_split == 0.1
    assert settings_of(*given, "--data_path", tmp_path / "others").data.val_split is None
    assert settings_of(*given, "--data_set", "digits").data.val_split is None
    assert settings_of("--resume", path, "--data_path", tmp_path / "moved").data.val_split == 0.1
    (tmp_path / "photos" / "val").mkdir()
    for more in ([], ["--split", "test"]):
        assert settings_of(*given, *more).data.val_split is None
    assert settings_of(*given, "--val_split", "0.1").data.val_split == 0.1
    assert settings_of("--resume", path).data.val_split == 0.1


def test_size_and_crop_of_validation_are_not_the_runs(tmp_path):
    """Under --use_test_size; another size beside it is refused, but not that of a recipe for training."""
    path = checkpoint_of(tmp_path / "c.pth", "--model", "resnet18.a1_in1k", "--crop_pct", "0.9", "--input_size", "96")
    given = ["--eval", "--resume", path, "--use_test_size"]
    settings = settings_of(*given)
    assert (settings.augmentation.crop_pct, settings.model.input_size) == (None, 224)
    assert "crop_pct" not in notes_of(*given)[0] and "input_size" not in notes_of(*given)[0]
    assert settings_of(*given, "--crop_pct", "0.5").augmentation.crop_pct == 0.5
    with pytest.raises(ValueError, match=r"^--use_test_size and --input_size are mutually exclusive$"):
        settings_of(*given, "--input_size", "96")
    (tmp_path / "recipe.yaml").write_text("input_size: 96\n")
    assert settings_of(*given, "--config", tmp_path / "recipe.yaml").augmentation.use_test_size


# --- resuming ---------------------------------------------------------------------------------------------------------


def test_a_resumed_run_has_the_settings_of_the_run(photos, tmp_path, capfd):
    """All that decides its result, but not where and how it runs; and it ends as one that never stopped."""
    arguments = [*RUN, "--data_path", photos, "--epochs", "2", "--mixup", "0.3", "--seed", "7"]
    assert run(capfd, *arguments, "--output_dir", tmp_path / "whole")[0] == 0
    half, whole = sorted((tmp_path / "whole").glob("checkpoint-*.pth"))
    shutil.copytree(tmp_path / "whole", tmp_path / "auto", symlinks=True)
    (tmp_path / "auto" / whole.name).unlink()
    for source, *way in (
        (half, "--resume", half, "--output_dir", tmp_path / "named"),
        (tmp_path / "auto" / "args.yaml", "--auto_resume", "--output_dir", tmp_path / "auto"),
    ):
        code, out, err = run(capfd, *DEVICE, *way)
        assert code == 0, err
        taken = next(line for line in out.splitlines() if line.startswith(f"from {source}: "))
        assert "mixup=0.3" in taken and "seed=7" in taken and "device" not in taken and "as asked for" not in out
        assert "epoch 1, step 0 of 3" in out or "epoch 0, step 3 of 3" in out
        assert [line for line in differences(way[-1], tmp_path / "whole") if not line.startswith("log.txt")] == []
    recipe = yaml.safe_load((tmp_path / "named" / "args.yaml").read_text())
    assert recipe["output_dir"] == str(tmp_path / "named") and recipe["resume"] == str(half)


def test_resuming_by_other_settings_is_a_warning(photos, trained, tmp_path, capfd):
    code, out, _ = run(capfd, *DEVICE, "--resume", trained / "last.pth", "--output_dir", tmp_path, "--epochs", "2",
                       "--log_every", "1", "--data_path", photos.parent / photos.name)
    assert code == 0 and f"warning: {trained / 'last.pth'} has epochs=1, not 2 as asked for\n" in out


@pytest.mark.parametrize("run_had,given,said", [
    ([], ["--clip_grad", "5"], "clip_grad=None, not 5.0"),
    (["--clip_grad", "5"], ["--clip_grad", "null"], "clip_grad=5.0, not None"),
    (["--epochs", "90"], ["--max_steps", "50"], "epochs=90, not max_steps=50"),
    (["--max_steps", "7"], ["--epochs", "3"], "max_steps=7, not epochs=3"),
    ([], ["--warmup_epochs", "1"], "warmup_epochs=None, not 1"),
    ([], ["--sched", "step", "--decay_epochs", "3"], "sched=cosine, not step; decay_epochs=None, not [3]"),
    (["--model_kwargs", "topk=(1,)"], ["--model_kwargs", "topk=(2,)"],
     "model_kwargs={'topk': [1]}, not {'topk': [2]}"),
    (["--lr", "0.1", "--save_every", "3"], ["--lr", "1e-1", "--save_every", "2", "--epochs", "300"], None),
])
def test_whatever_differs_is_a_warning(tmp_path, run_had, given, said):
    """Values that one of the two has not, and those of an alternative, too."""
    path = checkpoint_of(tmp_path / "c.pth", *run_had)
    warnings = [line for line in notes_of("--resume", path, *given) if line.startswith("warning")]
    assert warnings == ([f"warning: {path} has {said} as asked for"] if said else [])


@pytest.mark.parametrize("run_had,given", [
    (["--distillation_type", "soft", "--teacher_model", "biformer_tiny", "--teacher_path", "t.pth",
      "--distillation_tau", "2"], ["--distillation_type", "none"]),
    (["--token_label", "maps", "--token_label_weight", "1"], ["--token_label", "null"]),
])
def test_what_is_turned_off_leaves_nothing_of_itself(tmp_path, run_had, given):
    resumed = settings_of("--resume", checkpoint_of(tmp_path / "c.pth", *run_had), *given)
    without = settings_of("--data_path", "photos")
    assert (resumed.distillation, resumed.token_label) == (without.distillation, without.token_label)


def test_a_linear_probe_resumes_by_its_folder_alone(tmp_path, monkeypatch):
    """Which weights it started from is taken only where it has no checkpoint yet: then it starts from them again."""
    probe = settings_of("--data_path", "photos", "--freeze_backbone", "--finetune", "w.pth", "--output_dir", tmp_path)
    options.save(flags.as_recipe(probe), tmp_path / "args.yaml")
    bare = ["--auto_resume", "--output_dir", tmp_path]
    assert settings_of(*bare).checkpoint.finetune == "w.pth"
    (tmp_path / "checkpoint-00000003.pth").touch()
    restarted = ["--output_dir", tmp_path]
    for again in (bare, restarted):
        settings = settings_of(*again)
        assert settings.checkpoint.finetune is None and settings.model.freeze_backbone
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    with pytest.raises(ValueError, match="--freeze_backbone needs weights to freeze"):
        settings_of("--data_path", "photos", "--freeze_backbone", "--auto_resume", "--output_dir", tmp_path / "new")


@pytest.mark.parametrize("start", [["--load_release"], ["--finetune", "w.pth"], ["--resume", "w.pth"]])
def test_a_run_without_a_checkpoint_yet_starts_again_from_its_weights(tmp_path, start):
    first = settings_of("--data_path", "photos", *start, "--output_dir", tmp_path)
    options.save(flags.as_recipe(first), tmp_path / "args.yaml")
    again = settings_of("--auto_resume", "--output_dir", tmp_path)
    assert again.model.load_release == first.model.load_release
    assert (again.checkpoint.finetune, again.checkpoint.resume) == (first.checkpoint.finetune, first.checkpoint.resume)


def test_fine_tuning_takes_nothing(photos, trained):
    given = ["--data_path", photos, "--finetune", trained / "last.pth"]
    assert settings_of(*given).model.model == "biformer_small"


@pytest.mark.parametrize("make", [
    Path.mkdir, os.mkfifo, Path.touch, lambda path: path.symlink_to("/dev/zero"), lambda path: path.symlink_to("gone"),
    lambda path: path.symlink_to(path.name), lambda path: path.write_text("{}"), lambda path: path.write_text("[]"),
    lambda path: path.write_text("lr: 3"), lambda path: path.write_text("task: classification\nlr"),
    lambda path: path.write_bytes(b"\x97\x00"),
], ids=["folder", "pipe", "empty", "device", "dangling", "circle", "nothing", "list", "other", "half", "binary"])
def test_what_lies_in_the_place_of_a_runs_recipe_is_not_passed_over(tmp_path, make):
    """The run would resume with the defaults."""
    make(tmp_path / "args.yaml")
    with pytest.raises(UserError, match=f"^{tmp_path}/args.yaml is no recipe of a run; "):
        settings_of("--data_path", "photos", "--auto_resume", "--output_dir", tmp_path)


def test_a_run_whose_recipe_is_gone_resumes_by_its_newest_checkpoint(tmp_path):
    for step, lr in ((3, "0.1"), (6, "0.2")):
        checkpoint_of(tmp_path / f"checkpoint-{step:08d}.pth", "--lr", lr)
    assert settings_of("--auto_resume", "--output_dir", tmp_path).optimizer.lr == 0.2


def test_a_first_start_with_auto_resume_takes_nothing(photos, tmp_path):
    given = ["--data_path", photos, "--auto_resume", "--output_dir", tmp_path]
    assert settings_of(*given).optimizer.lr == 5e-4


def test_an_output_folder_that_holds_no_run_to_resume_is_named(tmp_path):
    """A mistyped one was asked for its --data_path."""
    with pytest.raises(ValueError, match=f"^--data_path is missing.*; {tmp_path}/typo holds no run to resume$"):
        settings_of("--auto_resume", "--output_dir", tmp_path / "typo")


def test_a_restart_by_torchrun_takes_what_the_run_had(photos, trained, monkeypatch):
    assert settings_of("--data_path", photos, "--output_dir", trained).optimizer.lr == 5e-4
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert settings_of("--output_dir", trained).optimizer.lr == 1e-2


@pytest.mark.parametrize("run_has,given,expected", [
    (dict(max_steps=7), ["--epochs", "3"], dict(epochs=3, max_steps=None)),
    (dict(max_steps=None, epochs=9), ["--max_steps", "30"], dict(max_steps=30)),
    (dict(warmup_steps=3, epochs=9), ["--warmup_epochs", "2"], dict(warmup_epochs=2, warmup_steps=None)),
    (dict(warmup_epochs=3, epochs=9), ["--warmup_steps", "2"], dict(warmup_steps=2)),
    (dict(sched="step", decay_epochs=[3], epochs=9), ["--decay_steps", "2"], dict(decay_steps=[2], decay_epochs=None)),
])
@pytest.mark.parametrize("level", ["checkpoint", "config"])
def test_of_two_alternatives_the_one_that_was_given_counts(trained, tmp_path, run_has, given, expected, level):
    checkpoint = torch.load(trained / "last.pth", weights_only=True)
    checkpoint["args"].update(run_has)
    torch.save(checkpoint, tmp_path / "c.pth")
    (tmp_path / "args.yaml").write_text(yaml.safe_dump(dict(checkpoint["args"], output_dir=None, model_kwargs={})))
    source = ["--resume", tmp_path / "c.pth"] if level == "checkpoint" else ["--config", tmp_path / "args.yaml"]
    schedule = settings_of(*source, *given).schedule
    assert {name: getattr(schedule, name) for name in expected} == expected


def test_a_recipe_comes_from_a_pipe(tmp_path):
    """Which can be read once: `--config <(...)`."""
    reading, writing = os.pipe()
    os.write(writing, b"lr: 3e-3\nmodel: biformer_nano\nval_split: 0.2\n")
    os.close(writing)
    settings = settings_of("--config", f"/dev/fd/{reading}", "--data_path", "photos", "--lr", "2e-3")
    os.close(reading)
    assert (settings.model.model, settings.data.val_split, settings.optimizer.lr) == ("biformer_nano", 0.2, 2e-3)


# --- flags without an effect ------------------------------------------------------------------------------------------

DISTIL = ["--distillation_type", "hard", "--teacher_model", "biformer_nano"]
IDLE = [
    (["--distillation_alpha", "0.7"], "--distillation_alpha has no effect without --distillation_type", DISTIL),
    ([*DISTIL, "--distillation_tau", "2"], "--distillation_tau has no effect without --distillation_type soft",
     ["--distillation_type", "soft"]),
    (["--mixup", "0", "--cutmix", "0", "--mixup_prob", "0.5"],
     "--mixup_prob has no effect without --mixup or --cutmix", ["--cutmix", "1"]),
    (["--mixup", "0", "--mixup_switch_prob", "0.5"],
     "--mixup_switch_prob has no effect without both --mixup and --cutmix", ["--mixup", "1"]),
    (["--reprob", "0", "--remode", "const"], "--remode has no effect without --reprob", ["--reprob", "0.1"]),
    (["--color_jitter", "0.2"], "--color_jitter has no effect without --aa none", ["--aa", "none"]),
    (["--project", "mine"], "--project has no effect without --enable_wandb", None),
    (["--poly_power", "2"], "--poly_power has no effect without --sched poly", ["--sched", "poly"]),
    (["--decay_rate", "0.5"], "--decay_rate has no effect without --sched step",
     ["--sched", "step", "--decay_epochs", "3"]),
    (["--min_lr", "2%", "--sched", "step", "--decay_epochs", "3"], "--min_lr has no effect with --sched step", None),
    (["--warmup_epochs", "0", "--warmup_lr", "1%"], "--warmup_lr has no effect without a warm-up",
     ["--warmup_epochs", "1"]),
    (["--model_ema", "false", "--model_ema_decay", "0.9"], "--model_ema_decay has no effect without --model_ema",
     ["--model_ema"]),
    (["--disable_eval", "--best_metric", "loss"], "--best_metric has no effect with --disable_eval",
     ["--disable_eval", "false"]),
    (["--model_key", "model_ema"], "--model_key has no effect without --finetune or --eval", ["--finetune", "w.pth"]),
    (["--download"], "--download has no effect without --data_set CIFAR10 or CIFAR100", ["--data_set", "CIFAR10"]),
    (["--shard_cache", "x"], "--shard_cache has no effect without shards from a URL",
     ["--data_set", "wds/a", "--data_path", "https://a.b/c"]),
    (["--freeze_backbone", "--load_release", "--drop_path", "0.1"],
     "--drop_path has no effect with --freeze_backbone", ["--freeze_backbone", "false"]),
    (["--eval", "--load_release", "--show_batch", "x.png"], "--show_batch has no effect with --eval",
     ["--eval", "false"]),
]


@pytest.mark.parametrize("tokens,warning,remedy", IDLE)
def test_a_flag_that_can_have_no_effect_is_a_warning(tokens, warning, remedy):
    assert notes_of("--data_path", "photos", *tokens) == [f"warning: {warning}"]
    if remedy is not None:
        assert notes_of("--data_path", "photos", *tokens, *remedy) == []


def test_a_recipe_holds_all_flags_and_needs_no_warning(tmp_path):
    """That of a run, whose values of these flags are defaults; and a flag that is turned off has no effect rightly."""
    off = ["--mixup", "0", "--cutmix", "0", "--reprob", "0", "--model_ema", "false", "--disable_eval"]
    options.save(flags.as_recipe(settings_of("--data_path", "photos", *off)), tmp_path / "args.yaml")
    assert notes_of("--config", tmp_path / "args.yaml") == []
    assert notes_of("--data_path", "photos", "--download", "false", "--best_metric", "null", "--disable_eval") == []
