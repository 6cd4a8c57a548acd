"""COCO's scores: against pycocotools, worked out by hand, and by files that are wrong."""
import contextlib
import copy
import csv
import io
import json
import logging
import math
import warnings

import numpy as np
import pytest
from pycocotools import mask as coco_masks
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from helpers import ROOT
from tasks.detection.files import read_annotations, read_detections
from tasks.detection.scores import BOX, MASK, Score, check_detections, score, write_classes
from utils import UserError

# Of pycocotools, which knows an older NumPy.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

KEYS = ["AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large", "AR1", "AR10", "AR100", "AR_small", "AR_medium",
        "AR_large"]
# Gaps between them, out of order, and the last without objects.
CATEGORIES = [dict(id=7, name="cat"), dict(id=2, name="=dog"), dict(id=90, name="bird"), dict(id=50, name="none")]
HEIGHT, WIDTH = 140, 160


def pycocotools(annotations, detections, kind, images=None):
    """The twelve values of pycocotools, -1 where there is none, what it prints, and AP and AP50 by category."""
    annotations, detections = copy.deepcopy((annotations, detections))
    if kind == MASK:
        for entry in detections:
            entry.pop("bbox", None)
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        truth = COCO()
        truth.dataset = annotations
        truth.createIndex()
        if detections:
            found = truth.loadRes(detections)
        else:  # which loadRes fails at
            found = COCO()
            found.dataset = dict(annotations, annotations=[])
            found.createIndex()
        evaluation = COCOeval(truth, found, dict(box="bbox", mask="segm")[kind])
        if images is not None:
            evaluation.params.imgIds = sorted(images)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    precision = evaluation.eval["precision"][:, :, :, 0, -1]
    by_class = [[_mean(x) for x in (precision[:, :, k], precision[0, :, k])] for k in range(precision.shape[2])]
    lines = [line for line in out.getvalue().splitlines() if line.startswith(" Average")]
    return evaluation.stats, lines, by_class


def _mean(values):
    return values[values > -1].mean() if (values > -1).any() else math.nan


def check_equal(annotations, detections, kind, images=None):
    before = copy.deepcopy((annotations, detections))
    found = score(annotations, detections, kind, images)
    assert (annotations, detections) == before
    values, lines, by_class = pycocotools(annotations, detections, kind, images)
    assert list(found.values) == KEYS and found.lines() == lines
    expected = [math.nan if value == -1 else value for value in values]
    np.testing.assert_allclose(list(found.values.values()), expected, rtol=0, atol=1e-9)
    np.testing.assert_allclose([x[2:] for x in found.classes], by_class, rtol=0, atol=1e-9)
    return found


# --- random data ------------------------------------------------------------------------------------------------------


def mask_of(box, is_round):
    """Compressed run lengths of a box, or of the ellipse in it."""
    left, top, width, height = box
    y, x = np.mgrid[:HEIGHT, :WIDTH] + 0.5
    dx, dy = (x - left - width / 2) / max(width, 1e-3), (y - top - height / 2) / max(height, 1e-3)
    inside = dx**2 + dy**2 <= 0.25 if is_round else (abs(dx) <= 0.5) & (abs(dy) <= 0.5)
    mask = coco_masks.encode(np.asfortranarray(inside.astype(np.uint8)))
    return dict(size=mask["size"], counts=mask["counts"].decode())


def polygon_of(box):
    left, top, width, height = box
    angles = np.linspace(0, 2 * np.pi, 12, endpoint=False)
    points = np.stack([left + width * (1 + np.cos(angles)) / 2, top + height * (1 + np.sin(angles)) / 2], axis=1)
    return points.round(2).ravel().tolist()


def uncompressed(mask):
    flat = coco_masks.decode(mask).ravel(order="F")
    runs = np.diff(np.flatnonzero(np.diff(flat, prepend=-1, append=-1)))
    return dict(size=mask["size"], counts=[0] * int(flat[0]) + runs.tolist())


