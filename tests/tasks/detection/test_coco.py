"""tasks/detection/coco.py: COCO as downloaded and other folders, which images are read, and what is wrong with them."""
import json
import shutil

import numpy as np
import pytest
from PIL import Image

from helpers.objects import CLASSES, read_annotations, write_annotations, write_objects
from tasks.detection.coco import CocoImages, open_coco
from tasks.detection.errors import BadAnnotationError, OtherSizeError
from training.data.images import UnreadableFileError
from utils import UserError


@pytest.fixture
def root(tmp_path):
    return write_objects(tmp_path / "data", train=4, val=3)


def opened(root, split="train", given=None, train=True, with_masks=True, skip_bad=False) -> CocoImages:
    return open_coco(str(root), split, given, train, with_masks, skip_bad)


def changed(root, change, split="train"):
    content = read_annotations(root, split)
    change(content)
    return write_annotations(root, split, content)


# --- what is read -----------------------------------------------------------------------------------------------------


def test_images_and_their_objects(root):
    images = opened(root)
    assert images.classes == list(CLASSES) and len(images) == 4 and images.samples[1][1] == 11
    assert images.notes == [f"{root}/annotations/instances_train2017.json: 4 images, 12 objects"]
    for index in range(4):
        image, target = images[index]
        assert target.masks.shape == (3, image.height, image.width) and target.masks.dtype == bool
        pixels = np.asarray(image).astype(int)
        for box, label, mask in zip(target.boxes, target.labels, target.masks, strict=True):
            left, top, right, bottom = box
            rows, columns = mask.any(1).nonzero()[0], mask.any(0).nonzero()[0]
            extent = [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
            assert np.abs(np.array([left, top, right, bottom]) - extent).max() < 1.5
            inner = mask & (pixels[..., label - 1] > 140)
            assert inner.sum() > 0.9 * mask.sum()  # the colour of its class
    assert opened(root, with_masks=False)[0][1].masks is None


def test_an_evaluation_gets_all_images_and_their_ids(root):
    """Also those without objects, and those of a few pixels."""
    def change(content):
        content["annotations"] = [x for x in content["annotations"] if x["image_id"] != 11]

    changed(root, change)
    evaluated = opened(root, train=False)
    assert [evaluated[index][1] for index in range(4)] == [1, 11, 21, 31]
    trained = opened(root)
    assert [id for _, id in trained.samples] == [1, 21, 31]
    assert trained.notes[0].endswith("3 images, 9 objects; left out: 1 image without objects")
    assert trained[1][1].masks.shape[0] == 3


def test_small_images_and_crowds_are_not_learnt(root):
    def change(content):
        small = content["images"][0]
        small.update(width=31, height=200)
        for x in content["annotations"]:
            if x["image_id"] == 1:
                x.update(bbox=[1, 1, 9, 9], segmentation=[[1, 1, 9, 1, 9, 9]])
            elif x["image_id"] == 11:
                x["iscrowd"] = 1

    changed(root, change)
    Image.new("RGB", (31, 200)).save(root / "train2017/0.png")
    images = opened(root)
    assert [id for _, id in images.samples] == [21, 31]
    assert images.notes[0].endswith("2 images, 6 objects; left out: 3 crowd regions, 1 image without objects, "
                                    "1 image of less than 32 pixels")
    assert opened(root, train=False).notes[0].endswith("4 images, 9 objects")


def test_images_of_two_orientations(root):
    assert opened(root).is_wide.tolist() == [True, True, False, True]


def test_fingerprints(root):
    """They follow the images, their objects and the classes, and not the place."""
    found = {opened(root).fingerprint()}
    moved = root.rename(root.with_name("moved"))
    assert {opened(moved).fingerprint()} == found

    def box(content):
        content["annotations"][4]["bbox"][0] += 0.5

    def mask(content):
        content["annotations"][4]["segmentation"][0][0] += 0.5

    def name(content):
        content["categories"][0]["name"] = "crimson"

    for number, change in enumerate((box, mask, name), start=2):
        changed(moved, change)
        found.add(opened(moved).fingerprint())
        assert len(found) == number, change


# --- where things lie -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place,folder", [
    ("annotations/instances_train2017.json", "train2017"), ("annotations/instances_train2017.json", "images/train2017"),
    ("annotations/instances_train.json", "train"), ("annotations/train.json", "images"), ("train.json", "."),
    ("train/_annotations.coco.json", "train"), ("training.json", "training"),
])
def test_the_usual_places(tmp_path, place, folder):
    source, root = write_objects(tmp_path / "source"), tmp_path / "data"
    (root / place).parent.mkdir(parents=True, exist_ok=True)
    shutil.copytree(source / "train2017", root / folder, dirs_exist_ok=True)
    shutil.copy(source / "annotations/instances_train2017.json", root / place)
    images = opened(root)
    assert len(images) == 6 and images.folder == root / folder and images[0][0].size == (76, 64)


