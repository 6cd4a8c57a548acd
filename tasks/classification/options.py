"""The command-line options that only classification has."""
import argparse
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar

from training.data.splits import check_is_no_class
from training.flags import Group, Needs, flag, fraction, not_negative, path, positive
from training.options import OUTPUTS, Settings
from utils import UsageError, count, is_url

from ..options import NetworkOptions, check_picture, check_range, check_weights, image_size, model_name

IMAGE_FOLDERS = ("image_folder", "IMNET")
# Sets that are there to be evaluated, by a network of ImageNet's classes; see training/data/robustness.py.
ROBUSTNESS = ("robustness", "imagenet_val", "imagenet_v2", "imagenet_c", "imagenet_a", "imagenet_r", "imagenet_sketch",
              "imagenet_real")
DATA_SETS = ("IMNET", "image_folder", "CIFAR10", "CIFAR100", "digits", *ROBUSTNESS)
# Training images below which the augmentation of ImageNet, and a third of them in an epoch, are worth a warning.
_FEW = 10_000
# Pixels of a token along each side of the last map, in every model that has a token head.
TOKEN_STRIDE = 32


def _data_set(text: str) -> str:
    if text in DATA_SETS or text.startswith("wds/"):
        return text
    raise argparse.ArgumentTypeError(f"unknown data set {text!r}; choose from {', '.join(DATA_SETS)}, wds/NAME")


def check_val_split(data_set: str, val_split: float | None):
    """Raises UsageError where a part is to be held out of a data set that has its own val split."""
    if val_split is not None and data_set not in IMAGE_FOLDERS:
        raise UsageError(f"--val_split is for folders of images; {data_set} has a val split of its own")


@dataclass(frozen=True)
class ModelOptions(NetworkOptions):
    """Model"""

    classes_are: ClassVar[str] = "the data's, or --nb_classes"
    input_size: int | tuple[int, int] = flag(224, "side of the image, or HEIGHTxWIDTH", type=image_size,
                                             metavar="PIXELS")
    nb_classes: int | None = flag(None, "number of classes (default: what the data holds)", type=int, check=positive)
    drop: float = flag(0.0, "dropout rate of the classifier", type=float, check=fraction)
    freeze_backbone: bool = flag(False, "train the classifier alone (linear probe), the rest as in evaluation")


def _share(value: float) -> str | None:
    return None if 0 < value < 1 else "must be above 0 and below 1"


@dataclass(frozen=True)
class DataOptions(Group):
    """Data"""

    data_set: str = flag("IMNET", f"{', '.join(DATA_SETS)} or wds/NAME (WebDataset shards)", type=_data_set)
    data_path: str | None = flag(None, "where the data set is: for image folders, train/ and val/, or with --val_split "
                                       "the class folders; for shards, a folder or its URL", type=path,
                                 metavar="FOLDER")
    val_split: float | None = flag(None, "share of each class of an image folder without val/ that is held out as val",
                                   type=float, metavar="SHARE", check=_share)
    shard_cache: str | None = flag(None, "cache folder for shards from a URL (default: shards in torch.hub's folder)",
                                   type=path, metavar="FOLDER")
    shard_cache_gb: float | None = flag(None, "largest size of the cache (default: no limit)", type=float,
                                        metavar="GB", check=positive)
    download: bool = flag(False, "download CIFAR where it is missing")
    skip_bad_images: bool = flag(False, "skip images that cannot be read, and count them")
    exif_transpose: bool = flag(True, "turn images of folders and shards upright by their EXIF orientation, which "
                                      "published numbers did not")
    parts_of: ClassVar[Mapping[str, str]] = MappingProxyType({"data_path": "data_set", "val_split": "data_path"})

    def check(self):
        check_val_split(self.data_set, self.val_split)

    def needs(self) -> Needs:
        remote = self.data_set.startswith("wds/") and is_url(self.data_path or "")
        return {
            "download": (self.data_set.startswith("CIFAR"), "without --data_set CIFAR10 or CIFAR100"),
            **dict.fromkeys(("shard_cache", "shard_cache_gb"), (remote, "without shards from a URL")),
        }


