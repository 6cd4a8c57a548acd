"""What a checkpoint says of the network in it: model, arguments, classes, image size and crop."""
from dataclasses import dataclass, field
from typing import Any

import timm
import torch
from timm.models import PretrainedCfg

ImageSize = int | tuple[int, int]
# Names of the classifier in published checkpoints of our families.
_PUBLISHED_CLASSIFIERS = ("head", "mlp_head.1")


def _image_size(value: Any) -> ImageSize | None:
    """A side, or (height, width), of what a recipe says of it: 224, "224" or "224x320"."""
    if value is None:
        return None
    sides = tuple(int(side) for side in str(value).lower().split("x"))
    return sides[0] if len(sides) == 1 else sides


def size_kwargs(name: str, input_size: ImageSize) -> dict[str, Any]:
    """The image size as an argument of timm's models that are built for one size; empty for the others."""
    return dict(img_size=input_size) if timm.models.get_pretrained_cfg_value(name, "fixed_input_size") else {}


def count_classes(weights: dict[str, torch.Tensor], cfg: PretrainedCfg) -> int | None:
    """Classes of the classifier, under timm's name or a published one of our families; None where there is none."""
    names = (cfg.classifier,) if isinstance(cfg.classifier, str) else tuple(cfg.classifier or ())
    names += _PUBLISHED_CLASSIFIERS
    found = [weights[f"{name}.weight"] for name in names if f"{name}.weight" in weights]
    return len(found[0]) if found and found[0].ndim > 1 else None


@dataclass(frozen=True)
class NetworkRecipe:
    """What is needed to build the network of a checkpoint again.

    Args:
        model: Its name; None where the checkpoint does not say.
        kwargs: Its arguments, without those of the image size and the number of classes.
        num_classes: Its classes; None for as many as it was published with.
        class_names: Their names, in order, where they are known.
        input_size: Side, or (height, width), of the images that it was trained on, in pixels; None for the published.
        crop_pct: Part of the resized image that evaluation's crop keeps; None for the published.
        exif_transpose: Whether images were turned upright, as their EXIF orientation says.
        task: What it was trained for; classification where the checkpoint does not say.
    """

    model: str | None
    kwargs: dict[str, Any] = field(default_factory=dict)
    num_classes: int | None = None
    class_names: list[str] | None = None
    input_size: ImageSize | None = None
    crop_pct: float | None = None
    exif_transpose: bool = True
    task: str = "classification"

    @classmethod
    def of(cls, checkpoint: dict[str, Any], model: str | None = None) -> "NetworkRecipe":
        """What a checkpoint says: a run's says everything, one that holds weights alone nothing.

        Args:
            checkpoint: As `storage.weights.read_checkpoint` returns it.
            model: The model's name, where the checkpoint does not say it, or says another.
        """
        said = checkpoint.get("args")
        said = said if isinstance(said, dict) else {}
        # Checkpoints of others hold other things by these names.
        is_ours = "task" in said
        names = checkpoint.get("classes") if is_ours else None
        num_classes = (said.get("nb_classes") if is_ours else None) or len(names or ()) or None
        if not is_ours or model not in (None, said.get("model")):
            named = said.get("model")
            return cls(model or (named if isinstance(named, str) else None), {}, num_classes, names)
        return cls(
            said.get("model"), said.get("model_kwargs") or {}, num_classes, names,
            _image_size(said.get("input_size")), said.get("crop_pct"), said.get("exif_transpose", True),
            said["task"],
        )

    @property
    def owner(self) -> str:
        """The ending of an error that says whose weights do not fit; empty where the checkpoint does not."""
        if self.model is None:
            return ""
        arguments = "".join(f", {name}={value!r}" for name, value in self.kwargs.items())
        classes = f" with {self.num_classes} classes" if self.num_classes else ""
        return f"; this is {self.model}'s{classes}{arguments}"

    @property
    def build_kwargs(self) -> dict[str, Any]:
        """The arguments of `timm.create_model`."""
        kwargs = {} if self.num_classes is None else dict(num_classes=self.num_classes)
        return kwargs | ({} if self.input_size is None else size_kwargs(self.model, self.input_size)) | self.kwargs

    def config(self, published: tuple[str, ...] | None) -> dict[str, Any]:
        """The entries of a `pretrained_cfg` by which `timm.data.resolve_data_config` is that of the run.

        Args:
            published: The names of the classes in the model's default config, whose descriptions are kept for a run
                on the same; None where it has none.
        """
        names = tuple(self.class_names) if self.class_names else None
        config: dict[str, Any] = dict(label_names=names)
        if names is None or names != published:
            config["label_descriptions"] = None
        if self.input_size is not None:
            size = self.input_size
            config["input_size"] = (3, *(size if isinstance(size, tuple) else (size, size)))
        if self.crop_pct is not None:
            config["crop_pct"] = self.crop_pct
        if self.num_classes is not None:
            config["num_classes"] = self.num_classes
        return config
