"""The published augmentation, step by step, and the sizes at which images are evaluated."""
import colorsys
from functools import cache

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torchvision import tv_tensors

from helpers.photos import noise, photograph
from models.segmentation import EvalSize, SegmentationTransform, fit, resize
from tasks.segmentation.labels import IGNORE
from tasks.segmentation.transforms import (
    Augmentation,
    CropOfSeveralClasses,
    PadTo,
    PhotometricDistortion,
    RandomScale,
    TrainTransform,
    Views,
    distort,
)
from training.data.loader import seeded, seeded_sample

MEAN = (0.485, 0.456, 0.406)


def pixels_of(height=12, width=16):
    return torch.from_numpy(noise(height, width)).permute(2, 0, 1)


def as_mask(rows):
    return tv_tensors.Mask(torch.tensor(rows, dtype=torch.uint8))


# --- sizes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("image, sides, expected", [
    ((480, 640), (512, 2048), (512, 683)),  # 682.67
    ((640, 480), (512, 2048), (683, 512)),
    ((480, 640), (256, 1024), (256, 341)),  # 341.33
    ((480, 640), (1024, 4096), (1024, 1365)),  # 1365.33
    ((512, 512), (512, 2048), (512, 512)),
    ((200, 1000), (512, 2048), (410, 2048)),  # 409.6: the longer side decides
    ((1000, 200), (512, 2048), (2048, 410)),
    ((100, 101), (50, 1000), (50, 51)),  # 50.5
    ((100, 103), (50, 1000), (50, 52)),  # 51.5: halves are rounded up, not to even
    ((1, 1000), (512, 2048), (2, 2048)),
    ((1, 5000), (512, 2048), (1, 2048)),  # 0.41: at least a pixel
])
def test_an_image_is_as_large_as_fits_with_two_sides(image, sides, expected):
    assert fit(*image, *sides) == expected


def test_the_size_of_a_view_multiplies_both_sides():
    size = EvalSize(512, 2048)
    assert [size.of(480, 640, ratio) for ratio in (1.0, 0.5, 1.75)] == [(512, 683), (256, 341), (896, 1195)]
    assert size.of(200, 1000, 0.5) == (205, 1024)
    assert EvalSize(513, 2048).of(480, 640, 0.5) == (256, 341), "of 256.5 pixels the whole ones"


@pytest.mark.parametrize("rounding, expected", [
    ("none", [(512, 683), (512, 512), (205, 1024)]), ("pad", [(512, 683), (512, 512), (205, 1024)]),
    ("stretch", [(512, 704), (512, 512), (224, 1024)]),
])
def test_sides_are_stretched_to_multiples_of_32(rounding, expected):
    size = EvalSize(512, 2048, rounding)
    assert [size.of(480, 640), size.of(100, 100), size.of(200, 1000, 0.5)] == expected


# --- resizing ---------------------------------------------------------------------------------------------------------


def test_an_image_is_resized_by_hand():
    """Linear between the centres of pixels; of a shrunken image the pixels between them have no weight."""
    assert resize(torch.tensor([[[0, 100]]], dtype=torch.uint8), (1, 4)).tolist() == [[[0, 25, 75, 100]]]
    row = torch.tensor([200, 100, 0, 200, 200, 0, 40, 200], dtype=torch.uint8)
    assert resize(row.expand(3, 4, 8), (1, 2)).tolist() == [[[50, 20]]] * 3
    assert resize(row[:, None].expand(3, 8, 4), (2, 1)).tolist() == [[[50], [20]]] * 3


@pytest.mark.parametrize("size", [(64, 100), (37, 53), (20, 31), (5, 90)])
def test_an_image_is_resized_as_by_torch(size):
    """To one level: torch rounds uint8 after each side."""
    pixels = pixels_of(37, 53)
    expected = F.interpolate(pixels[None].float(), size, mode="bilinear", align_corners=False, antialias=False)[0]
    found = resize(pixels, size)
    assert found.dtype == torch.uint8 and found.shape == (3, *size)
    assert (found - expected).abs().max() <= 1


