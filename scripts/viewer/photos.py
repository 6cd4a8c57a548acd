"""What a page holds of a photograph: the picture, what the network says of it, and what its attentions look at."""
import base64
import io
import re
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image
from timm.data import resolve_data_config
from torch import nn
from torchvision.transforms import functional as F

from models import collect_attention
from ops import AttentionRecord
from scripts.prediction.names import class_names
from utils import UserError

from .encoding import encode_attention

# Photographs are shown larger than the network gets them, up to this longest side.
_SHOWN = 1024
_SMALLEST = 32
# Of what the network gets; more would take minutes and gigabytes.
_MOST_PIXELS = 4_000_000


class SizeError(UserError):
    """An image size that networks or page do not take."""


@dataclass
class Looker:
    """A network that is looked at, and how it gets photographs: whole, in their own shape, resized.

    Args:
        network: A classifier with routed attention, in evaluation mode.
        input_size: Shorter side of what the network gets, in pixels, or its height and width; None for the side of the
            images that its config is for.
        with_weights: Whether the page can compute the attention of every token, which is most of its bytes.
        topk: Classes to name.
    """

    network: nn.Module
    input_size: int | tuple[int, int] | None = None
    with_weights: bool = True
    topk: int = 5
    names: list[str] = field(init=False)

    def __post_init__(self):
        self.names = class_names({}, self.network)
        self.config = resolve_data_config(model=self.network)
        self.input_size = self.input_size or min(self.config["input_size"][-2:])
        sides = (self.input_size,) if isinstance(self.input_size, int) else self.input_size
        if min(sides) < _SMALLEST:
            raise SizeError(f"the network takes images from {_SMALLEST} pixels a side, not {min(sides)}")

    def size_of(self, photo: Image.Image, name: str) -> tuple[int, int]:
        """(height, width) that the network gets of a photograph, here called `name`.

        Raises:
            SizeError: They are too many pixels, as of a very narrow photograph.
        """
        if isinstance(self.input_size, int):
            scale = self.input_size / min(photo.size)
            height, width = (max(_SMALLEST, round(side * scale)) for side in reversed(photo.size))
        else:
            height, width = self.input_size
        if height * width > _MOST_PIXELS:
            raise SizeError(f"{name}: {width} x {height} pixels are too many, give fewer")
        return height, width

    def tensor(self, photo: Image.Image, name: str) -> torch.Tensor:
        """An RGB photograph -> (1, 3, H, W), resized as in evaluation, but not cropped, and normalised.

        Raises:
            SizeError: As of `size_of`.
        """
        interpolation = F.InterpolationMode(self.config["interpolation"])
        image = F.to_tensor(F.resize(photo, list(self.size_of(photo, name)), interpolation))
        device = next(self.network.parameters()).device
        return F.normalize(image, self.config["mean"], self.config["std"])[None].to(device)

    @torch.inference_mode()
    def guesses(self, images: torch.Tensor) -> list[tuple[str, float]]:
        """The most probable classes of one image, with their probabilities."""
        probabilities = self.network(images)[0].float().softmax(0)
        best = probabilities.topk(min(self.topk, len(probabilities)))
        return [(self.names[i], p) for p, i in zip(best.values.tolist(), best.indices.tolist(), strict=True)]

    def look(self, photo: Image.Image, name: str) -> dict[str, Any]:
        """All that a page holds of an RGB photograph.

        Raises:
            SizeError: As of `size_of`.
        """
        images = self.tensor(photo, name)
        height, width = images.shape[-2:]
        shown = photo.copy()
        shown.thumbnail((_SHOWN, _SHOWN), Image.Resampling.LANCZOS)
        return dict(
            name=name, height=height, width=width, image=_jpeg(shown), guesses=self.guesses(images),
            layers=encode_layers(self.records(images), (height, width), self.with_weights),
        )

    def records(self, images: torch.Tensor) -> dict[str, dict[str, AttentionRecord]]:
        """`collect_attention` of one image, on the CPU."""
        found = collect_attention(self.network, images)
        return {module: {kind: _on_cpu(record) for kind, record in kinds.items()} for module, kinds in found.items()}


def encode_layers(
    found: dict[str, dict[str, AttentionRecord]], size: tuple[int, int], with_weights: bool = True
) -> list[dict[str, Any]]:
    """The attentions of one image, in the order of the forward pass.

    Args:
        found: As `Looker.records` returns it.
        size: (height, width) of the image that the network got.
        with_weights: As of `Looker`.
    """
    layers = []
    for module, records in found.items():
        for kind, record in records.items():
            strides = [stride_of(size, x.shape[1:3]) for x in (record.query, record.key)]
            encoded = encode_attention(record, *strides, with_weights)
            layers.append(dict(module=module, kind=kind, **place_of(module), **encoded))
    return layers


def _on_cpu(part: Any) -> Any:
    """A part of a record, with its tensors on the CPU."""
    if isinstance(part, torch.Tensor):
        return part.cpu()
    return type(part)(*map(_on_cpu, part)) if isinstance(part, tuple) and hasattr(part, "_fields") else part


def stride_of(size: tuple[int, int], shape: tuple[int, int]) -> int:
    """The side of a map's token in pixels: a power of two, of which the last token of a row may lie partly outside."""
    stride = 1
    while -(-size[0] // stride) > shape[0] or -(-size[1] // stride) > shape[1]:
        stride *= 2
    return stride


def place_of(module: str) -> dict[str, Any]:
    """Where in the network a module lies, counted from 1, and which half of a block it is, of those that have two."""
    found = re.search(r"stages\.(\d+)\.blocks\.(\d+)(?:\.(first|second))?", module)
    if found is None:
        return dict(stage=None, block=None, half=None)
    return dict(stage=int(found[1]) + 1, block=int(found[2]) + 1, half=found[3])


def _jpeg(photo: Image.Image) -> str:
    """A photograph as a data URL."""
    file = io.BytesIO()
    photo.save(file, "JPEG", quality=88)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()