def random_box(rng):
    if rng.random() < 0.3:  # an area on the border between two
        width, height = [(32, 32), (16, 64), (96, 96), (64, 144)][rng.integers(4)]
        return [float(rng.integers(0, 15)), float(rng.integers(0, 15)), float(width), float(min(height, 130))]
    left, top = rng.uniform(0, 100, 2)
    width, height = np.exp(rng.uniform(1, 4.8, 2))
    return [float(x) for x in (left, top, min(width, WIDTH - left), min(height, HEIGHT - top))]


def random_object(rng, number, image):
    box, crowd = random_box(rng), int(rng.random() < 0.15)
    mask = mask_of(box, rng.random() < 0.5)
    form = rng.integers(3)
    segmentation = [[polygon_of(box)], uncompressed(mask), mask][form]
    if form == 0:
        mask = coco_masks.merge(coco_masks.frPyObjects(segmentation, HEIGHT, WIDTH))
    return dict(id=number, image_id=image, category_id=int(rng.choice([7, 2, 90])), bbox=box, iscrowd=crowd,
                area=float(rng.choice([coco_masks.area(mask), box[2] * box[3]])), segmentation=segmentation)


def random_detection(rng, truth, image):
    box, category = random_box(rng), int(rng.choice([7, 2, 90, 50]))
    if truth and rng.random() < 0.8:
        near = truth[rng.integers(len(truth))]
        shift = rng.normal(0, 3, 4) * (rng.random() < 0.7)  # or right upon it
        box = [float(x) for x in np.maximum(np.add(near["bbox"], shift), 1)]
        category = near["category_id"] if rng.random() < 0.9 else category
    box[2:] = min(box[2], WIDTH - box[0]), min(box[3], HEIGHT - box[1])
    # Scores of two digits: many are equal, in an image and between images.
    return dict(image_id=image, category_id=category, score=round(float(rng.uniform()), 2), bbox=box,
                segmentation=mask_of(box, rng.random() < 0.5))


def random_data(seed, most=12):
    """Images out of order, some without objects, some without detections, and one with over 100 detections."""
    rng = np.random.default_rng(seed)
    images = [dict(id=int(i), height=HEIGHT, width=WIDTH) for i in rng.permutation(60)[:10] + 3]
    annotations, detections = [], []
    for index, image in enumerate(images):
        number = 0 if index in (0, 1) else int(rng.integers(1, most))
        truth = [random_object(rng, len(annotations) + i + 1, image["id"]) for i in range(number)]
        found = 0 if index in (1, 2) else 150 if index == 3 else int(rng.integers(1, 2 * most))
        # All of one category where there are over 100, since the limit is by category.
        entries = [random_detection(rng, truth, image["id"]) for _ in range(found)]
        detections += [dict(entry, category_id=2) for entry in entries] if index == 3 else entries
        annotations += truth
    order = rng.permutation(len(detections))
    data = dict(images=images, annotations=annotations, categories=CATEGORIES)
    return data, [detections[i] for i in order]


@pytest.mark.parametrize("kind", [BOX, MASK])
@pytest.mark.parametrize("seed", range(4))
def test_scores_are_those_of_pycocotools(seed, kind):
    annotations, detections = random_data(seed)
    found = check_equal(annotations, detections, kind)
    assert not any(math.isnan(value) for value in found.values.values()) and 0.05 < found.values["AP"] < 0.9
    assert [name for name, *_ in found.classes] == ["=dog", "cat", "none", "bird"]
    assert found.classes[2][1] == 0 and all(math.isnan(value) for value in found.classes[2][2:])
    objects = [x for x in annotations["annotations"] if not x["iscrowd"]]
    assert sum(number for _, number, *_ in found.classes) == len(objects) < len(annotations["annotations"])


