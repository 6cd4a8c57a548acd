"""Detectors: every point in which the published ones differ from torchvision's, by hand or by plain loops."""
import math

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import box_iou

from models.detection import (
    DETECTORS,
    NoMapsError,
    cascade_mask_rcnn,
    is_detector,
    load_backbone,
    load_detector,
    mask_rcnn,
)
from models.detection._anchors import Anchors, Matcher, see_image
from models.detection._cascade import LOSS_WEIGHTS, OVERLAPS, CascadeHeads, Stage
from models.detection._images import DetectionTransform
from models.detection._masks import cut_masks, paste_masks
from models.detection._pool import RoIPool, level_of
from models.detection._retinanet import Head
from models.detection._roi_heads import RoIHeads, Samples, mask_loss
from models.detection._rpn import RPN
from models.detection._weights import rename
from storage.weights import MismatchError

SMALL = dict(num_classes=3, channels=16, short=96, long=160)
KINDS = list(DETECTORS)


def make(kind, backbone="biformer_nano", **kwargs):
    torch.manual_seed(0)
    width = {} if kind == "retinanet" else dict(head_channels=32)
    return DETECTORS[kind](backbone, **(SMALL | width | kwargs))


def target(boxes, labels, height=70, width=90):
    masks = torch.zeros(len(boxes), height, width, dtype=torch.uint8)
    for mask, (left, top, right, bottom) in zip(masks, boxes, strict=True):
        mask[top:bottom, left:right] = 1
    return dict(boxes=torch.tensor(boxes).view(-1, 4).float(), labels=torch.tensor(labels).long(), masks=masks)


def batch():
    """Two images of different sizes, one without objects."""
    torch.manual_seed(1)
    images = [torch.rand(3, 70, 90), torch.rand(3, 60, 64)]
    return images, [target([[5, 6, 40, 50], [10, 10, 60, 30]], [1, 3]), target([], [], 60, 64)]


# --- anchors and what they are matched with ---------------------------------------------------------------------------


