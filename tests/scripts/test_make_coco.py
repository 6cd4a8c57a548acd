"""scripts/make_coco.py: labels of YOLO and Pascal VOC in COCO's format, by hand-computed boxes."""
import json
import shlex
from pathlib import Path

import pytest
from faster_coco_eval import COCO, COCOeval_faster
from PIL import Image

import main as training
from helpers.photos import noise, photograph
from scripts.make_coco import main
from tasks.detection.coco import open_coco


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def picture(path, size=(100, 50)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size).save(path)
    return path


def xml(*objects, size=(100, 50)):
    """The XML of an image with objects: (name, "xmin ymin xmax ymax"), and what stands in `difficult`."""
    lines = ["<annotation>", f"<size><width>{size[0]}</width><height>{size[1]}</height><depth>3</depth></size>"]
    for name, corners, *difficult in objects:
        sides = zip(("xmin", "ymin", "xmax", "ymax"), corners.split(), strict=True)
        lines += ["<object>", f"<name>{name}</name>", f"<difficult>{difficult[0] if difficult else 0}</difficult>",
                  "<bndbox>" + "".join(f"<{side}>{value}</{side}>" for side, value in sides) + "</bndbox>",
                  "<part><name>head</name><bndbox><xmin>0</xmin></bndbox></part>", "</object>"]
    return "\n".join([*lines, "</annotation>"])


@pytest.fixture
def convert(tmp_path, capfd):
    """Convert a folder; returns what was written by split, and what was printed."""
    def run(data, *arguments, output="coco", code=0, format="yolo"):
        words = [data, "--format", format, "--output", tmp_path / output, *arguments]
        status = main([str(word) for word in words])
        out, err = capfd.readouterr()
        assert status == code, err
        files = sorted((tmp_path / output / "annotations").glob("*"))
        assert all(file.name.startswith("instances_") for file in files)
        return {file.stem.removeprefix("instances_"): json.loads(file.read_text()) for file in files}, out, err

    return run


@pytest.fixture
def refuse(convert):
    """What is said of a folder that cannot be converted: what is named first, and the error. Nothing is written."""
    def run(data, *arguments, **options):
        files, _, err = convert(data, *arguments, code=1, **options)
        *named, last = err.splitlines()
        assert not files and last.startswith("error: ") and "Traceback" not in err
        return "\n".join(named), last

    return run


@pytest.fixture
def yolo(tmp_path):
    """Two training images and one for validation, of 100 x 50 pixels, as Ultralytics lays them out."""
    root = tmp_path / "data"
    write(root / "data.yaml", "path: .\ntrain: images/train\nval: images/val\nnames: [ant, bee]\nnc: 2\n")
    for name in ("train/a.png", "train/b.png", "val/c.png"):
        picture(root / "images" / name)
    write(root / "labels/train/a.txt", "1 0.5 0.5 0.2 0.4\n\n0 0.1 0.2 0.5 0.2 0.5 0.6\n")
    write(root / "labels/val/c.txt", "0 0.25 0.5 0.5 1\n")
    return root


@pytest.fixture
def voc(tmp_path):
    """Two training images and one for validation, of 100 x 50 pixels, as the challenge lays them out."""
    root = tmp_path / "VOC2012"
    for name in ("a", "b", "c"):
        picture(root / f"JPEGImages/{name}.jpg")
    write(root / "Annotations/a.xml", xml(("cat", "1 1 100 50"), ("bird", "11 21 20.5 30", 1)))
    write(root / "Annotations/b.xml", xml())
    write(root / "Annotations/c.xml", xml(("dog", "5 6 5 6")))
    write(root / "ImageSets/Main/train.txt", "a\nb\n")
    write(root / "ImageSets/Main/val.txt", "c \n")
    write(root / "ImageSets/Main/trainval.txt", "a\nb\nc\n")
    write(root / "ImageSets/Main/dog_train.txt", "a -1\nb -1\n")
    return root


def boxes(found):
    """(file name, category's name, box) of each annotation."""
    names = {image["id"]: image["file_name"] for image in found["images"]}
    categories = {category["id"]: category["name"] for category in found["categories"]}
    return [(names[a["image_id"]], categories[a["category_id"]], a["bbox"]) for a in found["annotations"]]


def images(found):
    return [image["file_name"] for image in found["images"]]


# --- YOLO -------------------------------------------------------------------------------------------------------------