@pytest.mark.parametrize("kind", [BOX, MASK])
def test_scores_of_some_images_are_those_of_pycocotools(kind):
    """And those of annotations and detections without the others."""
    annotations, detections = random_data(9)
    images = [image["id"] for image in annotations["images"][1:6]]
    found = check_equal(annotations, detections, kind, images)
    assert found.values != score(annotations, detections, kind).values
    alone = dict(annotations, images=annotations["images"][1:6])
    alone["annotations"] = [x for x in annotations["annotations"] if x["image_id"] in images]
    assert score(alone, [x for x in detections if x["image_id"] in images], kind) == found


@pytest.mark.parametrize("kind", [BOX, MASK])
def test_no_detections_have_an_ap_of_zero(kind):
    annotations, _ = random_data(0)
    assert set(check_equal(annotations, [], kind).values.values()) == {0}


@pytest.mark.parametrize("kind", [BOX, MASK])
def test_without_objects_nothing_is_defined(kind):
    annotations, detections = random_data(0)
    found = check_equal(dict(annotations, annotations=[]), detections, kind)
    assert all(map(math.isnan, found.values.values()))
    nothing = score(annotations, detections, kind, [])
    assert all(map(math.isnan, nothing.values.values())) and [x[1] for x in nothing.classes] == [0] * 4


def test_boxes_are_those_of_masks_where_there_are_none():
    annotations, detections = random_data(5)
    for entry in detections:
        del entry["bbox"]
    check_equal(annotations, detections, BOX)


@pytest.mark.parametrize("side,areas", [(32, ("small", "medium")), (96, ("medium", "large"))])
@pytest.mark.parametrize("kind", [BOX, MASK])
def test_an_area_on_a_border_is_of_both_sides(side, areas, kind):
    image, box = dict(id=1, height=HEIGHT, width=WIDTH), [0.0, 0.0, float(side), float(side)]
    truth = dict(id=1, image_id=1, category_id=2, bbox=box, area=side**2, iscrowd=0, segmentation=mask_of(box, False))
    # A false one, of the same area, has the higher score.
    other = [60.0, 40.0, float(side), float(side)]
    detections = [dict(image_id=1, category_id=2, bbox=x, score=s, segmentation=mask_of(x, False))
                  for x, s in ((box, 0.5), (other, 0.9))]
    found = check_equal(dict(images=[image], annotations=[truth], categories=CATEGORIES), detections, kind)
    for area in ("small", "medium", "large"):
        assert found.values[f"AP_{area}"] == pytest.approx(0.5 if area in areas else math.nan, nan_ok=True)


# --- by hand ----------------------------------------------------------------------------------------------------------


def one_image(*boxes, **more):
    objects = [dict(id=i, image_id=4, category_id=2, bbox=list(x), area=x[2] * x[3], iscrowd=0)
               for i, x in enumerate(boxes, 1)]
    return dict(images=[dict(id=4, height=HEIGHT, width=WIDTH)], annotations=objects, categories=CATEGORIES, **more)


def detected(*found):
    return [dict(image_id=4, category_id=2, bbox=list(box), score=score) for box, score in found]


def test_two_objects_and_three_detections_by_hand():
    """The first detection is an object, the second nothing, the third has an IoU of 8 / 10 with the other object.

    At the IoU of 0.50 to 0.80, seven of the ten, precision is 1/1, 1/2 and 2/3 after each detection, at recalls of 1/2,
    1/2 and 1. Of 101 recalls, 51 (0 to 0.50) have a precision of 1, and 50 of 2/3: AP = (51 + 50 * 2/3) / 101. At 0.85,
    0.90 and 0.95 the third is wrong: 51 have a precision of 1, and 50 none: AP = 51 / 101.
    """
    annotations = one_image((0, 0, 10, 10), (50, 50, 10, 10))
    detections = detected(((0, 0, 10, 10), 0.9), ((90, 0, 10, 10), 0.8), ((50, 50, 8, 10), 0.7))
    high, low = (51 + 50 * 2 / 3) / 101, 51 / 101
    # Of recall, one detection finds half of the objects, and three all, but half where the third is wrong.
    recall = (7 * 1 + 3 * 0.5) / 10
    expected = dict(AP=(7 * high + 3 * low) / 10, AP50=high, AP75=high, AR1=0.5, AR10=recall, AR100=recall)
    found = check_equal(annotations, detections, BOX)
    assert {key: found.values[key] for key in expected} == pytest.approx(expected)
    assert found.values["AP_small"] == found.values["AP"] and math.isnan(found.values["AP_large"])
    assert found.classes[0] == ("=dog", 2, pytest.approx(expected["AP"]), pytest.approx(high))
    assert found.lines()[0] == " Average Precision  (AP) @[ IoU=0.50:0.95 | area=   all | maxDets=100 ] = 0.736"
    assert found.lines()[1] == " Average Precision  (AP) @[ IoU=0.50      | area=   all | maxDets=100 ] = 0.835"
    assert found.lines()[11] == " Average Recall     (AR) @[ IoU=0.50:0.95 | area= large | maxDets=100 ] = -1.000"


