"""The benchmark of what `auto` chooses, on shapes so small that it takes a moment."""
import itertools
import json
import time
from dataclasses import replace

import pytest
import torch

from ops import IMPLS
from scripts import benchmark
from scripts.bench import choice
from scripts.bench.attention import BACKWARD, DENSE, FORWARD, REFERENCE, AttentionCase
from scripts.bench.timing import Trial

CPU = torch.device("cpu")


def shape(side, regions, topk, mode=FORWARD):
    return AttentionCase("grid", 1, side, side, 1, regions, topk, mode, choice.CONTENDERS, 8, torch.float32)


@pytest.fixture(autouse=True)
def fast(monkeypatch):
    monkeypatch.setattr(choice, "SECONDS_OF_SHAPE", 0.0)


def test_shapes_are_the_same_every_time_and_of_the_grid():
    def some(mode):
        return list(itertools.islice(choice.shapes(torch.float32, mode), 40))

    assert some(FORWARD) == some(FORWARD)
    assert len({case.describe() for case in some(FORWARD)}) > 20
    for case in some(BACKWARD):
        assert 1 <= case.topk <= case.grid.num_regions
        assert 14 * case.batch * case.heads * case.height**4 * 32 <= choice.MOST_OPERATIONS


@pytest.mark.parametrize("mode", [FORWARD, BACKWARD])
def test_a_row_says_what_was_chosen_and_what_would_be_faster(mode):
    row = choice.measure_shape(shape(12, 4, 3, mode), CPU)
    assert set(row["milliseconds"]) == {*IMPLS, DENSE} - {"triton"} and row["auto"] in IMPLS
    milliseconds = row["milliseconds"]
    assert row["best"] == min({*IMPLS} - {"triton"}, key=milliseconds.get)
    for reference in ("best", DENSE, REFERENCE):
        of = row["best"] if reference == "best" else reference
        assert row[f"of_{reference}"] == pytest.approx(milliseconds[row["auto"]] / milliseconds[of])


def test_threads_are_set_back(monkeypatch):
    monkeypatch.setattr(choice, "shapes", lambda dtype, mode: iter([shape(4, 2, 1)] * 3))
    before = torch.get_num_threads()
    rows = choice.measure(before + 1, torch.float32, FORWARD, Trial(CPU, 3, 3, deadline=time.time() + 60))
    assert [row["threads"] for row in rows] == [before + 1] * 3 and torch.get_num_threads() == before


def test_summary():
    def row(ratio, threads=1):
        return dict(threads=threads, dtype="float32", mode=FORWARD, of_best=ratio, of_dense=2 * ratio, of_gather=0.5)

    best, dense, gather, other, *_ = choice.summary([row(1.0), row(1.04), row(1.3), row(1.0, threads=2)])
    assert (best["shapes"], best["median"], best["worst"]) == (3, 1.04, 1.3)
    assert best["slower"] == pytest.approx(1 / 3) and dense["slower"] == 1 and gather["slower"] == 0
    assert other["threads"] == 2 and other["decile"] == 1.0


@pytest.mark.long
def test_command(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(choice, "shapes", lambda dtype, mode: iter([
        replace(shape(4, 2, 1, mode), dtype=dtype), replace(shape(6, 3, 2, mode), dtype=dtype),
    ]))
    benchmark.main(["choice", "--budget", "60", "--output", str(tmp_path)])
    (path,) = tmp_path.glob("*choice*.json")
    record = json.loads(path.read_text())
    assert len(record["shapes"]) == 2 * len(choice.KINDS) and len(record["results"]) == 3 * len(choice.KINDS)
    assert "| threads | dtype | mode | reference | shapes | slower |" in capsys.readouterr().out