# --- random scale -----------------------------------------------------------------------------------------------------


def test_a_scaled_image_is_bilinear_and_its_labels_nearest():
    pixels, labels = pixels_of(24, 32), torch.randint(0, 256, (24, 32), dtype=torch.uint8)
    image, mask = RandomScale(EvalSize(18, 100), (1, 1))(tv_tensors.Image(pixels), tv_tensors.Mask(labels))
    assert type(image) is tv_tensors.Image and type(mask) is tv_tensors.Mask
    assert torch.equal(image.as_subclass(torch.Tensor), resize(pixels, (18, 24)))
    nearest = F.interpolate(labels[None, None], (18, 24), mode="nearest")[0, 0]
    assert mask.dtype == torch.uint8 and torch.equal(mask.as_subclass(torch.Tensor), nearest)


def test_labels_are_repeated_and_left_out_by_hand():
    labels = as_mask([[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 255, 11], [12, 13, 14, 15]])
    assert RandomScale(EvalSize(2, 2), (1, 1))(labels).tolist() == [[0, 2], [8, 255]]
    assert RandomScale(EvalSize(4, 4), (1, 1))(as_mask([[0, 255], [2, 1]])).tolist() == [
        [0, 0, 255, 255], [0, 0, 255, 255], [2, 2, 1, 1], [2, 2, 1, 1]]


def test_scales_are_uniform_between_both_ratios():
    """Of 100 x 400 pixels the shorter side is 50 to 200; each quarter of the way has a quarter of the images."""
    scale, image = RandomScale(EvalSize(100, 400), (0.5, 2.0)), [tv_tensors.Image(torch.zeros(3, 48, 64))]
    with seeded(0):
        sizes = np.array([scale.make_params(image)["size"] for _ in range(2000)])
    heights = sizes[:, 0]
    assert heights.min() in range(50, 53) and heights.max() in range(198, 201)
    quarters = np.histogram(heights, bins=[50, 87.5, 125, 162.5, 201])[0]
    assert (np.abs(quarters - 500) < 80).all()
    assert np.array_equal(sizes[:, 1], (heights * 64 / 48 + 0.5).astype(int)), "the shape stays"


def test_a_panorama_is_scaled_by_its_longer_side():
    scale, image = RandomScale(EvalSize(100, 400), (0.5, 2.0)), [tv_tensors.Image(torch.zeros(3, 10, 100))]
    with seeded(0):
        widths = {scale.make_params(image)["size"][1] for _ in range(500)}
    assert min(widths) in range(200, 212) and max(widths) in range(790, 801)


# --- crop -------------------------------------------------------------------------------------------------------------


class Scripted(CropOfSeveralClasses):
    """Draws crops of one row from a list of columns at which they begin, and none twice."""

    def __init__(self, width, columns):
        super().__init__((1, width))
        self.columns = iter(columns)

    def _draw(self, labels):
        return 0, next(self.columns), *self.size


FINE = [0, 1]  # a crop that needs no other


@pytest.mark.parametrize("crop, is_kept", [
    ([0, 1], True), ([0, 0, 0, 1], False), ([1, 0, 0, 0], False), ([0, 0, 0, 1, 1], True),
    ([0] * 74 + [3] * 26, True), ([0] * 75 + [3] * 25, False), ([0] * 75 + [3] * 15 + [2] * 10, False),
    ([0, 0, 0, 1] + [IGNORE] * 4, False), ([0, 0, 1] + [IGNORE] * 9, True), ([0, 254, IGNORE], True),
    ([0] * 5, False), ([254] * 5, False), ([IGNORE] * 5, False), ([7] + [IGNORE] * 5, False),
])
def test_a_crop_of_which_one_class_has_three_quarters_is_drawn_again(crop, is_kept):
    """Of its labelled pixels: those that are not labelled count neither as a class nor among them all."""
    labels = as_mask([crop + FINE * len(crop)])
    found = Scripted(len(crop), [0, len(crop)])(labels)
    assert found.tolist() == [crop if is_kept else (FINE * len(crop))[:len(crop)]]


