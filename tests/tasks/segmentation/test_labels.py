"""Label files: the values of pixels as classes, what is refused, colours, and overlays."""
import zlib

import numpy as np
import pytest
from PIL import Image

import tasks.segmentation.labels as labels_module
from tasks.colours import palette
from tasks.segmentation.labels import IGNORE, LabelError, overlay, read_label, write_label
from training.data.images import UnreadableFileError


def write(path, values, mode="L"):
    """A label file with these rows of values, in a mode of Pillow's."""
    values = np.array(values)
    dtype = {"L": "u1", "P": "u1", "I;16": "<u2", "I;16B": ">u2", "I": "<i4"}[mode]
    image = Image.frombytes(mode, values.shape[::-1], values.astype(dtype).tobytes())
    if mode == "P":
        image.putpalette(np.random.default_rng(0).permutation(768).astype(np.uint8).tobytes())  # colours of no meaning
    image.save(path)
    return path


def complaint_about(path, num_classes=3, size=None):
    with pytest.raises(LabelError) as raised:
        read_label(path, num_classes, size)
    return str(raised.value)


# --- values -----------------------------------------------------------------------------------------------------------


def test_values_are_classes_from_1_and_0_and_255_are_not_labelled(tmp_path):
    labels = read_label(write(tmp_path / "a.png", [[0, 1, 2], [3, 255, 1]]), 3)
    assert labels.tolist() == [[IGNORE, 0, 1], [2, IGNORE, 0]] and labels.dtype == np.uint8


@pytest.mark.parametrize("num_classes, last", [(253, None), (254, 253), (255, 253)])
def test_the_largest_values(tmp_path, num_classes, last):
    """254 is the class before the last of 255, the last of 254, and none of 253."""
    path = write(tmp_path / "a.png", [[254]])
    if last is None:
        assert complaint_about(path, num_classes).startswith(f"{path}: holds the value 254, ")
    else:
        assert read_label(path, num_classes).tolist() == [[last]]


def test_of_255_classes_255_is_the_last(tmp_path):
    path = write(tmp_path / "a.png", [[0, 1, 255]])
    assert read_label(path, 255).tolist() == [[IGNORE, 0, 254]]
    assert read_label(path, 254).tolist() == [[IGNORE, 0, IGNORE]]


@pytest.mark.parametrize("mode, ending", [("L", "png"), ("P", "png"), ("I;16", "png"), ("I;16", "tif"),
                                          ("I;16B", "tif"), ("I", "tif")])
def test_one_channel_of_any_type(tmp_path, mode, ending):
    """Of a palette its indices; values of 16 and 32 bits are not scaled, as those of images are."""
    path = write(tmp_path / f"a.{ending}", [[0, 1, 2], [150, 255, 149]], mode)
    with Image.open(path) as image:
        assert image.mode == mode
    labels = read_label(path, 150)
    assert labels.tolist() == [[IGNORE, 0, 1], [149, IGNORE, 148]] and labels.dtype == np.uint8


