"""scripts/bench/loader.py and `benchmark.py data`: what is measured is what it says, and what follows from it."""
import io
import json

import numpy as np
import pytest
import torch
from PIL import Image

from helpers.photos import write_photos
from scripts import benchmark
from scripts.bench import loader, tables


def test_data(tmp_path, capsys):
    folder = write_photos(tmp_path / "photos", train=6, val=1)
    benchmark.main(["data", "--data_path", str(folder), "--images", "4", "--rounds", "3", "--rate", "nano=1e6",
                    "--output", str(tmp_path / "out")])
    out = capsys.readouterr().out
    (path,) = (tmp_path / "out").glob("*.json")
    record = json.loads(path.read_text())
    assert record["machine"]["threads"] == 1 and record["photos"]["images"] == 4
    assert record["photos"]["originals"] == dict(JPEG=0, WEBP=0, PNG=4)
    rows = {row["contender"]: row for row in record["results"] if "failed" not in row}
    for format in loader.FORMATS:
        reference = rows[f"decode, PIL, {format}"]
        assert reference["equal"] == 4 and reference["ratio"] == 1
    for name in (*loader.transforms(), "the loader, training, 1 worker", "seeding alone"):
        row = rows[f"pipeline, {name}, JPEG"]
        assert row["images_per_second"] == pytest.approx(1e3 * row["images"] / row["milliseconds"], rel=0.01)
        assert f"| {name} |" in out
    (needed,) = record["cores"]
    assert (needed["cores"] - 1) * needed["per_core"] < needed["rate"] == 1e6 <= needed["cores"] * needed["per_core"]
    assert "| nano | " in out


@pytest.fixture
def threads():
    """`data` works with one thread; the tests after it go on with as many as before."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


# torchvision warns that these decoders will move to TorchCodec
pytestmark = [pytest.mark.usefixtures("threads"), pytest.mark.filterwarnings("ignore::DeprecationWarning:torchvision")]


def test_other_pixels_and_another_size_are_noticed():
    files = [loader._encode(Image.fromarray(np.full((8, 9, 3), value, np.uint8)), "PNG") for value in (10, 250)]

    def brighter(content):
        return Image.open(io.BytesIO(content)).point(lambda value: min(value + 7, 255))

    assert loader.compare(files, loader.by_pil) == dict(equal=2, largest_difference=0)
    assert loader.compare(files, brighter) == dict(equal=0, largest_difference=7)
    assert loader.compare(files, lambda content: torch.zeros(3, 8, 8)) == dict(equal=0, largest_difference=None)
    row = dict(kind="decode", name="x", format="PNG", images=2, images_per_second=1.0, quartiles=[1, 1])
    assert "0 of 2; up to 7 |" in tables.decoders_table([dict(row, **loader.compare(files, brighter))])


def test_synthetic_images_are_those_of_their_seed():
    one, again = loader.synthetic(2), loader.synthetic(2)
    assert one == again and one[0] != one[1]
    with Image.open(io.BytesIO(one[0])) as image:
        assert image.format == "JPEG" and image.size == (500, 375)


def test_rates_come_from_the_newest_record_of_a_gpu(tmp_path):
    row = dict(model="m", mode="train", batch=8, images_per_second=9.0)
    record = dict(machine=dict(date="2026-01-02 00:00"), settings=dict(device="cuda"), results=[row])
    inner = dict(machine=dict(date="2026-01-03 00:00"), settings=dict(device="cuda:0"),
                 sections=dict(models=dict(rows=[dict(row, images_per_second=5.0), dict(row, mode="infer")])))
    cpu = dict(machine=dict(date="2026-01-04 00:00"), settings=dict(device="cpu"), results=[row])
    assert loader.recorded_rates(tmp_path) == {}
    for name, content, rates in (("a", record, {"m, batch 8": 9.0}), ("b", cpu, {"m, batch 8": 9.0}),
                                 ("c", inner, {"m, batch 8": 5.0})):
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
        assert loader.recorded_rates(tmp_path) == rates


def test_mistakes(tmp_path, capsys):
    for arguments in (["--images", "0"], ["--rounds", "1"], ["--rate", "m=fast"], ["--rate", "m=-1"]):
        with pytest.raises(SystemExit):
            benchmark.parse(["data", *arguments])
        assert arguments[0] in capsys.readouterr().err
    with pytest.raises(SystemExit, match="nowhere does not exist"):
        benchmark.main(["data", "--data_path", str(tmp_path / "nowhere")])
