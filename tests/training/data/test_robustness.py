"""Robustness sets, on small folders in the very layouts in which they are downloaded."""
import numpy as np
import pytest
from PIL import Image
from timm.data import ImageNetInfo, RealLabelsImagenet

from datasets import build_dataset
from helpers.robustness import VAL, write_images, write_sets
from tasks.classification.options import ROBUSTNESS
from training.data.robustness import CORRUPTIONS, SETS, find, find_all, incomplete, real_labels, set_classes, synsets
from utils import UserError

NAMES = ImageNetInfo().label_names()


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return write_sets(tmp_path_factory.mktemp("sets"))


def classes_of(part):
    folders = [file.decode().partition("/")[0] for file in part.files]
    return dict(zip(folders, part.labels.tolist(), strict=True))


def test_the_flags_name_every_set():
    assert ("robustness", *SETS) == ROBUSTNESS


def test_imagenet_v2_is_numbered_by_its_folders(root):
    """Not by their order as words, in which 10 comes before 2."""
    parts = find("imagenet_v2", root)
    assert [part.name for part in parts] == ["matched-frequency", "threshold0.7", "top-images"]
    assert classes_of(parts[0]) == {name: [int(name)] for name in ("0", "2", "10", "999")}
    own = find("imagenet_v2", root / "imagenetv2-matched-frequency-format-val")
    assert len(own) == 1 and own[0].name == "matched-frequency" and classes_of(own[0]) == classes_of(parts[0])


@pytest.mark.parametrize("name", ["imagenet_a", "imagenet_r"])
def test_the_sets_of_200_classes(root, name):
    """The classes are ImageNet's of the folders' names; a network chooses among the set's 200."""
    (part,) = find(name, root)
    allowed = set_classes(name)
    assert len(set(allowed)) == 200 and list(allowed) == sorted(allowed)
    assert classes_of(part) == {NAMES[i]: [i] for i in (allowed[0], allowed[7], allowed[-1])}


def test_lists_of_classes_are_the_papers():
    """They begin with the stingray and with the goldfish, as the lists beside the archives do."""
    assert set_classes("imagenet_a")[0] == NAMES.index("n01498041") == 6
    assert set_classes("imagenet_r")[0] == NAMES.index("n01443537") == 1
    assert set_classes("imagenet_sketch") is None and synsets() == tuple(NAMES)


def test_imagenet_c_has_every_corruption_and_severity(root):
    parts = find("imagenet_c", root)
    assert [(part.name, part.severity) for part in parts] == [(name, s) for name in CORRUPTIONS for s in range(1, 6)]
    assert classes_of(parts[7]) == {name: [NAMES.index(name)] for name in VAL}


@pytest.mark.parametrize("kind", ["flat", "by kind", "unnamed"])
def test_imagenet_c_as_its_archives_are_unpacked(tmp_path, kind):
    """Right in a folder, one deeper by the names of the archives, or in a folder of another name."""
    folder = tmp_path / ("corrupted" if kind == "unnamed" else "ImageNet-C")
    for corruption, group in (("fog", "weather"), ("gaussian_noise", "noise"), ("gaussian_blur", "extra")):
        for severity in range(1, 6):
            place = folder / group if kind == "by kind" else folder
            write_images(place / corruption / str(severity), ["n01440764"])
    parts = find("imagenet_c", folder if kind == "unnamed" else tmp_path)
    assert [part.description for part in parts][::5] == [
        "imagenet_c gaussian_noise severity 1", "imagenet_c fog severity 1"
    ]


def test_sketch_and_validation_images(root):
    (sketch,), (clean,) = find("imagenet_sketch", root), find("imagenet_val", root)
    assert classes_of(sketch) == {NAMES[i]: [i] for i in (0, 500, 999)} and sketch.folder.name == "sketch"
    assert classes_of(clean) == {name: [NAMES.index(name)] for name in VAL}


def test_real_labels_are_those_of_the_number_in_the_name(root):
    """Images without a label are left out; the rest have theirs, as many as there are."""
    (part,) = find("imagenet_real", root)
    numbers = [int(file.decode()[-13:-5]) for file in part.files]
    assert numbers == [2, 3]  # the first has none
    assert part.labels.tolist() == [[970, 795], [230, 231]]
    assert len(real_labels()) == 50_000


