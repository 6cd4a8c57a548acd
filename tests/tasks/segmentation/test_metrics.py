"""Intersection over union, by hand and as scikit-learn has it, and the evaluation of images of any size."""
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sklearn import metrics as sklearn
from torch import nn

from tasks.segmentation.inference import Inference
from tasks.segmentation.labels import IGNORE
from tasks.segmentation.metrics import Sample, SegmentationScores, confusion_matrix, scores
from training.distributed import Distributed
from training.precision import Precision
from utils import UserError

ALONE = Distributed(torch.device("cpu"))
NAN = float("nan")


# --- scores -----------------------------------------------------------------------------------------------------------

LABELS = torch.tensor([[0, 0, 1], [1, 2, IGNORE]], dtype=torch.uint8)
PREDICTED = torch.tensor([[0, 1, 1], [1, 0, 2]])


def test_a_confusion_matrix_by_hand():
    """Rows are true classes; a pixel without a label counts nowhere, whatever was predicted."""
    matrix = confusion_matrix(LABELS, PREDICTED, 3)
    assert matrix.dtype == torch.int64 and matrix.tolist() == [[1, 1, 0], [0, 2, 0], [1, 0, 0]]
    assert confusion_matrix(torch.full_like(LABELS, IGNORE), PREDICTED, 3).tolist() == [[0] * 3] * 3


def test_of_255_classes_the_last_is_one():
    labels = torch.tensor([[254, IGNORE, 1]], dtype=torch.uint8)
    matrix = confusion_matrix(labels, torch.tensor([[254, 254, 253]]), 255)
    assert matrix.sum() == 2 and matrix[254, 254] == matrix[1, 253] == 1


def test_scores_by_hand():
    found = scores(np.array([[1, 1, 0], [0, 2, 0], [1, 0, 0]]))
    assert found.iou.tolist() == pytest.approx([100 / 3, 200 / 3, 0])
    assert found.accuracy.tolist() == pytest.approx([50, 100, 0])
    assert found.miou == pytest.approx(100 / 3) and found.macc == pytest.approx(50) and found.aacc == pytest.approx(60)


def test_a_class_that_nowhere_occurs_is_left_out_of_the_means():
    """Class 1 is neither labelled nor predicted."""
    found = scores(np.array([[3, 0, 1], [0, 0, 0], [0, 0, 2]]))
    np.testing.assert_allclose(found.iou, [75, NAN, 200 / 3])
    np.testing.assert_allclose(found.accuracy, [75, NAN, 100])
    assert found.miou == pytest.approx((75 + 200 / 3) / 2) and found.macc == pytest.approx(87.5)
    assert found.aacc == pytest.approx(500 / 6)


def test_a_class_that_is_only_predicted_counts_as_0():
    """In IoU; it has no accuracy."""
    found = scores(np.array([[3, 1], [0, 0]]))
    np.testing.assert_allclose(found.iou, [75, 0])
    np.testing.assert_allclose(found.accuracy, [75, NAN])
    assert (found.miou, found.macc, found.aacc) == (37.5, 75, 75)


def test_nothing_has_no_score():
    found = scores(np.zeros((2, 2), np.int64))
    assert np.isnan([*found.iou, *found.accuracy, found.miou, found.macc, found.aacc]).all()


@pytest.mark.parametrize("seed", range(3))
def test_scores_are_scikit_learns(seed):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 6, (40, 50))
    predicted = np.where(rng.random((40, 50)) < 0.6, labels, rng.integers(0, 6, (40, 50)))
    labels[rng.random((40, 50)) < 0.2] = IGNORE
    matrix = confusion_matrix(torch.from_numpy(labels.astype(np.uint8)), torch.from_numpy(predicted), 6).numpy()
    known = labels != IGNORE
    pair = labels[known], predicted[known]
    assert np.array_equal(matrix, sklearn.confusion_matrix(*pair, labels=range(6)))
    found = scores(matrix)
    np.testing.assert_allclose(found.iou, 100 * sklearn.jaccard_score(*pair, average=None))
    np.testing.assert_allclose(found.accuracy, 100 * sklearn.recall_score(*pair, average=None))
    assert found.miou == pytest.approx(100 * sklearn.jaccard_score(*pair, average="macro"))
    assert found.macc == pytest.approx(100 * sklearn.balanced_accuracy_score(*pair))
    assert found.aacc == pytest.approx(100 * sklearn.accuracy_score(*pair))


# --- evaluation -------------------------------------------------------------------------------------------------------

CLASSES = ["sky", "road", "tree"]


class Channels(nn.Module):
    """Takes each pixel for the class of its brightest channel; no number comes of an image that begins with 255."""

    def forward(self, images):
        spoilt = images[:, :1, :1, :1] > 254
        return images.masked_fill(spoilt, NAN)


def sample(labels, predicted):
    """An image that `Channels` gives these labels."""
    view = 100 * nn.functional.one_hot(torch.as_tensor(predicted), 3).permute(2, 0, 1).to(torch.uint8)
    return Sample([view], torch.as_tensor(labels, dtype=torch.uint8))


def random_samples(count):
    rng = np.random.default_rng(0)
    samples = []
    for i in range(count):
        shape = (5 + i, 9 - i)
        labels = rng.integers(0, 4, shape)
        samples.append(sample(np.where(labels == 3, IGNORE, labels), rng.integers(0, 3, shape)))
    return samples


def unreadable():
    return Sample([torch.zeros(3, 8, 8, dtype=torch.uint8)], torch.empty(0, 0))


def spoilt(labels):
    found = sample(labels, labels)
    found.views[0][0, 0, 0] = 255
    return found


