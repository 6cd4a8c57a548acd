import pytest

triton = pytest.importorskip("triton")

from ops import RegionGrid  # noqa: E402
from ops.impl.triton import op  # noqa: E402
from ops.impl.triton.tuning import Tile, make_plan  # noqa: E402
from scripts import tune_kernels  # noqa: E402


def test_neighbours_differ_in_one_setting():
    tile = Tile(16, 64, 1, 2)
    neighbours = tune_kernels.neighbours(tile)
    assert Tile(32, 64, 1, 2) in neighbours and Tile(16, 64, 1, 3) in neighbours
    assert Tile(8, 64, 1, 2) not in neighbours, "the matrix units take 16 tokens at least"
    assert all(sum(a != b for a, b in zip(tile, other, strict=True)) == 1 for other in neighbours)


def test_every_pass_is_timed_with_every_tile(monkeypatch, capsys):
    """The timing itself needs a GPU: here each pass runs once in the interpreter, and says which tiles it was given."""
    tiles = []

    def run_once(run, **_):
        monkeypatch.setattr(op, "_launch", lambda kernel, plan, *args, **sizes: tiles.append(plan.tile))
        run()
        return [1.0, 2.0, 3.0]

    monkeypatch.setattr(triton.testing, "do_bench", run_once)
    monkeypatch.setattr(op, "_launch", lambda *args, **sizes: None)
    monkeypatch.setattr(tune_kernels, "DEVICE", "cpu")
    monkeypatch.setitem(tune_kernels.MAPS, "28 x 28, top-4", (RegionGrid.fit(8, 8, 2), 2))
    tune_kernels.main(["--map", "28 x 28, top-4", "--batch_size", "1", "--heads", "1"])
    out = capsys.readouterr().out
    assert out.count("2.0000 ms (1.0000 to 3.0000)") == 2 * 3 and out.count("1.00 x as fast") >= 2 * 3 * 5
    assert {tile.num_stages for tile in tiles} == {1, 2, 3} and op.make_plan is make_plan