def test_real_labels_of_images_in_no_class_folders(tmp_path):
    """As ImageNet's archive of validation images is unpacked."""
    for number in (1, 2, 3):
        Image.new("RGB", (8, 8)).save(tmp_path / f"ILSVRC2012_val_{number:08d}.JPEG")
    (part,) = find("imagenet_real", tmp_path)
    assert part.files.tolist() == [b"ILSVRC2012_val_00000002.JPEG", b"ILSVRC2012_val_00000003.JPEG"]
    with pytest.raises(UserError, match="has no imagenet_val: expected val/SYNSET in it"):
        find("imagenet_val", tmp_path)


def test_real_labels_agree_with_timm():
    """All 50,000, by the names of the images."""
    names = [f"ILSVRC2012_val_{i + 1:08d}.JPEG" for i in range(50_000)]
    theirs = RealLabelsImagenet(names)
    assert [tuple(theirs.real_labels[name]) for name in names] == list(real_labels())


def test_all_sets_below_a_folder(root, tmp_path):
    parts = find_all(root)
    assert list(dict.fromkeys(part.set for part in parts)) == list(SETS)
    assert len(parts) == 1 + 3 + 75 + 1 + 1 + 1 + 1
    with pytest.raises(UserError, match=r"has none of the sets .*: it has photos"):
        (tmp_path / "photos").mkdir()
        find_all(tmp_path)


def test_sets_that_are_not_whole_say_so(root):
    notes = incomplete(find("imagenet_v2", root))
    assert notes == ["imagenet_v2 has 8, 4, 4 images where the whole set has 10,000"]


@pytest.mark.parametrize(("place", "name", "note"), [
    ("val/n01440764", "1.JPEG", "imagenet_real is left out: its labels are found by names as ILSVRC2012_val_00000001"),
    ("val", "ILSVRC2012_val_00000002.JPEG", "imagenet_val is left out: the validation images are in no class folders"),
])
def test_validation_images_that_are_left_out_of_all_sets_are_told(tmp_path, place, name, note):
    (tmp_path / place).mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(tmp_path / place / name)
    assert any(line.startswith(note) for line in build_dataset("robustness", tmp_path, "val").notes)
    alone = build_dataset("imagenet_val" if "real" in note else "imagenet_real", tmp_path, "val")
    assert not any("left out" in line for line in alone.notes)


def test_a_folder_of_another_class_is_named(tmp_path):
    write_images(tmp_path / "imagenet-a", ["n01440764"])  # the tench is none of its 200
    with pytest.raises(UserError, match="imagenet-a needs folders of imagenet_a's classes; it has n01440764"):
        find("imagenet_a", tmp_path)
    write_images(tmp_path / "sketch", ["cat"])
    with pytest.raises(UserError, match="sketch needs folders of imagenet_sketch's classes; it has cat"):
        find("imagenet_sketch", tmp_path)


def test_a_missing_severity_is_named(tmp_path):
    write_images(tmp_path / "fog" / "1", ["n01440764"])
    with pytest.raises(UserError, match="fog has no folder 2: there are five severities"):
        find("imagenet_c", tmp_path)


@pytest.mark.parametrize("name", SETS)
def test_a_set_that_is_not_there(tmp_path, name):
    with pytest.raises(UserError, match=f"has no {name}: expected "):
        find(name, tmp_path)


def test_every_image_has_its_part_and_its_labels(root):
    dataset = build_dataset("robustness", root, "val")
    source = dataset.source
    assert len(dataset) == sum(len(part.files) for part in source.parts) == len(dataset.names())
    assert dataset.classes == NAMES
    targets = [dataset[i][1] for i in range(len(dataset))]
    assert {len(target) for target in targets} == {source.width} == {1 + 2}
    counts = np.bincount([target[0] for target in targets])
    assert counts.tolist() == [len(part.files) for part in source.parts]
    for i, target in enumerate(targets):
        part = source.parts[target[0]]
        assert dataset.name(i).startswith(str(part.folder))
        if part.set not in ("imagenet_real", "imagenet_v2"):
            folder = dataset.name(i).split("/")[-2]
            assert target[1:] == (NAMES.index(folder), -1)
    with pytest.raises(UserError, match="robustness has no split test"):
        build_dataset("robustness", root, "test")


def test_unreadable_images_are_left_out(root, tmp_path):
    write_images(tmp_path / "sketch", ["n01440764"])
    (tmp_path / "sketch" / "n01440764" / "broken.JPEG").write_bytes(b"no image")
    dataset = build_dataset("imagenet_sketch", tmp_path, "val", on_error="mask")
    assert sorted(dataset[i][1] for i in range(len(dataset))) == [(-1, -1), (0, 0), (0, 0)]
    assert dataset.bad_images.sum() == 1