def test_boxes_and_polygons(yolo, convert, tmp_path):
    files, out, err = convert(yolo)
    assert list(files) == ["train", "val"] and not err
    categories = [dict(id=1, name="ant"), dict(id=2, name="bee")]
    assert files["train"] == dict(
        info={},
        images=[dict(id=1, file_name="images/train/a.png", width=100, height=50),
                dict(id=2, file_name="images/train/b.png", width=100, height=50)],
        annotations=[
            dict(id=1, image_id=1, category_id=2, bbox=[40, 15, 20, 20], area=400, iscrowd=0, segmentation=[]),
            dict(id=2, image_id=1, category_id=1, bbox=[10, 10, 40, 20], area=400, iscrowd=0,
                 segmentation=[[10, 10, 50, 10, 50, 30]]),
        ],
        categories=categories,
    )
    assert boxes(files["val"]) == [("images/val/c.png", "ant", [0, 0, 50, 50])]
    assert files["val"]["categories"] == categories and files["val"]["annotations"][0]["id"] == 1
    assert "train: 2 images, 1 of them without objects, 2 objects, 1 of them with polygons\n" in out
    assert "val: 1 image, 0 of them without objects, 1 object\n2 classes: ant, bee\n" in out
    coco = tmp_path / "coco" / "annotations"
    command = out.splitlines()[-1].removeprefix("train with: ")
    assert shlex.split(command) == ["python", "main.py", "--task", "detection", "--data_path", str(yolo),
                                    "--train_json", f"{coco}/instances_train.json",
                                    "--val_json", f"{coco}/instances_val.json", "--detector", "retinanet"]
    assert out.count("warning") == 1


def test_what_was_written_is_read_as_coco(yolo, voc, convert, tmp_path):
    convert(yolo)
    coco = COCO(str(tmp_path / "coco/annotations/instances_train.json"))
    assert coco.getCatIds(catNms=["bee"]) == [2] and len(coco.getImgIds()) == 2
    polygon = coco.annToMask(coco.loadAnns(2)[0])
    assert polygon.shape == (50, 100) and polygon[12, 40] and not polygon[28, 15]
    convert(voc, format="voc", output="voc")
    coco = COCO(str(tmp_path / "voc/annotations/instances_train.json"))
    found = [dict(image_id=1, category_id=2, bbox=[0, 0, 100, 50], score=0.5),
             # higher scores in the difficult object: nothing is counted as found, nor as wrong
             dict(image_id=1, category_id=1, bbox=[10, 20, 10, 10], score=0.9)]
    evaluation = COCOeval_faster(coco, coco.loadRes(found), "bbox")
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    assert evaluation.stats[0] == pytest.approx(1), "cat is found, and there is no bird to find"


def test_names_by_number_and_names_that_yaml_takes_for_something_else(yolo, convert):
    write(yolo / "data.yaml", "train: images/train\nval: images/val\nnames:\n  1: no\n  0: 12\n")
    files, _, _ = convert(yolo)
    assert [category["name"] for category in files["train"]["categories"]] == ["12", "no"]


def test_a_list_of_folders_and_a_file_that_lists_images(yolo, convert):
    """Each image once in its split, and once more in another one, which is said."""
    write(yolo / "data.yaml", "path: /of/another/machine\ntrain: [images/train, images/val]\nval: lists/val.txt\n"
                              "test: nowhere\nnames: [ant, bee]\n")
    write(yolo / "lists/val.txt", f"../images/val/c.png\n\n{yolo}/images/train/b.png\nimages/val/c.png\n")
    files, out, _ = convert(yolo)
    assert images(files["train"]) == ["images/train/a.png", "images/train/b.png", "images/val/c.png"]
    assert images(files["val"]) == ["images/val/c.png", "images/train/b.png"]
    assert "warning: 2 images of train are in val too\n" in out
    assert f"left out the split test: {yolo}/data.yaml names nowhere, which does not exist\n" in out


def test_roboflows_layout(tmp_path, convert):
    root = tmp_path / "data"
    write(root / "data.yaml", "train: ../train/images\nval: ../valid/images\ntest: ../test/images\nnames: ['x y']\n")
    for split in ("train", "valid", "test"):
        picture(root / split / "images/deep/a.b.PNG")
        write(root / split / "labels/deep/a.b.txt", "0 .5 .5 .5 .5")
    files, _, _ = convert(root)
    assert {split: boxes(found) for split, found in files.items()} == {
        split: [(f"{folder}/images/deep/a.b.PNG", "x y", [25, 12.5, 50, 25])]
        for split, folder in (("train", "train"), ("val", "valid"), ("test", "test"))
    }


def test_a_yaml_file_elsewhere(yolo, convert, tmp_path, monkeypatch):
    """Its `path` begins at the file, or where the script is run; images may lie beside it."""
    text = (yolo / "data.yaml").read_text()
    (yolo / "data.yaml").unlink()
    monkeypatch.chdir(tmp_path)
    for number, (folder, path) in enumerate((("sets", "../data"), ("sets/more", "data"), ("sets", yolo))):
        file = write(tmp_path / folder / "ants.yaml", text.replace("path: .", f"path: {path}"))
        files, out, _ = convert(file, output=str(number))
        assert images(files["val"]) == ["images/val/c.png"] and f"--data_path {yolo} " in out
    write(file, f"train: {yolo}/images/train\nval: ../data/images/val\nnames: [ant, bee]")
    files, out, _ = convert(file, output="beside")
    assert images(files["val"]) == ["data/images/val/c.png"] and f"--data_path {tmp_path} " in out