@dataclass(frozen=True)
class AugmentationOptions(Group):
    """Augmentation and regularisation"""

    scale: list[float] = flag([0.08, 1.0], "area of the random crop", type=float, nargs=2, metavar=("MIN", "MAX"),
                              check=check_range)
    ratio: list[float] = flag([3 / 4, 4 / 3], "aspect ratio of the random crop", type=float, nargs=2,
                              metavar=("MIN", "MAX"), check=check_range)
    hflip: float = flag(0.5, "probability of a horizontal flip", type=float, check=fraction)
    color_jitter: float = flag(0.4, "strength of colour jitter, where --aa is none", type=float, check=not_negative)
    aa: str = flag("rand-m9-mstd0.5-inc1", "timm's AutoAugment or RandAugment policy, or none")
    train_interpolation: str = flag("bicubic", "interpolation of the random crop",
                                    choices=["bicubic", "bilinear", "random"])
    crop_pct: float | None = flag(None, "centre crop ratio of evaluation (default: the model's own)",
                                  type=float, check=positive)
    use_test_size: bool = flag(False, "with --eval, take the image size and the crop that timm's validate.py takes: "
                                      "the model's own for evaluation, instead of --input_size")
    repeated_aug: bool = flag(True, "repeated augmentation: a third of the images an epoch, each augmented three ways")
    reprob: float = flag(0.25, "probability of random erasing", type=float, check=fraction)
    remode: str = flag("pixel", "what random erasing fills in", choices=["const", "rand", "pixel"])
    mixup: float = flag(0.8, "alpha of mixup, 0 for none", type=float, check=not_negative)
    cutmix: float = flag(1.0, "alpha of cutmix, 0 for none", type=float, check=not_negative)
    mixup_prob: float = flag(1.0, "probability of mixup or cutmix", type=float, check=fraction)
    mixup_switch_prob: float = flag(0.5, "probability of cutmix where both are on", type=float, check=fraction)
    smoothing: float = flag(0.1, "label smoothing", type=float, check=fraction)
    class_weights: str = flag("none", "loss weight of each class; balanced: inverse to its number of images",
                              choices=["none", "balanced"])

    def check(self):
        if self.crop_pct is not None and self.crop_pct > 1:
            raise UsageError(f"--crop_pct is the part of the image that is kept, at most 1, got {self.crop_pct}")
        if self.scale[1] > 1:
            raise UsageError(f"--scale is the cropped part of the image, at most 1, got {self.scale[1]}")

    def needs(self) -> Needs:
        return {
            # timm's 3-Augment has colour jitter of its own
            "color_jitter": (self.aa == "none" or "3a" in self.aa, "without --aa none"),
            "remode": (self.reprob, "without --reprob"),
            "mixup_prob": (self.mixup or self.cutmix, "without --mixup or --cutmix"),
            "mixup_switch_prob": (self.mixup and self.cutmix, "without both --mixup and --cutmix"),
        }

    def as_for_imagenet(self) -> list[str]:
        """What is as strong as in ImageNet's recipes: repeated augmentation, and mixing in every batch."""
        mixing = [name for name in ("mixup", "cutmix") if self.mixup_prob == 1 and
                  getattr(self, name) >= getattr(AugmentationOptions, name)]
        return [f"{name} {getattr(self, name):g}" for name in mixing] + ["repeated_aug"] * self.repeated_aug


