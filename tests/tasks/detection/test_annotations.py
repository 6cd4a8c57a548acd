"""tasks/detection/annotations.py and masks.py: what is learnt, what is left out, and what cannot be right."""
import json

import numpy as np
import pytest
from pycocotools import mask as reference

from helpers.objects import CLASSES, IDS, read_annotations, write_annotations, write_objects
from tasks.detection import masks
from tasks.detection.annotations import Packed, describe, read
from tasks.detection.errors import BadAnnotationError, MissingMaskError, NoMasksError
from tasks.detection.scores import MASK, score
from utils import UserError

# Of pycocotools, which knows an older NumPy.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
SQUARE = [[10, 10, 30, 10, 30, 30, 10, 30]]


def entry(image=1, **changed):
    return dict(id=1, image_id=image, category_id=3, bbox=[10, 10, 20, 20], area=400, iscrowd=0,
                segmentation=SQUARE) | changed


def content(*annotations):
    return dict(
        images=[dict(id=1, file_name="a.jpg", height=50, width=60), dict(id=7, file_name="b.jpg", height=60, width=50)],
        categories=[dict(id=id, name=name) for id, name in zip((7, 3, 8), ("green", "red", "blue"), strict=True)],
        annotations=[dict(x, id=index) for index, x in enumerate(annotations, start=1)],
    )


@pytest.fixture
def found(tmp_path):
    """A function: annotations -> what is read of them, by these arguments."""
    (tmp_path / "annotations").mkdir()
    return lambda data, **kwargs: read(write_annotations(tmp_path, "train", data), **{"with_masks": True, **kwargs})


# --- what is learnt ---------------------------------------------------------------------------------------------------


def test_objects_are_those_of_their_image(found):
    """In the file's order within an image; categories with gaps are labels from 1 in the order of their ids."""
    data = found(content(entry(7), entry(1, category_id=8), entry(7, category_id=7, bbox=[0, 0, 5, 9])))
    assert data.categories == {3: "red", 7: "green", 8: "blue"} and list(data.counts) == [1, 2]
    first, second = data.objects(0), data.objects(1)
    assert first.labels.tolist() == [3] and second.labels.tolist() == [1, 2]
    assert second.boxes.tolist() == [[10, 10, 30, 30], [0, 0, 5, 9]] and second.boxes.dtype == np.float32
    assert len(second) == 2 and second.segmentations == [SQUARE, SQUARE]
    assert not data.left_out and describe(data.left_out) == ""


def test_a_box_is_cut_at_the_edges_of_its_image(found):
    data = found(content(entry(bbox=[-5, -3, 20, 20]), entry(bbox=[50, 40, 20.5, 30])))
    assert data.objects(0).boxes.tolist() == [[0, 0, 15, 17], [50, 40, 60, 50]]


@pytest.mark.parametrize("changed,reason", [
    (dict(iscrowd=1), "1 crowd region"),
    (dict(iscrowd=1, segmentation=dict(size=[50, 60], counts=[0, 3000])), "1 crowd region"),
    (dict(bbox=[10, 10, 0, 5]), "1 box without area"),
    (dict(bbox=[10, 10, 0.9, 5]), "1 box without area"),
    (dict(area=0), "1 box without area"),
    (dict(segmentation=[]), "1 object without a mask"),
    (dict(segmentation=[[1, 2, 3, 4]]), "1 object without a mask"),
    (dict(segmentation=None), "1 object without a mask"),
])
def test_what_is_left_out_is_counted(found, changed, reason):
    data = found(content(entry(), entry(**changed), entry(7)))
    assert list(data.counts) == [1, 1] and describe(data.left_out) == reason


def test_boxes_alone_need_no_masks(found):
    for changed in (dict(segmentation=[]), dict(segmentation="anything")):
        data = found(content(entry(**changed)), with_masks=False)
        assert list(data.counts) == [1, 0] and data.objects(0).segmentations == [None]
    plain = {key: value for key, value in entry().items() if key not in ("segmentation", "area", "iscrowd")}
    assert list(found(content(plain), with_masks=False).counts) == [1, 0]
    with pytest.raises(NoMasksError, match=r"instances_train2017\.json has boxes and no masks$"):
        found(content(plain))


def test_counts_of_what_is_left_out(found):
    data = found(content(entry(iscrowd=1), entry(iscrowd=1), entry(area=0), entry(area=0), entry()))
    assert describe(data.left_out) == "2 crowd regions, 2 boxes without area"


