"""Folders of images and label files: what is found, what is said, the names of classes, images that are skipped."""
import shutil
import unicodedata

import numpy as np
import pytest
import torch
from PIL import Image

from helpers.photos import noise, photograph
from helpers.segments import CLASSES, write_segments
from models.segmentation import EvalSize
from tasks.segmentation import folder
from tasks.segmentation.classes import read_classes
from tasks.segmentation.data import SegmentationDataset, collate_samples
from tasks.segmentation.errors import TurnedImageError
from tasks.segmentation.folder import SegmentationFolder, open_folder
from tasks.segmentation.labels import IGNORE, LabelError, write_label
from tasks.segmentation.transforms import Augmentation, TrainTransform, Views
from training.data.images import UnreadableFileError
from utils import UserError


@pytest.fixture
def data(tmp_path):
    return write_segments(tmp_path / "data", train=4, val=2)


def opened(root, split="train", data_set="segmentation_folder", exif_transpose=True):
    return open_folder(str(root), split, data_set, exif_transpose)


def complaint_about(root, split="train", **settings):
    with pytest.raises(UserError) as raised:
        opened(root, split, **settings)
    return str(raised.value)


def add(root, name, label=None):
    """One more training image, of 12 x 16 pixels, and its label file, all of the first class, if it is to have one."""
    path = root / "images" / "training" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(noise()).save(path)
    if label is not None:
        path = root / "annotations" / "training" / label
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (16, 12), 1).save(path)


def names(folder):
    return [path.removeprefix(f"{folder.root}/") for path, _ in folder.samples]


# --- layout -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("split, name, number", [("train", "training", 4), ("val", "validation", 2)])
def test_each_image_has_the_label_file_of_its_name(data, split, name, number):
    folder = opened(data, split)
    assert folder.samples == [(f"{data}/images/{name}/{i}.png", f"{data}/annotations/{name}/{i}.png")
                              for i in range(number)]
    assert len(folder) == number and folder.classes == [*CLASSES] and folder.notes == []
    for i in range(number):
        image, labels = folder[i]
        values = np.array(Image.open(data / "annotations" / name / f"{i}.png"))
        assert np.array_equal(labels, np.where(values == 0, IGNORE, values - 1)) and labels.dtype == np.uint8
        assert np.array_equal(np.array(image), np.array(Image.open(data / "images" / name / f"{i}.png")))


def test_a_test_split(data):
    assert complaint_about(data, "test").startswith(f"{data} has no folder images/test: ")
    for kind in ("images", "annotations"):
        (data / kind / "validation").rename(data / kind / "test")
    assert names(opened(data, "test")) == ["0.png", "1.png"]
    assert complaint_about(data, "val").startswith(f"{data} has no folder images/validation: ")


def test_images_of_any_format_lie_in_folders_of_any_depth(data):
    """The label file of an image lies at its path and is a PNG, whatever dots are in its name."""
    add(data, "b/x.y.jpg", label="b/x.y.png")
    add(data, "a/deep/er/1.TIF", label="a/deep/er/1.png")
    add(data, "a/2.jpeg", label="a/2.png")
    folder = opened(data)
    assert names(folder) == ["0.png", "1.png", "2.png", "3.png", "a/2.jpeg", "a/deep/er/1.TIF", "b/x.y.jpg"]
    assert [label for _, label in folder.samples[4:]] == [
        f"{data}/annotations/training/{name}.png" for name in ("a/2", "a/deep/er/1", "b/x.y")]
    assert all((folder[i][1] == 0).all() for i in (4, 5, 6))


def test_label_files_without_an_image_are_passed_over(data):
    (data / "images" / "training" / "2.png").unlink()
    assert names(opened(data)) == ["0.png", "1.png", "3.png"]


def test_the_home_folder(data, monkeypatch):
    monkeypatch.setenv("HOME", str(data.parent))
    assert opened("~/data").samples == opened(data).samples


# --- what is missing --------------------------------------------------------------------------------------------------


def test_a_data_folder_that_is_none(data):
    assert complaint_about(data / "other") == f"data folder {data}/other does not exist"
    assert complaint_about(data / "classes.txt") == f"data folder {data}/classes.txt is not a folder"


