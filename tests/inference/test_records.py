"""Signatures of label maps, manifests and tables of statistics."""

import csv
import hashlib
import json
import os
import re
from concurrent.futures import ThreadPoolExecutor

import nibabel
import numpy as np
import pytest
from conftest import (
    RAS_AFFINE,
    errors_of,
    metadata_of,
    names_in,
    save_nifti,
    stored,
    trained_looking_network,
    with_header,
)
from PIL import Image

import inference
from inference.files import printable, spreadsheet_text
from inference.labels import LABEL_NAMES
from inference.network.weights import save_weights
from inference.records.manifest import Manifest
from inference.records.provenance import format_signature
from inference.records.statistics import StatisticsTable, label_statistics
from inference.service import Service
from inference.volume import read_volume


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_long_or_strange_name_of_weights_fits():
    for name in ("w" * 300, "Gewichte für 腹部" * 9, "a b\n\0c"):
        text = format_signature(name, "0123456789abcdef" * 4)
        assert len(text) <= 79 and text.isascii() and text.isprintable()
        assert text.endswith(" sha256:0123456789abcdef")
    assert len(format_signature("w" * 300, "0" * 64)) == 79
    assert re.fullmatch(r"abdoseg \d+\.\d+\.\d+", format_signature())


def test_a_manifest_has_what_made_each_label_map(folders, run, cts, tmp_path, weights_file):
    (path,), bad, log = cts("a"), folders[0] / "b_0000.nii.gz", tmp_path / "m.jsonl"
    bad.write_bytes(path.read_bytes()[:-9])
    assert run("--quiet", "--manifest", log) == 1
    by_case = {line["case"]: line for line in lines_of(log)}
    line = by_case["a"]
    assert (line["status"], line["reason"], line["input"]) == ("done", None, str(path))
    assert (line["bytes"], line["sha256"]) == (path.stat().st_size, sha256(path))
    grid = line["shape"], line["spacing_mm"], line["orientation"]
    assert grid == ([40, 33, 21], [1.5, 1.25, 4.0], "RAS")
    assert (line["weights"], line["weights_sha256"]) == ("random.safetensors", sha256(weights_file))
    assert line["device"] == "cpu" and line["precision"] in ("float32", "bfloat16")
    assert line["versions"]["abdoseg"] == inference.__version__
    assert line["versions"]["torch"] and line["versions"]["python"]
    assert list(line["seconds"]) == ["read", "percentiles", "predict", "components", "write"]
    label_map = stored(folders[1] / "a.nii.gz")
    assert list(line["volumes_ml"]) == list(LABEL_NAMES[1:])
    for number, name in enumerate(LABEL_NAMES[1:], 1):
        volume = (label_map == number).sum() * 1.5 * 1.25 * 4e-3
        assert line["volumes_ml"][name] == pytest.approx(volume, abs=1e-3)
    header = nibabel.load(folders[1] / "a.nii.gz").header
    signature = f"abdoseg {inference.__version__} random sha256:{sha256(weights_file)[:16]}"
    assert line["made_by"] == header["descrip"].item().decode() == signature
    line = by_case["b"]
    assert line["status"] == "failed" and line["reason"]
    assert (line["bytes"], line["sha256"]) == (bad.stat().st_size, sha256(bad))
    assert line["volumes_ml"] is None and line["device"] is None
    assert names_in(folders[1]) == ["a.nii.gz"]


@pytest.mark.slow
def test_doubts_about_the_header_are_in_the_manifest(folders, run, ct, tmp_path):
    log = tmp_path / "m.jsonl"
    with_header(folders[0] / "a_0000.nii", ct, codes=(0, 0))
    with_header(folders[0] / "b_0000.nii", ct, pixdim=[1, 1, 1, 1, 0, 0, 0, 0])
    with_header(folders[0] / "c_0000.nii", ct)
    assert run("--quiet", "--manifest", log) == 0
    lines = {line["case"]: line for line in lines_of(log)}
    assert [len(lines[name]["warnings"]) for name in "abc"] == [1, 1, 0]
    assert "LAS" in lines["a"]["warnings"][0] and lines["a"]["orientation"] == "LAS"
    assert all(size in lines["b"]["warnings"][0] for size in ("1.5x1.25x4 mm", "1x1x1 mm"))


@pytest.mark.slow
def test_statistics_flags_preview_and_reduction_are_the_affines(folders, run, ct, tmp_path):
    """A leaning file whose `pixdim` is 1 mm has the numbers, slices and pictures of a plain one."""
    network = trained_looking_network()
    weights, log, table = (tmp_path / name for name in ("w.safetensors", "m.jsonl", "t.csv"))
    save_weights(weights, network.state_dict(), metadata_of(network, matrix_reduction=4))
    lean = RAS_AFFINE.copy()
    lean[1, 2] = 4 * np.tan(np.radians(18))
    with_header(folders[0] / "a_0000.nii", ct)
    odd = [1, 0.1, 0.1, 0.1, 0, 0, 0, 0]
    with_header(folders[0] / "b_0000.nii", ct, lean, codes=(1, 0), pixdim=odd)
    records = ["--manifest", log, "--statistics", table, "--preview", "--quiet"]
    assert run("--weights", weights, *records) == 0
    plain, leaning = (stored(folders[1] / f"{name}.nii.gz") for name in "ab")
    assert np.array_equal(plain, leaning)
    a, b = sorted(lines_of(log), key=lambda line: line["case"])
    assert a["volumes_ml"] == b["volumes_ml"] and a["flags"] == b["flags"]
    assert a["spacing_mm"] == b["spacing_mm"] == [1.5, 1.25, 4.0]
    rows = [row[1:] for row in table.read_text().splitlines()[1:]]
    assert rows[:14] == rows[14:]
    sizes = [Image.open(folders[1] / f"{name}.png").size for name in "ab"]
    assert sizes[0] == sizes[1]