def test_what_is_kept_for_scoring(found):
    """All but bad annotations: an evaluation has its own use of crowds."""
    crowd, bad = entry(iscrowd=1), entry(bbox=[0, 0, -1, 4])
    data = found(content(entry(), crowd, bad), skip_bad=True, for_scoring=True)
    assert [x["id"] for x in data.content["annotations"]] == [1, 2] and data.bad == {"bad annotation": 1}
    assert found(content(entry())).content is None
    bare = content(entry(), entry(segmentation=[]))
    with pytest.raises(MissingMaskError, match=r"instances_train2017\.json: annotation 2 has no mask$"):
        found(bare, for_scoring=True)
    data = found(bare, for_scoring=True, skip_bad=True)
    assert [x["id"] for x in data.content["annotations"]] == [1] and data.bad == {"bad annotation": 1}
    assert len(found(bare, for_scoring=True, with_masks=False).content["annotations"]) == 2


@pytest.mark.parametrize("tiny", [dict(bbox=[3, 3, 0.5, 0.5]), dict(area=0)])
@pytest.mark.parametrize("segmentation", [[], [[3, 3, 3.5, 3.5]]])
def test_what_is_kept_can_be_scored(found, tiny, segmentation):
    """Objects that are too small to be learnt are scored: they need masks too."""
    data = content(entry(), entry(**tiny, segmentation=segmentation), entry(**tiny))
    with pytest.raises(MissingMaskError):
        found(data, for_scoring=True)
    kept = found(data, for_scoring=True, skip_bad=True)
    assert score(kept.content, [], MASK).values["AP"] == 0 and [x["id"] for x in kept.content["annotations"]] == [1, 3]
    assert describe(found(data).left_out) == "2 boxes without area"


# --- mistakes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("changed,message", [
    (dict(bbox=[float("nan"), 0, 5, 5]), "has no bbox of four finite numbers"),
    (dict(bbox=[0, 0, float("inf"), 5]), "has no bbox of four finite numbers"),
    (dict(bbox=[1, 2, 3]), "has no bbox of four finite numbers"),
    (dict(bbox=None), "has no bbox of four finite numbers"),
    (dict(bbox=[5, 5, -1, 5]), "has a bbox of negative size, -1 x 5"),
    (dict(area=float("nan")), "has the area nan, which is no number"),
    (dict(bbox=[60, 5, 10, 5]), r"outside of its image a\.jpg of 60 x 50"),
    (dict(bbox=[5, -20, 10, 20]), r"outside of its image a\.jpg"),
    (dict(image_id=2), "has the image_id 2, which is not among the images"),
    (dict(category_id=1), "has the category_id 1, which is not among the categories"),
    (dict(segmentation="abc"), "neither polygons nor an object with size and counts"),
    (dict(segmentation=[[1, 2, 3, 4, 5]]), "has a polygon that is no list of numbers"),
    (dict(segmentation=[[1, 2, 3, 4, 5, float("nan")]]), "has a polygon that is no list"),
    (dict(segmentation=[1, 2, 3, 4, 5, 6]), "has a polygon that is no list"),
    (dict(segmentation=dict(size=[60, 50], counts=[3000])), "has a mask of 60 x 50 pixels, and its image has 50 x 60"),
    (dict(segmentation=dict(size=[50, 60], counts=[10])), "has a mask of 50 x 60 pixels, and counts of 10"),
    (dict(segmentation=dict(size=[50, 60], counts=[-1, 3001])), "has a mask whose counts are no run lengths"),
    (dict(segmentation=[[1e300, 2, 3, 4, 5, 6]]), "has a polygon far outside of its image of 60 x 50"),
    (dict(segmentation=[[1, 2, 3, 4, 5, 6], [0, 0, 9, -61, 9, 9]]), "has a polygon far outside of its image"),
    (dict(segmentation=[[1, 2, 3, 4, 5, 10**400]]), "has a polygon that is no list of numbers"),
    (dict(segmentation=[[1, 2, 3, 4, 5, True]]), "has a polygon that is no list of numbers"),
    (dict(segmentation=dict(size=[50, 60])), "neither polygons nor an object with size and counts"),
])
def test_a_bad_annotation_is_named(found, changed, message):
    data = content(entry(), entry(**changed))
    with pytest.raises(BadAnnotationError, match=rf"^\S+instances_train2017\.json: annotation 2 .*{message}"):
        found(data)
    kept = found(data, skip_bad=True)
    assert list(kept.counts) == [1, 0] and describe(kept.left_out) == "1 bad annotation"


