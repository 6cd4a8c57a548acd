from pathlib import Path

import pytest
import timm
import yaml

import models  # noqa: F401
from training import options
from utils import UsageError

RECIPES = Path(__file__).resolve().parents[2] / "configs" / "train"
REQUIRED = ["--data_path", "data"]


def parse(*tokens):
    return options.parse([*REQUIRED, *tokens])


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
def test_documented_commands(command):
    assert options.parse(command.split()).data_path


def test_underscores_and_hyphens_are_one():
    assert parse("--drop-path", "0.3", "--warmup-epochs=2") == parse("--drop_path=0.3", "--warmup_epochs", "2")


def test_every_flag_in_both_forms():
    for name in options.build_parser().names():
        assert options._underscored(f"--{name.replace('_', '-')}=x-y") == f"--{name}=x-y"


@pytest.mark.parametrize("tokens,value", [(["--compile"], True), (["--compile", "true"], True), ([], False),
                                          (["--compile=no"], False), (["--compile", "--seed", "1"], True)])
def test_booleans_bare_or_with_a_value(tokens, value):
    assert parse(*tokens).compile is value


def test_local_rank_as_old_launchers_pass_it():
    assert parse("--local-rank=1").local_rank == 1


@pytest.mark.parametrize("null", [["--clip_grad", "null"], ["--clip-grad=null"]])
def test_null_takes_back_what_a_recipe_says(null, tmp_path):
    recipe = tmp_path / "r.yaml"
    recipe.write_text("clip_grad: 5\nopt_betas: [0.9, 0.95]\nlr: null\n")
    args = parse("--config", str(recipe), *null, "--seed", "1")
    assert (args.clip_grad, args.opt_betas, args.seed, args.lr) == (None, [0.9, 0.95], 1, 5e-4)
    assert parse("--config", str(recipe), "--opt_betas=null").opt_betas is None
    with pytest.raises(UsageError, match="unknown flag --clip_grat"):
        parse("--clip_grat=null")


@pytest.mark.parametrize("published,ours", [("BViT-5", "bvit_5m"), ("BViT-22", "bvit_22m")])
def test_published_names_of_models(published, ours, tmp_path):
    assert parse("--arch", published).model == parse(f"--model={published}").model == ours
    recipe = tmp_path / "r.yaml"
    recipe.write_text(f"model: {published}\n")
    assert parse("--config", str(recipe)).model == ours
    assert parse("--config", str(recipe), "--arch", "biformer_tiny").model == "biformer_tiny"
    assert set(options.PUBLISHED_NAMES.values()) <= set(timm.list_models())


def test_input_size_may_be_a_pair():
    assert parse("--input_size", "224x320").input_size == (224, 320)
    assert parse("--input_size", "96").input_size == 96


def test_model_kwargs():
    assert parse("--model_kwargs", "num_regions=8", "topk=(1,4,9)", "layout=stl").model_kwargs == {
        "num_regions": 8, "topk": (1, 4, 9), "layout": "stl"
    }


def test_command_line_over_yaml_over_defaults(tmp_path):
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        "lr: 1e-3\nwarmup-epochs: 7\nscale: [0.5, 1.0]\nmodel_ema: false\nmodel_kwargs: {topk: [1, 2, 3]}\n"
    )
    args = parse("--config", str(recipe), "--lr", "2e-3")
    assert (args.lr, args.warmup_epochs, args.scale, args.model_ema) == (2e-3, 7, [0.5, 1.0], False)
    assert args.weight_decay == 0.05
    assert args.model_kwargs == {"topk": [1, 2, 3]}


def test_what_runs_can_be_run_again(tmp_path):
    args = parse("--lr=1e-3", "--input_size=64x96", "--model_kwargs", "topk=(1, 2, 3)", "--opt_betas", "0.9", "0.99")
    options.save(args, tmp_path / "args.yaml")
    again = options.parse(["--config", str(tmp_path / "args.yaml")])
    again.config = None
    again.model_kwargs = {key: tuple(value) for key, value in again.model_kwargs.items()}
    assert again == args


@pytest.mark.parametrize("path", sorted(path.stem for path in RECIPES.glob("*.yaml")))
def test_recipes(path):
    label_maps = ["--token_label", "maps"] if path.endswith("token_label") else []
    args = parse("--config", str(RECIPES / f"{path}.yaml"), *label_maps)
    assert args.model == ("biformer_nano" if path == "quickstart" else path.removesuffix("_token_label"))


