"""Tables of predictions: what programs and spreadsheets read is what was written."""
import csv
from pathlib import Path

import pytest

from tasks.tables import as_cell, write_csv
from utils import UserError


@pytest.mark.parametrize("text", ["=1+1", "+1", "-1", "@SUM(A1)", "\t=1", "\r=1", "\n=1"])
def test_text_that_a_spreadsheet_would_compute_gets_an_apostrophe(text):
    assert as_cell(text) == f"'{text}" and as_cell(Path(text)) == f"'{text}"


def test_other_cells_stay_as_they_are():
    assert [as_cell(value) for value in ("a=b", "", -1, "0.5", Path("a/-b"))] == ["a=b", "", "-1", "0.5", "a/-b"]


def test_quotes_commas_line_breaks_and_bytes(tmp_path):
    row = ['a "b"', "c,d", "e\nf", "g\udcff"]
    write_csv(tmp_path / "t.csv", [["1", "2", "3", "4"], row])
    with open(tmp_path / "t.csv", newline="", encoding="utf-8") as file:
        assert list(csv.reader(file))[1] == [*row[:3], "g\\udcff"]


def test_rows_before_an_error_are_kept_and_a_table_without_any_replaces_nothing(tmp_path):
    def rows(count):
        yield from [["title"], *([str(i)] for i in range(count))]
        raise KeyboardInterrupt

    path = tmp_path / "t.csv"
    for count in (2, 0):
        with pytest.raises(KeyboardInterrupt):
            write_csv(path, rows(count))
        assert path.read_text() == "title\n0\n1\n" and list(tmp_path.iterdir()) == [path]


def test_a_disk_that_is_full_is_one_line(tmp_path, monkeypatch):
    def full(path, write):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tasks.tables.replace_file", full)
    with pytest.raises(UserError, match=r"^cannot write .*t\.csv: No space left on device$"):
        write_csv(tmp_path / "t.csv", [["title"]])
    with pytest.raises(UserError, match="it is a folder"):
        write_csv(tmp_path, [["title"]])
