"""Tables and lines: what cannot be written, what is not added to, names as harmless text."""

import csv
import json
import os

import numpy as np
import pytest
from conftest import save_nifti

from inference.files import printable, spreadsheet_text
from inference.records.statistics import StatisticsTable, label_statistics
from inference.service import Service
from inference.volume import read_volume


def test_a_table_that_cannot_be_written_is_told_at_once(folders, run, ct, monkeypatch, capsys):
    save_nifti(folders[0] / "a_0000.nii.gz", ct)
    monkeypatch.setattr(Service, "run", lambda *_: pytest.fail("cases were begun"))
    assert run("--statistics", str(folders[0] / "nowhere" / "table.csv")) == 2
    assert "--statistics" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("ending", ["csv", "json"])
def test_keeping_label_maps_keeps_their_rows(folders, run, ct, tmp_path, ending):
    table = tmp_path / f"table.{ending}"
    save_nifti(folders[0] / "a_0000.nii.gz", ct)
    options = ("--statistics", str(table), "--quiet", "--keep-existing")
    assert run(*options) == 0
    first = table.read_text()
    assert run(*options) == 0
    assert table.read_text() == first
    save_nifti(folders[0] / "b_0000.nii.gz", ct)
    assert run(*options) == 0
    with table.open(newline="") as file:
        rows = json.load(file) if ending == "json" else list(csv.DictReader(file))
    assert [row["case"] for row in rows] == ["a"] * 14 + ["b"] * 14


def test_a_foreign_table_is_not_added_to(folders, run, ct, tmp_path, capsys):
    save_nifti(folders[0] / "a_0000.nii.gz", ct)
    table = tmp_path / "table.csv"
    table.write_text("name,age\nx,3\n")
    assert run("--statistics", str(table), "--keep-existing") == 2
    assert "not a table of label statistics" in capsys.readouterr().err
    assert table.read_text() == "name,age\nx,3\n"


def test_tables_hold_no_nan_and_no_formula(tmp_path):
    path = save_nifti(tmp_path / "a.nii", np.full((4, 4, 4), np.nan, np.float32))
    volume = read_volume(path)
    record = {"case": "=1+2", "flags": []}
    record |= label_statistics(np.ones((4, 4, 4), np.uint8), volume)
    for ending in ("csv", "json"):
        table = StatisticsTable(tmp_path / f"t.{ending}")
        table.add(record)
        table.write()
    with (tmp_path / "t.csv").open(newline="") as file:
        assert next(csv.DictReader(file))["case"] == "'=1+2"

    def refuse(name):
        raise AssertionError(name)

    rows = json.loads((tmp_path / "t.json").read_text(), parse_constant=refuse)
    assert rows[0]["mean_hu"] is None


@pytest.mark.parametrize("name", ["a\nb", "a\x1b[2Jb", "a\rb", os.fsdecode(b"a\xffb")])
def test_names_reach_a_terminal_as_one_harmless_line(folders, run, ct, name, capsys):
    save_nifti(folders[0] / f"{name}_0000.nii.gz", ct)
    (folders[0] / f"{name}x.nii.gz").write_text("no volume")
    assert run() == 1
    captured = capsys.readouterr()
    text = captured.out + captured.err
    assert all(character.isprintable() or character == "\n" for character in text)
    assert len(errors_of_text(captured.err)) == 1
    assert (folders[1] / f"{name}.nii.gz").is_file()


def errors_of_text(text):
    return [line for line in text.splitlines() if line.startswith("error: ")]


def test_shown_names():
    assert printable("a\tb\x07") == "a\\tb\\x07"
    assert printable("Äpfel 腹") == "Äpfel 腹"
    for text in ("=a", "+a", "-a", "@a"):
        assert spreadsheet_text(text) == f"'{text}"
    assert spreadsheet_text("case-1") == "case-1"