@pytest.mark.parametrize("missing, found, place", [
    ("images", "annotations, classes.txt", ""), ("images/training", "validation", "/images"),
    ("annotations", "classes.txt, images", ""), ("annotations/training", "validation", "/annotations"),
])
def test_a_missing_folder_is_named_with_what_is_there(data, missing, found, place):
    shutil.rmtree(data / missing)
    folder = f"{missing.partition('/')[0]}/training"
    layout = "expected images/{training,validation,test} and annotations/ with the same folders"
    assert complaint_about(data) == f"{data} has no folder {folder}: {layout}, found {found} in {data}{place}"


def test_an_empty_folder_holds_nothing(tmp_path):
    with pytest.raises(UserError, match=r"has no folder images/validation: .* with the same folders, found nothing"):
        SegmentationFolder(tmp_path, "val", ["a"])


def test_images_without_a_label_file_are_counted_and_one_is_named(data):
    (data / "annotations" / "training" / "1.png").unlink()
    images, labels = data / "images" / "training", data / "annotations" / "training"
    assert complaint_about(data) == f"1 image of {images} without a label file: {labels}/1.png for {images}/1.png, " \
                                    "for example"
    add(data, "new/x.jpg")
    assert complaint_about(data).startswith(f"2 images of {images} without a label file: {labels}/1.png for ")
    (labels / "1.png").mkdir()
    assert complaint_about(data).startswith("2 images of "), "a folder is no label file"


def test_label_files_of_another_format_are_not_found(data):
    labels = data / "annotations" / "training"
    (labels / "3.png").rename(labels / "3.bmp")
    assert f"without a label file: {labels}/3.png for " in complaint_about(data)


def test_a_folder_without_images(data):
    for path in (data / "images" / "training").iterdir():
        path.rename(path.with_suffix(".txt"))
    assert complaint_about(data) == f"{data}/images/training holds no image"


# --- notes ------------------------------------------------------------------------------------------------------------


def test_files_that_are_no_images_are_counted(data):
    images = data / "images" / "training"
    (images / "readme.txt").touch()
    (images / ".DS_Store").touch()
    assert opened(data).notes == [f"left out 1 file in {images} that is no image: 1 .txt"]
    (images / "b.heic").touch()
    (images / "a.heic").touch()
    assert opened(data).notes == [f"left out 3 files in {images} that are no images: 2 .heic, 1 .txt"]
    assert opened(data, "val").notes == []


def test_a_palette_is_told_after_the_files_left_out(data):
    first = data / "annotations" / "training" / "0.png"
    values = np.array(Image.open(first))
    before = opened(data)[0][1]
    write_label(np.where(values == 0, IGNORE, values - 1)).save(first)
    palettes = "label files have palettes: their indices are taken for the classes"
    assert opened(data).notes == [palettes] and opened(data, "val").notes == []
    assert np.array_equal(opened(data)[0][1], before)
    (data / "images" / "training" / "x.txt").touch()
    assert opened(data).notes == [f"left out 1 file in {data}/images/training that is no image: 1 .txt", palettes]


def test_a_first_label_file_that_is_damaged_is_named_when_it_is_read(data):
    (data / "annotations" / "training" / "0.png").write_text("no image")
    folder = opened(data)
    assert folder.notes == []
    with pytest.raises(UnreadableFileError, match=f"^cannot read {data}/annotations/training/0.png: not an image$"):
        folder[0]


def test_a_first_label_file_that_is_too_large_is_named_when_it_is_read(data, monkeypatch):
    label = data / "annotations" / "training" / "0.png"
    Image.new("L", (100, 100)).save(label)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 4000)  # Pillow refuses twice as many
    folder = opened(data)
    assert folder.notes == []
    with pytest.raises(UnreadableFileError, match=f"^cannot read {label}: it has more than 160 million pixels; "):
        folder[0]


# --- classes ----------------------------------------------------------------------------------------------------------


def classes_of(root, content):
    root.mkdir(exist_ok=True)
    (root / "classes.txt").write_bytes(content)
    return read_classes(root, "segmentation_folder")


