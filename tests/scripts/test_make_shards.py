"""scripts/make_shards.py: a folder of images and its shards hold the same."""
import json
import tarfile
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from datasets import Reading, ValSplit, build_dataset
from helpers import ROOT
from scripts.make_shards import main
from storage.remote import sha256_of


@pytest.fixture
def photos(tmp_path):
    """Ten train and five val images of two classes, each of its own brightness."""
    for split, number in (("train", 10), ("val", 5)):
        for i in range(number):
            path = tmp_path / "photos" / split / ("ant" if i % 2 else "bee") / f"a.{i}.b.{'PNG' if i % 3 else 'bmp'}"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (4, 4), (i, i, i)).save(path)
    return tmp_path / "photos"


def content(dataset):
    samples = (dataset[i] for i in range(len(dataset)))
    return Counter((np.array(image)[0, 0, 0].item(), target) for image, target in samples)


def test_shards_hold_what_the_folder_holds(photos, tmp_path):
    assert main([str(photos), str(tmp_path / "shards"), "--size", "4"]) == 0
    info = json.loads((tmp_path / "shards" / "_info.json").read_text())
    splits = info["splits"]
    assert info["num_classes"] == 2 and info["classes"] == ["ant", "bee"]
    assert splits["train"]["shard_lengths"] == [4, 4, 2] and splits["val"]["shard_lengths"] == [4, 1]
    for split in ("train", "val"):
        shards = build_dataset("wds/photos", tmp_path / "shards", split)
        assert content(shards) == content(build_dataset("image_folder", photos, split))
        assert shards.num_classes == 2 and shards.classes == ["ant", "bee"]
        files = [tmp_path / "shards" / name for name in splits[split]["filenames"]]
        assert splits[split]["sha256"] == [sha256_of(file) for file in files]
        assert splits[split]["shard_bytes"] == [file.stat().st_size for file in files]
    train = build_dataset("wds/photos", tmp_path / "shards", "train")
    assert len({train[i][1] for i in range(4)}) == 2, "the first shard mixes the classes"


