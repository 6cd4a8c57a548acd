"""training/data/folders.py: which folder is which class, and which images are held out."""
import unicodedata
from collections import Counter
from pathlib import Path

import pytest
from timm.data import ImageNetInfo

from training.data.folders import NoValFolderError, number_classes, open_folders
from training.data.held_out import ValSplit
from training.data.splits import check_is_no_class
from utils import UsageError, UserError

FISH = ["n02102040", "n01440764", "n03888257"]


def write(root, counts):
    for place, number in counts.items():
        for i in range(number):
            path = root / place / f"{i}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
    return root


def names(root, split, **settings):
    """Images below the folder of a split, and their targets."""
    source = open_folders(root, split, Path, **settings)
    return {str(path.relative_to(source.root)): target for path, target in source}


# --- numbers of classes -----------------------------------------------------------------------------------------------


def test_integer_names_are_in_the_order_of_their_numbers(tmp_path):
    """Of folders 0 to 11, folder 10 was class 2."""
    write(tmp_path, {f"train/{i}": 1 for i in range(12)})
    source = open_folders(tmp_path, "train", str)
    assert source.classes == [str(i) for i in range(12)] and not source.notes
    assert number_classes(["10", "9", "01", "1"]).classes == ["01", "1", "9", "10"]
    assert [(int(Path(path).parent.name), target) for path, target in source.samples] == [(i, i) for i in range(12)]


@pytest.mark.parametrize("folders, order", [
    (["10", "9", "x"], ["10", "9", "x"]), (["b", "B", "a"], ["B", "a", "b"]), (["²", "10", "9"], ["10", "9", "²"]),
])
def test_other_names_are_in_the_order_of_their_letters(folders, order):
    numbering = number_classes(folders)
    assert numbering.classes == order and numbering.indices == {name: i for i, name in enumerate(order)}
    assert numbering.note is None


@pytest.mark.parametrize("num_classes, subset", [
    (1000, "imagenet-1k"), (21841, "imagenet-22k"), (11821, "imagenet-12k")])
def test_synsets_have_the_numbers_of_imagenet(num_classes, subset):
    synsets = ImageNetInfo(subset).label_names()
    numbering = number_classes(FISH, num_classes)
    assert numbering.classes == synsets and len(synsets) == num_classes
    assert numbering.indices == {name: synsets.index(name) for name in FISH}
    first, last = min(map(synsets.index, FISH)), max(map(synsets.index, FISH))
    assert numbering.note == (f"3 class folders are synsets of ImageNet: numbered as its {num_classes} classes, "
                              f"{first} is {synsets[first]} and {last} is {synsets[last]}")


@pytest.mark.parametrize("num_classes", [None, 3])
def test_synsets_alone_are_classes_of_their_own(num_classes):
    numbering = number_classes(FISH, num_classes)
    assert numbering.classes == sorted(FISH) and numbering.note is None


def test_the_whole_of_imagenet_is_numbered_as_ever():
    numbering = number_classes(ImageNetInfo("imagenet-1k").label_names()[::-1], 1000)
    assert numbering.classes == sorted(numbering.classes) == ImageNetInfo("imagenet-1k").label_names()
    assert numbering.note is None


@pytest.mark.parametrize("folders, num_classes", [(["cat", "dog"], 1000), (["3", "7"], 10), ([*FISH, "dog"], 1000),
                                                  ([*FISH, "n99999999"], 1000), (FISH, 999)])
def test_a_line_says_which_numbers_the_folders_got(folders, num_classes):
    numbering, order = number_classes(folders, num_classes), sorted(folders)
    assert numbering.indices == {name: i for i, name in enumerate(order)}
    assert numbering.note == (f"{len(order)} class folders, for a network of {num_classes} classes: numbered in order, "
                              f"0 is {order[0]} and {len(order) - 1} is {order[-1]}")