def refused(root, content):
    with pytest.raises(UserError) as raised:
        classes_of(root, content)
    assert str(raised.value).count(f"{root}/classes.txt") == 1
    return str(raised.value).replace(f"{root}/classes.txt", "PATH")


@pytest.mark.parametrize("content", [
    b"sky\nold house\nroad", b"sky\nold house\nroad\n", b"sky\r\nold house\r\nroad\r\n",
    b"  sky \n\told house\nroad\t\n\n  \n\n", b"\xef\xbb\xbfsky\nold house\nroad\n",
])
def test_classes_are_named_a_line_each(tmp_path, content):
    """By any system's line ends, with space around them and lines below them, and with a byte order mark."""
    assert classes_of(tmp_path, content) == ["sky", "old house", "road"]


def test_classes_of_any_script_are_composed(tmp_path):
    decomposed = unicodedata.normalize("NFD", "Bäume\n空\n")
    assert decomposed != "Bäume\n空\n" and classes_of(tmp_path, decomposed.encode()) == ["Bäume", "空"]


def test_no_list_of_classes(data):
    (data / "classes.txt").unlink()
    assert complaint_about(data) == f"{data} has no classes.txt: a class a line, the first has the value 1"
    (data / "classes.txt").mkdir()
    assert complaint_about(data) == f"cannot read {data}/classes.txt: Is a directory"


@pytest.mark.parametrize("content", [b"", b"\n", b" \n\t\n", b"\xef\xbb\xbf"])
def test_an_empty_list_of_classes(tmp_path, content):
    assert refused(tmp_path, content) == "PATH: it is empty"


@pytest.mark.parametrize("content, line", [(b"\nsky\n", 1), (b"sky\n \nroad\n", 2), (b"sky\nroad\n\n\ntree", 3)])
def test_a_blank_line_would_be_a_class(tmp_path, content, line):
    assert refused(tmp_path, content) == f"PATH: line {line} is empty, and each is to name a class"


def test_a_class_that_is_named_twice(tmp_path):
    assert refused(tmp_path, b"sky\nroad\nsky \ntree\nroad\nsky\n") == "PATH: names sky, road twice"
    content = "Bäume\n" + unicodedata.normalize("NFD", "Bäume\n")
    assert refused(tmp_path, content.encode()) == "PATH: names Bäume twice", "the same letters in other bytes"


def test_255_classes_are_the_most(tmp_path):
    lines = [f"class {i}" for i in range(256)]
    assert classes_of(tmp_path, "\n".join(lines[:255]).encode()) == lines[:255]
    assert refused(tmp_path, "\n".join(lines).encode()) == \
        "PATH: 256 classes are more than the 255 that label files of 8 bits can hold"


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16"])
def test_a_list_in_another_encoding(tmp_path, encoding):
    assert refused(tmp_path, "Bäume\nHäuser\n".encode(encoding)) == "cannot read PATH: it is no text in UTF-8"


# The first lines of SceneParse150's table as it is downloaded, and their synonyms.
ADE20K = """Idx\tRatio\tTrain\tVal\tName
1\t0.1576\t11664\t1172\twall
2\t0.1072\t6046\t612\tbuilding, edifice
3\t0.0231\t1906\t199\tbed\x20
4 \t0.0074\t709\t75\twater
"""


def table(root, rows):
    root.mkdir(exist_ok=True)
    lines = [f"{i}\t0.0001\t1\t1\tthing {i}, part of {i}" for i in range(5, rows + 1)]
    (root / "objectInfo150.txt").write_text(ADE20K + "\n".join([*lines, ""]))
    return root


def test_ade20ks_classes_are_called_by_their_first_names(tmp_path):
    names = read_classes(table(tmp_path, 150), "ade20k")
    assert len(names) == 150 and names[:5] == ["wall", "building", "bed", "water", "thing 5"]
    assert names[-1] == "thing 150"


