"""What the command-line options of several tasks have in common: the network by timm's name, the size of its images."""
import argparse
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar

from training.flags import Group, Needs, flag, fraction, key_value
from training.options import CheckpointOptions, Settings
from utils import UsageError

# Names that models were published under, where timm's style differs.
PUBLISHED_NAMES = {
    "BViT-5": "bvit_5m", "BViT-22": "bvit_22m",
    "ViTAE_basic_Tiny": "vitae_tiny", "ViTAE_basic_6M": "vitae_6m", "ViTAE_basic_13M": "vitae_13m",
    "ViTAE_basic_Small": "vitae_s", "ViTAE_basic_Base": "vitae_b", "ViTAE_basic_Large": "vitae_l",
    "ViTAE_basic_Huge": "vitae_h",
}


def model_name(text: str) -> str:
    """timm's name of a model that may be given by its published one."""
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


def check_range(value: list[float]) -> str | None:
    """Check that two numbers are a range above 0."""
    low, high = value
    return None if 0 < low <= high < float("inf") else "takes a range above 0"


def check_picture(file: str) -> str | None:
    """Check that a file name ends as a picture's."""
    return None if Path(file).suffix.lower() in (".png", ".jpg", ".jpeg") else "must end in .png or .jpg"


@dataclass(frozen=True)
class NetworkOptions(Group):
    """Network"""

    model: str = flag(
        "biformer_small", f"any model that timm knows, ours included; as published too: {', '.join(PUBLISHED_NAMES)}",
        alias="arch", type=model_name, metavar="MODEL",
    )
    model_kwargs: dict[str, Any] = flag({}, "arguments of the model", type=key_value, nargs="*", metavar="KEY=VALUE")
    drop_path: float = flag(0.1, "stochastic depth rate of the last block", type=float, check=fraction)
    grad_checkpointing: bool = flag(False, "recompute activations in the backward pass to save memory")
    load_release: bool = flag(False, "start from the published weights of the model")
    parts_of: ClassVar[Mapping[str, str]] = MappingProxyType({"model_kwargs": "model"})
    classes_are: ClassVar[str] = "the data's"

    def check(self):
        if "num_classes" in self.model_kwargs:
            raise UsageError(f"--model_kwargs num_classes: the number of classes is {self.classes_are}")


def check_weights(
    network: NetworkOptions, checkpoint: CheckpointOptions, is_evaluation: bool, can_release: bool = True
):
    """Check that a run starts from one place.

    Args:
        network, checkpoint: What was asked for.
        is_evaluation: Whether it evaluates, for which it needs weights.
        can_release: Whether published weights can be evaluated.

    Raises:
        UsageError: It starts from several, or an evaluation has none.
    """
    weights = [checkpoint.resume, checkpoint.finetune, network.load_release]
    if is_evaluation and not any(weights if can_release else weights[:2]):
        published = ", or --load_release for the published ones" if can_release else ""
        raise UsageError(f"--eval needs weights: --resume CHECKPOINT{published}")
    if sum(map(bool, weights)) > 1:
        raise UsageError("--resume, --finetune and --load_release are mutually exclusive")


@dataclass(frozen=True)
class OnBackboneSettings(Settings):
    """All options of a run whose network stands on a backbone.

    Attributes:
        data_is: What `--data_path` names.
        of_evaluation: Flags of an evaluation alone, of the group `report`.
    """

    data_is: ClassVar[str]
    of_evaluation: ClassVar[tuple[str, ...]] = ("report",)

    def needs(self) -> Needs:
        if self.evaluation.eval:
            return dict.fromkeys(("show_batch", "output_dir"), (False, "with --eval"))
        return super().needs()

    def check(self):
        check_weights(self.model, self.checkpoint, self.evaluation.eval, can_release=False)
        if self.data.data_path is None:
            raise UsageError(f"--data_path is missing: {self.data_is}")
        if self.evaluation.eval:
            return
        for name in self.of_evaluation:
            if getattr(self.report, name) is not None:
                raise UsageError(f"--{name} is of an evaluation: it needs --eval")
        if self.optimizer.layer_decay is not None:
            raise UsageError("--layer_decay is for classifiers alone")
        if self.machine.cuda_graph:
            raise UsageError("--cuda_graph is for classifiers alone")