@pytest.mark.parametrize(
    "tokens,message",
    [
        (["--modle", "x"], "unknown flag --modle; did you mean --model?"),
        (["--drop-pth=0.1"], "unknown flag --drop_pth; did you mean --drop_path?"),
        (["stray"], "'stray' is the value of no flag"),
        (["--token_label", "maps", "--data_set", "digits"], "--token_label needs a folder of images"),
        (["--token_label", "maps", "--data_set", "wds/x"], "--token_label needs a folder of images"),
        (["--token_label", "maps", "--distillation_type", "soft", "--teacher_model", "x"], "leave out --distill"),
        (["--token_label", "maps", "--input_size", "224x250"], "--input_size of whole tokens, multiples of 32 pixels"),
        (["--token_label", "maps", "--aa", "augmix-m5-w4-d2"], "cannot go with --aa augmix"),
        (["--token_label_weight", "-1"], "--token_label_weight must not be negative"),
        (["--token_label_weight", "1"], "--token_label_weight needs --token_label"),
        (["--model_kwargs", "num_classes=3"], "the number of classes is the data's, or --nb_classes"),
        (["--crop_pct", "1.5"], "--crop_pct is the part of the image that is kept, at most 1"),
        (["--batch_size", "0"], "--batch_size must be at least 1, got 0"),
        (["--epochs", "0"], "--epochs must be at least 1, got 0"),
        (["--epochs", "many"], "--epochs: invalid int value: 'many'"),
        (["--lr", "-1"], "--lr must be above 0"),
        (["--lr", "nan"], "--lr must be above 0 and finite"),
        (["--opt_eps", "-1"], "--opt_eps must be above 0"),
        (["--opt_betas", "2", "3"], "at least 0 and below 1"),
        (["--mixup=-1"], "--mixup must not be negative"),
        (["--scale", "0", "1"], "--scale takes a range above 0"),
        (["--scale", "0.5", "2"], "at most 1"),
        (["--seed", "99999999999"], "--seed must be below"),
        (["--smoothing", "1.5"], "--smoothing must be 0 to 1"),
        (["--eval"], "--eval needs weights"),
        (["--eval", "perhaps"], "takes true or false, not 'perhaps'"),
        (["--epochs", "3"], "--warmup_epochs 5 leaves nothing of --epochs 3"),
        (["--batch_size", "3"], "must be even"),
        (["--distillation_type", "soft"], "needs a --teacher_model"),
        (["--teacher_model", "x"], "needs --distillation_type"),
        (["--finetune", "a", "--load_release"], "three sources of weights"),
        (["--auto_resume"], "needs the --output_dir"),
        (["--data_set", "cifar"], "'cifar' is no data set; choose from IMNET"),
        (["--shard_cache_gb", "0"], "--shard_cache_gb must be above 0"),
        (["--input_size", "224x"], "takes a side or HEIGHTxWIDTH"),
        (["--model_kwargs", "topk"], "takes KEY=VALUE"),
        (["--config", "missing.yaml"], "--config missing.yaml: No such file"),
    ],
)
def test_mistakes_are_explained_in_one_line(tokens, message):
    with pytest.raises(UsageError) as error:
        parse(*tokens)
    assert message in str(error.value)
    assert "\n" not in str(error.value) and error.value.exit_code == 2


def test_missing_data_path():
    with pytest.raises(UsageError, match="--data_path is missing"):
        options.parse([])
    assert options.parse(["--data_set", "digits"]).data_path is None


@pytest.mark.parametrize(
    "text,message",
    [
        ("lrr: 1", "unknown key 'lrr'; did you mean lr?"),
        ("drop_pth: 1", "did you mean drop_path?"),
        ("- a\n- b", "must be lines of `flag: value`"),
        ("a: [", "not YAML"),
        ("epochs: many", "invalid int value"),
        ("!!python/object/apply:os.system ['true']", "not YAML"),
    ],
)
def test_bad_recipes(tmp_path, text, message):
    recipe = tmp_path / "r.yaml"
    recipe.write_text(text)
    with pytest.raises(UsageError) as error:
        parse("--config", str(recipe))
    assert message in str(error.value) and "\n" not in str(error.value)


def test_saved_recipe_is_plain_yaml(tmp_path):
    options.save(parse(), tmp_path / "args.yaml")
    assert yaml.safe_load((tmp_path / "args.yaml").read_text())["batch_size"] == 128