def test_first_names_that_are_the_same_keep_their_synonyms(tmp_path):
    path = table(tmp_path, 150) / "objectInfo150.txt"
    path.write_text(path.read_text().replace("thing 150, part of 150", "wall, rampart"))
    names = read_classes(tmp_path, "ade20k")
    assert names[:3] == ["wall", "building, edifice", "bed"] and names[-1] == "wall, rampart"


@pytest.mark.parametrize("rows", [149, 151])
def test_a_table_of_other_classes_is_refused(tmp_path, rows):
    with pytest.raises(UserError) as raised:
        read_classes(table(tmp_path, rows), "ade20k")
    assert str(raised.value) == f"{tmp_path}/objectInfo150.txt: names {rows} classes, and ADE20K has 150"


def test_without_its_table_ade20ks_classes_are_numbers(data):
    (data / "classes.txt").unlink()
    folder = opened(data, data_set="ade20k")
    assert folder.classes == [str(number) for number in range(1, 151)]
    values = np.array(Image.open(data / "annotations" / "training" / "0.png"))
    assert np.array_equal(folder[0][1], np.where(values == 0, IGNORE, values - 1))


def test_ade20k_has_no_use_for_another_list(data):
    (data / "classes.txt").write_text("")
    table(data, 150)
    assert opened(data, data_set="ade20k").classes[0] == "wall"
    assert complaint_about(data) == f"{data}/classes.txt: it is empty"


# --- an image and its label file --------------------------------------------------------------------------------------


def turned(root, label_size, value=1):
    """A photograph of 32 x 16 pixels that is stored as 16 x 32, with a label file of (width, height)."""
    upright = photograph(root / "images" / "training" / "0.png", 6)
    Image.new("L", label_size, value).save(root / "annotations" / "training" / "0.png")
    return upright


def test_a_label_file_of_the_upright_image(data):
    upright = turned(data, (32, 16))
    image, labels = opened(data)[0]
    assert np.array_equal(np.array(image), upright) and labels.shape == (16, 32) and (labels == 0).all()
    with pytest.raises(LabelError, match=r"is 16 x 32 pixels, and its image is 32 x 16 pixels$") as raised:
        opened(data, exif_transpose=False)[0]
    assert not isinstance(raised.value, TurnedImageError)


def test_a_label_file_of_the_image_as_it_is_stored(data):
    upright = turned(data, (16, 32))
    with pytest.raises(TurnedImageError) as raised:
        opened(data)[0]
    assert str(raised.value) == (f"{data}/annotations/training/0.png: is 32 x 16 pixels, and its image is 16 x 32 "
                                 "pixels, turned upright by its EXIF orientation")
    image, labels = opened(data, exif_transpose=False)[0]
    assert np.array_equal(np.array(image), np.rot90(upright)) and labels.shape == (32, 16)


def test_a_label_file_of_another_size_is_no_matter_of_exif(data):
    """Neither of an image that has no orientation, nor of one whose stored size is another too."""
    Image.new("L", (57, 43), 1).save(data / "annotations" / "training" / "0.png")
    with pytest.raises(LabelError, match=r"is 43 x 57 pixels, and its image is 44 x 57 pixels$"):
        opened(data)[0]
    turned(data, (20, 20))
    with pytest.raises(LabelError, match=r"is 20 x 20 pixels, and its image is 16 x 32 pixels$"):
        opened(data)[0]


def test_a_square_image_is_never_taken_for_a_turned_one(data):
    Image.new("RGB", (20, 20)).save(data / "images" / "training" / "0.png")
    Image.new("L", (20, 19), 1).save(data / "annotations" / "training" / "0.png")
    with pytest.raises(LabelError, match=r"is 19 x 20 pixels, and its image is 20 x 20 pixels$"):
        opened(data)[0]


def test_a_wrong_value_for_a_turned_image_is_no_matter_of_exif(data):
    turned(data, (32, 16), value=9)
    with pytest.raises(LabelError, match=r"holds the value 9, at row 0 and column 0, .* for what is not labelled$"):
        opened(data)[0]


# --- fingerprint ------------------------------------------------------------------------------------------------------