def test_the_reference_of_cocos_own_tools():
    """Boxes for 100 images of val2014, and what cocodataset/cocoapi prints of them, one image without a detection.

    The annotations are COCO's (https://cocodataset.org, CC BY 4.0), without their masks; the detections are
    results/instances_val2014_fakebbox100_results.json of that repository, the values val2014_fake_eval_res.txt beside
    it.
    """
    data = np.load(ROOT / "tests" / "data" / "coco_val2014_100.npz")
    annotations = dict(
        images=[dict(id=int(x)) for x in data["images"]],
        categories=[dict(id=int(x), name=str(x)) for x in data["categories"]],
        annotations=[
            dict(image_id=int(image), category_id=int(category), bbox=box, area=area, iscrowd=int(crowd))
            for image, category, *box, area, crowd in data["objects"].tolist()
        ],
    )
    detections = [
        dict(image_id=int(image), category_id=int(category), bbox=box, score=value)
        for image, category, *box, value in data["detections"].tolist()
    ]
    found = score(annotations, detections, BOX)
    printed = [float(line.rpartition("= ")[2]) for line in found.lines()]
    assert printed == [0.505, 0.697, 0.573, 0.586, 0.519, 0.501, 0.387, 0.594, 0.595, 0.640, 0.566, 0.564]
    seen = {entry["image_id"] for entry in detections}
    assert len(seen) == 99 and round(score(annotations, detections, BOX, seen).values["AP"], 3) == 0.507


def test_detections_in_a_crowd_are_neither_right_nor_wrong():
    annotations = one_image((0, 0, 10, 10), (40, 40, 60, 60))
    detections = detected(((50, 50, 10, 10), 0.9), ((70, 50, 10, 10), 0.8), ((0, 0, 10, 10), 0.7))
    # Behind two that are wrong it has a precision of 1/3, and recall ends at 1/2.
    assert score(annotations, detections, BOX).values["AP"] == pytest.approx(51 / 101 / 3)
    annotations["annotations"][1]["iscrowd"] = 1
    found = score(annotations, detections, BOX)
    assert found.values["AP"] == pytest.approx(1) and found.classes[0][1] == 1


def test_images_without_detections_count():
    annotations = one_image((0, 0, 10, 10))
    annotations["images"] = [*annotations["images"], dict(id=5, height=HEIGHT, width=WIDTH)]
    annotations["annotations"] += [dict(annotations["annotations"][0], id=2, image_id=5)]
    found = score(annotations, detected(((0, 0, 10, 10), 0.7)), BOX)
    assert found.values["AR100"] == 0.5


# --- what other tools leave out ---------------------------------------------------------------------------------------


def test_ids_of_annotations_are_not_read():
    """pycocotools takes an object with the id 0 for none, and of two with the same id knows one."""
    annotations = one_image((0, 0, 10, 10), (50, 50, 10, 10))
    detections = detected(((0, 0, 10, 10), 0.9), ((50, 50, 10, 10), 0.8))
    for ids in ((0, 1), (3, 3), (None, None)):
        for entry, number in zip(annotations["annotations"], ids, strict=True):
            entry["id"] = number
            if number is None:
                del entry["id"]
        assert score(annotations, detections, BOX).values["AP"] == pytest.approx(1), ids