@pytest.mark.parametrize("pattern", ["{kind}/{split}", "{split}/{kind}"])
def test_folders_without_yaml(tmp_path, convert, refuse, pattern):
    root = tmp_path / "images" / "data"
    for split in ("train", "valid", "test"):
        picture(root / pattern.format(kind="images", split=split) / "a.jpg")
        write(root / pattern.format(kind="labels", split=split) / "a.txt", "\ufeff0 .5 .5 1 1\n")
    assert "has neither data.yaml nor classes.txt; name the classes by --classes FILE" in refuse(root)[1]
    write(root / "classes.txt", "ant\r\nbee\r\n\r\n")
    files, _, _ = convert(root)
    name = pattern.format(kind="images", split="valid") + "/a.jpg"
    assert set(files) == {"train", "val", "test"} and boxes(files["val"]) == [(name, "ant", [0, 0, 100, 50])]
    files, _, _ = convert(root, "--classes", write(tmp_path / "names", "wasp"), output="b")
    assert files["train"]["categories"] == [dict(id=1, name="wasp")]


def test_a_part_is_held_out_by_the_seed(tmp_path, convert):
    """Of folders without splits; labels may lie beside their images."""
    root = tmp_path / "data"
    for i in range(10):
        picture(root / f"images/{i}.png")
        write(root / f"{'images' if i % 2 else 'labels'}/{i}.txt", "0 .5 .5 1 1")
    write(root / "labels/classes.txt", "ant")
    everything = [f"images/{i}.png" for i in range(10)]
    found = {}
    for name, arguments in dict(a=[], b=["--val_share", ".4"], c=["--val_share", ".4"],
                                d=["--val_share", ".4", "--seed", "1"]).items():
        files, out, _ = convert(root, *arguments, output=name)
        assert sorted(images(files["train"]) + images(files["val"])) == everything
        assert f"held out for validation: {len(images(files['val']))} of the 10 images, by seed " in out
        found[name] = images(files["val"])
        assert len(files["val"]["annotations"]) == len(found[name])
    assert len(found["a"]) == 1 and len(found["b"]) == 4 and found["b"] == found["c"] != found["d"]
    files, _, _ = convert(root, "--val_share", "0", output="all")
    assert list(files) == ["train"] and images(files["train"]) == everything


def test_labels_beside_their_images(tmp_path, convert):
    """Other texts there are no labels of a lost image. The data set's own YAML file is taken."""
    root = tmp_path / "data"
    write(root / "data.yaml", "train: photos\nnames: [ant]\nval: photos/list.txt")
    write(root / "args.yaml", "lr: 1")
    for name in ("a", "b"):
        picture(root / f"photos/{name}.png")
        write(root / f"photos/{name}.txt", "0 .5 .5 1 1")
    write(root / "photos/list.txt", "b.png")
    files, out, _ = convert(root)
    assert boxes(files["train"]) == [(f"photos/{name}.png", "ant", [0, 0, 100, 50]) for name in "ab"]
    assert images(files["val"]) == ["photos/b.png"] and "label file" not in out


def test_boxes_at_the_edge(yolo, convert):
    """What reaches out is cut off; less than rounding is no reason to say so. Objects count once."""
    write(yolo / "labels/train/a.txt", "0 1.0005 0.5 0.1 1\n0 0.5 0.5 1.0008 1\n")
    write(yolo / "labels/val/c.txt", "0 0.2 0.5 0.1 1\n" * 3 + "1 -0.0009 0 1.0009 0 1 1\n")
    files, out, _ = convert(yolo)
    assert [box for *_, box in boxes(files["train"])] == [[95.05, 0, 4.95, 50], [0, 0, 100, 50]]
    assert boxes(files["val"]) == [("images/val/c.png", "ant", [15, 0, 10, 50]),
                                   ("images/val/c.png", "bee", [0, 0, 100, 50])]
    assert files["val"]["annotations"][1]["segmentation"] == [[0, 0, 100, 0, 100, 50]]
    assert f"warning: 1 object that reached out of its image was cut off at the edge, first in {yolo}/labels/tr" in out
    assert f"warning: 2 objects that were given twice were left out, first in {yolo}/labels/val/c.txt\n" in out


@pytest.mark.parametrize("ending", ["jpg", "png", "tif"])
def test_images_are_measured_upright(yolo, convert, ending):
    (yolo / "images/train/a.png").unlink()
    photograph(yolo / f"images/train/a.{ending}", orientation=6)
    write(yolo / "labels/train/a.txt", "0 0.25 0.5 0.5 1")
    files, _, _ = convert(yolo)
    assert [(i["width"], i["height"]) for i in files["train"]["images"]] == [(32, 16), (100, 50)]
    assert boxes(files["train"])[0][2] == [0, 0, 16, 16]


