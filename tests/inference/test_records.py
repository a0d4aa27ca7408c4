"""Signatures of label maps, manifests, tables, and when --keep-existing recomputes a case."""

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import nibabel
import numpy as np
import pytest
from conftest import RAS_AFFINE, metadata_of, save_nifti, trained_looking_network, with_header
from PIL import Image

import inference
from inference.command import main
from inference.labels import LABEL_NAMES
from inference.network.weights import save_weights
from inference.records import provenance
from inference.records.manifest import Manifest
from inference.records.provenance import Provenance, format_signature
from inference.service import Service

ROOT = Path(__file__).parents[2]


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def other_weights(tmp_path):
    network = trained_looking_network(seed=1)
    save_weights(tmp_path / "other.safetensors", network.state_dict(), metadata_of(network))
    return tmp_path / "other.safetensors"


# The header


def test_the_header_says_who_made_the_label_map(folders, run, ct, weights_file):
    save_nifti(folders[0] / "a_0000.nii.gz", ct)
    assert run("--quiet") == 0
    header = nibabel.load(folders[1] / "a.nii.gz").header
    text = header["descrip"].item().decode()
    assert text == f"abdoseg {inference.__version__} random sha256:{sha256(weights_file)[:16]}"


def test_a_long_or_strange_name_of_weights_fits():
    for name in ("w" * 300, "Gewichte für 腹部" * 9, "a b\n\0c"):
        text = format_signature(name, "0123456789abcdef" * 4)
        assert len(text) <= 79 and text.isascii() and text.isprintable()
        assert text.endswith(" sha256:0123456789abcdef")
    assert len(format_signature("w" * 300, "0" * 64)) == 79
    assert re.fullmatch(r"abdoseg \d+\.\d+\.\d+", format_signature())


def test_one_place_says_the_version():
    assert f'"{inference.__version__}"' not in (ROOT / "pyproject.toml").read_text()
    assert '{attr = "inference.__version__"}' in (ROOT / "pyproject.toml").read_text()


# What --keep-existing believes


@pytest.mark.slow
def test_label_maps_of_other_weights_or_versions_are_made_again(
    folders, run, ct, other_weights, predicted, monkeypatch
):
    save_nifti(folders[0] / "a_0000.nii.gz", ct)
    keep = ("--keep-existing",)
    assert run("--quiet", "--weights", str(other_weights)) == 0
    others = (folders[1] / "a.nii.gz").read_bytes()
    assert run(*keep) == 0
    assert (folders[1] / "a.nii.gz").read_bytes() != others
    assert predicted == ["a", "a"]
    assert run(*keep) == 0
    assert predicted == ["a", "a"]
    monkeypatch.setattr(provenance, "__version__", "9.0.0")
    assert run(*keep) == 0
    assert predicted == ["a", "a", "a"]


@pytest.mark.slow
def test_the_same_weights_under_another_name_recompute_nothing(
    folders, run, ct, weights_file, tmp_path, predicted
):
    save_nifti(folders[0] / "a_0000.nii.gz", ct)
    log = tmp_path / "m.jsonl"
    renamed = shutil.copy(weights_file, tmp_path / "sha256:a b.safetensors")
    keep = ("--quiet", "--keep-existing", "--manifest", str(log))
    for more in ((), ("--weights", str(renamed)), ("--weights", str(weights_file))):
        assert run(*keep, *more) == 0
    assert (predicted, len(lines_of(log))) == (["a"], 1)