def test_what_annotations_leave_out_is_filled_in():
    annotations, detections = random_data(3)
    for entry in annotations["annotations"]:
        entry.update(iscrowd=0, area=entry["bbox"][2] * entry["bbox"][3])
    bare = copy.deepcopy(annotations)
    for entry in bare["annotations"]:
        del entry["iscrowd"], entry["area"]
    for kind in (BOX, MASK):
        assert score(bare, detections, kind) == score(annotations, detections, kind)
    for entry in bare["annotations"]:
        del entry["segmentation"]
    for image in bare["images"]:
        del image["height"], image["width"]
    assert score(bare, detections, BOX) == score(annotations, detections, BOX)


@pytest.mark.parametrize("given", ["left out", None, []])
def test_an_object_without_a_mask(given):
    """A crowd is ignored all over its box; any other is a mistake."""
    boxes = [[0.0, 0.0, 10.0, 10.0], [40.0, 40.0, 60.0, 60.0]]
    annotations = one_image(*boxes)
    for entry, box in zip(annotations["annotations"], boxes, strict=True):
        entry["segmentation"] = mask_of(box, False)
    annotations["annotations"][1].update(iscrowd=1)
    inside = [50.0, 50.0, 10.0, 10.0]
    detections = [dict(x, segmentation=mask_of(x["bbox"], False))
                  for x in detected((inside, 0.9), (boxes[0], 0.5), ([120.0, 0.0, 9.0, 9.0], 0.7))]
    expected = score(annotations, detections, MASK)
    for index in (1, 0):
        entry = annotations["annotations"][index]
        entry.pop("segmentation") if given == "left out" else entry.update(segmentation=given)
        if index:
            assert score(annotations, detections, MASK) == expected
            assert expected.values["AP"] == pytest.approx(0.5)
    with pytest.raises(UserError, match=r"^the annotation of id 1, of image 4, has no segmentation, and masks are to"):
        score(annotations, detections, MASK)


def test_masks_are_small_or_large_by_themselves_not_by_their_boxes():
    """A thin ring is small, though its box is of medium size: as a false detection it counts among the small."""
    truth = [0.0, 0.0, 20.0, 20.0]
    annotations = one_image(truth)
    annotations["annotations"][0]["segmentation"] = mask_of(truth, False)
    thin = dict(size=[HEIGHT, WIDTH], counts=[50 * HEIGHT + 50, 90, HEIGHT * WIDTH - 50 * HEIGHT - 140])
    detections = [dict(image_id=4, category_id=2, score=0.9, bbox=[50, 50, 40, 90], segmentation=thin),
                  dict(image_id=4, category_id=2, score=0.5, bbox=truth, segmentation=mask_of(truth, False))]
    assert score(annotations, detections, MASK).values["AP_small"] == pytest.approx(0.5)
    assert score(annotations, detections, BOX).values["AP_small"] == pytest.approx(1)


def test_masks_of_detections_in_every_form_are_the_same():
    annotations, detections = random_data(6)
    polygons = [dict(x, segmentation=[polygon_of(x["bbox"])]) for x in detections]
    merged = [coco_masks.merge(coco_masks.frPyObjects(x["segmentation"], HEIGHT, WIDTH)) for x in polygons]
    expected = score(annotations, polygons, MASK)
    compressed = [dict(x, segmentation=mask) for x, mask in zip(detections, merged, strict=True)]
    assert check_equal(annotations, compressed, MASK) == expected
    lists = [dict(x, segmentation=uncompressed(x["segmentation"])) for x in compressed]
    assert score(annotations, lists, MASK) == expected