def test_valid_is_val(tmp_path):
    source, root = write_objects(tmp_path / "source"), tmp_path / "data"
    shutil.copytree(source / "val2017", root / "valid")
    shutil.copy(source / "annotations/instances_val2017.json", root / "valid/_annotations.coco.json")
    assert len(opened(root, "val", train=False)) == 4


def test_given_annotations(root, monkeypatch):
    """From the working folder, or from the data's; file names below the data's folder."""
    content = read_annotations(root, "train")
    for image in content["images"]:
        image["file_name"] = f"train2017/{image['file_name']}"
    (root.parent / "mine.json").write_text(json.dumps(content))
    assert len(opened(root, given=str(root.parent / "mine.json"))) == 4
    monkeypatch.chdir(root.parent)
    assert opened(root, given="mine.json").folder == root
    assert len(opened(root, given="annotations/instances_train2017.json")) == 4


@pytest.mark.parametrize("change,message", [
    (lambda root: shutil.rmtree(root), r"data folder \S+ does not exist$"),
    (lambda root: (shutil.rmtree(root), root.write_text("")), r"data folder \S+ is not a folder$"),
    (lambda root: shutil.rmtree(root / "annotations"),
     r"\S+data has no annotations of the split train: expected one of annotations/instances_train2017\.json, "),
    (lambda root: (root / "annotations/instances_train2017.json").write_text("{"), "it is no JSON"),
    (lambda root: (root / "annotations/instances_train2017.json").write_text("[]"), "it is a list, as detections are"),
    (lambda root: (root / "annotations/instances_train2017.json").write_text("{}"), "it has no images"),
    (lambda root: shutil.rmtree(root / "train2017"),
     r"no image of \S+json is there: 0\.png, for example, is in none of \S+data/train2017, "),
    (lambda root: changed(root, lambda x: x.update(annotations=[])), "has no image with an object to learn$"),
])
def test_what_is_not_there(root, change, message):
    change(root)
    with pytest.raises(UserError, match=message) as raised:
        opened(root)
    assert "\n" not in str(raised.value)


def test_a_part_of_the_annotations_by_another_name(root):
    """Images are looked for where those of the split are."""
    content = read_annotations(root, "val")
    content.update(images=content["images"][1:2], annotations=[])
    (root / "annotations" / "mini.json").write_text(json.dumps(content))
    images = opened(root, "val", "annotations/mini.json", train=False)
    assert images.folder == root / "val2017" and images[0][1] == 11 and not images.has_objects
    assert opened(root, "val", train=False).has_objects


def test_objects_of_images_that_are_not_there_are_none(root):
    changed(root, lambda content: content["annotations"].__delitem__(slice(3, None)), "val")
    assert opened(root, "val", train=False).has_objects
    (root / "val2017/0.png").unlink()
    assert not opened(root, "val", train=False, skip_bad=True).has_objects


def test_given_annotations_that_are_not_there(root):
    with pytest.raises(UserError, match=r"cannot read nowhere\.json: No such file"):
        opened(root, given="nowhere.json")


# --- images -----------------------------------------------------------------------------------------------------------


def test_images_without_a_file(root):
    (root / "train2017/1.png").unlink()
    with pytest.raises(BadAnnotationError, match=r"^1 image of \S+json not in \S+: 1\.png \(image 11\), for example$"):
        opened(root)
    for train in (True, False):
        images = opened(root, train=train, skip_bad=True)
        assert [id for _, id in images.samples] == [1, 21, 31]
        assert images.notes[0].endswith("; left out: 1 image without a file")


def test_an_image_that_cannot_be_read(root):
    path = root / "train2017/1.png"
    path.write_bytes(path.read_bytes()[:300])
    images = opened(root)
    with pytest.raises(UnreadableFileError, match=rf"cannot read {path}"):
        images[1]


def test_an_image_of_another_size(root):
    Image.new("RGB", (50, 40)).save(root / "train2017/1.png")
    with pytest.raises(OtherSizeError, match=r"1\.png: is 50 x 40, and its annotations \(image 11\) are of 87 x 73$"):
        opened(root)[1]


def test_images_that_are_turned_by_their_orientation(root):
    """They are as their annotations say: upright, or as stored."""
    stored = Image.open(root / "train2017/1.png").convert("RGB")
    exif = stored.getexif()
    exif[0x0112] = 6  # turn right to see it upright
    stored.save(root / "train2017/1.png", exif=exif)
    image, _ = opened(root)[1]
    assert image.size == stored.size and np.array_equal(np.asarray(image), np.asarray(stored))
    upright = stored.transpose(Image.Transpose.ROTATE_270)
    changed(root, lambda content: content["images"][1].update(width=upright.width, height=upright.height))
    changed(root, lambda content: content["annotations"].__setitem__(slice(3, 6), []))
    image, id = opened(root, train=False)[1]
    assert id == 11 and np.array_equal(np.asarray(image), np.asarray(upright))