def test_the_fingerprint_is_that_of_names_and_classes_wherever_they_lie(data, monkeypatch):
    add(data, "a/x.jpg", label="a/x.png")
    original = opened(data).fingerprint()
    data.rename(data.parent / "moved")
    assert opened(data.parent / "moved").fingerprint() == original
    monkeypatch.chdir(data.parent)
    assert opened("moved").fingerprint() == original
    monkeypatch.chdir("moved")
    assert opened(".").fingerprint() == original


def test_the_fingerprint_changes_with_names(data):
    original = opened(data).fingerprint()
    assert opened(data, "val").fingerprint() != original
    for kind in ("images", "annotations"):
        (data / kind / "training" / "3.png").rename(data / kind / "training" / "4.png")
    renamed = opened(data).fingerprint()
    (data / "images" / "training" / "4.png").unlink()
    assert len({original, renamed, opened(data).fingerprint()}) == 3


@pytest.mark.parametrize("classes", ["green\nred\nblue", "red\ngreen\nblue\nother", "red\ngreen\nBlue"])
def test_the_fingerprint_changes_with_classes(data, classes):
    original = opened(data).fingerprint()
    (data / "classes.txt").write_text(classes)
    assert opened(data).fingerprint() != original


def test_the_fingerprint_takes_letters_in_any_bytes(data):
    """macOS took letters and accents apart."""
    found = set()
    for form in ("NFC", "NFD"):
        name = unicodedata.normalize(form, "Bäume")
        add(data, f"{name}.jpg", label=f"{name}.png")
        found.add(opened(data).fingerprint())
        for kind, ending in (("images", "jpg"), ("annotations", "png")):
            (data / kind / "training" / f"{name}.{ending}").unlink()
    assert len(found) == 1


# --- images to be skipped ---------------------------------------------------------------------------------------------


def damage(path):
    path.write_bytes(path.read_bytes()[:100])


def dataset_of(root, split, transform, on_error):
    folder = opened(root, split)
    return SegmentationDataset(folder, folder.classes, transform, on_error)


AUGMENTED = TrainTransform(Augmentation((40, 48), EvalSize(48, 160)), (0.5, 0.5, 0.5))


@pytest.mark.parametrize("kind", ["images", "annotations"])
def test_in_training_the_next_image_stands_for_one_that_cannot_be_read(data, kind):
    damage(data / kind / "training" / "3.png")
    damage(data / kind / "training" / "0.png")
    dataset = dataset_of(data, "train", AUGMENTED, "next")
    assert not dataset.bad_images.any()
    for found, expected in zip(dataset[3, 7], dataset[1, 7], strict=True):
        assert torch.equal(found, expected)
    assert dataset.bad_images.tolist() == [True, False, False, True], "after the last comes the first"
    assert dataset.name(3) == f"{data}/images/training/3.png"


@pytest.mark.parametrize("kind", ["images", "annotations"])
def test_in_evaluation_an_image_that_cannot_be_read_has_no_labels(data, kind):
    damage(data / kind / "validation" / "0.png")
    dataset = dataset_of(data, "val", Views(EvalSize(32, 160)), "mask")
    assert dataset[0][1] is None and dataset.bad_images.tolist() == [True, False]
    bad, good = collate_samples([dataset[0], dataset[1]])
    assert bad.labels.numel() == 0 and good.labels.shape == (53, 70)
    assert good.views[0].shape == (3, 32, 42) and not torch.equal(bad.views[0], good.views[0])


@pytest.mark.parametrize("kind", ["images", "annotations"])
def test_an_unreadable_image_ends_a_run_that_skips_none(data, kind):
    damage(data / kind / "training" / "1.png")
    dataset = dataset_of(data, "train", AUGMENTED, "raise")
    assert dataset.bad_images is None and dataset[0, 0][0].shape == (3, 40, 48)
    with pytest.raises(UnreadableFileError, match=f"^cannot read {data}/{kind}/training/1.png: "):
        dataset[1, 0]


@pytest.mark.parametrize("on_error", ["next", "mask"])
def test_a_label_file_that_does_not_fit_is_never_skipped(data, on_error, monkeypatch):
    monkeypatch.setattr(folder, "_LOOKED_AT", 1)
    Image.new("L", (9, 9), 1).save(data / "annotations" / "training" / "1.png")
    dataset = dataset_of(data, "train", AUGMENTED, on_error)
    with pytest.raises(LabelError, match=r"1.png: is 9 x 9 pixels"):
        dataset[1, 0]


