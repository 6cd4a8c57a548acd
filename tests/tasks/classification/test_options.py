import re
from dataclasses import fields

import pytest
import timm
import yaml
from timm.optim import list_optimizers

import main as program
import models  # noqa: F401
from helpers import ROOT
from optim_factory import scaled_lr
from tasks.classification.options import ClassificationSettings
from tasks.options import PUBLISHED_NAMES
from training import flags, options, parsing
from utils import UsageError, nearest

RECIPES = ROOT / "configs" / "train"
REQUIRED = ["--data_path", "data"]


def parse(*tokens):
    task_class, settings = program.parse([*REQUIRED, *tokens])
    assert isinstance(settings, ClassificationSettings) and task_class.settings_class is ClassificationSettings
    return settings


@pytest.mark.parametrize(
    "command",
    [
        "--model convnext_base --eval true --resume URL --input_size 224 --drop_path 0.2 --data_path /in1k",
        "--data_path ./in1k --input_size 224 --batch_size 128 --dist_eval --eval --load_release --model biformer_small",
        "--model biformer_small --drop_path 0.15 --lr 5e-4 --batch-size 256 --data-path ./data/in1k --output_dir out",
        "--local-rank=3 --config configs/train/biformer_small.yaml --data_path ./data/in1k",
        "--config configs/train/biformer_small_token_label.yaml --data_path /in1k --token_label /maps --output_dir out",
        "--config configs/train/debiformer_small.yaml --data_path d --token_label m --mixup 0 "
        "--train_interpolation random",
    ],
)
def test_documented_commands(command, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert program.parse(command.split())[1].data.data_path


def test_every_flag_in_both_forms():
    for name in parsing.Parser(ClassificationSettings).names():
        assert parsing._underscored(f"--{name.replace('_', '-')}=x-y") == f"--{name}=x-y"


@pytest.mark.parametrize("published,ours", [
    ("BViT-5", "bvit_5m"), ("BViT-22", "bvit_22m"), ("ViTAE_basic_13M", "vitae_13m"), ("ViTAE_basic_Huge", "vitae_h"),
])
def test_published_names_of_models(published, ours, tmp_path):
    assert parse("--arch", published).name == parse(f"--model={published}").name == ours
    recipe = tmp_path / "r.yaml"
    recipe.write_text(f"model: {published}\n")
    assert parse("--config", str(recipe)).name == ours
    assert parse("--config", str(recipe), "--arch", "biformer_tiny").name == "biformer_tiny"
    assert set(PUBLISHED_NAMES.values()) <= set(timm.list_models())


PATHS = ("data_path", "output_dir", "resume", "finetune", "shard_cache", "token_label", "teacher_path", "report",
         "show_batch")


def test_every_path_begins_at_home(monkeypatch, tmp_path):
    """In a recipe too, where no shell has expanded it."""
    monkeypatch.setenv("HOME", "/home/me")
    paths = {f.name for g in flags.group_classes(ClassificationSettings).values() for f in fields(g)
             if f.metadata["argument"].get("metavar") in ("FOLDER", "CHECKPOINT", "FILE")}
    assert paths == set(PATHS)
    for name in paths:
        others = dict(report=dict(eval="true", load_release="true"),
                      teacher_path=dict(distillation_type="soft", teacher_model="biformer_nano"))
        recipe = {"data_path": "x", **others.get(name, {}), name: "~/x.png"}
        (tmp_path / "r.yaml").write_text("".join(f"{key}: {value}\n" for key, value in recipe.items()))
        for line in ([f"--{key}={value}" for key, value in recipe.items()], ["--config", str(tmp_path / "r.yaml")]):
            assert flags.as_recipe(program.parse(line)[1])[name] == "/home/me/x.png"


def test_help_begins_with_what_is_used_most_and_lists_what_may_be_chosen(capsys):
    with pytest.raises(SystemExit):
        parse("--help")
    out = capsys.readouterr().out
    titles = re.findall(r"^(\w.*):$", out, re.M)
    assert titles[:4] == ["options", "Most used", "Model", "Data"] and len(titles) == len(set(titles))
    used = re.findall(r"^  --(\w+)", out[out.index("Most used:") : out.index("\nModel:")], re.M)
    assert used == list(ClassificationSettings.most_used) and used[0] == "data_path"
    listed = re.findall(r"^  --(\w+)", out, re.M)
    assert sorted(listed) == sorted({*parsing.Parser(ClassificationSettings).names()} - {"local_rank"})
    assert "{cosine,poly,step,tanh}" in out and "timm.optim.list_optimizers()" in out
    named = re.search(r"--opt OPT\s+(.*?) or\s+another that", out, re.S).group(1)
    assert {re.split(r"\s", name)[0] for name in re.split(r",\s+", named)} <= set(list_optimizers())


def test_input_size_may_be_a_pair():
    assert parse("--input_size", "224x320").model.input_size == (224, 320)
    assert parse("--input_size", "96").model.input_size == 96


def test_model_kwargs():
    assert parse("--model_kwargs", "num_regions=8", "topk=(1,4,9)", "layout=stl").model.model_kwargs == {
        "num_regions": 8, "topk": (1, 4, 9), "layout": "stl"
    }


def test_what_runs_can_be_run_again(tmp_path):
    settings = parse(
        "--lr=1e-3", "--input_size=64x96", "--model_kwargs", "topk=[1, 2, 3]", "--opt_betas", "0.9", "0.99"
    )
    options.save(flags.as_recipe(settings), tmp_path / "args.yaml")
    assert program.parse(["--config", str(tmp_path / "args.yaml")])[1] == settings


@pytest.mark.parametrize("name,epochs,peak", [("finetune_small", 30, 2e-4), ("scratch_small", 100, 1e-3)])
def test_recipes_for_a_folder_of_photographs(name, epochs, peak):
    """Every photograph in every epoch, a learning rate for their batch, shares of it for the schedule, EMA as ever."""
    settings = parse("--config", str(RECIPES / f"{name}.yaml"))
    assert settings.data.data_set == "image_folder" and not settings.augmentation.repeated_aug
    assert scaled_lr(settings.optimizer.lr, settings.loader.batch_size) == pytest.approx(peak)
    schedule = settings.schedule
    assert (schedule.epochs, schedule.min_lr, schedule.warmup_lr) == (epochs, "1%", "0.1%")
    assert settings.ema == options.EmaOptions()
    assert schedule.total_warmup(10) == {30: 30, 100: 50}[epochs]
    shorter = parse("--config", str(RECIPES / f"{name}.yaml"), "--epochs", "2").schedule
    assert shorter.total_warmup(10) == 2


NOT_REPEATED = ["--repeated_aug", "false"]


@pytest.mark.parametrize("tokens,strong", [
    ([], "mixup 0.8, cutmix 1, repeated_aug"),
    (NOT_REPEATED, "mixup 0.8, cutmix 1"),
    ([*NOT_REPEATED, "--mixup", "0"], "cutmix 1"),
    ([*NOT_REPEATED, "--cutmix", "0", "--mixup", "1.5"], "mixup 1.5"),
    (["--mixup", "0", "--cutmix", "0"], "repeated_aug"),
    ([*NOT_REPEATED, "--mixup", "0.2", "--cutmix", "0"], None),
    ([*NOT_REPEATED, "--mixup_prob", "0.5"], None),
    (["--data_set", "digits"], None),
    *((["--config", str(RECIPES / f"{name}_small.yaml")], None) for name in ("finetune", "scratch")),
])
def test_few_photographs_with_the_augmentation_of_imagenet_are_told_of_the_recipes_for_them(tokens, strong):
    few = f"warning: the augmentation is that of ImageNet ({strong}), for 9999 images; see " \
          "configs/train/finetune_small.yaml and scratch_small.yaml"
    assert parse(*tokens).advice_for(9999) == (few if strong else None)
    assert parse(*tokens).advice_for(10_000) is None


@pytest.mark.parametrize("name", sorted(path.stem for path in RECIPES.glob("*.yaml")))
def test_recipes(name, tmp_path):
    label_maps = ["--token_label", "maps"] if name.endswith("token_label") else []
    settings = parse("--config", str(RECIPES / f"{name}.yaml"), *label_maps)
    nano = dict.fromkeys(("quickstart", "scratch_small", "imagenette"), "biformer_nano")
    others = dict(nano, finetune_small="biformer_tiny")
    assert settings.name == others.get(name, name.removesuffix("_token_label").removesuffix("_cifar10"))
    options.save(flags.as_recipe(settings), tmp_path / "args.yaml")
    assert program.parse(["--config", str(tmp_path / "args.yaml")])[1] == settings


@pytest.mark.parametrize(
    "tokens,message",
    [
        (["--modle", "x"], "unknown flag --modle; did you mean --model?"),
        (["--drop-pth=0.1"], "unknown flag --drop_pth; did you mean --drop_path?"),
        (["--token_label", "maps", "--data_set", "digits"], "--token_label needs a folder of images"),
        (["--token_label", "maps", "--data_set", "wds/x"], "--token_label needs a folder of images"),
        (["--token_label", "maps", "--distillation_type", "soft", "--teacher_model", "x"], "leave out --distill"),
        (["--token_label", "maps", "--input_size", "224x250"], "--input_size of whole tokens, multiples of 32 pixels"),
        (["--token_label", "maps", "--aa", "augmix-m5-w4-d2"], "cannot go with --aa augmix"),
        (["--token_label_weight", "-1"], "--token_label_weight must be finite and not negative"),
        (["--token_label_weight", "1"], "--token_label_weight needs --token_label"),
        (["--class_weights", "balanced", "--data_set", "wds/x"], "shards do not say how many images each class has: "),
        (["--class_weights", "balanced", "--token_label", "maps"], "leave out --class_weights"),
        (["--freeze_backbone"], "--freeze_backbone needs weights to freeze: --load_release, or --finetune CHECKPOINT"),
        (["--freeze_backbone", "--load_release", "--drop", "0.1"], "trains without dropout: leave out --drop"),
        (["--freeze_backbone", "--finetune", "x", "--token_label", "m"], "leave out --freeze_backbone"),
        (["--freeze_backbone", "--finetune", "x", "--cuda_graph"], "leave out --freeze_backbone"),
        (["--class_weights", "all"], "--class_weights: invalid choice: 'all'"),
        (["--model_kwargs", "num_classes=3"], "the number of classes is the data's, or --nb_classes"),
        (["--crop_pct", "1.5"], "--crop_pct is the part of the image that is kept, at most 1"),
        (["--nb_classes", "0"], "--nb_classes must be above 0"),
        (["--mixup=-1"], "--mixup must be finite and not negative"),
        (["--scale", "0", "1"], "--scale takes a range above 0"),
        (["--scale", "1", "0.5"], "--scale takes a range above 0"),
        (["--scale", "0.5", "2"], "at most 1"),
        (["--ratio", "nan", "1"], "--ratio takes a range above 0"),
        (["--smoothing", "1.5"], "--smoothing must be 0 to 1"),
        (["--eval"], "--eval needs weights"),
        (["--eval", "perhaps"], "takes true or false, not 'perhaps'"),
        (["--epochs", "3", "--warmup_epochs", "5"], "--warmup_epochs 5 must be less than --epochs 3"),
        (["--batch_size", "3"], "--batch_size must be even, got 3"),
        (["--distillation_type", "soft"], "needs a --teacher_model"),
        (["--teacher_model", "x"], "needs --distillation_type"),
        (["--teacher_path", "x"], "--teacher_path needs --distillation_type soft or hard"),
        (["--distillation_tau", "0"], "--distillation_tau must be above 0"),
        (["--finetune", "a", "--load_release"], "mutually exclusive"),
        (["--data_set", "cifar"], "unknown data set 'cifar'; choose from IMNET"),
        (["--shard_cache_gb", "0"], "--shard_cache_gb must be above 0"),
        (["--input_size", "224x"], "takes a side or HEIGHTxWIDTH"),
    ],
)
def test_mistakes_are_explained_in_one_line(tokens, message):
    with pytest.raises(UsageError) as error:
        parse(*tokens)
    assert message in str(error.value)
    assert "\n" not in str(error.value) and error.value.exit_code == 2


@pytest.mark.parametrize("tokens", [
    ["--batch_size", "3", "--mixup", "0", "--cutmix", "0"],
    ["--eval", "--resume", "a.pth", "--batch_size", "3", "--epochs", "1", "--token_label_weight", "1"],
])
def test_what_is_no_mistake(tokens):
    assert parse(*tokens).loader.batch_size == 3


def test_missing_data_path():
    with pytest.raises(UsageError, match="--data_path is missing"):
        program.parse([])
    assert program.parse(["--data_set", "digits"])[1].data.data_path is None


def test_saved_recipe_is_plain_yaml(tmp_path):
    options.save(flags.as_recipe(parse()), tmp_path / "args.yaml")
    recipe = yaml.safe_load((tmp_path / "args.yaml").read_text())
    assert recipe["batch_size"] == 128 and recipe["task"] == "classification" and "config" not in recipe


def test_what_others_call_a_flag_is_no_flag_and_leads_to_one():
    names = parsing.Parser(ClassificationSettings).names()
    assert set(parsing.OTHER_NAMES.values()) <= set(names) and not parsing.OTHER_NAMES.keys() & set(names)
    assert not [name for name, ours in parsing.OTHER_NAMES.items() if nearest(name, names) == f"; did you mean {ours}?"]