def test_damaged_exif_is_passed_over(yolo, convert):
    """As in training."""
    damaged = yolo / "images/train/a.png"
    Image.new("RGB", (90, 50)).save(damaged, exif=b"Exif\0\0nonsense")
    with Image.open(damaged) as image, pytest.raises(SyntaxError):
        image.getexif()
    files, _, _ = convert(yolo)
    assert [image["width"] for image in files["train"]["images"]] == [90, 100]


def test_a_png_cut_off(yolo, refuse):
    """It is decoded to find its EXIF; what is wrong with it is not taken for damaged EXIF."""
    path = yolo / "images/train/a.png"
    Image.fromarray(noise(50, 100)).save(path)
    content = path.read_bytes()
    path.write_bytes(content[: content.index(b"IDAT") + 40])
    assert refuse(yolo)[0].startswith(f"cannot read {path}: ")


@pytest.mark.parametrize("row,message", [
    ("2 .5 .5 .1 .1", "there is no class 2; 2 classes count from 0"),
    ("-1 .5 .5 .1 .1", "there is no class -1; 2"),
    ("0.5 .5 .5 .1 .1", "there is no class 0.5; 2"),
    ("0 .5 .5 .1", "4 columns; a box has 5, a polygon has 7, 9, 11 or so on"),
    ("0 .5 .5 .1 .1 .9", "6 columns; a box"),
    ("0 .1 .1 .5 .5 .5 .1 .3", "8 columns; a box"),
    ("0", "1 column; a box"),
    ("ant .5 .5 .1 .1", "'ant' is no number"),
    ("0 .5 nan .1 .1", "nan is not finite"),
    ("0 .5 .5 inf .1", "inf is not finite"),
    ("0 -0.002 .5 .1 .1", "-0.002 is not from 0 to 1, as a share of the image is"),
    ("0 50 25 20 20", "50 is not from 0 to 1"),
    ("0 .1 .1 .5 .5 .5 1.002", "1.002 is not from 0 to 1"),
    ("0 .5 .5 0 .1", "the box has no area"),
    ("0 .5 .5 -.0005 -.0005", "the box has no area"),
    ("0 .1 .1 .5 .5 .9 .9", "the polygon has no area"),
])
def test_wrong_rows(yolo, refuse, convert, row, message):
    label = write(yolo / "labels/train/a.txt", f"0 .5 .5 .1 .1\n{row}\n")
    named, error = refuse(yolo)
    assert named.startswith(f"{label}:2: {message}") and "\n" not in named
    assert error == ("error: 1 image could not be converted: mend what is named, or leave it out by "
                     "--skip_bad_images")
    files, out, err = convert(yolo, "--skip_bad_images")
    assert images(files["train"]) == ["images/train/b.png"] and images(files["val"]) == ["images/val/c.png"]
    assert "left out 1 image that could not be converted\n" in out and err == named + "\n"


def test_other_files_that_are_wrong(yolo, refuse, convert):
    """All are named at once."""
    write(yolo / "images/train/b.png", b"no image")
    label = write(yolo / "labels/train/a.txt", b"\xff\xfe0 ")
    picture(yolo / "images/val/d.png")
    picture(yolo / "images/val/d.jpg")
    both = write(yolo / "labels/val/d.txt", "0 .5 .5 1 1")
    listed = write(yolo / "val.txt", f"{yolo}/images/val/c.png\n./gone.png\nimages/val/d.jpg\nimages/val/d.png\n")
    write(yolo / "data.yaml", "train: images/train\nval: val.txt\nnames: [ant, bee]\n")
    named, error = refuse(yolo)
    expected = [f"{label}: not text in UTF-8", f"cannot read {yolo}/images/train/b.png: not an image",
                f"{listed}:2: there is no image ./gone.png", f"{both}: d.jpg and d.png share it; rename them",
                f"{both}: d.jpg"]
    for line, start in zip(named.splitlines(), expected, strict=True):
        assert line.startswith(start)
    assert error.startswith("error: 5 images could")
    picture(yolo / "images/train/e.png")
    files, _, _ = convert(yolo, "--skip_bad_images")
    assert images(files["train"]) == ["images/train/e.png"] and images(files["val"]) == ["images/val/c.png"]


def test_of_many_mistakes_the_first_are_named(yolo, refuse):
    for i in range(25):
        write(yolo / f"images/train/{i}.png", b"")
    named, error = refuse(yolo)
    assert len(named.splitlines()) == 21 and named.endswith("\nand 5 more") and "error: 25 images" in error