@pytest.mark.parametrize("before", [[], ["a"], ["a", "b"]])
@pytest.mark.parametrize(
    "torn", [b'{"cas', b'{"case": "a", "status', b'{"case": "\xff', b'{"a": 1}']
)
def test_a_torn_last_line_is_removed(tmp_path, before, torn):
    path, long = tmp_path / "m.jsonl", {"case": "c", "reason": "x" * 200_000}
    start = b"".join(b'{"case": "%s"}\n' % name.encode() for name in before)
    path.write_bytes(start + (torn if start or torn[:5] == b'{"cas' else b""))
    Manifest(path).add(long)
    assert lines_of(path) == [*({"case": name} for name in before), long]


@pytest.mark.parametrize(
    ("option", "content"),
    [
        ("--manifest", b"my notes, without an end"),
        ("--manifest", b'{"name": 1}\n'),
        ("--statistics", b"name,age\nx,3\n"),
    ],
)
def test_another_file_is_not_added_to(run, cts, tmp_path, capsys, option, content):
    cts("a")
    other = tmp_path / "other.csv"
    other.write_bytes(content)
    assert run(option, other, "--keep-existing", "--quiet") == 2
    assert option in errors_of(capsys)[0]
    assert other.read_bytes() == content


def test_lines_of_many_writers_are_whole(tmp_path):
    path = tmp_path / "m.jsonl"

    def write(writer):
        manifest = Manifest(path)
        for number in range(25):
            manifest.add({"case": f"{writer}-{number}", "reason": str(writer) * 5000})

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(write, range(4)))
    lines = lines_of(path)
    assert len({line["case"] for line in lines}) == len(lines) == 100


def test_a_manifest_on_a_full_disk_costs_no_case(folders, run, cts, tmp_path, monkeypatch, capsys):
    cts("a")

    def full(self, line):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Manifest, "add", full)
    assert run("--manifest", tmp_path / "m.jsonl") == 1
    assert capsys.readouterr().err.count("m.jsonl: No space left on device") == 1
    assert (folders[1] / "a.nii.gz").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("ending", ["csv", "json"])
def test_rows_are_the_manifests(run, cts, tmp_path, every_label, monkeypatch, ending):
    """A lost or stale row is made of the record alone, with the flags of removed pieces."""
    cts("a")
    log, table = tmp_path / "m.jsonl", tmp_path / f"t.{ending}"
    records = ("--quiet", "--keep-existing", "--manifest", log, "--statistics", table)
    assert run(*records) == 0
    rows = table.read_text()
    assert "pieces" in rows  # stripes of labels that come twice
    cts("b")
    assert run(*records) == 0
    with table.open(newline="") as file:
        found = json.load(file) if ending == "json" else list(csv.DictReader(file))
    assert [row["case"] for row in found] == ["a"] * 14 + ["b"] * 14
    rows = table.read_text()
    monkeypatch.setattr(Service, "segment", lambda *_: pytest.fail("segmented again"))
    for change in (table.unlink, lambda: table.write_text(rows.replace("pieces", "small"))):
        change()
        assert run(*records) == 0
        assert table.read_text() == rows


def test_tables_hold_no_nan_and_no_formula(tmp_path):
    path = save_nifti(tmp_path / "a.nii", np.full((4, 4, 4), np.nan, np.float32))
    record = {"case": "=1+2", "flags": []}
    record |= label_statistics(np.ones((4, 4, 4), np.uint8), read_volume(path))
    for ending in ("csv", "json"):
        StatisticsTable(tmp_path / f"t.{ending}").add(record)
        table = StatisticsTable(tmp_path / f"t.{ending}")
        table.add(record)
        table.write()
    with (tmp_path / "t.csv").open(newline="") as file:
        assert next(csv.DictReader(file))["case"] == "'=1+2"
    rows = json.loads((tmp_path / "t.json").read_text(), parse_constant=pytest.fail)
    assert rows[0]["mean_hu"] is None


@pytest.mark.parametrize("name", ["a\nb", "a\x1b[2Jb", "a\rb", os.fsdecode(b"a\xffb")])
def test_names_reach_a_terminal_as_one_harmless_line(folders, run, cts, name, capsys):
    cts(name)
    (folders[0] / f"{name}x.nii.gz").write_text("no volume")
    assert run() == 1
    captured = capsys.readouterr()
    text = captured.out + captured.err
    assert all(character.isprintable() or character == "\n" for character in text)
    assert sum(line.startswith("error: ") for line in captured.err.splitlines()) == 1
    assert (folders[1] / f"{name}.nii.gz").is_file()


def test_shown_names():
    assert printable("a\tb\x07") == "a\\tb\\x07"
    assert printable("Äpfel 腹") == "Äpfel 腹"
    for text in ("=a", "+a", "-a", "@a"):
        assert spreadsheet_text(text) == f"'{text}"
    assert spreadsheet_text("case-1") == "case-1"
