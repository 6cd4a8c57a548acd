"""The command line: flags, recipes in YAML, and the checks that need neither data nor models.

Order of precedence: the command line, then `--config`, then the defaults here, which are the BiFormer paper's recipe.
"""
import argparse
import ast
import math
import os
import sys
from pathlib import Path
from typing import Any, NoReturn

import yaml

from utils import UsageError, nearest, replace_file

IMAGE_FOLDERS = ("image_folder", "IMNET")
DATA_SETS = ("IMNET", "image_folder", "CIFAR10", "CIFAR100", "digits")
BEST_METRICS = ("acc1", "acc5", "loss", "ema_acc1", "ema_acc5", "ema_loss")
# Pixels of a token along each side of the last map, in every model that has a token head.
TOKEN_STRIDE = 32
# Names that models were published under, for those that timm's style writes otherwise.
PUBLISHED_NAMES = {"BViT-5": "bvit_5m", "BViT-22": "bvit_22m"}
# Of no meaning for another run: what started this one.
_NOT_SAVED = ("config", "local_rank")


def _boolean(text: str) -> bool:
    if text.lower() in ("true", "yes", "on", "1"):
        return True
    if text.lower() in ("false", "no", "off", "0"):
        return False
    raise argparse.ArgumentTypeError(f"takes true or false, not {text!r}")


def _data_set(text: str) -> str:
    if text in DATA_SETS or text.startswith("wds/"):
        return text
    raise argparse.ArgumentTypeError(f"{text!r} is no data set; choose from {', '.join(DATA_SETS)}, wds/NAME")


def _model(text: str) -> str:
    return PUBLISHED_NAMES.get(text, text)


def image_size(text: str) -> int | tuple[int, int]:
    """A side, or (height, width), of `SIDE` or `HEIGHTxWIDTH` in pixels, as `--input_size` takes them."""
    try:
        sizes = tuple(int(side) for side in text.lower().split("x"))
    except ValueError:
        sizes = ()
    if len(sizes) not in (1, 2) or min(sizes) < 1:
        raise argparse.ArgumentTypeError(f"takes a side or HEIGHTxWIDTH in pixels, not {text!r}")
    return sizes[0] if len(sizes) == 1 else sizes


def _key_value(text: str) -> tuple[str, object]:
    key, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"takes KEY=VALUE, not {text!r}")
    try:
        return key, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return key, value


class _Parser(argparse.ArgumentParser):
    """Takes every flag with hyphens too, and raises `UsageError`, one line, where argparse would print its usage."""

    def flag(self, name: str, default=None, alias: str | None = None, **kwargs):
        if isinstance(default, bool):
            kwargs.update(type=_boolean, nargs="?", const=True, metavar="BOOL")
        names = [name] if alias is None else [name, alias]
        self.add_argument(*(f"--{n}" for n in names), default=default, **kwargs)

    def names(self) -> list[str]:
        return [action.dest for action in self._actions if action.dest != "help"]

    def error(self, message: str) -> NoReturn:
        raise UsageError(message)