def test_the_same_bytes_again_and_others_by_another_seed(photos, tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        main([str(photos), str(tmp_path / name), "--seed", str(seed)])
        for path in photos.rglob("*.*"):  # the time of a file does not matter
            path.touch()
    one, again, other = ((tmp_path / name / "_info.json").read_text() for name in "abc")
    assert one == again != other
    with tarfile.open(tmp_path / "a" / "train-000000.tar") as tar:
        assert {(member.mtime, member.uid, member.uname) for member in tar} == {(0, 0, "")}


def test_what_is_no_photograph_is_not_packed(photos, tmp_path, capsys):
    for name in ("._a.jpg", ".ipynb_checkpoints/b.jpg", "notes.txt"):
        (photos / "train" / "ant" / name).parent.mkdir(exist_ok=True)
        (photos / "train" / "ant" / name).write_bytes(b"text")
    (photos / "train" / "ant" / "loop").symlink_to("..")
    Image.new("RGB", (4, 4)).save(photos / "train" / "ant" / "c.jfif", "JPEG")
    assert main([str(photos), str(tmp_path / "shards")]) == 0
    out = capsys.readouterr().out
    assert out.count("left out") == 1 and f"left out 1 file in {photos}/train that is no image: 1 .txt\n" in out
    shards = build_dataset("wds/photos", tmp_path / "shards", "train")
    assert len(shards) == 11 and content(shards) == content(build_dataset("image_folder", photos, "train"))


def test_images_that_cannot_be_read(photos, tmp_path, capsys):
    """They were packed without a word. All are named; left out, the others have the same names as ever."""
    whole, output = tmp_path / "whole", tmp_path / "shards"
    main([str(photos), str(whole), "--size", "4"])
    bad = [photos / "train" / "ant" / "a.1.b.PNG", photos / "train" / "bee" / "a.4.b.PNG"]
    bad[0].write_bytes(bad[0].read_bytes()[:50])
    bad[1].write_bytes(b"")
    for asked, code in ((["--skip_bad_images"], 0), ([], 1)):
        capsys.readouterr()
        arguments = [str(photos), str(output if not code else tmp_path / "refused"), "--size", "4", *asked]
        assert main(arguments) == code
        err = capsys.readouterr().err
        assert err.count("cannot read") == 2 and all(f"cannot read {path}: " in err for path in bad)
    assert err.endswith("error: 2 images could not be read: remove what is named, or pass --skip_bad_images\n")
    assert not (tmp_path / "refused" / "_info.json").exists()
    splits = json.loads((output / "_info.json").read_text())["splits"]
    assert splits["train"]["num_samples"] == 8 and splits["val"]["num_samples"] == 5
    images, all_images = (build_dataset("wds/x", root, "train").names() for root in (output, whole))
    assert set(images) < set(all_images) and len(images) == 8


def test_a_part_is_held_out_as_in_training(photos, tmp_path, capsys):
    (photos / "train").rename(tmp_path / "flat")
    assert main([str(tmp_path / "flat"), str(tmp_path / "shards"), "--val_split", "0.4", "--seed", "3"]) == 0
    said = f"held out for validation: 4 of the 10 images in {tmp_path}/flat, 0.4 of each class by seed 3\n"
    assert capsys.readouterr().out.count(said) == 1
    for split in ("train", "val"):
        folder = build_dataset("image_folder", tmp_path / "flat", split, reading=Reading(val_split=ValSplit(0.4, 3)))
        assert content(build_dataset("wds/x", tmp_path / "shards", split)) == content(folder)
    with pytest.raises(SystemExit):
        main([str(photos), str(tmp_path / "b"), "--val_split", "1"])
    assert "--val_split must be above 0 and below 1, got 1.0" in capsys.readouterr().err


def test_the_list_is_written_whole_or_not_at_all(photos, tmp_path, monkeypatch):
    def fail(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError, match="No space left"):
        main([str(photos), str(tmp_path / "shards")])
    assert {path.suffix for path in (tmp_path / "shards").iterdir()} == {".tar"}


def test_mistakes(photos, tmp_path, capsys):
    def complaint(*arguments):
        assert main([str(argument) for argument in arguments]) == 1
        return capsys.readouterr().err

    output = tmp_path / "shards"
    assert main([str(photos), str(output), "--splits", "val"]) == 0
    assert "_info.json already exists; choose another output folder" in complaint(photos, output)
    assert f"give the folder above it, {photos}\n" in complaint(photos / "val", tmp_path / "b")
    (tmp_path / "flat").symlink_to(photos / "train")
    assert complaint(tmp_path / "flat", tmp_path / "b").endswith(
        "found ant, bee; --val_split 0.1 holds a tenth of the training images out instead; or pack --splits train "
        "alone\n")
    assert complaint(photos, tmp_path / "b", "--val_split", 0.1).endswith("; leave out --val_split\n")
    assert f"{photos}/train/x lies among the class folders of {photos}/train" in complaint(photos, photos / "train/x")
    (tmp_path / "empty").mkdir()
    assert "has no folder train" in complaint(tmp_path / "empty", tmp_path / "b")
    assert "1 classes were asked for, fewer than the 2" in complaint(photos, tmp_path / "b", "--nb_classes", 1)
    (photos / "val" / "ant").rename(photos / "val" / "cat")
    assert "must have the training set's classes, but lacks ant and adds cat" in complaint(photos, tmp_path / "b")
    assert not (tmp_path / "b").exists()
    with pytest.raises(SystemExit):
        main([str(photos), str(tmp_path / "b"), "--size", "0"])
    assert "--size must be at least 1" in capsys.readouterr().err


def test_an_output_that_cannot_be_written(photos, tmp_path, capsys):
    (tmp_path / "file").touch()
    assert main([str(photos), str(tmp_path / "file" / "x")]) == 1
    assert "file/x: Not a directory" in capsys.readouterr().err


def test_paths_begin_at_home(photos, tmp_path, monkeypatch):
    """Where no shell has expanded them; so in every script."""
    monkeypatch.setenv("HOME", str(tmp_path))
    assert main([f"~/{photos.relative_to(tmp_path)}", "~/shards"]) == 0
    assert list((tmp_path / "shards").iterdir())
    assert not [path for path in (ROOT / "scripts").glob("*.py") if "type=Path" in path.read_text()]