def test_one_bit_is_one_class(tmp_path):
    Image.fromarray(np.array([[False, True], [True, True]])).save(tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as image:
        assert image.mode == "1"
    assert read_label(tmp_path / "a.png", 1).tolist() == [[IGNORE, 0], [0, 0]]


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA", "PA"])
def test_several_channels_are_refused(tmp_path, mode):
    path = tmp_path / ("a.tif" if mode == "PA" else "a.png")
    Image.new(mode, (3, 2)).save(path)
    assert complaint_about(path) == f"{path}: is {mode}, and a label file has one channel: the numbers of classes"


@pytest.mark.parametrize("mode, value", [("L", 4), ("L", 254), ("P", 4), ("I;16", 256), ("I;16", 65535)])
def test_a_value_beyond_the_classes_is_named_with_its_place(tmp_path, mode, value):
    """The first one by rows: at row 1 and column 2, and not the one at row 2 and column 0."""
    path = write(tmp_path / "a.png", [[0, 1, 2, 3], [3, 255, value, value], [value, 0, 0, 0]], mode)
    assert complaint_about(path) == (f"{path}: holds the value {value}, at row 1 and column 2, and there are 3 "
                                     "classes, from 1, and 0 for what is not labelled")


def test_a_value_below_0_is_none(tmp_path):
    path = write(tmp_path / "a.tif", [[0, 1], [-1, 2]], "I")
    assert f"{path}: holds the value -1, at row 1 and column 0, " in complaint_about(path)


def test_a_label_file_has_the_size_of_its_image(tmp_path):
    path = write(tmp_path / "a.png", [[0, 1, 2], [3, 0, 1]])
    assert read_label(path, 3, (2, 3)).shape == (2, 3)
    assert complaint_about(path, size=(3, 2)) == f"{path}: is 2 x 3 pixels, and its image is 3 x 2 pixels"
    assert complaint_about(path, size=(2, 4)) == f"{path}: is 2 x 3 pixels, and its image is 2 x 4 pixels"


# --- files that are none ----------------------------------------------------------------------------------------------


def test_a_damaged_png_is_named(tmp_path):
    path = write(tmp_path / "a.png", np.random.default_rng(0).integers(0, 4, (50, 60)))
    content = path.read_bytes()
    path.write_bytes(content[:len(content) // 2])
    with pytest.raises(UnreadableFileError, match=f"^cannot read {path}: "):
        read_label(path, 3)


def test_what_is_no_image_and_what_is_not_there(tmp_path):
    (tmp_path / "a.png").write_text("no image")
    with pytest.raises(UnreadableFileError, match=f"^cannot read {tmp_path}/a.png: not an image$"):
        read_label(tmp_path / "a.png", 3)
    with pytest.raises(UnreadableFileError, match=f"^cannot read {tmp_path}/b.png: .*No such file"):
        read_label(tmp_path / "b.png", 3)


# --- what is written --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_classes", [2, 254, 255])
def test_what_is_written_is_read(tmp_path, num_classes):
    """Every class, and what is not labelled; in a file that shows the colours of the palette."""
    labels = np.append(np.arange(num_classes), IGNORE).astype(np.uint8)[None].repeat(2, 0)
    image = write_label(labels)
    image.save(tmp_path / "a.png")
    assert np.array_equal(read_label(tmp_path / "a.png", num_classes, labels.shape), labels)
    with Image.open(tmp_path / "a.png") as image:
        assert image.mode == "P" and np.asarray(image)[0].tolist() == [*range(1, num_classes + 1), 0]
        colours = np.asarray(image.convert("RGB"))[0]
    assert np.array_equal(colours, palette()[[*range(1, num_classes + 1), 0]])


def test_an_overlay_by_hand(monkeypatch):
    """Class 0 is (128, 0, 0) and class 1 is (0, 128, 0); what is not labelled stays."""
    colours = np.zeros((256, 3), np.uint8)
    colours[1], colours[2], colours[255] = (128, 0, 0), (0, 128, 0), (224, 224, 192)
    monkeypatch.setattr(labels_module, "palette", lambda: colours)
    image = np.array([[[100, 200, 50], [10, 20, 30], [0, 101, 255]]], np.uint8)
    labels = np.array([[0, IGNORE, 1]], np.uint8)
    assert overlay(image, labels).tolist() == [[[114, 100, 25], [10, 20, 30], [0, 114, 128]]]
    assert overlay(image, labels, 0.25).tolist() == [[[107, 150, 38], [10, 20, 30], [0, 108, 191]]]
    assert overlay(image, labels, 1.0).tolist() == [[[128, 0, 0], [10, 20, 30], [0, 128, 0]]]
    image = np.zeros((1, 2, 3), np.uint8)
    assert overlay(image, np.array([[254, 255]], np.uint8), 1.0).tolist() == [[[224, 224, 192], [0, 0, 0]]]


@pytest.mark.parametrize("bits", [2, 4])
def test_greys_of_few_bits_are_not_spread(tmp_path, bits):
    """Pillow reads the value 1 of a PNG of 4 bits as 17."""
    values = np.array([[0, 1, 2], [3, 1, 0]], np.uint8)
    rows = [sum(int(v) << (8 - bits * (i + 1)) for i, v in enumerate(row)) for row in values] if bits == 2 else None
    packed = (
        b"".join(b"\0" + bytes([row]) for row in rows) if rows
        else b"".join(b"\0" + bytes([row[0] << 4 | row[1], row[2] << 4]) for row in values.tolist())
    )

    def chunk(kind, data):
        return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")

    header = (3).to_bytes(4, "big") + (2).to_bytes(4, "big") + bytes([bits, 0, 0, 0, 0])
    path = tmp_path / "label.png"
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(packed))
                     + chunk(b"IEND", b""))
    assert read_label(path, 3).tolist() == [[IGNORE, 0, 1], [2, 0, IGNORE]]