@pytest.mark.slow
def test_a_label_map_with_something_behind_it_is_not_whole(folders, run, ct, predicted, capsys):
    save_nifti(folders[0] / "a_0000.nii.gz", ct)
    path = folders[1] / "a.nii.gz"
    assert run("--quiet") == 0
    good = path.read_bytes()
    import gzip

    for content, words in (
        (good + b"\0", "behind its end"),
        (good + good, "behind its end"),
        (gzip.compress(gzip.decompress(good) + b"\0"), "more than its voxels"),
        (gzip.compress(gzip.decompress(good)[:-1]), "cut short"),
        (good[:-1], "end mark"),
    ):
        path.write_bytes(content)
        assert run("--keep-existing") == 0
        assert words in capsys.readouterr().err
        assert path.read_bytes() == good


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ending", "same_content", "same_time", "with_manifest", "again"),
    [
        (".nii", False, False, False, True),
        (".nii", False, True, False, False),  # nothing tells
        (".nii", False, True, True, True),  # the SHA-256 does
        (".nii.gz", False, True, True, True),  # the size does
        (".nii", True, False, False, True),
        (".nii", True, False, True, False),  # touched alone: the SHA-256 is the same
    ],
)
def test_a_replaced_input_is_segmented_again(
    folders, run, ct, tmp_path, predicted, ending, same_content, same_time, with_manifest, again
):
    """Its label map and its rows are those of the new file, and a line says why."""
    source, output = folders[0] / f"a_0000{ending}", folders[1] / "a.nii.gz"
    log, table, fresh = tmp_path / "m.jsonl", tmp_path / "t.csv", tmp_path / "fresh.csv"
    records = ["--quiet", "--statistics", str(table)]
    records += ["--manifest", str(log)] if with_manifest else []
    save_nifti(source, ct)
    os.utime(source, ns=(10**18, 10**18))
    assert run(*records) == 0
    save_nifti(source, ct if same_content else ct[::-1] // 2)
    later = output.stat().st_mtime_ns + 1
    os.utime(source, ns=(10**18, 10**18) if same_time else (later, later))
    predicted.clear()
    assert run("--keep-existing", *records) == 0
    assert predicted == ["a"] * again
    if with_manifest:
        assert len(lines_of(log)[-1]["warnings"]) == again
    if again:
        kept = output.read_bytes()
        assert run("--quiet", "--statistics", str(fresh)) == 0
        assert (output.read_bytes(), table.read_text()) == (kept, fresh.read_text())


@pytest.mark.slow
def test_doubts_about_the_header_are_in_the_manifest(folders, run, ct, tmp_path):
    log = tmp_path / "m.jsonl"
    with_header(folders[0] / "a_0000.nii", ct, codes=(0, 0))
    with_header(folders[0] / "b_0000.nii", ct, pixdim=[1, 1, 1, 1, 0, 0, 0, 0])
    with_header(folders[0] / "c_0000.nii", ct)
    assert run("--quiet", "--manifest", str(log)) == 0
    lines = {line["case"]: line for line in lines_of(log)}
    assert [len(lines[name]["warnings"]) for name in "abc"] == [1, 1, 0]
    assert "LAS" in lines["a"]["warnings"][0] and lines["a"]["orientation"] == "LAS"
    assert all(size in lines["b"]["warnings"][0] for size in ("1.5x1.25x4 mm", "1x1x1 mm"))


@pytest.mark.slow
def test_statistics_flags_preview_and_reduction_are_the_affines(folders, ct, tmp_path):
    """A leaning file whose `pixdim` is 1 mm has the numbers, slices and pictures of a plain one."""
    network = trained_looking_network()
    weights = tmp_path / "reduced.safetensors"
    save_weights(weights, network.state_dict(), metadata_of(network, matrix_reduction=4))
    lean = RAS_AFFINE.copy()
    lean[1, 2] = 4 * np.tan(np.radians(18))
    with_header(folders[0] / "a_0000.nii", ct)
    odd = [1, 0.1, 0.1, 0.1, 0, 0, 0, 0]
    with_header(folders[0] / "b_0000.nii", ct, lean, codes=(1, 0), pixdim=odd)
    log, table = tmp_path / "m.jsonl", tmp_path / "t.csv"
    places = ["--input", str(folders[0]), "--output", str(folders[1]), "--weights", str(weights)]
    records = ["--manifest", str(log), "--statistics", str(table), "--preview", "--quiet"]
    assert main([*places, "--device", "cpu", *records]) == 0
    plain, leaning = (
        np.asanyarray(nibabel.load(folders[1] / f"{name}.nii.gz").dataobj) for name in "ab"
    )
    assert np.array_equal(plain, leaning)
    a, b = sorted(lines_of(log), key=lambda line: line["case"])
    assert a["volumes_ml"] == b["volumes_ml"] and a["flags"] == b["flags"]
    assert a["spacing_mm"] == b["spacing_mm"] == [1.5, 1.25, 4.0]
    rows = [row[1:] for row in table.read_text().splitlines()[1:]]
    assert rows[:14] == rows[14:]
    sizes = [Image.open(folders[1] / f"{name}.png").size for name in "ab"]
    assert sizes[0] == sizes[1]


# Manifests


def test_a_manifest_says_what_made_each_label_map(folders, run, ct, tmp_path, weights_file):
    inputs, outputs = folders
    path, log = save_nifti(inputs / "a_0000.nii.gz", ct), tmp_path / "m.jsonl"
    bad = inputs / "b_0000.nii.gz"
    bad.write_bytes(path.read_bytes()[:-9])
    assert run("--quiet", "--manifest", str(log)) == 1
    by_case = {line["case"]: line for line in lines_of(log)}
    line = by_case["a"]
    assert (line["status"], line["reason"], line["input"]) == ("done", None, str(path))
    assert (line["bytes"], line["sha256"]) == (path.stat().st_size, sha256(path))
    assert (line["shape"], line["spacing_mm"], line["orientation"]) == (
        [40, 33, 21], [1.5, 1.25, 4.0], "RAS"
    )  # fmt: skip
    assert (line["weights"], line["weights_sha256"]) == ("random.safetensors", sha256(weights_file))
    assert line["device"] == "cpu" and line["precision"] in ("float32", "bfloat16")
    assert line["versions"]["abdoseg"] == inference.__version__
    assert line["versions"]["torch"] and line["versions"]["python"]
    assert list(line["seconds"]) == ["read", "percentiles", "predict", "components", "write"]
    label_map = np.asanyarray(nibabel.load(outputs / "a.nii.gz").dataobj)
    assert list(line["volumes_ml"]) == list(LABEL_NAMES[1:])
    for number, name in enumerate(LABEL_NAMES[1:], 1):
        assert line["volumes_ml"][name] == pytest.approx(
            (label_map == number).sum() * 1.5 * 1.25 * 4e-3, abs=1e-3
        )
    header = nibabel.load(outputs / "a.nii.gz").header
    assert line["made_by"] == header["descrip"].item().decode()
    assert {flag["flag"] for flag in line["flags"]} <= {
        "border", "pieces", "fragment", "small", "large", "sides", "no liver"
    }  # fmt: skip
    line = by_case["b"]
    assert line["status"] == "failed" and "gzip" in line["reason"]
    assert (line["bytes"], line["sha256"]) == (bad.stat().st_size, sha256(bad))
    assert line["volumes_ml"] is None and line["device"] is None
    assert [entry.name for entry in outputs.iterdir()] == ["a.nii.gz"]


@pytest.mark.slow
def test_an_interrupted_manifest_is_taken_up(folders, run, ct, tmp_path, predicted, capsys):
    inputs, _ = folders
    for name in "abc":
        save_nifti(inputs / f"{name}_0000.nii.gz", ct)
    log, table = tmp_path / "m.jsonl", tmp_path / "t.csv"
    records = ("--quiet", "--keep-existing", "--manifest", str(log), "--statistics", str(table))
    assert run(*records) == 0
    whole, rows = log.read_bytes(), table.read_text()
    # Killed after c's label map was written and in the middle of its line; rows of b are missing.
    begin = whole.splitlines(keepends=True)
    log.write_bytes(b"".join(begin[:2]) + begin[2][:50])
    table.write_text("".join(row for row in rows.splitlines(keepends=True) if row[0] != "b"))
    predicted.clear()
    assert run(*records) == 0
    assert predicted == []
    lines = lines_of(log)
    assert [(line["case"], line["status"]) for line in lines] == [
        ("a", "done"), ("b", "done"), ("c", "kept")
    ]  # fmt: skip
    assert table.read_text() == rows
    for name in ("sha256", "voxels", "volumes_ml", "mean_hu", "made_by", "shape"):
        assert lines[2][name] == json.loads(begin[2])[name]
    assert run(*records) == 0
    assert lines_of(log) == lines
    assert lines[2]["warnings"]  # nobody knows its flags of pieces
    assert capsys.readouterr().err == ""


@pytest.mark.slow
@pytest.mark.parametrize("ending", ["csv", "json"])
def test_rows_are_the_manifests(folders, run, ct, tmp_path, every_label, monkeypatch, ending):
    """A lost or stale row is made of the record alone, with the flags of removed pieces."""
    save_nifti(folders[0] / "a_0000.nii.gz", ct)
    log, table = tmp_path / "m.jsonl", tmp_path / f"t.{ending}"
    records = ("--quiet", "--keep-existing", "--manifest", str(log), "--statistics", str(table))
    assert run(*records) == 0
    rows = table.read_text()
    assert "pieces" in rows  # stripes of labels that come twice
    monkeypatch.setattr(Service, "segment", lambda *_: pytest.fail("read again"))
    for change in (table.unlink, lambda: table.write_text(rows.replace("pieces", "small"))):
        change()
        assert run(*records) == 0
        assert table.read_text() == rows


@pytest.mark.slow
def test_a_label_map_of_some_organs_does_not_stand_for_all(
    folders, run, ct, tmp_path, predicted, every_label
):
    save_nifti(folders[0] / "a_0000.nii.gz", ct)
    log = tmp_path / "m.jsonl"
    some = ("--quiet", "--keep-existing", "--organs", "spleen")
    assert run(*some) == 0
    assert run(*some) == 0
    assert predicted == ["a"]
    assert run(*some, "--manifest", str(log)) == 0
    assert predicted == ["a", "a"]
    assert all(volume > 0 for volume in lines_of(log)[0]["volumes_ml"].values())
    assert run(*some, "--manifest", str(log)) == 0
    assert predicted == ["a", "a"]


def test_an_input_of_the_same_name_does_not_hide_the_record_of_the_first(
    folders, run, ct, tmp_path, capsys
):
    log = tmp_path / "m.jsonl"
    for ending in (".nii", ".nii.gz"):
        save_nifti(folders[0] / f"a{ending}", ct)
    rows = []
    for _ in range(3):
        assert run("--keep-existing", "--manifest", str(log)) == 1
        captured = capsys.readouterr()
        assert "warning" not in captured.err
        rows.append([line.split() for line in captured.out.splitlines()[1:3]])
    assert [line["status"] for line in lines_of(log)] == ["failed", "done", "failed", "failed"]
    assert [row[1][1:] for row in rows] == [["-"] * 6 + ["failed"]] * 3


@pytest.mark.parametrize("torn", [b'{"cas', b'{"case": "a", "status', b'{"case": "\xff'])
def test_a_torn_last_line_is_taken_away(tmp_path, torn):
    path = tmp_path / "m.jsonl"
    path.write_bytes(torn)
    Manifest(path).add({"case": "b"})
    assert lines_of(path) == [{"case": "b"}]
    path.write_bytes(b'{"case": "a"}\n' + torn)
    Manifest(path).add({"case": "b"})
    assert lines_of(path) == [{"case": "a"}, {"case": "b"}]


def test_a_last_line_that_lacks_its_end_alone_stays(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_bytes(b'{"case": "a"}')
    long = {"case": "b", "reason": "x" * 200_000}
    Manifest(path).add(long)
    assert lines_of(path) == [{"case": "a"}, long]
    path.write_bytes(path.read_bytes()[:-9])
    Manifest(path)
    assert lines_of(path) == [{"case": "a"}]


def test_another_file_is_not_added_to(folders, run, ct, tmp_path, capsys):
    save_nifti(folders[0] / "a_0000.nii.gz", ct)
    other = tmp_path / "notes.jsonl"
    for content in (b"my notes, without an end", b'{"name": 1}\n'):
        other.write_bytes(content)
        assert run("--manifest", str(other)) == 2
        assert "not a manifest" in capsys.readouterr().err
        assert other.read_bytes() == content
    assert run("--manifest", str(tmp_path / "nowhere" / "m.jsonl")) == 2
    assert "No such file" in capsys.readouterr().err


def test_lines_of_many_writers_are_whole(tmp_path):
    path = tmp_path / "m.jsonl"

    def write(writer):
        manifest = Manifest(path)
        for number in range(25):
            manifest.add({"case": f"{writer}-{number}", "reason": str(writer) * 5000})

    writers = [threading.Thread(target=write, args=(writer,)) for writer in range(4)]
    for thread in writers:
        thread.start()
    for thread in writers:
        thread.join()
    lines = lines_of(path)
    assert len({line["case"] for line in lines}) == len(lines) == 100


def test_a_manifest_on_a_full_disk_costs_no_case(folders, run, ct, tmp_path, monkeypatch, capsys):
    save_nifti(folders[0] / "a_0000.nii.gz", ct)

    def full(self, line):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Manifest, "add", full)
    assert run("--manifest", str(tmp_path / "m.jsonl")) == 1
    assert "m.jsonl: No space left on device" in capsys.readouterr().err
    assert (folders[1] / "a.nii.gz").is_file()


def test_weights_are_found_for_the_device_without_a_name(tmp_path):
    weights = tmp_path / "w.safetensors"
    weights.write_bytes(b"weights")
    asked = []
    made = Provenance(lambda: asked.append(1) or [weights])
    assert not asked
    assert made.signature == format_signature("w", hashlib.sha256(b"weights").hexdigest())
    assert made.digest and asked == [1]


# Signals and kills

SERVICE = """
import sys, time
from inference import command
from inference import outputs
from inference import service
from inference import signals
predict, read = service.Service._predict, service.Service._read
def slowly(self, read, predictor):
    label_map = predict(self, read, predictor)
    if read.case.name == "b":
        print("predicting", flush=True)
        time.sleep({seconds})
    return label_map
service.Service._predict = slowly
if {grace}:
    signals.GRACE_SECONDS, signals.LAST_SECONDS = {grace}, {grace} + 0.3
if {hang}:
    write = outputs.write_label_map
    def hanging(path, *arguments):
        if path.name == "b.nii.gz":
            from inference import files
            files.os.fsync = lambda descriptor: time.sleep(600)
        write(path, *arguments)
    outputs.write_label_map = hanging
sys.exit(command.main(sys.argv[1:]))
"""


def start(folders, weights_file, *more, seconds=0.0, grace=0.0, hang=False):
    script = SERVICE.format(seconds=seconds, grace=grace, hang=hang)
    command = [sys.executable, "-c", script, "--input", str(folders[0]), "--output"]
    command += [str(folders[1]), "--weights", str(weights_file), "--device", "cpu", *more]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, cwd=ROOT, **pipes)
    assert process.stdout.readline() == "predicting\n"
    return process