@dataclass(frozen=True)
class DistillationOptions(Group):
    """Distillation"""

    distillation_type: str = flag("none", "distillation loss", choices=["none", "soft", "hard"])
    teacher_model: str | None = flag(None, "any model that timm knows", type=model_name)
    teacher_path: str | None = flag(None, "the teacher's weights (default: its published ones)", type=path,
                                     metavar="CHECKPOINT")
    distillation_alpha: float = flag(0.5, "weight of the teacher, 0 to 1", type=float, check=fraction)
    distillation_tau: float = flag(1.0, "temperature of soft distillation", type=float, check=positive)

    parts_of: ClassVar[Mapping[str, str]] = MappingProxyType(dict.fromkeys(
        ["teacher_model", "teacher_path", "distillation_alpha", "distillation_tau"], "distillation_type",
    ))

    def check(self):
        if self.distillation_type != "none" and self.teacher_model is None:
            raise UsageError(f"--distillation_type {self.distillation_type} needs a --teacher_model")
        for name in ("teacher_model", "teacher_path"):
            if self.distillation_type == "none" and getattr(self, name) is not None:
                raise UsageError(f"--{name} needs --distillation_type soft or hard")

    def needs(self) -> Needs:
        return {
            "distillation_alpha": (self.distillation_type != "none", "without --distillation_type"),
            "distillation_tau": (self.distillation_type == "soft", "without --distillation_type soft"),
        }


@dataclass(frozen=True)
class TokenLabelOptions(Group):
    """Token labels"""

    token_label: str | None = flag(None, "folder of token label maps (see scripts/make_label_maps.py)",
                                   type=path, metavar="FOLDER")
    token_label_weight: float | None = flag(None, "weight of the tokens' loss (default: 0.5)", type=float,
                                            check=not_negative)
    parts_of: ClassVar[Mapping[str, str]] = MappingProxyType({"token_label_weight": "token_label"})


@dataclass(frozen=True)
class ReportOptions(Group):
    """Reports and pictures"""

    report: str | None = flag(None, "with --eval, write tables there: the predictions of every image, accuracy by "
                                    "class, the confusion matrix", type=path, metavar="FOLDER")
    show_batch: str | None = flag(None, "write the first training images there, as the network sees them, and train",
                                  type=path, metavar="FILE", check=check_picture)