def test_folders_are_numbered_by_the_names_of_a_networks_classes(tmp_path):
    """In the order of the network's classes, whichever of them have images."""
    write(tmp_path, {"val/ant": 2, "val/cat": 1})
    classes = ["dog", "cat", "bee", "ant"]
    source = open_folders(tmp_path, "val", Path, 10, classes=classes)
    assert source.classes == classes and source.folders == ["cat", "ant"]
    assert [(path.parent.name, target) for path, target in source] == [("cat", 1), ("ant", 3), ("ant", 3)]
    assert source.notes == [f"no images in {tmp_path}/val of 2 of the network's 4 classes: dog, bee"]


@pytest.mark.parametrize("folders, complaint", [
    (["Cat", "dog"], "Cat; did you mean cat?"),
    (["wasp", "dog"], "wasp; its classes are dog, cat"),
    (["Cat", "Dog", "dog"], "Cat, Dog; its classes are dog, cat"),
])
def test_a_folder_that_a_network_has_no_class_for(tmp_path, folders, complaint):
    write(tmp_path, {f"val/{name}": 1 for name in folders})
    with pytest.raises(UserError) as raised:
        open_folders(tmp_path, "val", Path, classes=["dog", "cat"])
    assert str(raised.value) == f"{tmp_path}/val has folders that the network has no class for: {complaint}"


def test_what_is_held_out_is_numbered_by_a_networks_classes_too(tmp_path):
    write(tmp_path, {"a": 4, "b": 4})
    source = open_folders(tmp_path, "val", Path, None, ValSplit(0.5), classes=["b", "a"])
    assert Counter((path.parent.name, target) for path, target in source) == {("b", 0): 2, ("a", 1): 2}
    assert not any("no images" in note for note in source.notes)


NFC, NFD = (unicodedata.normalize(form, "Hosen (größe M)") for form in ("NFC", "NFD"))


def test_names_of_classes_are_the_same_however_their_letters_are_composed(tmp_path):
    """A copy from macOS was refused: "no class for Hosen (größe M); its classes are Hosen (größe M)"."""
    write(tmp_path, {f"train/{NFC}": 6, "train/Hosen (grz)": 6})
    source = open_folders(write(tmp_path / "other", {f"val/{NFD}": 2}), "val", Path, classes=["Hosen (grz)", NFC])
    assert source.classes == ["Hosen (grz)", NFC] and source.folders == [NFC]
    assert [(path.parent.name, target) for path, target in source] == [(NFD, 1)] * 2, "paths are as they are on disk"
    write(tmp_path / "copy", {f"train/{NFD}": 6, "train/Hosen (grz)": 6})
    for settings in ({}, dict(val_split=ValSplit(0.5))):
        one, copy = (open_folders(root, "train", Path, **settings) for root in (tmp_path, tmp_path / "copy"))
        assert one.classes == copy.classes == ["Hosen (grz)", NFC], "numbered alike"
        there = {(unicodedata.normalize("NFC", path.parent.name), path.name, target) for path, target in copy}
        assert there == {(path.parent.name, path.name, target) for path, target in one}, "and held out alike"


def test_two_folders_of_one_class_are_refused(tmp_path):
    write(tmp_path, {f"train/{NFC}": 1, f"train/{NFD}": 1, "train/b": 1})
    with pytest.raises(UserError) as raised:
        open_folders(tmp_path, "train", str)
    assert str(raised.value) == (f"{tmp_path}/train has several folders of one class: {NFC}, composed in other ways "
                                 "(Unicode NFC and NFD); merge them")


# --- what is found ----------------------------------------------------------------------------------------------------


def test_what_is_left_out_is_said(tmp_path):
    write(tmp_path, {"train/a": 2, "train/b": 2, "train/.Trash": 2, "train/__MACOSX": 1})
    for name in ("train/a/x.heic", "train/b/y.heic", "train/b/z.txt", "train/loose.png", "train/labels.csv"):
        (tmp_path / name).touch()
    source = open_folders(tmp_path, "train", str)
    assert len(source) == 4 and source.classes == ["a", "b"]
    assert source.notes == [
        f"left out 1 image in {tmp_path}/train itself, in no class folder",
        f"left out 3 files in {tmp_path}/train that are no images: 2 .heic, 1 .txt",
    ]


