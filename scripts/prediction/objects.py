"""Objects in images, by a detector: drawn into pictures, and written as a JSON file in COCO's format."""
import argparse
import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torchvision.models.detection import MaskRCNN_ResNet50_FPN_Weights
from torchvision.transforms.v2 import functional as F

from models.detection import Detector, DetectorRecipe, create_trained
from tasks.colours import colours_of
from tasks.detection.drawing import draw_objects
from tasks.detection.masks import encode
from tasks.detection.metrics import watch_outputs
from tasks.pictures import prepare_folder, write_picture
from training.distributed import init_distributed
from training.precision import Precision
from training.task import NonFiniteOutputError
from utils import UserError, replace_file

from .images import Prediction
from .whole import Images, Kind, load_items, load_network, output_names

DETECTOR = Kind("detection", Detector.kind, DetectorRecipe, create_trained, "pictures", ".jpg")
# Below the output folder.
RESULTS = "detections.json"


@torch.inference_mode()
def predict(args: argparse.Namespace, paths: list[Path]) -> Iterator[Prediction]:
    """The objects in each image whose scores are above `args.score`: the best `args.topk` of them, and how many more.

    Writes FOLDER/NAME.jpg and FOLDER/detections.json, where `args.output` is a folder; the latter once all images are
    predicted, or when the generator is closed, of what was predicted until then.

    Raises:
        UserError: The weights cannot be read, a file cannot be written, or outputs are NaN.
    """
    names = output_names(DETECTOR, args.images, paths, args.output)
    if args.output is not None:
        prepare_folder(args.output)
    distributed = init_distributed(args.device)
    network, recipe, _ = load_network(DETECTOR, args)
    network.to(distributed.device).find_above(args.score)
    precision = Precision.on(distributed.device, args.amp)
    classes = class_names(recipe)
    results, has_ended = Results(classes), False
    try:
        for item in load_items(Images(paths, _prepare, recipe.exif_transpose), args.num_workers, distributed):
            path = paths[item.index]
            if item.error:
                yield Prediction(path, [], item.error)
                continue
            with precision.autocast(), watch_outputs(network) as problems:
                found, = network([F.to_dtype(item.views[0].to(distributed.device), torch.float32, scale=True)])
            if problems:  # which looks like an image without objects
                raise NonFiniteOutputError(f"{path}: the outputs of the network are NaN or infinite")
            found = {name: value.cpu().numpy() for name, value in found.items()}
            objects = [(classes[i - 1], s) for i, s in zip(found["labels"], found["scores"].tolist(), strict=True)]
            if args.output is not None:
                name = names[item.index]
                _draw(args.output / f"{name}.jpg", item.pixels, objects, found)
                results.add(item.index + 1, f"{name}{path.suffix}", item.pixels.shape[:2], found)
            yield Prediction(path, objects[: args.topk], more=len(objects[args.topk :]))
        has_ended = True
    finally:
        if args.output is not None and (has_ended or results.images):
            results.write(args.output / RESULTS)


def _prepare(image: Image.Image) -> list[torch.Tensor]:
    return [F.pil_to_tensor(image)]


def class_names(recipe: DetectorRecipe) -> list[str]:
    """The checkpoint's classes; of 80 without names COCO's, of which nearly all published detectors are; or numbers."""
    if recipe.class_names:
        return recipe.class_names
    return _coco_names() if recipe.num_classes == 80 else [str(i + 1) for i in range(recipe.num_classes)]


@cache
def _coco_names() -> list[str]:
    """The 80 classes of COCO that have objects, in order."""
    categories = MaskRCNN_ResNet50_FPN_Weights.COCO_V1.meta["categories"]
    return [name for name in categories if name not in ("__background__", "N/A")]


class Results:
    """Images and their objects, in COCO's format with a score for each, which labelling tools and pycocotools open.

    Args:
        classes: Names, in order; the ids of categories count from 1.
    """

    def __init__(self, classes: list[str]):
        self.categories = [dict(id=i, name=name) for i, name in enumerate(classes, start=1)]
        self.images: list[dict[str, Any]] = []
        self.annotations: list[dict[str, Any]] = []

    def add(self, image_id: int, name: str, size: tuple[int, int], found: dict[str, np.ndarray]):
        """Add an image, (height, width) pixels upright, and what was found in it: boxes, labels, scores, masks."""
        self.images.append(dict(id=image_id, file_name=name, width=size[1], height=size[0]))
        boxes = np.concatenate([found["boxes"][:, :2], found["boxes"][:, 2:] - found["boxes"][:, :2]], axis=1)
        masks = encode(found["masks"]) if "masks" in found else None
        for index, (box, score) in enumerate(zip(boxes.tolist(), found["scores"].tolist(), strict=True)):
            entry = dict(
                id=len(self.annotations) + 1, image_id=image_id, category_id=int(found["labels"][index]),
                bbox=[round(x, 2) for x in box], area=round(box[2] * box[3], 2), iscrowd=0, score=round(score, 5),
            )
            if masks is not None:
                entry |= dict(area=int(found["masks"][index].sum()), segmentation=masks[index])
            self.annotations.append(entry)

    def write(self, file: Path):
        """Write them all.

        Raises:
            UserError: The file cannot be written.
        """
        content = dict(images=self.images, categories=self.categories, annotations=self.annotations)
        try:
            replace_file(file, lambda out: out.write(json.dumps(content).encode("ascii")))
        except OSError as error:
            raise UserError(f"cannot write {file}: {error.strerror}") from error


def _draw(file: Path, pixels: np.ndarray, objects: list[tuple[str, float]], found: dict[str, np.ndarray]):
    names, scores = [name for name, _ in objects], [score for _, score in objects]
    write_picture(file, draw_objects(pixels, found["boxes"], names, scores, found.get("masks"),
                                     colours_of(found["labels"])))
