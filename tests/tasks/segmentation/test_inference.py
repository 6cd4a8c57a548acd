"""Labels of whole images: windows, several views, mirrored ones, padding, and outputs that are no numbers."""
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tasks.segmentation import inference
from tasks.segmentation.inference import Inference, windows
from training.precision import Precision

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def inference_of(**settings):
    return Inference(MEAN, STD, Precision(), **settings)


# Of which the network sees the values of pixels, 0 to 255, as they are.
RAW = dict(mean=(0.0, 0.0, 0.0), std=(1 / 255, 1 / 255, 1 / 255), precision=Precision())


def view_of(height, width, seed=0):
    return torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def convolution(side, stride=1, classes=7):
    """A network that sees so many pixels around each; it is not the same for a mirrored image."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Conv2d(3, classes, side, stride, side // 2).requires_grad_(False)


class Seen(nn.Module):
    """A network that keeps what it is given."""

    def __init__(self, network):
        super().__init__()
        self.network, self.images = network, []

    def forward(self, images):
        self.images.append(images)
        return self.network(images)

    @property
    def shapes(self):
        return [tuple(images.shape) for images in self.images]


# --- windows ----------------------------------------------------------------------------------------------------------


def ranges(*arguments):
    """(top, bottom, left, right) of each window."""
    return [(rows.start, rows.stop, columns.start, columns.stop) for rows, columns in windows(*arguments)]


def test_windows_by_hand():
    """From left to right and then down; the last ones end with the image and overlap more."""
    assert ranges((4, 10), (4, 4), (3, 3)) == [(0, 4, 0, 4), (0, 4, 3, 7), (0, 4, 6, 10)]
    assert ranges((5, 9), (4, 4), (3, 3)) == [
        (0, 4, 0, 4), (0, 4, 3, 7), (0, 4, 5, 9), (1, 5, 0, 4), (1, 5, 3, 7), (1, 5, 5, 9)]
    assert ranges((6, 6), (3, 6), (3, 6)) == [(0, 3, 0, 6), (3, 6, 0, 6)]
    assert ranges((8, 5), (4, 2), (4, 3)) == [(0, 4, 0, 2), (0, 4, 3, 5), (4, 8, 0, 2), (4, 8, 3, 5)]


def test_a_window_is_no_larger_than_the_image():
    assert ranges((3, 2), (4, 4), (2, 2)) == [(0, 3, 0, 2)]
    assert ranges((3, 6), (4, 4), (2, 2)) == [(0, 3, 0, 4), (0, 3, 2, 6)]
    assert ranges((4, 4), (4, 4), (1, 1)) == [(0, 4, 0, 4)]


@pytest.mark.parametrize("crop, stride", [
    ((32, 32), (21, 21)), ((32, 32), (32, 32)), ((17, 40), (5, 39)), ((1, 1), (1, 1)), ((8, 3), (1, 2)),
])
@pytest.mark.parametrize("size", [(32, 32), (33, 64), (50, 95), (12, 70), (70, 7), (1, 1)])
def test_windows_cover_every_pixel(crop, stride, size):
    """In the number that mmsegmentation has, all of one size."""
    found, seen = list(windows(size, crop, stride)), torch.zeros(size, dtype=torch.int64)
    for window in found:
        seen[window] += 1
        assert seen[window].shape == tuple(map(min, crop, size))
    assert seen.min() == 1 or stride < crop
    assert (seen > 0).all() and seen[0, 0] == seen[-1, -1] == 1
    rows, columns = (max(side - c + s - 1, 0) // s + 1 for side, c, s in zip(size, crop, stride, strict=True))
    assert len(found) == rows * columns
    assert found[-1][0].stop == size[0] and found[-1][1].stop == size[1]


@pytest.mark.parametrize("crop, stride", [
    ((16, 16), (10, 10)), ((9, 40), (9, 40)), ((20, 10), None), ((100, 100), None),
])
@pytest.mark.parametrize("flip", [False, True])
def test_a_network_that_sees_one_pixel_gives_the_same_labels_in_windows(crop, stride, flip):
    network, view = convolution(1), view_of(37, 53)
    whole = inference_of(flip=flip).labels(network, [view], (45, 60))
    assert whole.unique().numel() > 3
    assert torch.equal(inference_of(crop=crop, stride=stride, flip=flip).labels(network, [view], (45, 60)), whole)


def test_windows_are_seen_eight_at_a_time_side_by_side_by_default():
    network = Seen(convolution(1))
    inference_of(crop=(10, 12)).labels(network, [view_of(30, 60)], (30, 60))
    assert network.shapes == [(8, 3, 10, 12), (7, 3, 10, 12)]
    pixels = torch.cat(network.images)
    assert torch.equal(pixels[6], inference_of()._normalize(view_of(30, 60))[0, :, 10:20, 12:24])


def test_an_image_smaller_than_the_window_is_seen_as_it_is():
    network, view = Seen(convolution(3)), view_of(20, 24)
    labels = inference_of(crop=(32, 22), stride=(30, 20)).labels(network, [view], (20, 24))
    assert network.shapes == [(2, 3, 20, 22)] and labels.shape == (20, 24)
    assert torch.equal(inference_of(crop=(32, 32)).labels(network, [view], (20, 24)),
                       inference_of().labels(network, [view], (20, 24)))


class OfFirstPixel(nn.Module):
    """Gives each pixel of an image the logits that its first pixel has for values."""

    def forward(self, images):
        return images[..., :1, :1].expand_as(images)


def test_what_windows_that_overlap_say_is_averaged():
    """The first says (10, 0, 8) and the second (0, 10, 8): between them lie (5, 5, 8)."""
    view = torch.zeros(3, 1, 6, dtype=torch.uint8)
    view[:, 0, 0], view[:, 0, 2] = torch.tensor([10, 0, 8]), torch.tensor([0, 10, 8])
    settings = Inference(**RAW, crop=(1, 4), stride=(1, 2))
    assert settings.labels(OfFirstPixel(), [view], (1, 6)).tolist() == [[0, 0, 2, 2, 1, 1]]


def test_what_is_seen_twice_weighs_no_more_than_what_is_seen_once():
    """A view of three pixels, the middle one in two windows, with logits (2, 0, 0), and one pixel with (0, 3, 0)."""
    views = [torch.tensor([2, 0, 0]).view(3, 1, 1).expand(3, 1, 3), torch.tensor([0, 3, 0]).view(3, 1, 1)]
    settings = Inference(**RAW, crop=(1, 2), stride=(1, 1))
    assert settings.labels(nn.Identity(), [view.to(torch.uint8) for view in views], (1, 3)).tolist() == [[1, 1, 1]]


# --- views ------------------------------------------------------------------------------------------------------------


def test_a_view_is_normalised():
    network, view = Seen(nn.Identity()), view_of(4, 5)
    inference_of().labels(network, [view], (4, 5))
    expected = (view.double() / 255 - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    torch.testing.assert_close(network.images[0][0].double(), expected)


def test_logits_are_enlarged_to_the_view_and_then_to_the_image():
    network, view = convolution(5, stride=4), view_of(40, 56)
    logits = network(inference_of()._normalize(view))
    for size in ((40, 56), (33, 47), (90, 120)):
        expected = enlarged(enlarged(logits, (40, 56)), size).argmax(1)[0]
        labels = inference_of().labels(network, [view], size)
        assert labels.dtype == torch.int64 and torch.equal(labels, expected) and expected.unique().numel() > 3


def enlarged(logits, size):
    return F.interpolate(logits, size, mode="bilinear", align_corners=False)


def averaged(network, views, size, flip, of=lambda logits: logits.softmax(1)):
    """The mean over views and their mirror images of what `of` makes of logits."""
    found = []
    for view in views:
        image = ((view.float() / 255 - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None])[None]
        found.append(of(enlarged(enlarged(network(image), view.shape[1:]), size)))
        if flip:
            mirrored = enlarged(network(torch.flip(image, [-1])), view.shape[1:])
            found.append(of(enlarged(torch.flip(mirrored, [-1]), size)))
    return torch.stack(found).mean(0)[0].argmax(0)


@pytest.mark.parametrize("scales, flip", [(1, True), (3, False), (3, True)])
def test_probabilities_of_views_and_mirrored_ones_are_averaged(scales, flip):
    network, size = convolution(5, stride=4), (45, 61)
    network.weight *= 3  # of small logits, probabilities have their order
    views = [view_of(*shape, seed=i) for i, shape in enumerate([(32, 48), (40, 55), (64, 90)][:scales])]
    labels = inference_of(flip=flip).labels(network, views, size)
    assert torch.equal(labels, averaged(network, views, size, flip))
    assert not torch.equal(labels, averaged(network, views, size, flip, of=lambda logits: logits)), "logits are not"
    assert not torch.equal(labels, averaged(network, views[:1], size, False)), "nor is the first one all"


@pytest.mark.parametrize("rows", [0, 1, 4, 45])
def test_probabilities_of_large_images_are_found_some_rows_at_a_time(monkeypatch, rows):
    network, size = convolution(5), (45, 61)
    network.weight *= 3
    views = [view_of(32, 48), view_of(*size)]
    whole = inference_of(flip=True).labels(network, views, size)
    monkeypatch.setattr(inference, "_MOST_VALUES", rows * 7 * 61)
    assert torch.equal(inference_of(flip=True).labels(network, views, size), whole)


def test_an_average_by_hand():
    """One view is sure of class 0, two think it rather class 1: of logits it would be class 0."""
    views = [torch.tensor(x, dtype=torch.uint8).view(3, 1, 1) for x in ([9, 0, 0], [0, 4, 0], [0, 4, 0])]
    assert Inference(**RAW).labels(nn.Identity(), views, (1, 1)).tolist() == [[1]]


# --- padding ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings, seen, padded", [
    (dict(), (1, 33, 50), (1, 64, 64)), (dict(crop=(20, 40), stride=(13, 10)), (4, 20, 40), (4, 32, 64)),
    (dict(flip=True), (1, 33, 50), (1, 64, 64)),
])
def test_padding_is_zeros_at_the_right_and_the_bottom_and_is_cropped(settings, seen, padded):
    network, view = Seen(nn.Conv2d(3, 7, 4, 4).requires_grad_(False)), view_of(33, 50)
    inference_of(pads=True, **settings).labels(network, [view], (33, 50))
    images = network.images[0]
    assert images.shape == (padded[0], 3, *padded[1:])
    assert torch.equal(images[0, :, :seen[1], :seen[2]], inference_of()._normalize(view)[0, :, :seen[1], :seen[2]])
    assert (images[..., seen[1]:, :] == 0).all() and (images[..., seen[2]:] == 0).all()
    # a network that sees one pixel does not know of it
    whole = inference_of(**settings).labels(convolution(1), [view], (33, 50))
    assert torch.equal(inference_of(pads=True, **settings).labels(convolution(1), [view], (33, 50)), whole)


def test_multiples_of_32_are_not_padded():
    network = Seen(convolution(1))
    inference_of(pads=True).labels(network, [view_of(64, 32)], (64, 32))
    inference_of(pads=False).labels(network, [view_of(33, 50)], (64, 32))
    assert network.shapes == [(1, 3, 64, 32), (1, 3, 33, 50)]


# --- outputs that are no numbers --------------------------------------------------------------------------------------


class Spoilt(nn.Module):
    """Gives one logit of one pixel, and only of a view of a height, another value."""

    def __init__(self, value, height):
        super().__init__()
        self.value, self.height = value, height

    def forward(self, images):
        logits = images[..., ::4, ::4].clone()
        if images.shape[2] == self.height:
            logits[-1, 1, 3, 2] = self.value
        return logits


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("settings, heights", [
    (dict(), [32]), (dict(flip=True), [32]), (dict(), [40, 32]), (dict(pads=True), [31]), (dict(crop=(32, 32)), [64]),
])
def test_one_output_that_is_not_finite_leaves_no_label(value, settings, heights):
    views, size = [view_of(height, 48) for height in heights], (35, 47)
    assert (inference_of(**settings).labels(Spoilt(0.0, 32), views, size) >= 0).all()
    labels = inference_of(**settings).labels(Spoilt(value, 32), views, size)
    assert labels.shape == size and labels.dtype == torch.int64 and (labels == -1).all()


# --- classes, some at a time ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("at_once", [0, 1, 2, 5, 23, 24, 100])
@pytest.mark.parametrize("size", [(9, 11), (20, 35), (4, 5)])
def test_the_largest_of_some_classes_at_a_time_is_the_largest_of_all(monkeypatch, at_once, size):
    """Where fewer values are held than one class has, one class at a time."""
    logits = torch.randn(1, 23, 9, 11, generator=torch.Generator().manual_seed(0))
    expected = enlarged(logits, size).argmax(1)[0]
    monkeypatch.setattr(inference, "_MOST_VALUES", at_once * size[0] * size[1] + 1)
    assert torch.equal(inference._largest(logits, size), expected) and expected.unique().numel() > 8


@pytest.mark.parametrize("at_once", [1, 2, 3, 8])
def test_of_equal_logits_the_first_class_is_taken(monkeypatch, at_once):
    monkeypatch.setattr(inference, "_MOST_VALUES", at_once * 4)
    logits = torch.zeros(1, 8, 2, 2)
    logits[0, [2, 5, 7], 0, 1] = 1.0
    logits[0, [6, 7], 1, 0] = 2.0
    logits[0, :, 1, 1] = -1.0
    logits[0, 3:, 1, 1] = -0.5
    assert inference._largest(logits, (2, 2)).tolist() == [[0, 2], [6, 3]]


def test_the_labels_of_a_large_image_are_found_some_classes_at_a_time(monkeypatch):
    network, view = convolution(1), view_of(37, 53)
    whole = inference_of().labels(network, [view], (45, 60))
    sizes, enlarge = [], inference._resize
    monkeypatch.setattr(inference, "_MOST_VALUES", 3 * 45 * 60)
    monkeypatch.setattr(inference, "_resize", lambda x, size: sizes.append((x.shape[1], *size)) or enlarge(x, size))
    assert torch.equal(inference_of().labels(network, [view], (45, 60)), whole)
    assert sizes == [(7, 37, 53), (3, 45, 60), (3, 45, 60), (1, 45, 60)]
