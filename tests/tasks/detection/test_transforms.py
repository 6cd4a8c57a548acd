"""tasks/detection/transforms.py: sizes, flips and crops of images with their boxes and masks."""
import numpy as np
import pytest
import torch
from PIL import Image

from tasks.detection.coco import Target
from tasks.detection.transforms import (
    BEFORE_CROP,
    CROP,
    SCALES,
    FitSides,
    MultiScale,
    RandomSizeCrop,
    TrainTransform,
    to_sample,
)


def example(height=60, width=90, boxes=((10, 5, 40, 50), (50, 30, 85, 58)), with_masks=True):
    """An image whose objects are white, and their boxes and masks."""
    boxes = np.array(boxes, np.float32).reshape(-1, 4)
    masks = np.zeros((len(boxes), height, width), bool)
    for mask, (left, top, right, bottom) in zip(masks, boxes.astype(int), strict=True):
        mask[top:bottom, left:right] = True
    pixels = np.where(masks.any(0)[..., None], 255, 0).astype(np.uint8).repeat(3, axis=2)
    labels = np.arange(1, len(boxes) + 1)
    return Image.fromarray(pixels), Target(boxes, labels, masks if with_masks else None)


def transformed(transform, image, target, seed=0):
    torch.manual_seed(seed)
    return transform(image, target)


@pytest.mark.parametrize("size,expected", [
    ((480, 640), (800, 1067)), ((200, 1000), (267, 1333)), ((640, 480), (1067, 800)), ((427, 640), (800, 1199)),
])
def test_sizes_are_the_published_ones(size, expected):
    """int(side * scale + 0.5), where the scale is the smaller of 1333 / long side and 800 / short side."""
    image, target = example(*size, boxes=[(10, 20, 100, 150)])
    pixels, found = transformed(TrainTransform(800, 1333, flip=0), image, target)
    assert pixels.shape == (3, *expected) and pixels.dtype == torch.uint8 and found["masks"].shape == (1, *expected)
    scale = torch.tensor([expected[1] / size[1], expected[0] / size[0]] * 2)
    torch.testing.assert_close(found["boxes"], torch.tensor([[10.0, 20, 100, 150]]) * scale)
    assert found["labels"].tolist() == [1] and found["masks"].dtype == torch.bool


def test_objects_stay_with_their_pixels():
    """Flipped, resized and cropped, masks cover what is white, and boxes are about them."""
    image, target = example(240, 360, boxes=[(40, 20, 160, 200), (200, 120, 340, 232)])
    seen = set()
    for seed in range(12):
        pixels, found = transformed(TrainTransform(300, 500, multi_scale=True), image, target, seed)
        seen.add(tuple(pixels.shape))
        white = pixels[0] > 127
        assert (found["masks"].any(dim=0) != white).float().mean() < 0.02
        for box, mask in zip(found["boxes"], found["masks"], strict=True):
            rows, columns = mask.any(dim=1).nonzero(), mask.any(dim=0).nonzero()
            extent = torch.tensor([columns[0, 0], rows[0, 0], columns[-1, 0] + 1, rows[-1, 0] + 1])
            assert (box - extent).abs().max() <= 2
        assert len(found["labels"]) == len(found["boxes"]) == len(found["masks"])
    assert len(seen) > 6


def test_flips():
    image, target = example()
    plain = transformed(TrainTransform(60, 90, flip=0), image, target)
    pixels, found = transformed(TrainTransform(60, 90, flip=1), image, target)
    assert torch.equal(pixels, plain[0].flip(2)) and torch.equal(found["masks"], plain[1]["masks"].flip(2))
    assert found["boxes"].tolist() == [[50, 5, 80, 50], [5, 30, 40, 58]]
    flips = [transformed(TrainTransform(60, 90), image, target, seed)[1]["boxes"][0, 0] == 50 for seed in range(100)]
    assert 35 < sum(flips) < 65


def test_images_follow_from_the_seed():
    image, target = example(200, 300)
    transform = TrainTransform(200, 300, multi_scale=True)
    first, again, other = (transformed(transform, image, target, seed)[0] for seed in (3, 3, 4))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_targets_are_not_changed():
    image, target = example()
    before = [x.copy() for x in target]
    transformed(TrainTransform(120, 200, multi_scale=True, flip=1), image, target)
    assert all(np.array_equal(x, y) for x, y in zip(before, target, strict=True))


# --- several sizes, and crops -----------------------------------------------------------------------------------------


def test_sizes_and_crops_are_detrs():
    assert SCALES == (480, 512, 544, 576, 608, 640, 672, 704, 736, 768, 800)
    assert BEFORE_CROP == (400, 500, 600) and CROP == (384, 600)
    transform = MultiScale(800, 1333)
    before, crop, after = transform.cropped.transforms
    assert transform.plain.shorts == SCALES and before.shorts == BEFORE_CROP and crop.sides == CROP
    assert after is transform.plain and transform.plain.long == before.long == 1333


def test_sizes_and_crops_of_smaller_images():
    """All as large as for 800."""
    transform = MultiScale(400, 666)
    assert transform.plain.shorts == tuple(range(240, 401, 16)) and transform.cropped.transforms[1].sides == (192, 300)


def test_every_second_image_is_cropped():
    """A crop of its own shape is no longer of the image's."""
    image, target = example(600, 600, boxes=[(10, 10, 590, 590)])
    sizes = [tuple(transformed(TrainTransform(80, 133, True), image, target, seed)[0].shape[1:]) for seed in range(60)]
    cropped = [size for size in sizes if size[0] != size[1]]
    assert 18 < len(cropped) < 42 and len({size for size in sizes if size[0] == size[1]}) >= 6


@pytest.mark.parametrize("size", [(20, 400), (700, 30), (384, 384)])
def test_of_a_smaller_side_a_crop_keeps_all(size):
    crop = RandomSizeCrop((384, 600))
    for seed in range(20):
        torch.manual_seed(seed)
        params = crop.make_params([torch.zeros(3, *size)])
        for side, first, length in zip(size, (params["top"], params["left"]), (params["height"], params["width"]),
                                       strict=True):
            assert min(side, 384) <= length <= min(side, 600) and 0 <= first <= side - length


def test_objects_outside_of_a_crop_are_gone():
    """All of them may be: such an image is learnt from too."""
    image, target = example(1200, 1200, boxes=[(0, 0, 30, 30), (1170, 1170, 1200, 1200)])
    numbers = set()
    for seed in range(40):
        _, found = transformed(TrainTransform(1200, 2000, True), image, target, seed)
        numbers.add(len(found["labels"]))
        assert (found["boxes"][:, 2:] > found["boxes"][:, :2]).all()
        assert found["masks"].shape[0] == found["boxes"].shape[0] == len(found["labels"])
    assert 0 in numbers and 2 in numbers


def test_a_drawn_side_is_one_of_those_given():
    torch.manual_seed(0)
    fit = FitSides((40, 50), 100)
    sizes = {fit.make_params([torch.zeros(3, 30, 60)])["size"] for _ in range(40)}
    assert sizes == {(40, 80), (50, 100)}


# --- evaluation -------------------------------------------------------------------------------------------------------


def test_an_evaluation_gets_images_as_they_are():
    image, _ = example(33, 47)
    pixels, id = to_sample(image, 12)
    assert id == 12 and pixels.shape == (3, 33, 47) and np.array_equal(pixels.permute(1, 2, 0), np.asarray(image))


def test_boxes_alone():
    image, target = example(with_masks=False)
    _, found = transformed(TrainTransform(120, 200, multi_scale=True), image, target)
    assert found.keys() == {"boxes", "labels"}