@pytest.mark.parametrize("part,change,message", [
    ("categories", lambda x: x.clear(), "it has no categories"),
    ("categories", lambda x: x[0].update(id=3), "2 of its categories have the id 3"),
    ("images", lambda x: x[0].update(id=7), "2 of its images have the id 7"),
    ("images", lambda x: x[0].update(file_name="b.jpg"), r"two images have the file_name b\.jpg"),
    ("images", lambda x: x[0].pop("file_name"), "image 1 has no file_name"),
    ("images", lambda x: x[1].pop("width"), r"image 7 \(b\.jpg\) has no width and height in pixels"),
    ("images", lambda x: x[1].update(height=0), r"image 7 \(b\.jpg\) has no width and height in pixels"),
    ("images", lambda x: x.clear(), "it has no images"),
])
def test_what_else_cannot_be(found, part, change, message):
    data = content(entry())
    change(data[part])
    with pytest.raises(UserError, match=rf"instances_train2017\.json: .*{message}"):
        found(data, skip_bad=True)


def test_two_categories_of_one_name(found):
    """Roboflow's files begin with a category that no object has, and which may have the name of another."""
    data = content(entry(), entry(category_id=8))
    data["categories"].append(dict(id=0, name="red"))
    read = found(data, for_scoring=True)
    assert read.categories == {3: "red", 7: "green", 8: "blue"} and len(read.content["categories"]) == 3
    data = content(entry(), entry(category_id=0))
    data["categories"].append(dict(id=0, name="red"))
    with pytest.raises(UserError, match=r"json: two categories have the name red$"):
        found(data)


def test_what_other_tools_write(found):
    """null for what is not known, and sizes as floats; paths of Windows."""
    data = content(entry(area=None, iscrowd=None))
    data["images"][0].update(height=50.0, width=60.0, file_name="a\\b.jpg")
    read = found(data)
    assert list(read.counts) == [1, 0] and read.images[0] == (1, "a/b.jpg", 50, 60)
    del data["annotations"]
    assert not found(data, for_scoring=True).content["annotations"]


# --- masks ------------------------------------------------------------------------------------------------------------


def test_masks_are_those_of_cocos_own_tools():
    """Of polygons, of several parts too, and of runs in both forms."""
    rng = np.random.default_rng(0)
    for _ in range(20):
        height, width = rng.integers(20, 60, 2).tolist()
        parts = [(rng.random(2 * rng.integers(3, 9)) * min(height, width)).round(1).tolist() for _ in range(2)]
        expected = reference.decode(reference.merge(reference.frPyObjects(parts, height, width))).astype(bool)
        found = masks.rasterize(masks.tidy(parts), height, width)
        assert found.dtype == bool and found.any() and np.array_equal(found, expected)
        coded, = masks.encode(found[None])
        assert isinstance(coded["counts"], str) and coded["size"] == [height, width]
        assert np.array_equal(reference.decode(coded), expected)
        assert np.array_equal(masks.rasterize(masks.tidy(coded), height, width), expected)
        runs = np.diff(np.flatnonzero(np.diff(expected.ravel("F").astype(int), prepend=0, append=2)), prepend=0)
        counts = dict(size=[height, width], counts=runs.tolist())
        assert np.array_equal(masks.rasterize(masks.tidy(counts), height, width), expected)


def test_no_masks_are_no_runs():
    assert masks.encode(np.zeros((0, 5, 6), bool)) == []


def test_polygons_of_two_points_are_left_out():
    assert masks.tidy([[1, 2, 3, 4], *SQUARE]) == SQUARE
    assert masks.tidy([[1, 2, 3, 4]]) is masks.tidy([]) is masks.tidy(None) is None


# --- memory -----------------------------------------------------------------------------------------------------------


def test_segmentations_lie_in_arrays():
    """Python objects that data loading processes look at would be copied into each of them."""
    values = [None, SQUARE, dict(size=[2, 3], counts="ab")]
    texts = [json.dumps(value).encode() for value in values]
    packed = Packed(texts)
    assert [packed[index] for index in range(3)] == values and len(packed.content) == sum(map(len, texts))
    assert all(isinstance(x, np.ndarray) for x in vars(packed).values())


def test_the_helper_writes_what_is_read(tmp_path):
    data = read(write_objects(tmp_path).joinpath("annotations/instances_train2017.json"), with_masks=True)
    assert list(data.categories.items()) == list(zip(IDS, CLASSES, strict=True)) and list(data.counts) == [3] * 6
    assert len(read_annotations(tmp_path, "val")["images"]) == 4
