"""`benchmark.py data`: what is measured is what it says, and what follows from it."""
import io
import json

import pytest
import torch
from PIL import Image

from helpers.photos import write_photos
from scripts import benchmark
from scripts.bench import loader


@pytest.fixture(autouse=True)
def threads():
    """`data` works with one thread; the tests after it get as many as before."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.slow
def test_data(tmp_path, capsys):
    folder = write_photos(tmp_path / "photos", train=6, val=1)
    benchmark.main(["data", "--data_path", str(folder), "--images", "4", "--rounds", "3", "--rate", "nano=1e6",
                    "--output", str(tmp_path / "out")])
    out = capsys.readouterr().out
    (path,) = (tmp_path / "out").glob("*.json")
    record = json.loads(path.read_text())
    assert record["machine"]["threads"] == 1 and record["photos"]["images"] == 4
    assert record["photos"]["originals"] == dict(JPEG=0), "the photographs are PNG files"
    rows = {row["contender"]: row for row in record["results"] if "failed" not in row}
    assert rows["decode, PIL, JPEG"]["ratio"] == 1
    for name in (*loader.transforms(), "the loader, training, 1 worker", "seeding alone"):
        row = rows[f"pipeline, {name}, JPEG"]
        assert row["images_per_second"] == pytest.approx(1e3 * row["images"] / row["milliseconds"], rel=0.01)
        assert f"| {name} |" in out
    (needed,) = record["cores"]
    assert (needed["cores"] - 1) * needed["per_core"] < needed["rate"] == 1e6 <= needed["cores"] * needed["per_core"]
    assert "| nano | " in out


def test_synthetic_images_depend_on_the_seed_alone():
    files, about = loader.read_files(None, 2)
    assert files == loader.synthetic(2) and files[0] != files[1]
    assert about["originals"] == dict(JPEG=2) and about["mean_megapixels"] == 0.1875
    with Image.open(io.BytesIO(files[0])) as image:
        assert image.format == "JPEG" and image.size == (500, 375)


def test_mistakes(tmp_path, capsys):
    for arguments in (["--images", "0"], ["--rounds", "1"], ["--rate", "m=fast"], ["--rate", "m=-1"]):
        with pytest.raises(SystemExit):
            benchmark.parse(["data", *arguments])
        assert arguments[0] in capsys.readouterr().err
    with pytest.raises(SystemExit, match="nowhere does not exist"):
        benchmark.main(["data", "--data_path", str(tmp_path / "nowhere")])