def test_labels_without_an_image_are_counted(yolo, convert):
    """Not those of images that no split has."""
    stray = write(yolo / "labels/train/gone.txt", "0 .5 .5 1 1")
    write(yolo / "labels/train/classes.txt", "ant\nbee\n")
    write(yolo / "images/train/notes.doc", "")
    picture(yolo / "images/val/other.png")
    write(yolo / "labels/val/other.txt", "0 .5 .5 1 1")
    write(yolo / "val.txt", "images/val/c.png")
    write(yolo / "data.yaml", "train: images/train\nval: val.txt\nnames: [ant, bee]\n")
    files, out, _ = convert(yolo)
    assert f"warning: 1 label file has no image: {stray}\n" in out and len(images(files["train"])) == 2
    assert f"left out 1 file in {yolo}/images/train that is no image: 1 .doc\n" in out


@pytest.mark.parametrize("text,message", [
    ("train: nowhere\nnames: [ant, bee]", "train is nowhere, which does not exist"),
    ("train: images/train/a.png\nnames: [ant, bee]", "train is images/train/a.png, neither a folder nor a text file"),
    ("names: [ant, bee]", "names neither train nor val nor test"),
    ("train: images/train", "there are no names of classes"),
    ("train: images/train\nnames: [ant, ant]", "two classes have the name 'ant'"),
    ("train: images/train\nnames: [ant, ~, '']", "a class has no name"),
    ("train: images/train\nnames: {0: ant, 2: bee}", "2 names, but none of class 1"),
    ("train: images/train\nnames: ant", "names are neither a list nor a mapping"),
    ("train: images/train\nnames: [[ant]]", "names are neither a list nor a mapping"),
    ("train: images/train\nnames: [ant]\nnc: 2", "nc is 2, but there is 1 name"),
    ("train: images/train\nnames: [ant]\nkpt_shape: [17, 3]", "the labels are of key points"),
    ("train: [", "not YAML (while parsing a flow"),
    ("[" * 2000, "not YAML (maximum recursion depth"),
    ("- ant", "does not describe a data set"),
])
def test_wrong_yaml(yolo, refuse, text, message):
    write(yolo / "data.yaml", text)
    named, error = refuse(yolo)
    assert not named and error.startswith(f"error: {yolo}/data.yaml: {message}")


def test_folders_that_are_no_data_set(yolo, tmp_path, refuse):
    assert refuse(tmp_path / "gone")[1] == f"error: {tmp_path}/gone does not exist"
    (tmp_path / "empty").mkdir()
    assert "empty has no data.yaml, nor folders images/train or train/images" in refuse(tmp_path / "empty")[1]
    write(yolo / "labels/train/a.txt", "\n")
    write(yolo / "labels/val/c.txt", "")
    assert refuse(yolo)[1] == "error: no image has an object"
    (yolo / "labels").rename(yolo / "label")
    message = (f"none of 3 images has a label file: for {yolo}/images/train/a.png, there is no "
               f"{yolo}/labels/train/a.txt nor {yolo}/images/train/a.txt")
    assert refuse(yolo)[1] == f"error: {message}"
    (yolo / "label").rename(yolo / "labels")
    (yolo / "images/val/c.png").unlink()
    assert refuse(yolo)[1] == "error: no image is left in the split val"
    (yolo / "data.yaml").rename(yolo / "one.yaml")
    write(yolo / "two.yml", "")
    assert "has several YAML files, one.yaml, two.yml; give the data set's instead" in refuse(yolo)[1]


@pytest.mark.parametrize("text,message", [
    ("", "there are no names of classes"),
    ("ant\n\nbee\n", "a class has no name"),
    ("ant\nbee\nant\n", "two classes have the name 'ant'"),
])
def test_wrong_files_of_classes(yolo, tmp_path, refuse, text, message):
    names = write(tmp_path / "names.txt", text)
    assert refuse(yolo, "--classes", names)[1] == f"error: {names}: {message}"


# --- Pascal VOC -------------------------------------------------------------------------------------------------------


def test_boxes_of_voc(voc, convert):
    """Pixels count from 1, and both ends are in the box; difficult objects become crowds."""
    files, out, _ = convert(voc, format="voc")
    assert list(files) == ["train", "val"]
    assert files["train"] == dict(
        info={},
        images=[dict(id=1, file_name="JPEGImages/a.jpg", width=100, height=50),
                dict(id=2, file_name="JPEGImages/b.jpg", width=100, height=50)],
        annotations=[
            dict(id=1, image_id=1, category_id=2, bbox=[0, 0, 100, 50], area=5000, iscrowd=0, segmentation=[]),
            dict(id=2, image_id=1, category_id=1, bbox=[10, 20, 10.5, 10], area=105, iscrowd=1, segmentation=[]),
        ],
        categories=[dict(id=1, name="bird"), dict(id=2, name="cat"), dict(id=3, name="dog")],
    )
    assert boxes(files["val"]) == [("JPEGImages/c.jpg", "dog", [4, 5, 1, 1])]
    assert "train: 2 images, 1 of them without objects, 2 objects, 1 of them difficult\n" in out
    assert "warning" not in out and f"--data_path {voc} " in out