def test_a_class_without_images_says_what_is_there(tmp_path):
    write(tmp_path, {"train/a": 2})
    (tmp_path / "train" / "b").mkdir()
    (tmp_path / "train" / "b" / "0.heic").touch()
    complaint = r"train needs class folders.* for the classes b; endings .*1 file .*: 1 \.heic$"
    with pytest.raises(UserError, match=complaint):
        open_folders(tmp_path, "train", str)


@pytest.mark.parametrize("places, root, output, among", [
    (["a", "b"], ".", "run", "."),
    (["a", "b"], ".", "a/run", "."),
    (["a", "b"], "link", "run/1", "link"),
    (["a", "b"], ".", "link/run", "."),
    (["a", "b"], ".", ".", None),
    (["a", "b"], ".", ".runs/1", None),
    (["a", "b"], ".", "../run", None),
    (["train/a", "val/a"], ".", "train/run", "train"),
    (["train/a", "val/a"], ".", "link/val/a/run", "val"),
    (["train/a"], ".", "val/run", "val"),
    (["train/a"], ".", "test/run", "test"),
    (["train/a"], ".", "train", None),
    (["train/a", "val/a"], ".", "results/1", None),
    (["val/a"], ".", "results", None),
    (["train/a"], "train", "run", None),
    (["train/a"], "train", "train/run", "train"),
    ([], ".", "run", None),
    ([], "missing", "missing/run", None),
])
def test_a_folder_that_would_be_taken_for_a_class(tmp_path, places, root, output, among):
    data = write(tmp_path / "data", dict.fromkeys(places, 1))
    data.mkdir(exist_ok=True)
    (tmp_path / "link").symlink_to(tmp_path / "data")
    output, root = ((tmp_path if path.startswith("link") else data) / path for path in (output, root))
    if among is None:
        check_is_no_class(output, root, "it")
        return
    place = (root.parent if root.name == among else root) / among
    with pytest.raises(UsageError) as raised:
        check_is_no_class(output, root, "it")
    assert str(raised.value) == f"it lies among the class folders of {place} and would be taken for a class: " \
                                "take a folder elsewhere"


# --- what is held out -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["train/", ""])
@pytest.mark.parametrize("share", [0.1, 0.25, 0.5])
def test_a_share_of_each_class_is_held_out(tmp_path, layout, share):
    """Once in train/ and once right in the folder; every image is in one part."""
    counts = {"a": 100, "b": 8, "c/deep": 3, "c": 2, "d": 2}
    write(tmp_path, {f"{layout}{name}": number for name, number in counts.items()})
    train, val = (names(tmp_path, split, val_split=ValSplit(share)) for split in ("train", "val"))
    assert not train.keys() & val.keys()
    assert train | val == names(tmp_path, "train")
    held = Counter(path.partition("/")[0] for path in val)
    assert held == {"a": round(100 * share), "b": max(1, round(8 * share)), "c": max(1, round(5 * share)), "d": 1}
    assert set(train.values()) == set(val.values()) == {0, 1, 2, 3}


def test_what_is_held_out_follows_from_the_seed_and_the_names_alone(tmp_path):
    split = ValSplit(0.2, seed=3)
    one = names(write(tmp_path / "one", {"train/a": 50, "train/b": 50}), "val", val_split=split)
    other = names(write(tmp_path / "other place", {"b": 50, "a": 50}), "val", val_split=split)
    assert one == other != names(tmp_path / "one", "val", val_split=ValSplit(0.2, seed=4))
    a, b = ({path[2:] for path in one if path[0] == name} for name in "ab")
    assert a != b, "each class by itself"


def test_new_images_move_few_from_one_part_to_the_other(tmp_path):
    """A shuffle of numbers would deal out all anew, and validation would see what was trained on."""
    write(tmp_path, {"a": 100, "b": 100})
    before = names(tmp_path, "val", val_split=ValSplit(0.1))
    (tmp_path / "a" / "00.jpg").touch()
    after = names(tmp_path, "val", val_split=ValSplit(0.1))
    assert len(before.keys() - after.keys()) <= 1