def test_nothing_is_printed(capfd, caplog):
    annotations, detections = random_data(1)
    annotations["annotations"][0]["id"] = 0
    with caplog.at_level(logging.DEBUG), warnings.catch_warnings():
        warnings.simplefilter("error")
        for kind in (BOX, MASK):
            score(annotations, detections, kind)
            score(annotations, [], kind)
            score(annotations, detections, kind, [])
    assert capfd.readouterr() == ("", "") and not caplog.records


# --- checks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("change,kind,message", [
    (dict(image_id=5), BOX, "2 detections of images that the annotations do not have, with the image_id 5"),
    (dict(category_id=3), MASK, "2 detections of categories that the annotations do not have, with the category_id 3"),
    (dict(segmentation=None), MASK,
     "no segmentation in 2 of 3 detections, the first of them entry 1; a mask cannot be scored without"),
    (dict(bbox=[], segmentation=[]), BOX,
     "no bbox and no segmentation in 2 of 3 detections, the first of them entry 1; a box cannot be scored without"),
    (dict(segmentation=dict(size=[3, 4], counts=[12])), MASK,
     "entry 1 of the detections, of image 4, has a mask of 3 x 4 pixels, and its image has 140 x 160"),
])
def test_detections_that_do_not_belong_to_the_annotations(change, kind, message):
    box = [0.0, 0.0, 10.0, 10.0]
    annotations, detections = one_image(box), detected((box, 0.9), (box, 0.8), (box, 0.7))
    for entry in (annotations["annotations"][0], *detections):
        entry["segmentation"] = mask_of(box, False)
    check_detections(detections, annotations, kind)
    for entry in detections[1:]:
        entry.update(change)
    for check in (check_detections, lambda found, truth, kind: score(truth, found, kind)):
        with pytest.raises(UserError) as error:
            check(detections, annotations, kind)
        assert str(error.value) == message


def test_images_to_score_that_are_not_there():
    with pytest.raises(UserError, match=r"^2 images to score that the annotations do not have, with the ids 8, 9$"):
        score(one_image((0, 0, 10, 10)), [], BOX, [9, 4, 8])


@pytest.mark.parametrize("where", ["annotations", "detections"])
def test_polygons_need_the_size_of_their_image(where):
    box = [0.0, 0.0, 10.0, 10.0]
    annotations, detections = one_image(box), detected((box, 0.9))
    annotations["annotations"][0]["segmentation"] = detections[0]["segmentation"] = [polygon_of(box)]
    del annotations["images"][0]["height"]
    with pytest.raises(UserError, match=r"the annotations do not say the height and width of its image$"):
        score(annotations, detections if where == "detections" else [], MASK)


# --- files ------------------------------------------------------------------------------------------------------------


def write(path, content):
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_files_are_read_as_they_are(tmp_path):
    annotations, detections = random_data(2)
    detections[0] = {key: value for key, value in detections[0].items() if key != "bbox"}
    detections[1]["segmentation"] = [polygon_of(detections[1]["bbox"])]
    detections[2]["segmentation"] = uncompressed(detections[2]["segmentation"])
    detections[3].update(bbox=[0, 0, 0, 0], score=-2, segmentation=[])
    assert read_annotations(write(tmp_path / "gt.json", annotations)) == annotations
    assert read_detections(write(tmp_path / "found.json", detections)) == detections
    assert read_detections(write(tmp_path / "none.json", [])) == []


@pytest.mark.parametrize("read", [read_annotations, read_detections])
@pytest.mark.parametrize("content,message", [
    (None, r"^cannot read .*f\.json: No such file or directory$"),
    ("folder", r"^cannot read .*f\.json: Is a directory$"),
    (b"\xff\x00\xfe", r"f\.json: it is no JSON: "),
    (b"", r"f\.json: it is no JSON: "),
    (b'{"images": [', r"f\.json: it is no JSON: "),
    (b"[" * 100_000, r"f\.json: it is no COCO file: lists lie in lists too deep to read$"),
])
def test_files_that_cannot_be_read(tmp_path, read, content, message):
    path = tmp_path / "f.json"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content:
        path.mkdir()
    with pytest.raises(UserError, match=message) as error:
        read(path)
    assert len(str(error.value).splitlines()) == 1