def test_anchors_have_exact_sides_and_strides():
    image = ImageList(torch.zeros(1, 3, 800, 1344), [(800, 1344)])
    maps = [torch.zeros(1, 1, -(-800 // s), -(-1344 // s)) for s in (32, 64)]
    anchors, = Anchors((32, 64), scales=(8,))(image, maps)
    first = anchors[0]
    width, height = 256 / math.sqrt(0.5), 256 * math.sqrt(0.5)
    torch.testing.assert_close(first, torch.tensor([-width / 2, -height / 2, width / 2, height / 2]))
    of_64 = anchors[3 * 25 * 42 :].view(13, 21, 3, 4)
    torch.testing.assert_close(of_64[1, 0, 1], torch.tensor([-256.0, 64 - 256, 256, 64 + 256]))
    torch.testing.assert_close(of_64[12, 20, 1], torch.tensor([1280.0 - 256, 768 - 256, 1280 + 256, 768 + 256]))


def test_scales_of_a_ratio_follow_one_another():
    image, maps = ImageList(torch.zeros(1, 3, 8, 8), [(8, 8)]), [torch.zeros(1, 1, 1, 1)]
    anchors, = Anchors((8,), scales=(4, 8))(image, maps)
    areas = (anchors[:, 2] - anchors[:, 0]) * (anchors[:, 3] - anchors[:, 1])
    torch.testing.assert_close(areas, torch.tensor([32.0**2, 64**2] * 3))


def test_anchors_are_of_the_images_type():
    image = ImageList(torch.zeros(1, 3, 800, 1344), [(800, 1344)])
    anchors, = Anchors((32,), scales=(8,))(image, [torch.zeros(1, 1, 25, 42, dtype=torch.bfloat16)])
    assert anchors.dtype == torch.float32


def test_matcher():
    overlaps = torch.tensor([
        [0.8, 0.65, 0.0, 0.2, 0.29],
        [0.1, 0.60, 0.0, 0.4, 0.00],
        [0.0, 0.00, 0.0, 0.0, 0.25],
    ])
    assert Matcher(0.7, 0.3)(overlaps).tolist() == [0, -2, -1, -2, -1]
    # The second object's best box is the one that overlaps the first more; the third's best is below the limit.
    assert Matcher(0.7, 0.3, low_quality=0.3)(overlaps).tolist() == [0, 1, -1, -2, -1]
    assert Matcher(0.7, 0.3, low_quality=0.0)(overlaps).tolist() == [0, 1, -1, -2, 2]
    assert Matcher(0.5, 0.4, low_quality=0.0)(torch.zeros(1, 3)).tolist() == [-1, -1, -1]


def test_of_two_objects_with_the_same_best_box_the_last_has_it_and_ties_are_all_matched():
    overlaps = torch.tensor([[0.5, 0.5, 0.1], [0.5, 0.2, 0.1]])
    assert Matcher(0.7, 0.3, low_quality=0.3)(overlaps).tolist() == [1, 0, -1]


def proposals_network(**kwargs):
    torch.manual_seed(0)
    return RPN(8, **kwargs).train()


def inputs_of_proposals():
    torch.manual_seed(2)
    images = ImageList(torch.zeros(2, 3, 64, 96), [(64, 96), (60, 70)])
    features = {str(i): torch.randn(2, 8, -(-64 // s), -(-96 // s)) for i, s in enumerate((4, 8, 16, 32, 64))}
    return images, features, [target([[4, 4, 40, 30], [50, 20, 90, 60]], [1, 2]), target([[0, 0, 30, 50]], [1])]


@pytest.mark.parametrize("beta", [0.0, 1 / 9])
def test_losses_of_proposals(beta):
    """Of all anchors, by loops: a sample as large as they are."""
    network = proposals_network(beta=beta)
    images, features, targets = inputs_of_proposals()
    network.fg_bg_sampler.batch_size_per_image, network.fg_bg_sampler.positive_fraction = 10**6, 1.0
    _, losses = network(images, features, targets)
    logits, deltas = network.head(list(features.values()))
    anchors = network.anchor_generator(images, list(features.values()))
    scores = boxes = count = 0
    for image in range(2):
        logit = torch.cat([x[image].permute(1, 2, 0).flatten() for x in logits])
        delta = torch.cat([x[image].view(3, 4, *x.shape[2:]).permute(2, 3, 0, 1).reshape(-1, 4) for x in deltas])
        overlaps = box_iou(targets[image]["boxes"], anchors[image])
        for index, found in enumerate(network.proposal_matcher(overlaps).tolist()):
            x, y = anchors[image][index].view(2, 2).mean(0).tolist()
            if found == -2 or round(x) >= (96, 96)[image] or round(y) >= 64:  # of 60 x 70 pixels, padded alone 64 x 96
                continue
            count += 1
            scores = scores + F.binary_cross_entropy_with_logits(logit[index], torch.tensor(float(found >= 0)))
            if found >= 0:
                wanted = difference(anchors[image][index], targets[image]["boxes"][found])
                boxes = boxes + sum(smooth(abs(a - b), beta) for a, b in zip(delta[index], wanted, strict=True))
    torch.testing.assert_close(losses["loss_objectness"], scores / count)
    torch.testing.assert_close(losses["loss_rpn_box_reg"], boxes / count)


def smooth(x, beta):
    return x - beta / 2 if x >= beta else x**2 / (2 * beta)


def difference(anchor, box):
    (ax, ay, aw, ah), (bx, by, bw, bh) = (
        ((x[0] + x[2]) / 2, (x[1] + x[3]) / 2, x[2] - x[0], x[3] - x[1]) for x in (anchor.tolist(), box.tolist())
    )
    return (bx - ax) / aw, (by - ay) / ah, math.log(bw / aw), math.log(bh / ah)


def test_anchors_that_leave_the_image_count_or_not():
    anchors = torch.tensor([[0.0, 0, 10, 10], [-1, 0, 9, 10], [5, 5, 20, 10], [5, 5, 15, 19]])
    boxes = torch.tensor([[-1.0, 0, 9, 10]])
    labels, matched = proposals_network()._label(anchors, boxes, (20, 20))
    assert proposals_network(inside=True)._label(anchors[1:3], boxes, (20, 20))[0].tolist() == [-1, -1]
    assert labels.tolist() == [1, 1, 0, 0] and matched[1].tolist() == boxes[0].tolist()
    labels, _ = proposals_network(inside=True)._label(anchors, boxes, (20, 20))
    assert labels.tolist() == [1, -1, -1, 0], "the object's best box is sought among those inside"
    labels, _ = proposals_network(inside=True)._label(anchors, boxes[:0], (20, 20))
    assert labels.tolist() == [0, -1, -1, 0]


def test_how_many_proposals_are_kept():
    for network, (training, testing) in ((proposals_network(), (1000, 1000)),
                                         (proposals_network(num_proposals=2000), (2000, 1000))):
        assert network.post_nms_top_n() == training and network.eval().post_nms_top_n() == testing
        assert network.pre_nms_top_n() == 1000 and network.train().pre_nms_top_n() == 2000


# --- what is seen of a box --------------------------------------------------------------------------------------------


def test_level_of_a_box():
    sides = [1, 55, 111, 112, 223, 224, 447, 448, 2000]
    boxes = torch.tensor([[10.0, 10, 10 + side, 10 + side] for side in sides])
    assert level_of(boxes, 4).tolist() == [0, 0, 0, 1, 1, 2, 2, 3, 3]


def bilinear(image, y, x):
    """As RoIAlign reads: zero a pixel and more outside, and the border in between."""
    height, width = image.shape
    if y < -1 or y > height or x < -1 or x > width:
        return 0.0
    y, x = max(y, 0), max(x, 0)
    y0, x0 = min(int(y), height - 1), min(int(x), width - 1)
    y1, x1 = min(y0 + 1, height - 1), min(x0 + 1, width - 1)
    y, x = (y0 if y0 == height - 1 else y), (x0 if x0 == width - 1 else x)
    fy, fx = y - y0, x - x0
    values = image[y0, x0] * (1 - fy) * (1 - fx), image[y0, x1] * (1 - fy) * fx
    return sum(values) + image[y1, x0] * fy * (1 - fx) + image[y1, x1] * fy * fx


def pooled(image, box, size, stride):
    """RoIAlign with half-pixel offsets, and in each cell as many samples as pixels, rounded up."""
    left, top, right, bottom = (v / stride - 0.5 for v in box)
    width, height = (right - left) / size, (bottom - top) / size
    rows, cols = math.ceil(height), math.ceil(width)
    out = torch.zeros(size, size, dtype=torch.float64)
    for i in range(size):
        for j in range(size):
            samples = [
                bilinear(image, top + (i + (a + 0.5) / rows) * height, left + (j + (b + 0.5) / cols) * width)
                for a in range(rows) for b in range(cols)
            ]
            out[i, j] = sum(samples) / len(samples)
    return out


def test_pooling_against_loops():
    torch.manual_seed(0)
    sizes = [(256 // s, 320 // s) for s in (4, 8, 16, 32, 64)]
    maps = {str(i): torch.randn(2, 1, *size, dtype=torch.float64) for i, size in enumerate(sizes)}
    boxes = [torch.tensor([[3.3, 7.1, 60.2, 40.9], [10.5, 20.25, 150, 170]], dtype=torch.float64),
             torch.tensor([[0, 0, 319, 255]], dtype=torch.float64)]
    found = RoIPool(3)(maps, boxes)
    of_boxes = [("0", 0, boxes[0][0], 4), ("1", 0, boxes[0][1], 8), ("2", 1, boxes[1][0], 16)]
    expected = [pooled(maps[name][image, 0], box.tolist(), 3, stride) for name, image, box, stride in of_boxes]
    torch.testing.assert_close(found[:, 0], torch.stack(expected), rtol=0, atol=1e-12)
    assert RoIPool(3)(maps, [boxes[0][:0], boxes[1][:0]]).shape == (0, 1, 3, 3)


def test_masks_are_cut_out_and_thresholded():
    torch.manual_seed(0)
    masks = (torch.rand(2, 30, 40) > 0.5).to(torch.uint8)
    boxes, matched = torch.tensor([[2.3, 4.1, 33.7, 25.2], [5, 6, 12, 9.5]]).double(), torch.tensor([1, 0])
    expected = [pooled(masks[i].double(), box.tolist(), 7, 1) >= 0.5 for box, i in zip(boxes, matched, strict=True)]
    found = cut_masks(masks, boxes, matched, 7)
    assert found.dtype == torch.float64 and torch.equal(found, torch.stack(expected).double())


def test_masks_are_pasted_at_the_centres_of_pixels():
    masks = torch.ones(4, 1, 28, 28)
    masks[1, 0, :14] = 0
    boxes = torch.tensor([[10.2, 5, 20.7, 15], [0, 0, 28, 28], [-5, -5, 3, 3], [50, 50, 50, 60.0]])
    found = paste_masks(masks, boxes, 30, 40)
    expected = torch.zeros(4, 30, 40, dtype=torch.bool)
    expected[0, 5:15, 10:21] = True
    expected[1, 14:28, :28] = True
    expected[2, :3, :3] = True
    assert torch.equal(found, expected)
    assert paste_masks(masks[:0], boxes[:0], 5, 6).shape == (0, 5, 6)


def test_pasting_a_smooth_mask_against_loops():
    torch.manual_seed(0)
    mask, (left, top, right, bottom) = torch.rand(6, 6), (3.4, 2.2, 17.9, 20.3)
    found = paste_masks(mask[None, None], torch.tensor([[left, top, right, bottom]]), 24, 24)[0]
    padded = F.pad(mask, (1, 1, 1, 1)).double()
    for y in range(24):
        for x in range(24):
            row = (y + 0.5 - top) / (bottom - top) * 6 + 0.5  # of the padded mask
            col = (x + 0.5 - left) / (right - left) * 6 + 0.5
            value = bilinear(padded, row, col) if 0 <= row <= 7 and 0 <= col <= 7 else 0.0
            assert found[y, x] == (value >= 0.5), (y, x, value)


def test_boxes_are_exact_on_maps_in_low_precision():
    torch.manual_seed(0)
    maps = {str(i): torch.randn(1, 4, 800 // s, 1344 // s).bfloat16() for i, s in enumerate((4, 8, 16, 32, 64))}
    boxes = [torch.tensor([[1201.3, 601.7, 1231.9, 640.2]])]
    expected = RoIPool(7)({name: x.float() for name, x in maps.items()}, boxes).bfloat16()
    found = RoIPool(7)(maps, boxes)
    assert found.dtype == torch.bfloat16 and torch.equal(found, expected)


def test_cells_of_padding_are_not_learnt():
    anchors = Anchors((4, 64), scales=(8,))
    image = ImageList(torch.zeros(2, 3, 128, 256), [(128, 256), (60, 70)])
    boxes = anchors(image, [torch.zeros(2, 1, 32, 64), torch.zeros(2, 1, 2, 4)])[1]
    seen = see_image(boxes, (60, 70)).view(-1, 3)
    assert torch.equal(seen.all(1), seen.any(1))
    fine, coarse = seen[:, 0][: 32 * 64].view(32, 64), seen[:, 0][32 * 64 :].view(2, 4)
    assert fine[:16, :24].all() and fine.sum() == 16 * 24, "64 x 96 pixels"
    assert coarse.tolist() == [[True, True, False, False], [False] * 4]
    labels, _ = proposals_network()._label(boxes, torch.tensor([[4.0, 4, 40, 40]]), (60, 70))
    assert (labels[~seen.flatten()] == -1).all() and (labels[seen.flatten()] == 0).any()
    network = make("retinanet").train()
    images, objects = [torch.rand(3, 96, 160), torch.rand(3, 40, 40)], [target([], [], 96, 160), target([], [], 40, 40)]
    network.transform.resize_in_training = False
    matched = []
    network.head.compute_loss = lambda *args: matched.extend(args[3]) or {"none": torch.zeros(1)}
    network(images, objects)
    assert (matched[0] == -1).all() and (matched[1] == -2).any() and (matched[1] == -1).any()


def test_anchors_in_low_precision_leave_no_trace():
    anchors, maps = Anchors((32,), scales=(8,)), [torch.zeros(1, 1, 25, 42)]
    sizes = [(800, 1344)]
    first, = anchors(ImageList(torch.zeros(1, 3, 800, 1344), sizes), maps)
    for dtype in (torch.float16, torch.bfloat16, torch.float64, torch.float32):
        found, = anchors(ImageList(torch.zeros(1, 3, 800, 1344, dtype=dtype), sizes), maps)
        torch.testing.assert_close(found.float(), first, rtol=0, atol=1e-4)
    assert torch.equal(found, first)


# --- losses of the heads ----------------------------------------------------------------------------------------------


def heads(cls=RoIHeads, **kwargs):
    torch.manual_seed(0)
    return cls(3, 8, 16, **kwargs).train()


def features_and_proposals():
    torch.manual_seed(3)
    features = {str(i): torch.randn(2, 8, -(-96 // s), -(-96 // s)) for i, s in enumerate((4, 8, 16, 32, 64))}
    targets = [target([[4, 4, 40, 30], [50, 20, 90, 60]], [1, 3], 96, 96), target([], [], 96, 96)]
    corners = torch.rand(2, 40, 2) * 60
    boxes = torch.cat([corners, corners + 5 + torch.rand(2, 40, 2) * 35], dim=2)
    boxes[0, :6] = targets[0]["boxes"].repeat(3, 1) + torch.randn(6, 4) * 2
    return features, list(boxes), targets


def test_losses_of_boxes_by_loops():
    network = heads()
    features, proposals, targets = features_and_proposals()
    losses, samples = network.learn(features, proposals, targets)
    labels, boxes = torch.cat(samples.labels), torch.cat(samples.boxes)
    assert 8 <= (labels > 0).sum() < len(labels) == 82, "all proposals, and two objects"
    assert (samples.labels[1] == 0).all()
    scores = total = 0
    for index in range(len(labels)):
        scores = scores - samples.logits[index].log_softmax(0)[labels[index]]
        if labels[index] > 0:
            overlaps = box_iou(boxes[index][None], targets[0]["boxes"])[0]
            assert overlaps.max() >= 0.5 and targets[0]["labels"][overlaps.argmax()] == labels[index]
            wanted = difference(boxes[index], targets[0]["boxes"][overlaps.argmax()])
            said = samples.deltas[index].view(4, 4)[labels[index]]
            weights = (10, 10, 5, 5)
            total = total + sum(abs(s - w * k) for s, w, k in zip(said, wanted, weights, strict=True))
    torch.testing.assert_close(losses["loss_classifier"], scores / 82)
    torch.testing.assert_close(losses["loss_box_reg"], total / 82)


def test_loss_of_masks_is_of_the_own_class():
    torch.manual_seed(0)
    logits, targets = torch.randn(2, 4, 8, 8), [target([[4, 4, 40, 30], [50, 20, 90, 60]], [1, 3])]
    boxes = [torch.tensor([[50.0, 20, 90, 60], [2, 4, 40, 30]])]
    loss = mask_loss(logits, boxes, [torch.tensor([1, 0])], targets)
    wanted = cut_masks(targets[0]["masks"], boxes[0], torch.tensor([1, 0]), 8)
    expected = [F.binary_cross_entropy_with_logits(logits[0, 3], wanted[0]),
                F.binary_cross_entropy_with_logits(logits[1, 1], wanted[1])]
    torch.testing.assert_close(loss, sum(expected) / 2)


def test_losses_of_a_batch_without_objects_reach_every_weight():
    for kind in KINDS:
        network = make(kind, freeze_batch_norm=False).train()
        losses = network([torch.rand(3, 64, 64)], [target([], [], 64, 64)])
        sum(losses.values()).backward()
        assert all(value.isfinite() for value in losses.values()), kind
        assert [name for name, p in network.named_parameters() if p.grad is None] == [], kind


@pytest.mark.parametrize("kind", ["mask_rcnn", "cascade_mask_rcnn"])
def test_without_proposals(kind):
    """As of a network that has diverged, whose scores are NaN."""
    network = make(kind)
    images, targets = batch()
    network.rpn.filter_proposals = lambda boxes, *_: ([boxes.new_zeros(0, 4)] * len(boxes), None)
    losses = network.train()(images, targets)
    sum(losses.values()).backward()
    assert all(value.isfinite() for value in losses.values())
    losses = network([images[1]], [targets[1]])
    assert all(value.isfinite() for value in losses.values())
    with torch.no_grad():
        assert [len(found["boxes"]) for found in network.eval()(images)] == [0, 0]


def test_an_image_without_an_anchor_inside():
    network = make("cascade_mask_rcnn").train()
    losses = network([torch.rand(3, 10, 200)], [target([[5, 1, 60, 9]], [1], 10, 200)])
    assert all(value.isfinite() for value in losses.values())


def test_the_best_proposal_of_an_object_is_taken_for_it():
    objects, labels = [torch.tensor([[0.0, 0, 100, 100], [40, 0, 140, 100]])], [torch.tensor([1, 2])]
    proposals = [torch.cat([torch.tensor([[19.0, 0, 119, 100], [-2, 0, 100, 100]]), objects[0]])]
    _, found = heads().assign_targets_to_proposals(proposals, objects, labels)
    assert found[0].tolist() == [2, 1, 1, 2]
    _, found = heads(low_quality=False).assign_targets_to_proposals(proposals, objects, labels)
    assert found[0].tolist() == [1, 1, 1, 2]
    none = [torch.zeros(0, 4)], [torch.zeros(0, dtype=torch.long)]
    matched, found = heads().assign_targets_to_proposals(proposals, *none)
    assert found[0].tolist() == matched[0].tolist() == [0] * 4


def focal(logit, wanted):
    p = torch.sigmoid(logit)
    return -0.25 * (1 - p) ** 2 * p.log() if wanted else -0.75 * p**2 * (1 - p).log()


def test_losses_of_retinanet_are_over_the_anchors_of_the_batch():
    torch.manual_seed(0)
    head = Head(8, 2, 3)
    anchors = torch.tensor([[0.0, 0, 10, 10], [0, 0, 30, 30], [40, 40, 60, 60], [1, 0, 10, 10], [5, 5, 70, 90]])
    targets = [target([[0, 0, 10, 10]], [3]), target([[40, 40, 60, 60]], [1])]
    matched = [torch.tensor([0, -1, -1, 0, -2]), torch.tensor([-1, -1, 0, -1, -1])]
    outputs = dict(cls_logits=torch.randn(2, 5, 3), bbox_regression=torch.randn(2, 5, 4))
    losses = head.compute_loss(targets, outputs, [anchors] * 2, matched)
    scores = boxes = 0
    for image in range(2):
        for index, found in enumerate(matched[image].tolist()):
            label = targets[image]["labels"][0] - 1
            if found != -2:
                logits = outputs["cls_logits"][image, index]
                scores = scores + sum(focal(logit, found == 0 and c == label) for c, logit in enumerate(logits))
            if found == 0:
                wanted = difference(anchors[index], targets[image]["boxes"][0])
                said = outputs["bbox_regression"][image, index]
                boxes = boxes + sum(abs(s - w) for s, w in zip(said, wanted, strict=True))
    torch.testing.assert_close(losses["classification"], scores / 3)
    torch.testing.assert_close(losses["bbox_regression"], boxes / 3)


@pytest.mark.parametrize("kind", KINDS)
def test_whole_networks_in_bfloat16(kind):
    network, (images, targets) = make(kind).bfloat16().train(), batch()
    images = [image.bfloat16() for image in images]
    losses = network(images, targets)
    sum(losses.values()).backward()
    assert all(value.isfinite() and value.dtype == torch.float32 for value in losses.values())
    with torch.no_grad():
        assert all(found["boxes"].dtype == torch.float32 for found in network.eval()(images))


@pytest.mark.parametrize("kind", KINDS)
def test_objects_are_found_above_a_score(kind):
    """The same as without those below it; at first, above 0.05."""
    network, (images, _) = make(kind).eval(), batch()
    assert all((x["scores"] > 0.05).all() for x in network(images))
    network.find_above(0.0)
    every = network(images)
    score = every[0]["scores"][10].item()
    network.find_above(score)
    for found, expected in zip(network(images), every, strict=True):
        kept = expected["scores"] > score
        assert found.keys() == expected.keys() and all(torch.equal(found[k], expected[k][kept]) for k in found)
    assert len(every[0]["scores"]) > 20 and 0 < (every[0]["scores"] > score).sum() < 20


def test_no_images():
    with pytest.raises(ValueError, match="at least one image"):
        make("retinanet").eval()([])


def test_linear_layers_of_box_heads_start_as_published():
    for kind, name in (("mask_rcnn", "roi_heads.box_head.fc6"), ("cascade_mask_rcnn", "roi_heads.stages.2.box_head.5")):
        layer = make(kind).get_submodule(name)
        limit = math.sqrt(6 / (layer.in_features + layer.out_features))
        assert (layer.bias == 0).all() and 0.95 * limit < layer.weight.abs().max() <= limit


def test_what_retinanet_says_before_training():
    head = make("retinanet").head
    prior = torch.sigmoid(head.classification_head.cls_logits.bias)
    torch.testing.assert_close(prior, torch.full_like(prior, 0.01))
    assert head.classification_head.cls_logits.out_channels == 9 * 3, "without the background"


# --- Cascade ----------------------------------------------------------------------------------------------------------


def giou(a, b):
    inter = max(0, min(a[2], b[2]) - max(a[0], b[0])) * max(0, min(a[3], b[3]) - max(a[1], b[1]))
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - inter
    hull = (max(a[2], b[2]) - min(a[0], b[0])) * (max(a[3], b[3]) - min(a[1], b[1]))
    return inter / union - (hull - union) / hull


def test_the_loss_of_boxes_in_a_cascade():
    stage = Stage(3, 8, 16, 0.6, (20, 20, 10, 10))
    boxes = torch.tensor([[10.0, 10, 30, 40], [50, 20, 80, 60]])
    objects = torch.tensor([[12.0, 8, 35, 38], [48, 22, 77, 66]])
    wanted = stage.box_coder.encode_single(objects, boxes)
    said = wanted + torch.tensor([[1.0, -2, 0.5, 1], [-3, 0, 2, -1]])
    decoded = []
    for (dx, dy, dw, dh), (x0, y0, x1, y1) in zip(said.tolist(), boxes.tolist(), strict=True):
        width, height = x1 - x0, y1 - y0
        x, y = (x0 + x1) / 2 + dx / 20 * width, (y0 + y1) / 2 + dy / 20 * height
        w, h = width * math.exp(dw / 10), height * math.exp(dh / 10)
        decoded.append((x - w / 2, y - h / 2, x + w / 2, y + h / 2))
    expected = sum(10 * (1 - giou(a, b)) for a, b in zip(decoded, objects.tolist(), strict=True))
    assert stage.box_loss(said, wanted, boxes).item() == pytest.approx(expected, rel=1e-5)


def test_thresholds_and_weights_of_the_stages():
    cascade = CascadeHeads(3, 8, 16)
    assert [stage.proposal_matcher.high for stage in cascade.stages] == list(OVERLAPS) == [0.5, 0.6, 0.7]
    stds = torch.tensor([[1 / w for w in stage.box_coder.weights] for stage in cascade.stages])
    expected = torch.tensor([[0.1, 0.1, 0.2, 0.2], [0.05, 0.05, 0.1, 0.1], [0.033, 0.033, 0.067, 0.067]])
    torch.testing.assert_close(stds, expected)
    assert LOSS_WEIGHTS == (1, 0.5, 0.25)
    convs = [m for m in cascade.stages[0].box_head.modules() if isinstance(m, nn.Conv2d)]
    assert len(convs) == 4 and all(conv.bias is None for conv in convs)
    rpn = make("cascade_mask_rcnn").rpn.train()
    assert rpn.inside and rpn.beta == pytest.approx(1 / 9) and rpn.post_nms_top_n() == 2000


def test_each_stage_learns_from_what_the_one_before_it_corrected():
    cascade = heads(CascadeHeads)
    sizes, objects = [(96, 96), (96, 96)], [target([[4, 4, 40, 30]], [2], 96, 96), target([], [], 96, 96)]
    boxes = [torch.tensor([[4.0, 4, 40, 30], [6, 4, 38, 30], [60, 60, 90, 94]]), torch.tensor([[10.0, 10, 20, 20]])]
    deltas = torch.randn(4, 4, 4)
    logits = torch.tensor([[0.0, 5, 1, 2], [0, 5, 1, 2], [9, 0, 1, 5], [9, 1, 3, 2]])
    labels = [torch.tensor([2, 2, 0]), torch.tensor([0])]
    matched = [torch.zeros(3, dtype=torch.long), torch.zeros(1, dtype=torch.long)]
    stage = cascade.stages[0]
    found = cascade._corrected(stage, Samples(boxes, matched, labels, logits, deltas.flatten(1)), objects, sizes)
    decode = stage.box_coder.decode_single
    expected = [  # the object's own box is left out; the background's classes are the most likely ones
        torch.cat([decode(deltas[1, 2][None], boxes[0][1:2]), decode(deltas[2, 3][None], boxes[0][2:])]).clamp(0, 96),
        decode(deltas[3, 2][None], boxes[1]).clamp(0, 96),
    ]
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_a_cascade_averages_scores_and_masks():
    cascade = heads(CascadeHeads).eval()
    features, proposals, _ = features_and_proposals()
    sizes = [(96, 96)] * 2
    for stage in cascade.stages:
        stage.score_thresh, stage.detections_per_img, stage.nms_thresh = 0.0, 10**6, 1.0
    with torch.no_grad():
        detections, losses = cascade(features, [x.clone() for x in proposals], sizes)
        boxes, scores = proposals, 0
        for index, stage in enumerate(cascade.stages):
            logits, deltas = stage.predict(features, boxes)
            scores = scores + logits / 3
            if index < 2:
                best = logits[:, 1:].argmax(1) + 1
                boxes = stage.refine(boxes, deltas, best, sizes)
        masks = sum(s.predict_masks(features, [x["boxes"] for x in detections]).sigmoid() / 3 for s in cascade.stages)
    assert losses == {} and len(detections) == 2
    expected = scores.softmax(1)[: len(proposals[0]), 1:].flatten().sort(descending=True).values
    torch.testing.assert_close(detections[0]["scores"], expected[: len(detections[0]["scores"])])
    first = detections[0]
    torch.testing.assert_close(first["masks"][0, 0], masks[0, first["labels"][0]])


# --- pyramid, images and the whole network ----------------------------------------------------------------------------


def test_the_last_maps():
    x = torch.randn(1, 3, 96, 160)
    backbone = make("mask_rcnn").backbone.eval()
    maps = list(backbone(x).values())
    assert [tuple(y.shape[1:]) for y in maps] == [(16, 96 // s, 160 // s) for s in (4, 8, 16, 32)] + [(16, 2, 3)]
    assert torch.equal(maps[4], maps[3][:, :, ::2, ::2])
    backbone = make("retinanet").backbone.eval()
    maps = list(backbone(x).values())
    assert [tuple(y.shape[2:]) for y in maps] == [(12, 20), (6, 10), (3, 5), (2, 3), (1, 2)]
    last = super(type(backbone), backbone).forward(x)[-1]
    torch.testing.assert_close(maps[3], backbone.top.p6(last))
    torch.testing.assert_close(maps[4], backbone.top.p7(maps[3]))
    assert maps[3].min() < 0, "no ReLU in between, or the test shows nothing"


def test_batch_norms_are_frozen_and_their_scales_trained():
    for freeze in (True, False):
        network = make("mask_rcnn", freeze_batch_norm=freeze).train()
        before = {k: v.clone() for k, v in network.state_dict().items() if "running_mean" in k}
        sum(network(*batch()).values()).backward()
        same = [torch.equal(v, network.state_dict()[k]) for k, v in before.items()]
        assert before and all(same) if freeze else not any(same)
        norms = [m for m in network.backbone.modules() if isinstance(m, nn.BatchNorm2d)]
        assert norms and all(m.weight.grad is not None for m in norms)


@pytest.mark.parametrize("size,seen", [((480, 640), (800, 1067)), ((427, 640), (800, 1199)), ((500, 333), (1201, 800)),
                                       ((200, 1000), (267, 1333))])
def test_sides_are_rounded(size, seen):
    images, _ = DetectionTransform(800, 1333, [0.5] * 3, [0.25] * 3).eval()([torch.rand(3, *size)])
    assert images.image_sizes == [seen]
    assert all(side % 32 == 0 for side in images.tensors.shape[2:])


def test_padding_is_zero_after_normalisation_and_boxes_come_back():
    transform = DetectionTransform(96, 160, [0.5] * 3, [0.25] * 3).eval()
    images, _ = transform([torch.rand(3, 70, 90), torch.rand(3, 60, 64)])
    assert images.image_sizes == [(96, 123), (96, 102)] and images.tensors.shape == (2, 3, 96, 128)
    assert (images.tensors[1, :, :, 102:] == 0).all() and (images.tensors[1, :, :, :102] != 0).any()
    found = transform.postprocess([dict(boxes=torch.tensor([[0.0, 0, 123, 96]]))], [(96, 123)], [(70, 90)])
    torch.testing.assert_close(found[0]["boxes"], torch.tensor([[0.0, 0, 90, 70]]))


def test_training_images_are_resized_with_their_objects_or_not():
    transform = DetectionTransform(140, 200, [0.5] * 3, [0.25] * 3).train()
    images, objects = transform([torch.rand(3, 70, 90)], [target([[10, 20, 30, 40]], [1])])
    assert images.image_sizes == [(140, 180)] and objects[0]["boxes"].tolist() == [[20, 40, 60, 80]]
    assert objects[0]["masks"].shape == (1, 140, 180) and objects[0]["masks"].sum() == 40 * 40
    transform.resize_in_training = False
    images, objects = transform([torch.rand(3, 70, 90)], [target([[10, 20, 30, 40]], [1])])
    assert images.image_sizes == [(70, 90)] and objects[0]["boxes"].tolist() == [[10, 20, 30, 40]]
    assert transform.eval()([torch.rand(3, 70, 90)])[0].image_sizes == [(140, 180)]


@pytest.mark.parametrize("kind", KINDS)
def test_a_network_trains_and_detects(kind):
    network, (images, targets) = make(kind).train(), batch()
    losses = network(images, targets)
    sum(losses.values()).backward()
    assert [name for name, p in network.named_parameters() if p.grad is None] == []
    network.eval()
    for module in network.modules():
        if hasattr(module, "score_thresh"):
            module.score_thresh = 0.0
    with torch.no_grad():
        detections = network(images)
    assert len(detections) == 2 and network.num_classes == 3
    for found, image in zip(detections, images, strict=True):
        assert 0 < len(found["boxes"]) == len(found["labels"]) == len(found["scores"]) <= 100
        assert set(found["labels"].tolist()) <= {1, 2, 3}
        assert (found["scores"].diff() <= 0).all()
        height, width = image.shape[1:]
        assert (found["boxes"] >= 0).all() and (found["boxes"] <= torch.tensor([width, height] * 2) + 1e-3).all()
        if network.has_masks:
            assert found["masks"].shape == (len(found["boxes"]), height, width) and found["masks"].dtype == torch.bool


@pytest.mark.parametrize("kind", KINDS)
def test_losses_are_float32_under_autocast(kind):
    network = make(kind).train()
    with torch.autocast("cpu", torch.bfloat16):
        losses = network(*batch())
    assert {value.dtype for value in losses.values()} == {torch.float32}
    assert all(value.isfinite() for value in losses.values())


@pytest.mark.parametrize("change,message", [
    (lambda targets: None, "targets for each of the 2 images, got none"),
    (lambda targets: targets[:1], "targets for each of the 2 images, got 1"),
    (lambda targets: [{}, {}], "image 0 lack boxes, labels, masks"),
    (lambda targets: [dict(targets[0], boxes=torch.zeros(2, 5)), targets[1]], r"must be \(N, 4\) floats"),
    (lambda targets: [dict(targets[0], labels=torch.tensor([1])), targets[1]], r"\(N,\) int64 for 2 boxes"),
    (lambda targets: [dict(targets[0], labels=torch.tensor([0, 1])), targets[1]], "must be 1 to 3 .* got 0 to 1"),
    (lambda targets: [dict(targets[0], labels=torch.tensor([4, 1])), targets[1]], "must be 1 to 3 .* got 1 to 4"),
    (lambda targets: [dict(targets[0], masks=torch.zeros(1, 70, 90)), targets[1]], r"\(2, 70, 90\), got \(1, 70, 90\)"),
    (lambda targets: [dict(targets[0], masks=torch.zeros(2, 30, 20)), targets[1]], r"got \(2, 30, 20\)"),
    (lambda targets: [targets[0], target([[4, 4, 4, 9]], [1], 60, 64)], r"image 1 has a box without area, \[4.0"),
    (lambda targets: [dict(targets[0], boxes=torch.full((2, 4), math.nan)), targets[1]], "image 0 has a box without"),
])
def test_targets_that_cannot_be_right(change, message):
    images, targets = batch()
    with pytest.raises(ValueError, match=message):
        make("mask_rcnn").train()(images, change(targets))


@pytest.mark.parametrize("name", [
    "debiformer_tiny", "vitaev2_s", "resnet18", "swin_tiny_patch4_window7_224", "convnext_atto"
])
def test_other_backbones(name):
    network = make("mask_rcnn", name).train()
    sum(network(*batch()).values()).backward()
    unused = [k for k, p in network.named_parameters() if p.grad is None]
    assert unused == []


def test_a_network_without_maps():
    with pytest.raises(NoMapsError, match="deit"):
        mask_rcnn("deit_tiny_patch16_224")


@pytest.mark.parametrize("kind,name,regions,millions", [
    ("mask_rcnn", "biformer_small", 16, 45.2), ("mask_rcnn", "biformer_base", 16, 76.3),
    ("retinanet", "biformer_small", 16, 35.3), ("retinanet", "biformer_base", 16, 67.0),
    ("mask_rcnn", "debiformer_small", 16, 63.7), ("mask_rcnn", "debiformer_base", 32, 115.0),
    ("retinanet", "debiformer_small", 16, 53.7), ("retinanet", "debiformer_base", 32, 105.7),
    ("mask_rcnn", "debiformer_tiny", 8, None), ("mask_rcnn", "vitaev2_s", None, 39.0),
])
def test_parameters_and_regions(kind, name, regions, millions):
    with torch.device("meta"):
        network = DETECTORS[kind](name)
    if millions is not None:
        assert sum(p.numel() for p in network.parameters()) / 1e6 == pytest.approx(millions, abs=0.06)
    found = {module.num_regions for module in network.modules() if hasattr(module, "num_regions")}
    assert found == ({regions} if regions else set())


def test_the_cascade_of_vitaev2_has_its_published_size():
    with torch.device("meta"):
        network = cascade_mask_rcnn("vitaev2_s")
    assert sum(p.numel() for p in network.parameters()) / 1e6 == pytest.approx(75, abs=2.5)


def test_what_training_asks_of_a_network():
    network = make("mask_rcnn")
    names = {name for name, _ in network.named_parameters()}
    assert network.no_weight_decay() <= names
    debiformer = make("retinanet", "debiformer_tiny")
    assert debiformer.no_weight_decay()
    assert debiformer.no_weight_decay() <= {name for name, _ in debiformer.named_parameters()}
    assert network.default_cfg["architecture"] == "a detector on biformer_nano"
    network.set_grad_checkpointing()
    sum(network.train()(*batch()).values()).backward()


@pytest.mark.parametrize("kind,steps", [
    ("mask_rcnn", 40),
    pytest.param("retinanet", 320, marks=pytest.mark.long),
    pytest.param("cascade_mask_rcnn", 320, marks=pytest.mark.long),
])
def test_squares_are_learnt(kind, steps):
    """Where they are, of which of two classes, and their masks, from sixteen images."""
    torch.manual_seed(0)
    images, targets = [], []
    for index in range(16):
        left, top = (int(v) for v in torch.randint(4, 36, (2,)))
        label = 1 + index % 2
        image = torch.zeros(3, 64, 64)
        image[label, top : top + 24, left : left + 24] = 1
        images.append(image)
        targets.append(target([[left, top, left + 24, top + 24]], [label], 64, 64))
    small = dict(num_classes=2, channels=32, short=64, long=64, num_regions=4, freeze_batch_norm=False)
    network = make(kind, **small) if kind == "retinanet" else make(kind, head_channels=64, **small)
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3)
    for step in range(steps):
        part = slice(step % 4 * 4, step % 4 * 4 + 4)
        optimizer.zero_grad()
        sum(network.train()(images[part], targets[part]).values()).backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
    with torch.no_grad():
        detections = network.eval()(images)
    right = 0
    for found, wanted in zip(detections, targets, strict=True):
        if found["labels"][:1].tolist() == wanted["labels"].tolist():
            overlap = 1.0
            if network.has_masks:
                mask, whole = found["masks"][0], wanted["masks"][0].bool()
                overlap = (mask & whole).sum() / (mask | whole).sum()
            right += bool(overlap > 0.6) and bool(box_iou(found["boxes"][:1], wanted["boxes"]) > 0.5)
    assert right >= 12


# --- published weights ------------------------------------------------------------------------------------------------

HEADS_PUBLISHED = {
    "backbone.fpn.": "neck.", "rpn.head.conv.0.0.": "rpn_head.rpn_conv.", "rpn.head.cls_logits.": "rpn_head.rpn_cls.",
    "rpn.head.bbox_pred.": "rpn_head.rpn_reg.", "backbone.top.p6.": "neck.fpn_convs.3.conv.",
    "backbone.top.p7.": "neck.fpn_convs.4.conv.", "head.classification_head.cls_logits.": "bbox_head.retina_cls.",
    "head.regression_head.bbox_reg.": "bbox_head.retina_reg.",
}
OF_A_STAGE = {
    "box_head.fc6.": "bbox_head{s}.shared_fcs.0.", "box_head.fc7.": "bbox_head{s}.shared_fcs.1.",
    "box_head.5.": "bbox_head{s}.shared_fcs.0.", "box_predictor.cls_score.": "bbox_head{s}.fc_cls.",
    "box_predictor.bbox_pred.": "bbox_head{s}.fc_reg.", "mask_predictor.conv5_mask.": "mask_head{s}.upsample.",
    "mask_predictor.mask_fcn_logits.": "mask_head{s}.conv_logits.",
}
for i in range(4):
    HEADS_PUBLISHED[f"head.classification_head.conv.{i}.0."] = f"bbox_head.cls_convs.{i}.conv."
    HEADS_PUBLISHED[f"head.regression_head.conv.{i}.0."] = f"bbox_head.reg_convs.{i}.conv."
    OF_A_STAGE[f"mask_head.{i}.0."] = f"mask_head{{s}}.convs.{i}.conv."
    OF_A_STAGE[f"box_head.{i}.0."] = f"bbox_head{{s}}.shared_convs.{i}.conv."
    OF_A_STAGE[f"box_head.{i}.1."] = f"bbox_head{{s}}.shared_convs.{i}.bn."
for ours, published in OF_A_STAGE.items():
    HEADS_PUBLISHED[f"roi_heads.{ours}"] = f"roi_head.{published}".format(s="")
    for s in range(3):
        HEADS_PUBLISHED[f"roi_heads.stages.{s}.{ours}"] = f"roi_head.{published}".format(s=f".{s}")


def as_published(network):
    """The weights of a detector on a ResNet, whose body needs no renaming, in mmdetection's layout."""
    found = {}
    for name, value in network.state_dict().items():
        if "cls_score" in name:
            value = torch.cat([value[1:], value[:1]])
        elif name.startswith("roi_heads") and "bbox_pred" in name:
            value = value[4:]
        elif "mask_fcn_logits" in name:
            value = value[1:]
        for ours, published in HEADS_PUBLISHED.items():
            if name.startswith(ours):
                name = published + name.removeprefix(ours)
                break
        else:
            assert name.startswith("backbone."), name
            name = name.replace("backbone.body.", "backbone.")
        found[name] = value
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_published_weights_are_renamed(kind):
    network, other = make(kind, "resnet10t"), make(kind, "resnet10t")
    for p in network.parameters():
        nn.init.normal_(p)
    published = as_published(network)
    assert is_detector(published) and is_detector(network.state_dict())
    assert not load_detector(other, published)
    for name, value in network.state_dict().items():
        loaded = other.state_dict()[name].clone()
        if name.startswith("roi_heads") and ("bbox_pred" in name or "mask_fcn_logits" in name):
            rows = 4 if "bbox_pred" in name else 1
            assert (loaded[:rows] == 0).all(), name
            loaded[:rows] = value[:rows]  # of the background, which are not published
        assert torch.equal(loaded, value), name
    assert rename(network.state_dict(), other).keys() == other.state_dict().keys()


@pytest.mark.parametrize("kind", ["mask_rcnn", "retinanet"])
def test_published_biformers_have_extra_norms(kind):
    network = make(kind)
    own = {name for name in network.state_dict() if "extra_norms" in name}
    first = {f"backbone.extra_norms.0.{x}": torch.ones(64) for x in ("weight", "bias")}
    renamed = rename({**network.state_dict(), **first}, network)
    assert {name for name in renamed if "extra_norms" in name} == own and len(own) == (8 if kind == "mask_rcnn" else 6)


@pytest.mark.parametrize("kind,layers", [("mask_rcnn", 3), ("cascade_mask_rcnn", 9), ("retinanet", 1)])
def test_a_detector_of_other_classes_keeps_its_own_layers_of_them(kind, layers):
    source, network = make(kind, num_classes=5), make(kind)
    for p in source.parameters():
        nn.init.normal_(p)
    own = {name: value.clone() for name, value in network.state_dict().items()}
    with pytest.raises(MismatchError):
        load_detector(network, source.state_dict())
    assert load_detector(network, source.state_dict(), new_classes=True)
    kept = [name for name in own if own[name].shape != source.state_dict()[name].shape]
    assert len(kept) == 2 * layers and all(torch.equal(network.state_dict()[name], own[name]) for name in kept)
    for name, value in network.state_dict().items():
        assert name in kept or torch.equal(value, source.state_dict()[name]), name


def test_a_backbone_comes_from_a_classifier_or_another_detector():
    network = make("retinanet")
    classifier = timm.create_model("biformer_nano")
    loaded, left_out, new = load_backbone(network, classifier.state_dict())
    assert "head" in left_out and "backbone.fpn (" in new and "backbone.extra_norms (6)" in new
    body = network.backbone.body.state_dict()
    assert loaded.startswith(f"{len(body)} ") and all(torch.equal(body[k], classifier.state_dict()[k]) for k in body)
    source = make("mask_rcnn")
    for p in source.parameters():
        nn.init.normal_(p)
    loaded, left_out, new = load_backbone(network, source.state_dict())
    assert loaded.startswith(f"{len(body) + 6} ") and "extra_norms" not in new
    assert "backbone.extra_norms (2)" in left_out and "roi_heads" in left_out, "the norm of a map that is not used"
    norms = {name: value for name, value in network.state_dict().items() if "extra_norms" in name}
    assert len(norms) == 6 and all(torch.equal(value, source.state_dict()[name]) for name, value in norms.items())