def test_classes_of_one_image_are_not_split(tmp_path):
    write(tmp_path, {"a": 1, "b": 2, "c": 1})
    for split, expected in (("train", {"a": 1, "b": 1, "c": 1}), ("val", {"b": 1})):
        source = open_folders(tmp_path, split, Path, val_split=ValSplit(0.5))
        assert Counter(path.parent.name for path, _ in source) == expected
        assert source.notes == [
            "nothing can be held out of the classes of one image: a, c",
            f"held out for validation: 1 of the 4 images in {tmp_path}, 0.5 of each class by seed 0",
        ]
        assert source.classes == ["a", "b", "c"]
    write(tmp_path / "single", {"a": 1, "b": 1})
    with pytest.raises(UserError, match="single has one image in each class: nothing can be held out"):
        open_folders(tmp_path / "single", "train", Path, val_split=ValSplit(0.5))


def test_test_images_are_no_part_of_the_training_images(tmp_path):
    write(tmp_path, {"train/a": 4, "train/b": 4, "test/a": 2, "test/b": 1})
    assert len(names(tmp_path, "test", val_split=ValSplit(0.5))) == len(names(tmp_path, "test")) == 3


@pytest.mark.parametrize("places, split, share, complaint", [
    (["train/a"], "val", None, r"has no folder val: expected val/CLASS/IMAGE, found train$"),
    (["a", "b"], "val", None, r"has no folder val: expected val/CLASS/IMAGE, found a, b$"),
    (["train/a", "val/a"], "train", 0.1, r"has a folder val, and a part of the training images was to be held out"),
    (["train/a", "val/a"], "val", 0.1, r"has a folder val, and a part of the training images was to be held out"),
    (["train/a"], "test", 0.1, r"has no folder test: expected test/CLASS/IMAGE, found train$"),
    (["Training/a", "Validation/a"], "train", 0.1, r"has no folder train: .* found Training, Validation$"),
    (["Training/a", "Validation/a"], "val", 0.1, r"has no folder train: .* found Training, Validation$"),
    ([], "train", None, r"has no folder train: expected train/CLASS/IMAGE, found nothing$"),
    ([""], "val", None, r"has no folder val and no class folders: expected val/CLASS/IMAGE, found 0\.jpg, 1\.jpg$"),
    ([], "train", 0.1, r"has no folder train and no class folders: expected train/CLASS/IMAGE or CLASS/IMAGE, "
                       r"found nothing$"),
    ([], "test", 0.1, r"has no folder test: expected test/CLASS/IMAGE, found nothing$"),
    ([""], "val", 0.1, r"and no class folders: expected train/CLASS/IMAGE or CLASS/IMAGE, found 0\.jpg, 1\.jpg$"),
])
def test_splits_that_are_not_there(tmp_path, places, split, share, complaint):
    write(tmp_path, dict.fromkeys(places, 2))
    with pytest.raises(UserError, match=complaint):
        open_folders(tmp_path, split, str, val_split=share and ValSplit(share))


@pytest.mark.parametrize("place, split", [("train", "val"), ("val", "val"), ("val", "train"), ("test", "test")])
@pytest.mark.parametrize("is_here", [False, True])
def test_the_folder_of_a_split_is_not_the_one_above_it(tmp_path, monkeypatch, place, split, is_here):
    """Holding a part of it out was advised, though the split is beside it."""
    write(tmp_path / "cl", {f"{name}/{kind}": 1 for name in ("train", "val", "test") for kind in "ab"})
    folder = tmp_path / "cl" / place
    monkeypatch.chdir(folder)
    root = Path("." if is_here else folder)
    if (place, split) == ("val", "train"):  # which is no reason to refuse class folders
        assert len(open_folders(root, split, str)) == 2
        return
    complaint = f"{root} is the folder of one split, with no folder {split} in it: give the folder above it, "
    with pytest.raises(UserError) as raised:
        open_folders(root, split, str)
    assert str(raised.value) == complaint + str(tmp_path / "cl")


def test_a_folder_called_as_a_split_may_hold_all_images(tmp_path):
    write(tmp_path, {"train/a": 4, "train/b": 4})
    assert len(names(tmp_path / "train", "val", val_split=ValSplit(0.5))) == 4
    with pytest.raises(NoValFolderError, match=r"/train has no folder val: expected val/CLASS/IMAGE, found a, b$"):
        open_folders(tmp_path / "train", "val", str)
