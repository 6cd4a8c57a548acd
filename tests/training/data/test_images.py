"""Image files of every mode and format, upright, and what is said of those that cannot be read."""
import io
import resource
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from helpers import ROOT
from helpers.photos import noise, photograph
from training.data.images import UnreadableImageError, load_image

# --- images of every mode ---------------------------------------------------------------------------------------------


def rgb(image, format="PNG", **settings):
    file = io.BytesIO()
    image.save(file, format, **settings)
    file.seek(0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = load_image(file)
    assert loaded.mode == "RGB"
    return np.array(loaded)


def test_rgb_and_rgba_keep_their_colours():
    colours = noise()
    alpha = noise(seed=1)[..., :1]
    assert np.array_equal(rgb(Image.fromarray(colours)), colours)
    assert np.array_equal(rgb(Image.fromarray(np.concatenate([colours, alpha], 2))), colours)


@pytest.mark.parametrize("mode", ["L", "LA", "1"])
def test_grey_fills_three_channels(mode):
    grey = np.where(noise()[..., 0] > 127, 255, 0).astype(np.uint8) if mode == "1" else noise()[..., 0]
    loaded = rgb(Image.fromarray(grey).convert(mode))
    assert all(np.array_equal(loaded[..., channel], grey) for channel in range(3))


@pytest.mark.parametrize("transparency", [None, 1, b"\x00\x80\xff"])
def test_palette(transparency):
    palette = np.array([[10, 20, 30], [250, 0, 1], [7, 70, 170]], np.uint8)
    indices = noise()[..., 0] % 3
    image = Image.fromarray(indices).convert("P")
    image.putpalette(palette.tobytes())
    image.putdata(indices.flatten().tolist())
    settings = {} if transparency is None else {"transparency": transparency}
    assert np.array_equal(rgb(image, **settings), palette[indices])


def test_cmyk():
    cmyk = np.array([[[0, 0, 0, 0], [255, 0, 0, 0], [0, 0, 0, 255], [0, 255, 255, 0]]], np.uint8)
    loaded = rgb(Image.frombytes("CMYK", (4, 1), cmyk.tobytes()), "TIFF")
    assert loaded.tolist() == [[[255, 255, 255], [0, 255, 255], [0, 0, 0], [255, 0, 0]]]


@pytest.mark.parametrize("mode, format", [("I;16", "PNG"), ("I;16", "TIFF"), ("I;16B", "TIFF"), ("I", "TIFF")])
def test_16_bits_are_scaled_not_clipped(mode, format):
    eight = np.arange(256, dtype=np.uint16)
    values = eight[None] * 257
    dtype = {"I;16": "<u2", "I;16B": ">u2", "I": "<i4"}[mode]
    image = Image.frombytes(mode, (256, 1), values.astype(dtype).tobytes())
    assert np.array_equal(rgb(image, format)[0], np.stack([eight] * 3, 1))


def test_16_bit_rounding():
    values = np.array([[0, 128, 129, 65535 - 129, 65535 - 128, 65535]], "<u2")
    image = Image.frombytes("I;16", (6, 1), values.tobytes())
    assert rgb(image, "TIFF")[0, :, 0].tolist() == [0, 0, 1, 254, 255, 255]


@pytest.mark.parametrize("mode, values", [
    ("F", np.arange(256) / 255), ("F", np.arange(256)), ("I", np.arange(256)), ("I", np.arange(256) * 257),
    ("I;16", np.arange(256) * 257), ("I;16B", np.arange(256) * 257),
])
def test_a_ramp_is_a_ramp_whatever_its_type(mode, values):
    """Floats of 0 to 1 were black, 32-bit integers of 0 to 255 too; beyond 65535 all was white."""
    dtype = {"F": "<f4", "I": "<i4", "I;16": "<u2", "I;16B": ">u2"}[mode]
    image = Image.frombytes(mode, (256, 1), values.astype(dtype).tobytes())
    assert np.array_equal(rgb(image, "TIFF")[0], np.stack([np.arange(256)] * 3, 1))


@pytest.mark.parametrize("mode, values, complaint", [
    ("I", [0, 2**31 - 1], r"its values are 0 to 2.14748e\+09, and 32-bit integers are read where they are of 8 or 16 "),
    ("I", [-5, 200], "its values are -5 to 200, and 32-bit integers"),
    ("F", [0, 1.02], "its values are 0 to 1.02, and floats are read where they are 0 to 1 or 0 to 255; save it with 8"),
    ("F", [0, 65535], "its values are 0 to 65535, and floats"),
    ("F", [-0.5, 0.5], "its values are -0.5 to 0.5, and floats"),
    ("F", [0, float("nan")], "its values are nan to nan, and floats"),
])
def test_values_of_no_known_scale_are_refused(tmp_path, mode, values, complaint):
    path = tmp_path / "a.tif"
    Image.frombytes(mode, (2, 1), np.array(values, {"F": "<f4", "I": "<i4"}[mode]).tobytes()).save(path)
    with pytest.raises(UnreadableImageError, match=f"^cannot read {path}: {complaint}"):
        load_image(path)


# --- EXIF orientation -------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("ending", ["png", "webp", "tif"])
def test_a_photograph_is_read_upright(tmp_path, orientation, ending):
    path = tmp_path / f"a.{ending}"
    upright = photograph(path, orientation, **(dict(lossless=True) if ending == "webp" else {}))
    assert np.array_equal(np.array(load_image(path)), upright)


def test_a_jpeg_photograph_is_read_upright_or_as_it_is_stored(tmp_path):
    upright = photograph(tmp_path / "a.jpg", 6, quality=100)
    read, stored = (load_image(tmp_path / "a.jpg", exif_transpose=transpose) for transpose in (True, False))
    assert read.size == (32, 16) and stored.size == (16, 32)
    assert np.abs(np.array(read).astype(int) - upright).max() < 32
    assert np.array_equal(np.rot90(np.array(read)), np.array(stored))


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
@pytest.mark.parametrize("exif", [
    b"", b"Exif\0\0", b"Exif\0\0nonsense", b"Exif\0\0MM\0*\0\0\0\x08\0\x09\x01\x12", b"Exif\0\0II*\0\xff\xff\xff\xff",
    b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x63\0\0\0\0\0\0",
])
def test_damaged_exif_is_passed_over(tmp_path, exif):
    """No header, no content, a cut list of tags, a list beyond the end, an orientation of 99."""
    Image.fromarray(noise()).save(tmp_path / "plain.jpg")
    Image.fromarray(noise()).save(tmp_path / "a.jpg", exif=exif)
    assert np.array_equal(np.array(load_image(tmp_path / "a.jpg")), np.array(load_image(tmp_path / "plain.jpg")))


# --- files that cannot be read ----------------------------------------------------------------------------------------


def complaint_about(file):
    with pytest.raises(UnreadableImageError) as raised:
        load_image(file)
    return str(raised.value)


@pytest.mark.parametrize("name, format", [("x.heic", "HEIC"), ("x.HEIF", "HEIF"), ("x.jpg", "HEIC"), ("x", "AVIF")])
def test_a_photograph_of_a_format_that_pillow_cannot_read(tmp_path, monkeypatch, name, format):
    """As telephones save them, by their content: it was called no image."""
    brand = dict(HEIC=b"heic", HEIF=b"mif1", AVIF=b"avif")[format]
    content = b"\x00\x00\x00\x18ftyp" + brand + bytes(50)
    (tmp_path / name).write_bytes(content)
    if format == "AVIF" and ".avif" in Image.registered_extensions():
        assert complaint_about(tmp_path / name).endswith("/x: not an image"), "where Pillow reads others of it"
    monkeypatch.setattr("PIL.Image.ID", [kind for kind in Image.ID if kind != "AVIF"])
    monkeypatch.delitem(Image.EXTENSION, ".avif", raising=False)
    reason = f"{format} is a format that this Pillow does not read: convert it to JPEG"
    assert complaint_about(tmp_path / name) == f"cannot read {tmp_path}/{name}: {reason}"
    assert complaint_about(io.BytesIO(content)).endswith(f": {reason}"), "in a shard"


@pytest.mark.parametrize("content", [b"", b"<html>", b"\x00\x00\x00\x18ftypqt  " + bytes(50)])
def test_other_files_are_no_images_whatever_their_name(tmp_path, content):
    (tmp_path / "x.heic").write_bytes(content)
    assert complaint_about(tmp_path / "x.heic").endswith("/x.heic: not an image")


@pytest.mark.parametrize("kind", [str, Path])
def test_an_unreadable_file_is_named_by_its_whole_path(tmp_path, kind):
    (tmp_path / "0.jpg").write_text("no image")
    with pytest.raises(UnreadableImageError, match=f"^cannot read {tmp_path}/0.jpg: not an image$"):
        load_image(kind(tmp_path / "0.jpg"))


# --- what one image cannot help ---------------------------------------------------------------------------------------


def raises(error):
    def fail(*_, **__):
        raise error

    return fail


@pytest.mark.parametrize("where", ["PIL.Image.open", "PIL.ImageFile.ImageFile.load", "PIL.ImageOps.exif_transpose",
                                   "PIL.Image.Image.convert"])
@pytest.mark.parametrize("error", [MemoryError(), OSError("out of memory when reading image file"),
                                   OSError(12, "Cannot allocate memory")])
def test_memory_that_ran_out_makes_no_image_a_damaged_one(tmp_path, monkeypatch, where, error):
    photograph(tmp_path / "a.png", 6)
    monkeypatch.setattr(where, raises(error))
    with pytest.raises(MemoryError, match=f"^out of memory while reading {tmp_path}/a.png$"):
        load_image(tmp_path / "a.png")


def test_too_many_open_files_make_no_image_a_damaged_one(tmp_path, monkeypatch):
    path = tmp_path / "a.png"
    photograph(path, 1)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, limits[1]))
    try:
        with pytest.raises(OSError, match=f"Too many open files: '{path}'"):
            load_image(path)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_an_image_has_at_most_160_million_pixels(tmp_path):
    """As the largest cameras and satellites' tiles; decoded, one takes half a GB in every data loading process."""
    path = tmp_path / "a.png"
    Image.new("1", (16_001, 10_000)).save(path)
    told = complaint_about(path)
    assert told == f"cannot read {path}: it has more than 160 million pixels; make it smaller, or cut it up"


def test_pillow_does_not_warn_of_a_large_image_in_every_process(tmp_path):
    """Outside of pytest, which puts filters of its own before the module's."""
    path = tmp_path / "a.png"
    Image.new("1", (81_000, 1_000)).save(path)
    script = f"from training.data.images import load_image; print(load_image({str(path)!r}).size)"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("(81000, 1000)\n", "")
