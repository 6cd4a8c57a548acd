import json

import pytest
import torch

triton = pytest.importorskip("triton")

from ops import RegionGrid  # noqa: E402
from ops.impl.triton import op  # noqa: E402
from ops.impl.triton.tuning import Tile  # noqa: E402
from scripts import tune_kernels  # noqa: E402

SMALL = "28 x 28, top-4"


@pytest.fixture
def small(monkeypatch):
    """A small map in place of a stage, and two tiles beside the chosen one."""
    monkeypatch.setitem(tune_kernels.MAPS, SMALL, (RegionGrid.fit(4, 4, 2), 2))
    monkeypatch.setattr(tune_kernels, "neighbours", lambda tile: [tile._replace(block_n=n) for n in (32, 64)])
    sizes = ["--map", SMALL, "--batch_size", "1", "--heads", "1", "--head_dim", "16", "--dtype", "fp32"]
    return [*sizes, "--device", "cpu", "--jobs", "0", "--rounds", "2"]


def test_neighbours_differ_in_few_settings():
    tile = Tile(16, 64, 1, 2)
    neighbours = tune_kernels.neighbours(tile)
    assert {Tile(32, 64, 1, 2), Tile(32, 64, 2, 2), Tile(16, 64, 1, 3), Tile(16, 32, 1, 1)} <= set(neighbours)
    assert tile not in neighbours and len(neighbours) == len(set(neighbours)) <= 24
    assert all(16 <= other.block_m <= 128 and 16 <= other.block_n <= 128 for other in neighbours)


def test_tiles_of_one_pass_hold_the_whole_map():
    tiles = tune_kernels.neighbours(Tile(256, 16, 4, 1))
    assert Tile(256, 64, 8, 1) in tiles and Tile(256, 16, 4, 1) not in tiles and {t.block_m for t in tiles} == {256}


def test_one_pass_is_timed_where_it_can_run(small, tmp_path):
    path = tmp_path / "tiles.json"
    tune_kernels.main([*small, "--dtype", "fp16", "--kernel", "one pass", "--output", str(path)])
    (row,) = json.loads(path.read_text())["rows"]  # not by list
    assert row["kernel"] == "one pass" and not row["failed"] and len(row["tiles"]) == 2


def test_every_kernel_is_timed_alone_with_every_tile(small, tmp_path, capsys, monkeypatch):
    launched = []
    for name in ("launch_forward", "launch_query_gradient", "launch_key_value_gradient"):
        launch = getattr(op, name)

        def noted(*args, name=name, launch=launch, tile=None, **kwargs):
            launched.append((name, tile))
            return launch(*args, tile=tile, **kwargs)

        monkeypatch.setattr(op, name, noted)
    tune_kernels.main([*small, "--output", str(tmp_path / "tiles.json")])
    record = json.loads((tmp_path / "tiles.json").read_text())
    assert record["triton"] == triton.__version__ and record["torch"] == torch.__version__
    assert [row["kernel"] for row in record["rows"]] == ["forward", "queries", "keys"] * 2
    assert [row["way"].count("chosen") for row in record["rows"]] == [1] * 3 + [0] * 3
    for row in record["rows"]:
        assert not row["failed"] and row["rounds"] == 2
        assert len(row["tiles"]) == 3 and tune_kernels.AGAIN in row["tiles"]
    assert len({tile for _, tile in launched}) >= 3 and len({name for name, _ in launched}) == 3
    assert capsys.readouterr().out.count("x as fast") == 6 * 3


def test_a_tile_that_computes_something_else_is_not_timed(small, capsys, monkeypatch):
    launch = op.launch_forward

    def wrong(problem, out, lse, tile=None):
        launch(problem, out, lse, tile)
        if tile is not None and tile.block_n == 64:
            out[0, 0, 0] += 1

    monkeypatch.setattr(op, "launch_forward", wrong)
    tune_kernels.main([*small, "--kernel", "forward"])
    out = capsys.readouterr().out
    assert out.count("wrong: off by 1") == 2 and out.count("x as fast") == 2 * 2


def test_what_the_budget_does_not_allow_is_left_out(small, capsys):
    tune_kernels.main([*small, "--budget", "0"])
    assert capsys.readouterr().out.count("left out for lack of time") == 2 * 3
