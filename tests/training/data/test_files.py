"""training/data/files.py: which files below a folder are its images, past links and what systems leave there."""
import os
import socket
from pathlib import Path

import pytest
from torchvision.datasets.folder import IMG_EXTENSIONS, make_dataset

from training.data.files import IMAGE_EXTENSIONS, describe_left_out, find_images, list_folder
from utils import LostDataError


def touch(root, *names):
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def names_in(root):
    return [Path(path).relative_to(root).as_posix() for path in find_images(root).images]


def test_images_are_those_of_torchvision_in_its_order(tmp_path):
    """And so the samples of every data set of before."""
    touch(tmp_path, "a/b.jpg", "a/B.PNG", "a/c/1.Tiff", "a/c-d/1.webp", "a/c.e.jpeg", "a/10.bmp", "a/9.ppm", "b/x.pgm",
          "b/deep/er/y.tif", "a/notes.txt", "b/jpg", "b/x.jpg.txt")
    expected = [path for path, _ in make_dataset(tmp_path, extensions=IMG_EXTENSIONS)]
    assert [path for name in "ab" for path in find_images(tmp_path / name).images] == expected
    assert {ending[1:] for ending in IMG_EXTENSIONS} | {"jfif"} == set(IMAGE_EXTENSIONS)


def test_hidden_names_are_left_out_at_every_level(tmp_path):
    touch(tmp_path, "0.jpg", "._0.jpg", ".ipynb_checkpoints/1.jpg", ".Trash/deep/2.jpg", "__MACOSX/3.jpg",
          "deep/4.jpg", "deep/.thumbs/5.jpg", "deep/@eaDir/6.jpg", "$RECYCLE.BIN/7.jpg", ".DS_Store")
    assert names_in(tmp_path) == ["0.jpg", "deep/4.jpg"]
    assert not find_images(tmp_path).left_out
    touch(tmp_path, ".hidden/place/0.jpg")  # above the folder that was asked for, names do not matter
    assert names_in(tmp_path / ".hidden" / "place") == ["0.jpg"]


def test_links_in_a_circle_add_nothing(tmp_path):
    touch(tmp_path, "train/ant/0.jpg", "train/ant/deep/1.jpg", "train/bee/2.jpg")
    for target, name in (("..", "up"), (".", "self"), ("deep", "again"), (str(tmp_path), "top"), ("nowhere", "gone"),
                         ("loop", "loop"), ("../../train/ant/deep", "deep/deep")):
        (tmp_path / "train" / "ant" / name).symlink_to(target)
    assert names_in(tmp_path / "train" / "ant") == ["0.jpg", "deep/1.jpg"]
    (tmp_path / "train" / "cat").symlink_to("..")
    assert list_folder(tmp_path / "train") == (["ant", "bee"], [])
    linked = tmp_path / "elsewhere"
    linked.symlink_to("train")  # the folder itself reached by a link
    assert names_in(linked / "ant") == ["0.jpg", "deep/1.jpg"]


def test_links_elsewhere_are_followed(tmp_path):
    touch(tmp_path, "store/cats/0.jpg", "store/more/1.jpg", "store/2.png", "train/cat/3.jpg")
    links = {"train/ant": "store/cats", "train/cat/more": "store/more", "train/cat/4.png": "store/2.png"}
    for link, target in links.items():
        (tmp_path / link).symlink_to(tmp_path / target)
    assert list_folder(tmp_path / "train") == (["ant", "cat"], [])
    assert names_in(tmp_path / "train" / "ant") == ["0.jpg"]
    assert names_in(tmp_path / "train" / "cat") == ["3.jpg", "4.png", "more/1.jpg"]


def test_the_order_does_not_depend_on_the_system(tmp_path, monkeypatch):
    touch(tmp_path, *(f"{folder}/{name}.jpg" for folder in (".", "b", "a", "a/c") for name in "3142"))
    (tmp_path / "z").symlink_to(tmp_path / "a")
    (tmp_path / "0").symlink_to(tmp_path / "a")
    expected, scandir = names_in(tmp_path), os.scandir

    class Reversed:
        def __init__(self, folder):
            self.entries = scandir(folder)

        def __enter__(self):
            return reversed(list(self.entries))

        def __exit__(self, *_):
            self.entries.close()

    monkeypatch.setattr(os, "scandir", Reversed)
    assert names_in(tmp_path) == expected == [
        *(f"{n}.jpg" for n in "1234"), *(f"{folder}/{n}.jpg" for folder in ("a", "a/c", "b") for n in "1234")]


def test_what_is_left_out_is_counted_by_its_ending(tmp_path):
    touch(tmp_path, "0.jpg", "a.jfif", "b.JFIF", *(f"{i}.HEIC" for i in range(12)), "x.txt", "deep/y.txt", "README")
    found = find_images(tmp_path)
    assert len(found.images) == 3
    assert describe_left_out(found.left_out, "train") == (
        "left out 15 files in train that are no images: 12 .heic, 2 .txt, 1 of no ending")
    touch(tmp_path / "one", "a.\x1b[31mred")
    line = describe_left_out(find_images(tmp_path / "one").left_out, "train")
    assert line == r"left out 1 file in train that is no image: 1 '.\x1b[31mred'"
    assert describe_left_out(find_images(tmp_path / "deep").left_out, "train").endswith("no image: 1 .txt")
    touch(tmp_path / "clean", "0.png")
    assert describe_left_out(find_images(tmp_path / "clean").left_out, "train") is None


def test_what_is_no_file_is_no_image_whatever_its_name(tmp_path):
    """To read a pipe that nobody writes to takes for ever. A link to nothing is told of when it is read."""
    touch(tmp_path, "0.jpg", "elsewhere/1.jpg")
    os.mkfifo(tmp_path / "pipe.png")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(os.path.relpath(tmp_path / "socket.png"))
    for name, target in (("link.png", "pipe.png"), ("null.jpg", "/dev/null"), ("dead.jpg", "nowhere"),
                         ("loop.jpg", "loop.jpg"), ("good.jpg", "elsewhere/1.jpg")):
        (tmp_path / name).symlink_to(target)
    found = find_images(tmp_path)
    assert names_in(tmp_path) == ["0.jpg", "dead.jpg", "good.jpg", "loop.jpg", "elsewhere/1.jpg"]
    line = describe_left_out(found.left_out, "train")
    assert line == "left out 4 files in train that are no images: 4 pipe, socket or device"


def test_regular_files_are_told_apart_without_a_system_call_for_each(tmp_path, monkeypatch):
    touch(tmp_path, *(f"{number}.jpg" for number in range(50)))
    calls, stat, exists = [], os.stat, os.path.exists
    monkeypatch.setattr(os, "stat", lambda *args, **kwargs: calls.append(args) or stat(*args, **kwargs))
    monkeypatch.setattr(os.path, "exists", lambda path: calls.append(path) or exists(path))
    assert len(find_images(tmp_path).images) == 50
    assert len(calls) < 50


def test_a_folder_that_cannot_be_listed_is_no_empty_folder(tmp_path, monkeypatch):
    """torchvision passes over it in silence."""
    touch(tmp_path, "a/0.jpg", "b/0.jpg")
    scandir = os.scandir

    def denied(folder):
        if Path(folder).name == "b":
            raise PermissionError(13, "Permission denied")
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", denied)
    with pytest.raises(LostDataError, match=f"^cannot list the folder {tmp_path}/b: Permission denied$"):
        find_images(tmp_path)