OBJECT = dict(id=1, image_id=4, category_id=2, bbox=[0, 0, 10, 10], area=100, iscrowd=0)
TRUTH = dict(images=[dict(id=4)], annotations=[OBJECT, OBJECT], categories=[dict(id=2, name="dog")])


@pytest.mark.parametrize("content,message", [
    ([], "it is a list, as detections are, and annotations have images, annotations, categories"),
    ("3", "it is no annotations in COCO's format"),
    (dict(images=[]), "it has no annotations and no categories"),
    (dict(TRUTH, images={}), "its images are no list of objects"),
    (dict(TRUTH, categories=["dog"]), "its categories are no list of objects"),
    (dict(TRUTH, images=[]), "it has no images: their list is empty"),
    (dict(TRUTH, categories=[]), "it has no categories: their list is empty"),
    (dict(TRUTH, images=[dict(id=4), dict(id="5")]), "entry 1 of its images has no id that is an integer of 64 bits"),
    (dict(TRUTH, images=[dict(id=5), dict(id=4), dict(id=4)]), "2 of its images have the id 4"),
    (dict(TRUTH, categories=[dict(id=2)]), "entry 0 of its categories has no name"),
    *[(dict(TRUTH, annotations=[OBJECT, dict(OBJECT, **change)]), f"entry 1 of its annotations has {message}")
      for change, message in [
          (dict(image_id=None), "no image_id that is an integer of 64 bits"),
          (dict(category_id=True), "no category_id that is an integer of 64 bits"),
          (dict(image_id=5), "the image_id 5, which is not among the images"),
          (dict(category_id=1), "the category_id 1, which is not among the categories"),
          (dict(bbox=None), "no bbox of four finite numbers"),
          (dict(bbox=[0, 0, 10]), "no bbox of four finite numbers"),
          (dict(bbox=[0, 0, math.nan, 10]), "no bbox of four finite numbers"),
          (dict(bbox=[0, 0, 10, -1.5]), "a bbox of negative size, 10 x -1.5"),
          (dict(area=-1), "the area -1, which is no number of at least 0"),
          (dict(area=math.nan), "the area nan, which is no number of at least 0"),
          (dict(iscrowd=2), "the iscrowd 2, which is neither 0 nor 1"),
      ]],
])
def test_annotations_that_are_wrong(tmp_path, content, message):
    path = write(tmp_path / "f.json", content)
    with pytest.raises(UserError) as error:
        read_annotations(path)
    assert str(error.value) == f"{path}: {message}"


FOUND = dict(image_id=4, category_id=2, score=0.5, bbox=[0, 0, 10, 10])