def test_classes_in_another_order(voc, tmp_path, convert, refuse):
    names = write(tmp_path / "names.txt", "dog\nbird\ncat\nhorse\n")
    files, _, _ = convert(voc, "--classes", names, format="voc")
    assert [c["name"] for c in files["val"]["categories"]] == ["dog", "bird", "cat", "horse"]
    assert [a["category_id"] for a in files["train"]["annotations"]] == [3, 2]
    write(names, "dog\nbirds\ncat\n")
    named, _ = refuse(voc, "--classes", names, format="voc", output="b")
    assert named == f"{voc}/Annotations/a.xml:9: class 'bird' is not in --classes; did you mean birds?"


def test_image_sets_of_voc(voc, convert, refuse):
    sets = voc / "ImageSets" / "Main"
    (voc / "train").mkdir()
    for name in ("train.txt", "val.txt"):
        (sets / name).unlink()
    write(sets / "test.txt", "c 1\n")
    write(sets / "trainval.txt", "a  1\nb -1\nb -1\n")
    files, out, _ = convert(voc, format="voc")
    assert sorted(images(files["train"]) + images(files["val"])) == ["JPEGImages/a.jpg", "JPEGImages/b.jpg"]
    assert images(files["test"]) == ["JPEGImages/c.jpg"] and "held out for validation: 1 of the 2 images" in out
    (sets / "trainval.txt").unlink()
    files, out, _ = convert(voc, format="voc", output="test")
    assert list(files) == ["test"] and "main.py" not in out
    write(sets / "val.txt", "c\n\nx y\n")
    assert refuse(voc, format="voc", output="b")[0] == f"{sets}/val.txt:3: there is no XML file of x"
    (sets / "val.txt").unlink()
    (sets / "test.txt").unlink()
    files, out, _ = convert(voc, "--val_share", ".5", format="voc", output="c")
    assert len(images(files["train"])) == 1 and len(images(files["val"])) == 2


def test_xml_files_beside_their_images(tmp_path, convert):
    """As LabelImg writes them, and Roboflow in a folder for each split; and in folders of other names."""
    root = tmp_path / "data"
    for split in ("train", "valid"):
        picture(root / split / "a.b.png")
        write(root / split / "a.b.xml", xml(("cat", "1 1 10 10")))
        write(root / split / "._a.b.xml", b"\0")
    picture(root / "train" / "other.png")
    files, out, _ = convert(root, format="voc")
    assert boxes(files["train"]) == [("train/a.b.png", "cat", [0, 0, 10, 10])]
    assert boxes(files["val"]) == [("valid/a.b.png", "cat", [0, 0, 10, 10])]
    assert f"warning: left out 1 image that has no XML file: {root}/train/other.png\n" in out
    (root / "valid" / "annotations").mkdir()
    files, _, _ = convert(root / "valid", format="voc", output="flat")
    assert boxes(files["train"]) == [("a.b.png", "cat", [0, 0, 10, 10])] and list(files) == ["train"]
    (root / "train").rename(root / "images")
    (root / "annotations/deep").mkdir(parents=True)
    (root / "images/deep").mkdir()
    (root / "images/a.b.xml").rename(root / "annotations/deep/a.XML")
    (root / "images/a.b.png").rename(root / "images/deep/a.png")
    files, _, _ = convert(root, "--val_share", "0", format="voc", output="kaggle")
    assert boxes(files["train"]) == [("images/deep/a.png", "cat", [0, 0, 10, 10])]


def test_boxes_that_count_from_0(voc, convert):
    """Such a tool's reach out by up to a pixel, which is cut off."""
    write(voc / "Annotations/a.xml", xml(("cat", "0 0 100 50"), ("cat", "51 26 101 51", "True")))
    files, out, _ = convert(voc, format="voc")
    assert [box for *_, box in boxes(files["train"])] == [[0, 0, 100, 50], [50, 25, 50, 25]]
    assert [annotation["iscrowd"] for annotation in files["train"]["annotations"]] == [0, 1]
    assert "warning: 2 objects that reached out of their images were cut off at the edge, first in " in out