def evaluator(shown=()):
    inference = Inference((0.0, 0.0, 0.0), (1 / 255, 1 / 255, 1 / 255), Precision())
    return SegmentationScores(inference, CLASSES, ALONE.device, shown)


@torch.inference_mode()
def evaluated(batches, **settings):
    found = evaluator(**settings)
    for batch in batches:
        found.update(Channels(), batch)
    return found


def test_an_evaluation_by_hand():
    """Two images: the labels and predictions above, and another of one pixel, a road that is taken for the sky."""
    images = [sample(LABELS, PREDICTED), sample([[1]], [[0]])]
    found = evaluated([images])
    results = found.compute(ALONE)
    assert found.matrix.tolist() == [[1, 1, 0], [1, 2, 0], [1, 0, 0]]
    assert results == pytest.approx({
        "mIoU": (25 + 50 + 0) / 3, "mAcc": (50 + 200 / 3 + 0) / 3, "aAcc": 50, "images": 2,
        "IoU/sky": 25, "IoU/road": 50, "IoU/tree": 0,
    })
    assert [*results] == ["mIoU", "mAcc", "aAcc", "images", "IoU/sky", "IoU/road", "IoU/tree"]
    assert all(type(results[name]) is float for name in ("mIoU", "mAcc", "aAcc", "IoU/sky"))


def test_images_of_any_sizes_in_batches_of_any_size():
    samples = random_samples(5)
    expected = sum(confusion_matrix(x.labels, x.views[0].argmax(0), 3) for x in samples)
    results = []
    for batches in ([samples], [[x] for x in samples], [samples[:2], samples[2:4], samples[4:]]):
        found = evaluated(batches)
        results.append(found.compute(ALONE))
        assert np.array_equal(found.matrix, expected.numpy())
    assert results[0] == results[1] == results[2] and results[0]["images"] == 5
    assert results[0]["mIoU"] == scores(expected.numpy()).miou


def test_the_counts_of_all_processes_come_together():
    samples = random_samples(5)
    first, second = evaluated([samples[:2]]), evaluated([samples[2:]])
    sums = {id(first.counts): first.counts + second.counts, id(first.images): first.images + second.images}
    process = SimpleNamespace(sum=lambda values: sums[id(values)])
    assert first.compute(process) == evaluated([samples]).compute(ALONE)


def test_labels_have_their_own_size():
    """Not that of the view, of which what is predicted is brought to it."""
    labels = torch.tensor([[0, 0, 1, 1]] * 4, dtype=torch.uint8)
    view = sample(labels[:2, ::2], labels[:2, ::2].long()).views[0]
    found = evaluated([[Sample([view], labels)]])
    assert found.compute(ALONE)["mIoU"] == 100 and found.matrix.sum() == 16


def test_a_class_of_no_image_is_not_in_the_mean():
    results = evaluated([[sample([[0, 0, 1, IGNORE]], [[0, 1, 1, 2]])]]).compute(ALONE)
    assert np.isnan(results["IoU/tree"]) and results["mIoU"] == pytest.approx(50)


@pytest.mark.parametrize("place", [0, 1, 2])
def test_an_output_that_is_no_number_leaves_no_mean(place):
    """Wherever the image comes, and however many others do."""
    batches = [[x] for x in random_samples(2)]
    batches.insert(place, [spoilt([[1, 0], [2, 1]])])
    results = evaluated(batches).compute(ALONE)
    assert np.isnan([results[name] for name in ("mIoU", "mAcc", "aAcc")]).all() and results["images"] == 3
    assert not np.isnan(evaluated(batches[:place] + batches[place + 1:]).compute(ALONE)["mIoU"])


def test_an_image_that_cannot_be_read_is_not_counted():
    samples = random_samples(3)
    results = evaluated([[samples[0], unreadable()], [unreadable()], samples[1:]]).compute(ALONE)
    assert results == evaluated([samples]).compute(ALONE) and results["images"] == 3


@pytest.mark.parametrize("batches", [[], [[unreadable()]]])
def test_no_image_to_evaluate(batches):
    with pytest.raises(UserError, match=r"^there was no image to evaluate$"):
        evaluated(batches).compute(ALONE)


@pytest.mark.parametrize("images, of_them", [(1, "1 image"), (2, "2 images")])
def test_no_pixel_to_evaluate(images, of_them):
    blank = sample([[IGNORE] * 3], [[0, 1, 2]])
    with pytest.raises(UserError, match=f"^no pixel of the {of_them} to evaluate has a label$"):
        evaluated([[blank, unreadable()], [blank] * (images - 1)]).compute(ALONE)


def test_images_to_be_shown_are_kept_with_both_labels():
    """By their places among all images of the process; one that cannot be read has a place, and is not shown."""
    samples = random_samples(4)
    found = evaluated([[samples[0], unreadable()], [samples[1], samples[2]], [samples[3]]], shown=[4, 1, 2])
    assert len(found.shown) == 2
    for kept, expected in zip(found.shown, [samples[1], samples[3]], strict=True):
        assert torch.equal(kept.image, expected.views[0]) and torch.equal(kept.labels, expected.labels)
        assert torch.equal(kept.predicted, expected.views[0].argmax(0))
    assert evaluated([samples]).shown == []


def test_the_first_view_is_shown():
    (view,), labels = sample([[0, 1, 2]], [[0, 1, 2]])
    other = sample([[2, 2]], [[2, 2]]).views[0]
    found = evaluated([[Sample([view, other], labels)]], shown=[0])
    assert torch.equal(found.shown[0].image, view)