@pytest.mark.parametrize("content,message", [
    (TRUTH, "it is no list, as detections in COCO's format are; it holds annotations"),
    ({}, "it is no list, as detections in COCO's format are"),
    ([FOUND, 3], "entry 1 is no object with image_id, category_id, score and bbox or segmentation"),
    *[([FOUND, dict(FOUND, **change), {}], f"entry 1 has {message}") for change, message in [
        (dict(image_id="4"), "no image_id that is an integer of 64 bits"),
        (dict(category_id=None), "no category_id that is an integer of 64 bits"),
        (dict(score=math.nan), "the score nan, which is no finite number"),
        (dict(score=math.inf), "the score inf, which is no finite number"),
        (dict(score="0.5"), "the score '0.5', which is no finite number"),
        (dict(image_id=2**63), "no image_id that is an integer of 64 bits"),
        (dict(bbox=[0, 0, 10**400, 10]), "no bbox of four finite numbers"),
        (dict(score=True), "the score True, which is no finite number"),
        (dict(bbox=[]), "neither bbox nor segmentation"),
        (dict(bbox=[0, 0, 10, 10, 10]), "no bbox of four finite numbers"),
        (dict(bbox=[0, 0, math.inf, 10]), "no bbox of four finite numbers"),
        (dict(bbox=[0, 0, -3, 10]), "a bbox of negative size, -3 x 10"),
        (dict(segmentation="mask"), "a segmentation that is neither polygons nor an object with size and counts"),
        (dict(segmentation=dict(size=[2, 3])),
         "a segmentation that is neither polygons nor an object with size and counts"),
        (dict(segmentation=[[0, 0, 1, 1]]), "polygons of less than three points alone"),
        (dict(segmentation=[[0, 0, 1, 1, 2, 2, 3]]), "a polygon that is no list of numbers, x and y in turn"),
        (dict(segmentation=[[0, 0, 1, 1, math.nan, 2]]), "a polygon that is no list of numbers, x and y in turn"),
        (dict(segmentation=dict(size=[2], counts=[6])), "a mask whose size is not its height and width"),
        (dict(segmentation=dict(size=[2, 3], counts=[2, -1, 5])), "a mask whose counts are no run lengths"),
        (dict(segmentation=dict(size=[2, 3], counts=[2, 1])), "a mask of 2 x 3 pixels, and counts of 3"),
        (dict(segmentation=dict(size=[2, 3], counts="")), "a mask of 2 x 3 pixels, and counts of 0"),
        (dict(segmentation=dict(size=[2, 3], counts="21")), "a mask of 2 x 3 pixels, and counts of 3"),
        (dict(segmentation=dict(size=[2, 3], counts="2!")), "a mask whose counts are no run lengths"),
        (dict(segmentation=dict(size=[2, 3], counts="2o")), "a mask whose counts are no run lengths"),
        (dict(segmentation=dict(size=[2, 3], counts="2é")), "a mask whose counts are no run lengths"),
        (dict(segmentation=dict(size=[2, 3], counts="o" * 20 + "1")), "a mask whose counts are no run lengths"),
    ]],
    ([{key: value for key, value in FOUND.items() if key != "score"}], "entry 0 has no score"),
])
def test_detections_that_are_wrong(tmp_path, content, message):
    path = write(tmp_path / "f.json", content)
    with pytest.raises(UserError) as error:
        read_detections(path)
    assert str(error.value) == f"{path}: {message}"


@pytest.mark.parametrize("height,width", [(1, 1), (7, 5), (300, 2000)])
@pytest.mark.parametrize("density", [0, 0.001, 0.5, 1])
def test_every_mask_of_pycocotools_is_read(tmp_path, height, width, density):
    pixels = np.random.default_rng(0).random((height, width)) < density
    mask = coco_masks.encode(np.asfortranarray(pixels.astype(np.uint8)))
    entry = dict(FOUND, segmentation=dict(size=mask["size"], counts=mask["counts"].decode()))
    assert read_detections(write(tmp_path / "f.json", [entry])) == [entry]


# --- tables -----------------------------------------------------------------------------------------------------------


def test_table_by_class(tmp_path):
    """In percent; a name that a spreadsheet would compute is made text."""
    nan = math.nan
    boxes = Score(BOX, {}, [("=dog", 3, 0.5, 0.625), ("none", 0, nan, nan)])
    masks = Score(MASK, {}, [("=dog", 3, 1 / 3, 0.0), ("none", 0, nan, nan)])
    title = ["class", "objects", "box_AP", "box_AP50", "mask_AP", "mask_AP50"]
    of_boxes, of_masks, empty = ["50.000", "62.500"], ["33.333", "0.000"], ["", ""]
    cases = [([boxes, masks], of_boxes + of_masks), ([masks], empty + of_masks), ([boxes], of_boxes + empty)]
    for scores, row in cases:
        write_classes(tmp_path / "classes.csv", scores)
        with open(tmp_path / "classes.csv", newline="") as file:
            assert list(csv.reader(file)) == [title, ["'=dog", "3", *row], ["none", "0", "", "", "", ""]]