@pytest.mark.parametrize("fine_at, taken", [(0, 0), (1, 1), (9, 9), (10, 10), (11, 10)])
def test_a_crop_is_drawn_again_at_most_ten_times(fine_at, taken):
    """The first fine one is taken, and else the eleventh that was drawn."""
    labels = torch.zeros(1, 40, dtype=torch.uint8)
    labels[0, 2 * fine_at] = 1
    crop = Scripted(2, range(0, 40, 2))
    assert crop.make_params([tv_tensors.Mask(labels)])["left"] == 2 * taken
    assert next(crop.columns) == 2 * taken + 2, "no more are drawn than are needed"


def test_crops_lie_anywhere_in_an_image():
    """Of 3 x 4 pixels in 4 x 6, at each of six places a sixth; image and labels are cut alike."""
    labels = torch.arange(24, dtype=torch.uint8).view(4, 6)
    image, crop = tv_tensors.Image(labels.expand(3, 4, 6)), CropOfSeveralClasses((3, 4))
    with seeded(0):
        crops = [crop(image, tv_tensors.Mask(labels)) for _ in range(1200)]
    assert all(x.shape == (3, 3, 4) and torch.equal(x[0], y) for x, y in crops)
    places, counts = np.unique([y[0, 0].item() for _, y in crops], return_counts=True)
    assert places.tolist() == [0, 1, 2, 6, 7, 8] and counts.min() > 150
    assert all(torch.equal(y, labels[y[0, 0] // 6:, y[0, 0] % 6:][:3, :4]) for _, y in crops)


@pytest.mark.parametrize("size, shape", [((9, 9), (4, 6)), ((9, 4), (4, 4)), ((3, 9), (3, 6)), ((4, 6), (4, 6))])
def test_of_an_image_smaller_than_the_crop_all_is_kept(size, shape):
    labels = torch.arange(24, dtype=torch.uint8).view(4, 6)
    found = CropOfSeveralClasses(size)(tv_tensors.Mask(labels))
    assert found.shape == shape
    if shape == (4, 6):
        assert torch.equal(found.as_subclass(torch.Tensor), labels)


# --- photometric distortion -------------------------------------------------------------------------------------------

PLAIN = dict(brightness=0.0, contrast=1.0, contrast_first=True, saturation=1.0, hue=0.0)


def distorted(colour, **settings):
    """What becomes of one colour."""
    return distort(torch.tensor(colour, dtype=torch.uint8).view(3, 1, 1), **{**PLAIN, **settings}).flatten().tolist()


def test_nothing_is_changed_by_nothing():
    pixels = pixels_of()
    assert torch.equal(distort(pixels, **PLAIN), pixels)


@pytest.mark.parametrize("first", [True, False])
def test_brightness_is_added_and_contrast_multiplied_by_hand(first):
    """Contrast needs no mean: an image of one grey changes too."""
    assert distorted((0, 100, 250), brightness=20.4) == [20, 120, 255]
    assert distorted((0, 100, 250), brightness=-32.0) == [0, 68, 218]
    assert distorted((10, 100, 200), contrast=1.5, contrast_first=first) == [15, 150, 255]
    assert distorted((10, 100, 200), contrast=0.5, contrast_first=first) == [5, 50, 100]
    assert distorted((100, 100, 100), contrast=0.5, contrast_first=first) == [50, 50, 50]
    assert distorted((10, 40, 90), brightness=20.0, contrast=1.5, contrast_first=first) == [45, 90, 165]


def test_brightness_is_cut_off_before_contrast_is_multiplied():
    assert distorted((250, 3, 100), brightness=30.0, contrast=0.5) == [128, 16, 65]
    assert distorted((250, 3, 100), brightness=-10.0, contrast=1.5, contrast_first=False) == [255, 0, 135]


def test_contrast_comes_before_saturation_or_after_it():
    """(200, 100, 50) x 1.5 is (255, 150, 75), of which half the saturation is left; or the other way round."""
    both = dict(contrast=1.5, saturation=0.5)
    assert distorted((200, 100, 50), **both, contrast_first=True) == [255, 202, 165]
    assert distorted((200, 100, 50), **both, contrast_first=False) == [255, 225, 188]


def in_hsv(pixels, change):
    """`change` of hue, saturation and value, 0 to 1, of each pixel by Python's colorsys."""
    colours = pixels.flatten(1).T.double() / 255
    changed = [colorsys.hsv_to_rgb(*change(*colorsys.rgb_to_hsv(*colour))) for colour in colours.tolist()]
    return 255 * torch.tensor(changed).T.view(pixels.shape)


def colours():
    """Random ones, greys, black, white, and the corners of the colour cube."""
    corners = torch.cartesian_prod(*[torch.tensor([0, 255])] * 3).T
    greys = torch.tensor([1, 7, 128, 254]).expand(3, 4)
    return torch.cat([pixels_of(10, 20).flatten(1), corners, greys], dim=1).to(torch.uint8)[:, None]


@pytest.mark.parametrize("factor", [0.5, 0.9, 1.1, 1.5])
def test_saturation_is_multiplied_in_hsv(factor):
    found = distort(colours(), **{**PLAIN, "saturation": factor})
    expected = in_hsv(colours(), lambda h, s, v: (h, min(1, s * factor), v))
    assert (found - expected).abs().max() <= 1
    assert (found != colours()).any(), "some colours change"


@pytest.mark.parametrize("turn", [-0.1, -0.03, 0.05, 0.1])
def test_hue_is_turned_around_the_circle(turn):
    found = distort(colours(), **{**PLAIN, "hue": turn})
    expected = in_hsv(colours(), lambda h, s, v: ((h + turn) % 1, s, v))
    assert (found - expected).abs().max() <= 1
    assert (found != colours()).any(), "some colours change"


@cache
def draws():
    step = PhotometricDistortion()
    with seeded(0):
        drawn = [step.make_params([]) for _ in range(4000)]
    return {name: np.array([params[name] for params in drawn]) for name in PLAIN}


def test_each_distortion_is_of_half_of_the_images_by_itself():
    drawn = draws()
    chosen = [drawn["contrast_first"], *(drawn[name] != PLAIN[name] for name in PLAIN if name != "contrast_first")]
    assert len(chosen) == 5
    for i, first in enumerate(chosen):
        assert 0.46 < first.mean() < 0.54
        assert all(0.22 < (first & other).mean() < 0.28 for other in chosen[:i])


@pytest.mark.parametrize("name, low, high", [
    ("brightness", -32, 32), ("contrast", 0.5, 1.5), ("saturation", 0.5, 1.5), ("hue", -18 / 180, 18 / 180),
])
def test_distortions_are_uniform_in_their_ranges(name, low, high):
    values = draws()[name]
    values = (values[values != PLAIN[name]] - low) / (high - low)
    assert 0 <= values.min() < 0.01 and 0.99 < values.max() <= 1
    quarters = np.histogram(values, bins=4, range=(0, 1))[0] / len(values)
    assert (np.abs(quarters - 0.25) < 0.04).all()


def test_labels_are_not_distorted():
    labels, step = torch.arange(192, dtype=torch.uint8).view(12, 16), PhotometricDistortion()
    with seeded(1):
        pairs = [step(tv_tensors.Image(pixels_of()), tv_tensors.Mask(labels)) for _ in range(20)]
    assert all(torch.equal(mask.as_subclass(torch.Tensor), labels) for _, mask in pairs)
    changed = [not torch.equal(image.as_subclass(torch.Tensor), pixels_of()) for image, _ in pairs]
    assert sum(changed) > 10 and all(image.dtype == torch.uint8 for image, _ in pairs)


# --- padding ----------------------------------------------------------------------------------------------------------


def test_what_is_padded_lies_right_and_below_of_a_colour_and_without_labels():
    pixels, labels = pixels_of(2, 3), as_mask([[0, 1, 2], [3, 4, 5]])
    image, mask = PadTo((4, 5), (10, 20, 30))(tv_tensors.Image(pixels), labels)
    assert mask.tolist() == [[0, 1, 2, 255, 255], [3, 4, 5, 255, 255], [255] * 5, [255] * 5]
    assert image.dtype == torch.uint8 and torch.equal(image[:, :2, :3].as_subclass(torch.Tensor), pixels)
    assert (image[:, :, 3:] == torch.tensor([10, 20, 30]).view(3, 1, 1)).all()
    assert (image[:, 2:] == torch.tensor([10, 20, 30]).view(3, 1, 1)).all()


def test_what_is_as_large_is_not_padded():
    pixels = pixels_of(4, 6)
    for size, shape in (((4, 6), (4, 6)), ((2, 3), (4, 6)), ((2, 8), (4, 8))):
        image = PadTo(size, (1, 2, 3))(tv_tensors.Image(pixels))
        assert image.shape == (3, *shape) and torch.equal(image[..., :6].as_subclass(torch.Tensor), pixels)


# --- all together -----------------------------------------------------------------------------------------------------


def plain(crop, short, flip=0.0, distortion=False, ratio=(1, 1)):
    """A transform that scales images to fit with `short` and four times that."""
    return TrainTransform(Augmentation(crop, EvalSize(short, 4 * short), ratio, flip, distortion), MEAN)


def test_a_flip_mirrors_image_and_labels():
    """Of an image that is scaled, cropped and padded to what it is; of half of them, where half are asked for."""
    pixels, labels = noise(12, 16), np.arange(192, dtype=np.uint8).reshape(12, 16)

    def flipped(flip):
        image, mask = plain((12, 16), 12, flip)(Image.fromarray(pixels), labels)
        is_flipped = mask[0, 0] != 0
        assert np.array_equal(mask, labels[:, ::-1] if is_flipped else labels)
        assert np.array_equal(image.permute(1, 2, 0), pixels[:, ::-1] if is_flipped else pixels)
        return bool(is_flipped)

    assert flipped(1.0) and not flipped(0.0)
    with seeded(0):
        assert 160 < sum(flipped(0.5) for _ in range(400)) < 240


def test_the_mean_colour_pads_a_small_image():
    image, mask = plain((32, 32), 12)(Image.fromarray(noise(12, 16)), np.zeros((12, 16), np.uint8))
    assert (mask[:12, :16] == 0).all() and (mask == IGNORE).sum() == 32 * 32 - 12 * 16
    assert np.array_equal(image[:, :12, :16].permute(1, 2, 0), noise(12, 16))
    # 123.675, 116.28 and 103.53
    assert (image[:, mask == IGNORE] == torch.tensor([124, 116, 104])[:, None]).all()


def test_a_seed_decides_all_of_it_and_distortion_none_of_the_rest():
    image, labels = Image.fromarray(noise(48, 64)), np.random.default_rng(0).integers(0, 5, (48, 64), np.uint8)

    def drawn(seed, distortion=True):
        with seeded_sample(seed):
            return plain((40, 40), 48, 0.5, distortion, ratio=(0.5, 2.0))(image, labels)

    first = drawn(3)
    for state in (0, 1):
        torch.manual_seed(state)
        np.random.seed(state)
        assert all(torch.equal(x, y) for x, y in zip(first, drawn(3), strict=True))
    others = [drawn(seed) for seed in range(10)]
    assert len({x.numpy().tobytes() for x, _ in others}) == len({y.numpy().tobytes() for _, y in others}) == 10
    undistorted = [drawn(seed, distortion=False) for seed in range(10)]
    assert all(torch.equal(x[1], y[1]) for x, y in zip(others, undistorted, strict=True))
    assert sum(not torch.equal(x[0], y[0]) for x, y in zip(others, undistorted, strict=True)) > 5


def coded():
    """An image of 75 x 110 pixels whose red is 20 + 40 times its label, of four classes and of none (4) in areas of
    different sizes, which no turning or mirroring maps onto themselves; and its labels.
    """
    codes = np.zeros((75, 110), np.uint8)
    codes[:30, 40:], codes[30:, :25], codes[50:, 25:80], codes[40:60, 90:] = 1, 2, 3, 4
    image = np.zeros((75, 110, 3), np.uint8)
    image[..., 0], image[..., 2] = 20 + 40 * codes, 255
    return Image.fromarray(image), np.where(codes == 4, IGNORE, codes).astype(np.uint8)


@pytest.mark.parametrize("crop", [(64, 64), (40, 100), (130, 33)])
@pytest.mark.parametrize("distortion", [False, True])
def test_the_crop_has_its_size_and_labels_stay_with_their_pixels(crop, distortion):
    """At any scale: but for the edges of areas, where colours mix, red tells the label."""
    image, labels = coded()
    transform, sizes = plain(crop, 75, 0.5, distortion, ratio=(0.5, 2.0)), set()
    for seed in range(20):
        with seeded_sample(seed):
            pixels, mask = transform(image, labels)
        assert type(pixels) is type(mask) is torch.Tensor and pixels.dtype == mask.dtype == torch.uint8
        assert pixels.shape == (3, *crop) and mask.shape == crop
        if distortion:
            continue
        is_image = pixels[1] == 0  # the padding has green
        sizes.add(int(is_image.sum()))
        assert (mask[~is_image] == IGNORE).all()
        told = ((pixels[0].float() - 20) / 40).round().to(torch.uint8)[is_image]
        told[told == 4] = IGNORE
        is_mixed = ~torch.isin(pixels[0], torch.tensor([20, 60, 100, 140, 180]))[is_image]
        assert is_mixed.float().mean() < 0.15
        assert (told == mask[is_image])[~is_mixed].float().mean() > 0.96
    assert distortion or len(sizes) > 1, "some were padded"


# --- views ------------------------------------------------------------------------------------------------------------


def test_an_image_is_seen_at_each_ratio_and_its_labels_stay_as_they_are():
    pixels, labels = noise(30, 40), np.random.default_rng(0).integers(0, 256, (30, 40), np.uint8)
    views, mask = Views(EvalSize(45, 180), (0.5, 1.0, 1.75))(Image.fromarray(pixels), labels)
    assert [view.shape for view in views] == [(3, 22, 29), (3, 45, 60), (3, 78, 104)]
    for view in views:
        assert view.dtype == torch.uint8
        assert torch.equal(view, resize(torch.from_numpy(pixels).permute(2, 0, 1), view.shape[1:]))
    assert mask.dtype == torch.uint8 and np.array_equal(mask, labels)


def test_views_of_an_image_without_labels():
    (view,), labels = Views(EvalSize(45, 180))(Image.fromarray(noise(30, 40)), None)
    assert view.shape == (3, 45, 60) and labels is None


@pytest.mark.parametrize("rounding, shapes", [
    ("none", [(45, 60), (90, 120)]), ("pad", [(45, 60), (90, 120)]), ("stretch", [(64, 64), (96, 128)]),
])
def test_views_are_stretched_and_never_padded(rounding, shapes):
    """Each at its own ratio; what is padded is what the network sees, once it is normalised."""
    image, labels = Image.fromarray(noise(30, 40)), np.zeros((30, 40), "u1")
    views, labels = Views(EvalSize(45, 180, rounding), (1.0, 2.0))(image, labels)
    assert [view.shape[1:] for view in views] == shapes and labels.shape == (30, 40)


def test_a_loaded_segmenter_sees_the_view_of_an_evaluation(tmp_path):
    """Normalised, and upright: 16 x 32 pixels at 24 x 48."""
    upright, std = photograph(tmp_path / "a.png", 6), (0.2, 0.3, 0.4)
    (view,), _ = Views(EvalSize(24, 96))(Image.fromarray(upright), None)
    with Image.open(tmp_path / "a.png") as image:
        found = SegmentationTransform(EvalSize(24, 96), MEAN, std)(image)
        assert SegmentationTransform(EvalSize(24, 96), MEAN, std, exif_transpose=False)(image).shape == (3, 48, 24)
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (MEAN, std))
    assert found.shape == (3, 24, 48) and found.dtype == torch.float32
    torch.testing.assert_close(found, (view / 255 - mean) / std)