@dataclass(frozen=True)
class ClassificationSettings(Settings):
    """All options of a run that trains or evaluates a classifier."""

    evaluated = Settings.evaluated | {"model", "model_kwargs", "input_size", "nb_classes", "crop_pct"} | {
        field.name for field in fields(DataOptions)
    }
    decides_epoch = Settings.decides_epoch | {"data_set", "exif_transpose", "input_size"} | {
        field.name for field in fields(AugmentationOptions)
    } - {"class_weights", "crop_pct", "use_test_size"}
    model: ModelOptions
    data: DataOptions
    augmentation: AugmentationOptions
    distillation: DistillationOptions
    token_label: TokenLabelOptions
    report: ReportOptions

    most_used: ClassVar[tuple[str, ...]] = (
        "data_path", "data_set", "model", "load_release", "input_size", "finetune", *Settings.most_used,
    )

    @property
    def name(self) -> str:
        return self.model.model

    def advice_for(self, images: int) -> str | None:
        strong = self.augmentation.as_for_imagenet()
        if not strong or images >= _FEW or self.data.data_set not in IMAGE_FOLDERS:
            return None
        return (f"warning: the augmentation is that of ImageNet ({', '.join(strong)}), for {count(images, 'image')}; "
                "see configs/train/finetune_small.yaml and scratch_small.yaml")

    def needs(self) -> Needs:
        if self.evaluation.eval:
            none = dict.fromkeys(("show_batch", "output_dir"), (False, "with --eval"))
            return {**self.data.needs(), **none}
        return {**super().needs(), "drop_path": (not self.model.freeze_backbone, "with --freeze_backbone")}

    @classmethod
    def check_words(cls, given: Mapping[str, Any]):
        if given.get("use_test_size") and given.get("input_size") is not None:
            raise UsageError("--use_test_size and --input_size are mutually exclusive")

    @classmethod
    def not_taken(cls, asked: Mapping[str, Any], of_run: Mapping[str, Any]) -> set[str]:
        found = super().not_taken(asked, of_run)
        if asked.get("use_test_size"):
            found |= {"input_size", "crop_pct"}
        folder = asked.get("data_path", of_run.get("data_path"))
        if asked.get("eval") and folder is not None and (Path(folder) / "val").is_dir():
            found |= {"val_split"}
        return found

    def check(self):
        check_weights(self.model, self.checkpoint, self.evaluation.eval)
        if not self.evaluation.eval:
            self._check_training()
        if self.data.data_path is None and self.data.data_set != "digits":
            raise UsageError(f"--data_path is missing: the folder of the data set {self.data.data_set}")
        if self.data.data_set in ROBUSTNESS and self.evaluation.split != "val":
            raise UsageError(f"--data_set {self.data.data_set} has no split {self.evaluation.split}")
        if self.data.data_set in IMAGE_FOLDERS:
            for folder, name in self._written():
                check_is_no_class(folder, Path(self.data.data_path), name)

    def _written(self) -> Iterator[tuple[Path, str]]:
        """Folders that are written to, or in which folders are made, and what they are for messages."""
        output, shown, report = self.checkpoint.output_dir, self.report.show_batch, self.report.report
        if report is not None:
            yield Path(report), f"--report {report}"
        if self.evaluation.eval:
            return
        if shown is not None:
            yield Path(shown).parent, f"--show_batch {shown}"
        if output is None:
            yield OUTPUTS, f"{OUTPUTS}, where a run writes without --output_dir,"
        else:
            yield Path(output) / "tensorboard", f"--output_dir {output}"

    def _check_training(self):
        if self.data.data_set in ROBUSTNESS:
            raise UsageError(f"--data_set {self.data.data_set} is to be evaluated: it needs --eval")
        if self.report.report is not None:
            raise UsageError("--report is of an evaluation: it needs --eval")
        if self.augmentation.use_test_size:
            raise UsageError("--use_test_size is for --eval; a run is evaluated at its own --input_size")
        if self.machine.cuda_graph and self.model.grad_checkpointing:
            raise UsageError("--cuda_graph cannot capture --grad_checkpointing")
        if self.model.freeze_backbone:
            self._check_frozen()
        mixes = self.augmentation.mixup or self.augmentation.cutmix
        if mixes and self.loader.batch_size % 2:
            raise UsageError(f"mixup and cutmix pair images: --batch_size must be even, got {self.loader.batch_size}")
        if self.augmentation.class_weights != "none" and self.data.data_set.startswith("wds/"):
            raise UsageError("shards do not say how many images each class has: leave out --class_weights")
        if self.token_label.token_label is not None:
            self._check_token_label()
        elif self.token_label.token_label_weight is not None:
            raise UsageError("--token_label_weight needs --token_label, the folder of the label maps")

    def _check_frozen(self):
        start = [self.checkpoint.resume, self.checkpoint.finetune, self.model.load_release]
        if not any(start) and not self.checkpoint.resumes_here():
            raise UsageError("--freeze_backbone needs weights to freeze: --load_release, or --finetune CHECKPOINT")
        if self.model.drop:
            raise UsageError("--freeze_backbone trains without dropout: leave out --drop")
        if self.token_label.token_label is not None:
            raise UsageError("--token_label trains a second classifier, of tokens: leave out --freeze_backbone")
        if self.machine.cuda_graph:
            raise UsageError("--cuda_graph captures the training of a whole network: leave out --freeze_backbone")

    def _check_token_label(self):
        name, size = self.data.data_set, self.model.input_size
        if name not in IMAGE_FOLDERS:
            raise UsageError(f"--token_label needs a folder of images, --data_set {IMAGE_FOLDERS[0]}, not {name}")
        if self.augmentation.class_weights != "none":
            raise UsageError("--token_label has soft labels, not classes to count: leave out --class_weights")
        if self.distillation.distillation_type != "none":
            raise UsageError("--token_label is learning from a teacher already: leave out --distillation_type")
        if any(side % TOKEN_STRIDE for side in (size if isinstance(size, tuple) else (size,))):
            raise UsageError(f"--token_label needs an --input_size of whole tokens, multiples of {TOKEN_STRIDE} pixels")
        if self.augmentation.aa.startswith("augmix"):
            raise UsageError("--token_label cannot go with --aa augmix, which mixes several views of an image")