def build_parser() -> argparse.ArgumentParser:
    """All flags and their defaults."""
    parser = _Parser(
        prog="main.py",
        description="Train and evaluate image classifiers: the routed vision transformers here, and all of timm's.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    flag = parser.flag
    flag("config", metavar="YAML", help="recipe to start from; flags given here win over it")
    flag("local_rank", type=int, help=argparse.SUPPRESS)

    flag("model", "biformer_small", alias="arch", type=_model, metavar="MODEL",
         help=f"any model that timm knows, ours included; as published too: {', '.join(PUBLISHED_NAMES)}")
    flag("model_kwargs", [], type=_key_value, nargs="*", metavar="KEY=VALUE", help="arguments of the model")
    flag("input_size", 224, type=image_size, metavar="PIXELS", help="side of the image, or HEIGHTxWIDTH")
    flag("nb_classes", type=int, help="number of classes (default: what the data holds)")
    flag("drop", 0.0, type=float, help="dropout before the classifier")
    flag("drop_path", 0.1, type=float, help="stochastic depth of the last block")
    flag("grad_checkpointing", False, help="recompute activations in the backward pass to save memory")

    flag("load_release", False, help="start from the published weights of the model")
    flag("finetune", metavar="CHECKPOINT", help="start from these weights; another class count gets a new classifier")
    flag("resume", metavar="CHECKPOINT", help="go on from this checkpoint or, with --eval, evaluate it; file or URL")
    flag("auto_resume", False, help="go on from the newest whole checkpoint in --output_dir, if there is one")
    flag("model_key", help="which weights of a checkpoint to take, model_ema say (default: model, state_dict or bare)")

    flag("data_set", "IMNET", type=_data_set, help=f"{', '.join(DATA_SETS)} or wds/NAME (WebDataset shards)")
    flag("data_path", metavar="FOLDER",
         help="where the data set lies: for image folders, train/ and val/; for shards, a folder or its URL")
    flag("shard_cache", metavar="FOLDER", help="copies of shards from a URL (default: shards in torch.hub's folder)")
    flag("shard_cache_gb", type=float, metavar="GB", help="remove the oldest of them beyond this (default: none)")
    flag("download", False, help="fetch CIFAR where it is missing")
    flag("num_workers", min(8, os.cpu_count() or 1), type=int, help="processes that read images, for each GPU")
    flag("pin_mem", True, help="read images into page-locked memory")
    flag("skip_bad_images", False, help="go on after an image that cannot be read, and count them")
    flag("crop_pct", type=float, help="part of the image that evaluation crops (default: the model's own)")

    flag("hflip", 0.5, type=float, help="probability of a horizontal flip")
    flag("scale", [0.08, 1.0], type=float, nargs=2, metavar=("MIN", "MAX"), help="area of the random crop")
    flag("ratio", [3 / 4, 4 / 3], type=float, nargs=2, metavar=("MIN", "MAX"), help="aspect ratio of the random crop")
    flag("color_jitter", 0.4, type=float, help="strength of colour jitter, where --aa is none")
    flag("aa", "rand-m9-mstd0.5-inc1", help="timm's AutoAugment or RandAugment policy, or none")
    flag("train_interpolation", "bicubic", choices=["bicubic", "bilinear", "random"], help="of the random crop")
    flag("repeated_aug", True, help="a third of the images an epoch, each augmented three ways")
    flag("reprob", 0.25, type=float, help="probability of random erasing")
    flag("remode", "pixel", choices=["const", "rand", "pixel"], help="what random erasing fills in")
    flag("mixup", 0.8, type=float, help="alpha of mixup, 0 for none")
    flag("cutmix", 1.0, type=float, help="alpha of cutmix, 0 for none")
    flag("mixup_prob", 1.0, type=float, help="probability of mixup or cutmix")
    flag("mixup_switch_prob", 0.5, type=float, help="probability of cutmix where both are on")
    flag("smoothing", 0.1, type=float, help="label smoothing")

    flag("epochs", 300, type=int)
    flag("batch_size", 128, type=int, help="images for each GPU and forward pass")
    flag("update_freq", 1, type=int, help="forward passes for each optimizer step")
    flag("opt", "adamw", help="any optimizer of timm's that takes plain gradients")
    flag("opt_eps", 1e-8, type=float, help="epsilon of the optimizer")
    flag("opt_betas", type=float, nargs="+", metavar="BETA", help="betas of the optimizer (default: its own)")
    flag("momentum", 0.9, type=float, help="of optimizers that have one")
    flag("weight_decay", 0.05, type=float)
    flag("lr", 5e-4, type=float, help="learning rate for a global batch of 512 images; scaled with it")
    flag("sched", "cosine", choices=["cosine", "poly", "tanh"], help="timm's schedule of the learning rate")
    flag("warmup_epochs", 5, type=int)
    flag("warmup_lr", 1e-6, type=float, help="where the warm-up starts; not scaled")
    flag("min_lr", 1e-5, type=float, help="where the schedule ends; not scaled")
    flag("layer_decay", type=float, help="factor of the learning rate from one layer to the one before it")
    flag("clip_grad", type=float, help="largest norm of the gradients")
    flag("model_ema", True, help="keep an exponential moving average of the weights")
    flag("model_ema_decay", 0.99996, type=float)
    flag("model_ema_eval", False, help="evaluate the average too, after every epoch")

    flag("distillation_type", "none", choices=["none", "soft", "hard"], help="how to learn from --teacher_model")
    flag("teacher_model", type=_model, help="any model that timm knows")
    flag("teacher_path", metavar="CHECKPOINT", help="the teacher's weights (default: its published ones)")
    flag("distillation_alpha", 0.5, type=float, help="weight of the teacher, 0 to 1")
    flag("distillation_tau", 1.0, type=float, help="temperature of soft distillation")

    flag("token_label", metavar="FOLDER", help="train on the label maps in it (scripts/make_label_maps.py) too")
    flag("token_label_weight", type=float, help="weight of the tokens' loss (default: 0.5)")

    flag("eval", False, help="evaluate and stop")
    flag("dist_eval", True, help="share the evaluation among the processes; the result is the same")
    flag("disable_eval", False, help="do not evaluate while training")

    flag("output_dir", metavar="FOLDER", help="checkpoints and logs (default: outputs/MODEL/DATE-TIME)")
    flag("save_every", 1, type=int, metavar="EPOCHS", help="epochs between two checkpoints")
    flag("save_every_steps", type=int, metavar="STEPS", help="save within epochs too, every so many steps")
    flag("save_every_minutes", type=float, metavar="MINUTES", help="save within epochs too, every so many minutes")
    flag("keep_checkpoints", 2, type=int, metavar="N", help="how many of the newest checkpoints to keep")
    flag("best_metric", "acc1", choices=BEST_METRICS, help="what best.pth is best at; ema_: the average of the weights")
    flag("log_every", 50, type=int, metavar="STEPS", help="steps between two log lines")
    flag("seed", 0, type=int)
    flag("deterministic", False, help="the same bits in every run on a GPU too, at some cost; CPUs need no flag")
    flag("dist_timeout", 30.0, type=float, metavar="MINUTES", help="how long a process waits for another")
    flag("device", "auto", help="auto, cuda, cuda:1 or cpu")
    flag("amp", "auto", choices=["auto", "bf16", "fp16", "off"], help="auto: bf16 where the GPU has it")
    flag("channels_last", True, help="hold images channels last in memory")
    flag("compile", False, help="torch.compile the model")
    return parser


def as_tokens(recipe: dict[str, Any]) -> list[str]:
    """A recipe, of flag names and plain values, as the words of a command line that says the same."""
    tokens = []
    for name, value in recipe.items():
        if value is None:
            value = "null"
        if isinstance(value, dict):
            value = [f"{k}={v!r}" for k, v in value.items()]
        values = value if isinstance(value, list) else [value]
        # --flag=value keeps a negative number from being read as a flag.
        tokens += [f"--{name}={values[0]}"] if len(values) == 1 else [f"--{name}", *map(str, values)]
    return tokens


def _read_recipe(path: str, known: list[str]) -> dict[str, Any]:
    """The recipe in a file, its flags in underscores."""
    try:
        recipe = yaml.safe_load(Path(path).read_text()) or {}
    except OSError as error:
        raise UsageError(f"--config {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"--config {path}: not YAML ({' '.join(str(error).split())})") from error
    if not isinstance(recipe, dict):
        raise UsageError(f"--config {path}: must be lines of `flag: value`")
    recipe = {str(key).replace("-", "_"): value for key, value in recipe.items()}
    for name in recipe:
        if name not in known or name == "config":
            raise UsageError(f"--config {path}: unknown key {name!r}{nearest(name, known)}")
    return recipe


def _split_nulls(tokens: list[str], known: list[str]) -> tuple[list[str], list[str]]:
    """The tokens without `--flag null` and `--flag=null`, and the flags that were given so."""
    kept, nulls = [], []
    for token in tokens:
        if token == "null" and kept and kept[-1].removeprefix("--") in known:
            nulls.append(kept.pop().removeprefix("--"))
        elif token.endswith("=null") and token.removeprefix("--").removesuffix("=null") in known:
            nulls.append(token.removeprefix("--").removesuffix("=null"))
        else:
            kept.append(token)
    return kept, nulls


def _underscored(token: str) -> str:
    """--drop-path=0.1 -> --drop_path=0.1"""
    name, equals, value = token.partition("=")
    return f"{name.replace('-', '_').replace('__', '--', 1)}{equals}{value}" if token.startswith("--") else token


def _check(args: argparse.Namespace):
    for name in ("batch_size", "epochs", "update_freq", "save_every", "save_every_steps", "keep_checkpoints",
                 "log_every"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise UsageError(f"--{name} must be at least 1, got {getattr(args, name)}")
    for name in ("num_workers", "warmup_epochs", "seed"):
        if getattr(args, name) < 0:
            raise UsageError(f"--{name} must not be negative, got {getattr(args, name)}")
    for name in ("drop", "drop_path", "reprob", "smoothing", "hflip", "mixup_prob", "mixup_switch_prob",
                 "distillation_alpha", "model_ema_decay"):
        if not 0 <= getattr(args, name) <= 1:
            raise UsageError(f"--{name} must be 0 to 1, got {getattr(args, name)}")
    for name in ("lr", "clip_grad", "layer_decay", "distillation_tau", "nb_classes", "crop_pct", "opt_eps",
                 "save_every_minutes", "dist_timeout", "shard_cache_gb"):
        value = getattr(args, name)
        if value is not None and not 0 < value < math.inf:
            raise UsageError(f"--{name} must be above 0 and finite, got {value}")
    for name in ("mixup", "cutmix", "weight_decay", "color_jitter", "warmup_lr", "min_lr", "token_label_weight"):
        value = getattr(args, name)
        if value is not None and not 0 <= value < math.inf:
            raise UsageError(f"--{name} must not be negative, got {value}")
    if not all(0 <= beta < 1 for beta in [args.momentum, *(args.opt_betas or [])]):
        raise UsageError("--momentum and --opt_betas must be at least 0 and below 1")
    for name in ("scale", "ratio"):
        low, high = getattr(args, name)
        if not 0 < low <= high < math.inf:
            raise UsageError(f"--{name} takes a range above 0, got {low} {high}")
    if args.crop_pct is not None and args.crop_pct > 1:
        raise UsageError(f"--crop_pct is the part of the image that is kept, at most 1, got {args.crop_pct}")
    if "num_classes" in args.model_kwargs:
        raise UsageError("--model_kwargs num_classes: the number of classes is the data's, or --nb_classes")
    if args.scale[1] > 1:
        raise UsageError(f"--scale is the cropped part of the image, at most 1, got {args.scale[1]}")
    if args.seed >= 2**32:
        raise UsageError(f"--seed must be below 2 ** 32, got {args.seed}")
    if args.warmup_epochs >= args.epochs and not args.eval:
        raise UsageError(f"--warmup_epochs {args.warmup_epochs} leaves nothing of --epochs {args.epochs}; lower it")
    if (args.mixup or args.cutmix) and args.batch_size % 2 and not args.eval:
        raise UsageError(f"mixup and cutmix pair images: --batch_size must be even, got {args.batch_size}")
    if args.data_path is None and args.data_set != "digits":
        raise UsageError(f"--data_path is missing: the folder of the data set {args.data_set}")
    if args.distillation_type != "none" and args.teacher_model is None:
        raise UsageError(f"--distillation_type {args.distillation_type} needs a --teacher_model")
    if args.distillation_type == "none" and args.teacher_model is not None:
        raise UsageError("--teacher_model needs --distillation_type soft or hard")
    if not args.eval:
        _check_token_label(args)
    if args.eval and not (args.resume or args.finetune or args.load_release):
        raise UsageError("--eval needs weights: --resume CHECKPOINT, or --load_release for the published ones")
    if sum(map(bool, (args.resume, args.finetune, args.load_release))) > 1:
        raise UsageError("--resume, --finetune and --load_release are three sources of weights; give one")
    if args.best_metric.startswith("ema_") and not (args.model_ema and args.model_ema_eval):
        raise UsageError(f"--best_metric {args.best_metric} needs --model_ema and --model_ema_eval")
    if args.auto_resume and args.output_dir is None:
        raise UsageError("--auto_resume needs the --output_dir to go on in")


def _check_token_label(args: argparse.Namespace):
    if args.token_label is None:
        if args.token_label_weight is not None:
            raise UsageError("--token_label_weight needs --token_label, the folder of the label maps")
        return
    if args.data_set not in IMAGE_FOLDERS:
        raise UsageError(f"--token_label needs a folder of images, --data_set {IMAGE_FOLDERS[0]}, not {args.data_set}")
    if args.distillation_type != "none":
        raise UsageError("--token_label is learning from a teacher already: leave out --distillation_type")
    sides = args.input_size if isinstance(args.input_size, tuple) else (args.input_size,)
    if any(side % TOKEN_STRIDE for side in sides):
        raise UsageError(f"--token_label needs an --input_size of whole tokens, multiples of {TOKEN_STRIDE} pixels")
    if args.aa.startswith("augmix"):
        raise UsageError("--token_label cannot go with --aa augmix, which mixes several views of an image")


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line, and the recipe that it names. `--flag null` takes back what the recipe says of a flag.

    Args:
        argv: Words of the command line, `sys.argv[1:]` by default.

    Raises:
        UsageError: A flag, key or value is unknown or out of range; names the nearest one.
    """
    parser = build_parser()
    tokens = [_underscored(token) for token in (sys.argv[1:] if argv is None else argv)]
    tokens, nulls = _split_nulls(tokens, parser.names())
    config_flag = _Parser(add_help=False, allow_abbrev=False)
    config_flag.flag("config")
    config = config_flag.parse_known_args(tokens)[0].config
    if config is not None:
        recipe = _read_recipe(config, parser.names())
        tokens = as_tokens({k: v for k, v in recipe.items() if v is not None and k not in nulls}) + tokens
    args, unknown = parser.parse_known_args(tokens)
    if unknown:
        name = unknown[0].partition("=")[0]
        if name.startswith("--"):
            flags = [f"--{known}" for known in parser.names()]
            raise UsageError(f"unknown flag {name}{nearest(name, flags)}")
        raise UsageError(f"{unknown[0]!r} is the value of no flag")
    args.model_kwargs = dict(args.model_kwargs)
    _check(args)
    return args


def as_recipe(args: argparse.Namespace) -> dict:
    """What runs, as a recipe that `--config` takes; plain values alone."""
    recipe = {name: value for name, value in vars(args).items() if name not in _NOT_SAVED}
    if isinstance(args.input_size, tuple):
        recipe["input_size"] = "x".join(map(str, args.input_size))
    return recipe


def save(args: argparse.Namespace, path: Path):
    """Write what runs next to its checkpoints."""
    text = yaml.safe_dump(as_recipe(args), sort_keys=False)
    replace_file(path, lambda file: file.write(text.encode()))