def test_no_image_that_can_be_read(data):
    for i in range(4):
        damage(data / "images" / "training" / f"{i}.png")
    with pytest.raises(UserError, match=r"^none of the 4 images can be read$"):
        dataset_of(data, "train", AUGMENTED, "next")[2, 0]


def test_a_sample_is_a_function_of_its_seed(data):
    dataset = dataset_of(data, "train", AUGMENTED, "raise")
    torch.manual_seed(0)
    first = dataset[2, 5]
    torch.manual_seed(1)
    assert all(torch.equal(x, y) for x, y in zip(first, dataset[2, 5], strict=True))
    assert not all(torch.equal(x, y) for x, y in zip(first, dataset[2, 6], strict=True))


# --- what is told before a run trains ---------------------------------------------------------------------------------


def relabel(data, change, split="training"):
    """Change the values of all label files of a split."""
    for path in (data / "annotations" / split).rglob("*.png"):
        Image.fromarray(change(np.asarray(Image.open(path)))).save(path)


def test_one_class_is_refused(data):
    (data / "classes.txt").write_text("crack\n")
    assert complaint_about(data) == (f"{data}/classes.txt: one class alone cannot be told from another; name the "
                                     "background too, since 0 stands for what is not labelled")


@pytest.mark.parametrize("change", [np.zeros_like, lambda x: np.where(x > 0, 255, 0).astype(np.uint8)])
def test_labels_that_say_nothing_are_refused(data, change):
    """Masks of 0 and 255 too."""
    relabel(data, change)
    assert " has a label: they hold 0 and 255 alone, which both stand for what is not labelled" in complaint_about(data)


def test_a_class_that_never_occurs_is_told(data):
    """As where labels start at 0."""
    assert opened(data).notes == []
    relabel(data, lambda x: np.maximum(x, 1) - 1)
    advice = "the value 1 is the first class, red: labels from 0 have to be raised by one"
    assert opened(data).notes == [f"warning: no pixel of {data}/annotations/training is labelled blue; {advice}"]


def test_a_last_class_that_does_not_occur_in_a_sample_is_told(data, monkeypatch):
    """Any other may be rare."""
    monkeypatch.setattr(folder, "_LOOKED_AT", 2)
    relabel(data, lambda x: np.where(x == 1, 2, x))
    assert opened(data).notes == []
    relabel(data, lambda x: np.where(x == 3, 2, x))
    (note,) = opened(data).notes
    assert note.startswith(f"warning: no pixel of 2 label files of {data}/annotations/training is labelled blue; ")


def test_a_label_file_of_another_size_is_found_at_the_start(data):
    """Also of a photograph that is stored on its side, and not where the label file is as it should be."""
    turned(data, (32, 16))
    assert opened(data).notes == []
    turned(data, (16, 32))
    assert complaint_about(data).endswith("turned upright by its EXIF orientation")
    Image.new("L", (9, 9), 1).save(data / "annotations" / "validation" / "1.png")
    assert "1.png: is 9 x 9 pixels, and its image is " in complaint_about(data, "val")


def test_a_value_beyond_the_classes_is_found_at_the_start(data):
    relabel(data, lambda x: x + (x == 3).astype(np.uint8), "validation")
    with pytest.raises(LabelError, match="holds the value 4"):
        opened(data, "val")


def test_folders_may_be_called_train_and_val(data):
    before = [image.rpartition("/")[2] for image, _ in opened(data, "val").samples]
    for kind in ("images", "annotations"):
        (data / kind / "validation").rename(data / kind / "val")
    assert [image.rpartition("/")[2] for image, _ in opened(data, "val").samples] == before


def test_label_files_may_end_in_capitals(data):
    for path in (data / "annotations" / "training").glob("*.png"):
        path.rename(path.with_suffix(".PNG"))
    assert set(np.unique(opened(data)[0][1])) == {0, 1, 2, IGNORE}