@pytest.mark.parametrize("corners,line,message", [
    ("20 1 10 5", 6, "xmax or ymax is below xmin or ymin: 20 1 10 5"),
    ("1 20 5 10", 6, "xmax or ymax is below xmin or ymin: 1 20 5 10"),
    ("-1 1 10 10", 6, "the box -1 1 10 10 is not in the image, 100 x 50"),
    ("1 1 102 10", 6, "the box 1 1 102 10 is not in the image"),
    ("1 1 10 52", 6, "the box 1 1 10 52 is not in the image"),
    ("101 1 101 10", 6, "the box 101 1 101 10 is not in the image"),
    ("nan 1 10 10", 6, "nan is not finite"),
    ("1 one 10 10", 6, "'one' is no number"),
])
def test_wrong_boxes_of_voc(voc, convert, refuse, corners, line, message):
    label = write(voc / "Annotations/a.xml", xml(("cat", corners)))
    named, error = refuse(voc, format="voc")
    assert named.startswith(f"{label}:{line}: {message}") and error.startswith("error: 1 image could not be converted")
    files, _, err = convert(voc, "--skip_bad_images", format="voc")
    assert images(files["train"]) == ["JPEGImages/b.jpg"] and err == named + "\n"


BILLION_LAUGHS = "<!DOCTYPE a [\n<!ENTITY a0 'ha'>\n" + "".join(
    f"<!ENTITY a{i} '{f'&a{i - 1};' * 10}'>\n" for i in range(1, 10)
) + "]><annotation>&a9;</annotation>"


@pytest.mark.parametrize("text,message", [
    (BILLION_LAUGHS, ":1: has a DOCTYPE, which VOC's XML has not; remove it"),
    (BILLION_LAUGHS.encode("utf-16"), ":1: has a DOCTYPE"),
    ("<annotation>\n<object>\n</annotation>", ":3: not XML (mismatched tag)"),
    ("", ":1: not XML (no element found)"),
    (b"<annotation>\n\xff</annotation>", ":2: not XML (not well-formed (invalid token))"),
    ("<?xml version='1.0' encoding='big5'?><annotation/>", ": in an encoding that cannot be read; save it in UTF-8"),
    ("<?xml version='1.0' encoding='none'?><annotation/>", ": in an encoding that cannot be read; save it in UTF-8"),
    ("\n<html/>", ":2: <html> is not <annotation>"),
    ("<annotation>\n<object><name> </name></object></annotation>", ":2: an object without a name"),
    ("<annotation>\n<object><name>x</name></object></annotation>", ":2: an object without bndbox"),
    ("<annotation><object><name>x</name>\n<bndbox><xmin>1</xmin></bndbox></object></annotation>",
     ":2: '' is no number"),
])
def test_wrong_xml(voc, refuse, text, message):
    label = write(voc / "Annotations/a.xml", text)
    assert refuse(voc, format="voc")[0].startswith(f"{label}{message}")


def test_images_of_voc_that_are_wrong(voc, refuse, convert):
    write(voc / "JPEGImages/a.jpg", b"")
    (voc / "JPEGImages/b.jpg").unlink()
    picture(voc / "JPEGImages/c.png")
    named, error = refuse(voc, format="voc")
    assert named.splitlines() == [
        f"cannot read {voc}/JPEGImages/a.jpg: not an image",
        f"{voc}/Annotations/b.xml: there is no image {voc}/JPEGImages/b, with any ending",
        f"{voc}/Annotations/c.xml: c.jpg and c.png share it; rename them",
    ]
    assert "3 images could not" in error
    files, _, err = convert(voc, "--skip_bad_images", format="voc", code=1)
    assert not files and err.endswith("error: no image is left in the split train\n")


def test_sizes_in_xml(voc, convert, refuse):
    """The image's own counts. Boxes of an image that lies on its side would be elsewhere once it is upright."""
    write(voc / "Annotations/a.xml", xml(("cat", "1 1 10 10"), size=(50, 100)))
    write(voc / "Annotations/c.xml", xml(("cat", "1 1 10 10"), size=(0, 0)))
    files, out, _ = convert(voc, format="voc")
    assert files["train"]["images"][0]["width"] == 100
    assert f"warning: 1 XML file gives another size than its image has: look at its boxes, first in {voc}/Ann" in out
    photograph(voc / "JPEGImages/a.jpg", orientation=6)
    write(voc / "Annotations/a.xml", xml(("cat", "1 1 10 10"), size=(32, 16)))
    files, out, _ = convert(voc, format="voc", output="b")
    assert files["train"]["images"][0]["width"] == 32 and "another size" not in out
    write(voc / "Annotations/a.xml", xml(("cat", "1 1 10 10"), size=(16, 32)))
    named, _ = refuse(voc, format="voc", output="c")
    message = "its boxes are of the image as stored, 16 x 32, which EXIF turns upright; save the image without its "
    assert named == f"{voc}/Annotations/a.xml: {message}orientation"


def test_folders_that_are_no_voc(voc, refuse):
    message = "has no XML files, in Annotations or beside the images; is it the folder of one year?"
    assert refuse(voc / "JPEGImages", format="voc")[1] == f"error: {voc}/JPEGImages {message}"
    file = voc / "Annotations/a.xml"
    assert refuse(file, format="voc")[1] == f"error: {file} is no folder"


