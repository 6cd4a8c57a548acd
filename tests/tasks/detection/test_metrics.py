"""tasks/detection/metrics.py: what a detector finds, scored over all images, on one process or several."""
import copy
import json
import math

import numpy as np
import pytest
import torch
from pycocotools import mask as coco_masks

from helpers.objects import CLASSES, IDS, read_annotations, write_objects
from tasks.detection.coco import open_coco
from tasks.detection.data import Sample
from tasks.detection.metrics import DetectionScores, Truth, as_entries, flat, watch_outputs
from tasks.detection.scores import MASK, score
from tasks.errors import UnfitImageError
from training.distributed import Distributed
from utils import UserError

CPU = torch.device("cpu")
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return open_coco(str(write_objects(tmp_path_factory.mktemp("data"))), "val", None, False, True, False)


class Known(torch.nn.Module):
    """Finds the annotated objects of images in the order in which it is called, with these changes."""

    def __init__(self, images, change=lambda found: found, value=0.0):
        super().__init__()
        self.images, self.change, self.calls = images, change, 0
        self.head = torch.nn.Identity()
        self.value = value

    def forward(self, batch):
        image, = batch
        assert image.dtype == torch.float32 and 0 <= image.min() <= image.max() <= 1
        self.head({"cls_logits": [image, image + self.value]})
        objects, entry = self.images.found.objects(self.calls), self.images.found.images[self.calls]
        self.calls += 1
        masks = np.stack([
            coco_masks.decode(coco_masks.merge(coco_masks.frPyObjects(x, entry.height, entry.width)))
            for x in objects.segmentations
        ])
        return [self.change(dict(
            boxes=torch.tensor(objects.boxes), labels=torch.tensor(objects.labels), scores=torch.ones(len(objects)),
            masks=torch.tensor(masks).bool(),
        ))]


def samples(images):
    return [
        Sample(torch.tensor(np.asarray(image)).permute(2, 0, 1), id) for image, id in map(images.__getitem__, range(4))
    ]


def truth_of(images):
    return Truth(images.found.content, list(images.found.categories))


def scored(images, network, batch=None, with_masks=True):
    evaluator = DetectionScores(truth_of(images), with_masks, CPU, shown=[1, 3])
    evaluator.update(network, samples(images) if batch is None else batch)
    return evaluator, evaluator.compute(Distributed(CPU))


def test_whoever_finds_all_has_an_ap_of_100(images):
    evaluator, results = scored(images, Known(images))
    assert results["mask_AP"] == results["box_AP"] == results["box_AP50"] == 100 and results["images"] == 4
    assert results["mask_AP/red"] == 100 and results["box_AR/100"] == 100
    assert math.isnan(results["box_AP_of_size/large"])  # there is none
    assert [shown.id for shown in evaluator.shown] == [11, 31] and len(evaluator.detections) == 12
    assert {entry["category_id"] for entry in evaluator.detections} <= set(IDS)
    json.dumps(evaluator.detections)


def test_scores_are_those_of_the_detections(images):
    """Some are lost, some shifted."""
    rng = torch.Generator().manual_seed(0)

    def change(found):
        kept = torch.rand(len(found["labels"]), generator=rng) > 0.3
        found = {name: value[kept] for name, value in found.items()}
        found["boxes"] += torch.randn(found["boxes"].shape, generator=rng) * 3
        return dict(found, scores=torch.rand(len(found["labels"]), generator=rng))

    evaluator, results = scored(images, Known(images, change))
    expected = score(images.found.content, evaluator.detections, MASK)
    assert results["mask_AP"] == 100 * expected.values["AP"] and 0 < results["box_AP"] < results["mask_AP"] < 100
    assert results["mask_AP/blue"] == 100 * {name: ap for name, _, ap, _ in expected.classes}["blue"]


def test_images_without_detections_count(images):
    def change(found):
        return {name: value[:0] for name, value in found.items()} if network.calls == 1 else found

    network = Known(images, change)
    _, results = scored(images, network)
    assert results["images"] == 4 and 0 < results["box_AP"] < 100
    _, results = scored(images, Known(images, lambda found: {name: value[:0] for name, value in found.items()}))
    assert results["box_AP"] == results["mask_AP"] == 0


def test_images_that_cannot_be_read_do_not_count(images):
    """Nor do the objects in them."""
    network = Known(images)
    unread = Sample(torch.zeros(3, 9, 9, dtype=torch.uint8), None)
    evaluator, results = scored(images, network, [*samples(images)[:3], unread])
    assert results["images"] == 3 and results["box_AP"] == 100 and evaluator.seen == 4


def test_boxes_alone(images):
    def change(found):
        return {name: value for name, value in found.items() if name != "masks"}

    evaluator, results = scored(images, Known(images, change), with_masks=False)
    assert results["box_AP"] == 100 and not any(name.startswith("mask") for name in results)
    assert [found.kind for found in evaluator.scores] == ["box"] and "segmentation" not in evaluator.detections[0]


def test_maps_that_are_not_finite_are_told(images):
    """Of NaN, a detector finds nothing, and would have an AP of 0."""
    _, results = scored(images, Known(images, value=float("nan")))
    assert math.isnan(results["mask_AP"]) and math.isnan(results["box_AP"]) and results["images"] == 4
    network = Known(images, value=float("inf"))
    with watch_outputs(network) as problems:
        network([torch.zeros(3, 8, 8)])
    assert problems == ["head"] and not network.head._forward_hooks


def test_nothing_to_evaluate(images):
    with pytest.raises(UserError, match=r"^there was no image to evaluate$"):
        scored(images, Known(images), [])
    bare = copy.copy(images)
    content = dict(images.found.content, annotations=[])
    for has_objects in (True, False):
        evaluator = DetectionScores(Truth(content, list(IDS), has_objects), True, CPU)
        evaluator.update(Known(bare), samples(images))
        if not has_objects:
            assert math.isnan(evaluator.compute(Distributed(CPU))["mask_AP"]) and len(evaluator.detections) == 12
            continue
        with pytest.raises(UserError, match=r"^no object in the 4 images to evaluate$"):
            evaluator.compute(Distributed(CPU))


def test_an_image_that_the_network_does_not_take(images):
    class Refuses(Known):
        def forward(self, batch):
            raise RuntimeError("sizes differ")

    with pytest.raises(UnfitImageError, match=r"^the network cannot take an image of 64 x 76 pixels: sizes differ$"):
        scored(images, Refuses(images))


def test_entries_have_cocos_boxes():
    found = dict(boxes=torch.tensor([[1.5, 2, 11.5, 22]]), labels=torch.tensor([2]), scores=torch.tensor([0.5]))
    assert as_entries(found, 7, IDS) == [dict(image_id=7, category_id=7, bbox=[1.5, 2, 10, 20], score=0.5)]


def test_names_of_scores(images):
    names = set(flat(score(images.found.content, [], MASK)))
    assert {"mask_AP", "mask_AP50", "mask_AP75", "mask_AR/1", "mask_AP_of_size/small"} <= names
    assert {f"mask_AP/{name}" for name in CLASSES} <= names and len(names) == 12 + len(CLASSES)
    assert read_annotations(images.folder.parent, "val")["categories"][0]["name"] == "red"