@pytest.mark.slow
def test_sigterm_lets_the_case_under_way_be_written(folders, weights_file, ct, tmp_path):
    for name in "abcd":
        save_nifti(folders[0] / f"{name}_0000.nii.gz", ct)
    log = tmp_path / "m.jsonl"
    process = start(folders, weights_file, "--manifest", str(log), seconds=1)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 143, errors
    assert "stopped by SIGTERM" in errors.splitlines()[-1]
    assert sorted(path.name for path in folders[1].iterdir()) == ["a.nii.gz", "b.nii.gz"]
    assert [line["case"] for line in lines_of(log)] == ["a", "b"]
    assert nibabel.load(folders[1] / "b.nii.gz").get_fdata().shape == ct.shape


@pytest.mark.slow
def test_sigterm_does_not_wait_for_a_disk_that_hangs(folders, weights_file, ct):
    for name in "abc":
        save_nifti(folders[0] / f"{name}_0000.nii.gz", ct)
    process = start(folders, weights_file, grace=0.5, hang=True)
    while not list(folders[1].glob(".*.partial")):
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 143, errors
    assert [path.name for path in folders[1].iterdir()] == ["a.nii.gz"]  # and no temporary file


@pytest.mark.slow
def test_a_killed_run_is_taken_up_where_it_was(folders, run, weights_file, ct, tmp_path, predicted):
    for name in "abcde":
        save_nifti(folders[0] / f"{name}_0000.nii.gz", ct, RAS_AFFINE)
    log, table = tmp_path / "m.jsonl", tmp_path / "t.csv"
    records = ("--keep-existing", "--manifest", str(log), "--statistics", str(table))
    process = start(folders, weights_file, *records, seconds=600)
    while not log.exists() or not log.read_bytes().endswith(b"\n"):
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.communicate()
    assert [path.name for path in folders[1].glob("*.nii.gz")] == ["a.nii.gz"]
    assert run("--quiet", *records) == 0
    assert predicted == ["b", "c", "d", "e"]
    assert {line["case"] for line in lines_of(log)} == set("abcde")
    assert len(table.read_text().splitlines()) == 1 + 5 * 14
    resumed = {path.name: path.read_bytes() for path in folders[1].glob("*.nii.gz")}
    for path in folders[1].iterdir():
        path.unlink()
    assert run("--quiet") == 0
    assert resumed == {path.name: path.read_bytes() for path in folders[1].glob("*.nii.gz")}