# --- the command that trains ------------------------------------------------------------------------------------------


def open_as_trained(out):
    """The detector of the command that was printed, and its data, opened as a run does."""
    words = shlex.split(out.splitlines()[-1].removeprefix("train with: "))
    assert words[:2] == ["python", "main.py"]
    task, settings = training.parse(words[2:])
    assert task.settings_class.__name__ == "DetectionSettings"
    data, network = settings.data, settings.model
    return network.detector, *(
        open_coco(data.data_path, split, data.annotations(split), split == "train", network.has_masks, False)
        for split in ("train", "val")
    )


BOX, POLYGON = "0 .5 .5 .5 .5\n", "1 .1 .2 .5 .2 .5 .6\n"
LEFT_OUT = "training leaves out what has none\n"
BOXES_ALONE = "RetinaNet is trained, on boxes alone; Mask R-CNN needs masks in train, and that of each object in val\n"


@pytest.mark.parametrize("train,val,detector,learnt,warning", [
    (POLYGON, POLYGON, "mask_rcnn", 1, None),
    (POLYGON, "", "mask_rcnn", 1, None),
    (BOX, BOX, "retinanet", 1, None),
    (BOX + POLYGON, POLYGON, "mask_rcnn", 1, f"1 object has no mask (1 in train): {LEFT_OUT}"),
    (POLYGON + BOX + BOX.replace(".5\n", ".4\n"), POLYGON, "mask_rcnn", 1,
     f"2 objects have no mask (2 in train): {LEFT_OUT}"),
    (POLYGON, POLYGON + BOX, "retinanet", 1, f"1 object has no mask (1 in val): {BOXES_ALONE}"),
    (BOX + POLYGON, BOX, "retinanet", 2, f"2 objects have no mask (1 in train, 1 in val): {BOXES_ALONE}"),
    (BOX, POLYGON, "retinanet", 1, f"1 object has no mask (1 in train): {BOXES_ALONE}"),
])
def test_the_command_trains_what_masks_are_enough_for(yolo, convert, train, val, detector, learnt, warning):
    write(yolo / "labels/train/a.txt", train)
    write(yolo / "labels/val/c.txt", val)
    _, out, _ = convert(yolo)
    found, train_set, val_set = open_as_trained(out)
    assert found == detector and len(train_set) == len(val_set) == 1
    target = train_set[0][1]
    assert len(target.labels) == learnt
    assert target.masks is None if detector == "retinanet" else target.masks.any(axis=(1, 2)).all()
    assert out.count("no mask") == out.count("warning") == (warning is not None)
    assert warning is None or f"warning: {warning}" in out


def test_the_command_of_voc_learns_boxes_alone(voc, convert):
    _, out, _ = convert(voc, format="voc")
    detector, train_set, val_set = open_as_trained(out)
    assert detector == "retinanet" and len(train_set) == len(val_set) == 1 and "warning" not in out
    assert train_set[0][1].boxes.tolist() == [[0, 0, 100, 50]], "not the difficult object"


# --- the script -------------------------------------------------------------------------------------------------------


def test_nothing_is_written_over(yolo, convert, tmp_path):
    convert(yolo)
    written = tmp_path / "coco/annotations/instances_train.json"
    (tmp_path / "coco/annotations/instances_val.json").unlink()
    before = written.read_bytes()
    (yolo / "images/train/b.png").unlink()
    _, _, err = convert(yolo, code=1)
    assert err == f"error: {written} already exists; remove it, or choose another output folder\n"
    assert written.read_bytes() == before


def test_a_file_is_written_whole_or_not_at_all(yolo, convert, tmp_path, monkeypatch):
    def fail(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError, match="No space left"):
        convert(yolo)
    assert not list((tmp_path / "coco/annotations").iterdir())


def test_the_command_line(yolo, tmp_path, convert, capfd, monkeypatch):
    with pytest.raises(SystemExit):
        main([str(yolo), "--format", "yolo", "--output", str(tmp_path / "b"), "--val_share", "1"])
    assert "--val_share must be at least 0 and below 1, got 1.0" in capfd.readouterr().err
    _, _, err = convert(yolo, output="data/data.yaml", code=1)
    assert err == f"error: {yolo}/data.yaml/annotations: Not a directory\n"
    monkeypatch.setenv("HOME", str(tmp_path))
    assert main(["~/data", "--format", "yolo", "--output", "~/coco"]) == 0
    assert Path(tmp_path / "coco/annotations/instances_val.json").exists()


def test_a_data_folder_that_a_shell_must_quote(yolo, convert, tmp_path):
    yolo.rename(tmp_path / "my data\x1b")
    _, out, _ = convert(tmp_path / "my data\x1b")
    assert f"--data_path '{tmp_path}/my data\\x1b' --train_json" in out and "\x1b" not in out
