"""The accuracy run over folders: rows, tables, partly labelled references, cases that fail."""

import csv
import json
import multiprocessing
import os
import signal
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from harness import blobs, page_data, read, run_benchmark, save, tables_of
from PIL import Image

from benchmark.scoring import accuracy
from benchmark.scoring.protocol import COLUMNS
from benchmark.scoring.scores import score_case

pytestmark = pytest.mark.filterwarnings(
    "ignore:Please import.*scipy.ndimage:DeprecationWarning"  # inside the surface-distance package
)

GOLDEN = Path(__file__).parents[3] / "shared" / "golden_scores"


def score(root, *more, plots=False):
    """Run `benchmark accuracy` over root/reference and root/prediction; its code, root/report."""
    folders = ("--reference", root / "reference", "--prediction", root / "prediction")
    return run_benchmark("accuracy", *folders, "--report", root / "report", *more, plots=plots).code


def read_rows(path):
    with path.open() as file:
        return {row.pop("Name"): row for row in csv.DictReader(file)}


def rows_of(root):
    return read_rows(root / "report/accuracy_per_case.csv")


def table_of(root):
    """Structure to the cells of its row in accuracy.md."""
    return {row[0]: row[1:] for row in tables_of((root / "report/accuracy.md").read_text())}


def save_both(root, name, labels):
    for side in ("reference", "prediction"):
        save(root / side / name, labels)


@pytest.mark.slow
@pytest.mark.skipif(not GOLDEN.is_dir(), reason="needs the shared golden scores")
def test_every_golden_number_agrees_with_the_official_script(tmp_path):
    for side in ("reference", "prediction"):
        (tmp_path / side).symlink_to(GOLDEN / side)
    assert score(tmp_path, "--workers", "2") == 0
    official, ours = read_rows(GOLDEN / "official/per_case.csv"), rows_of(tmp_path)
    assert list(ours) == list(official)
    assert len(official) == 5
    for name, row in official.items():
        assert list(ours[name]) == list(row)
        assert list(map(float, ours[name].values())) == list(map(float, row.values()))
    averages = (tmp_path / "report/accuracy_official.txt").read_text()
    assert averages == (GOLDEN / "official/scores.txt").read_text()


@pytest.mark.slow
def test_failed_cases_cost_only_their_own_row(tmp_path):
    labels, prediction = blobs(4), tmp_path / "prediction"
    names = ("good", "missing", "shape", "damaged", "text", "flat", "unfetched", "reference")
    for name in names:
        save_both(tmp_path, f"{name}.nii.gz", labels)
    (prediction / "missing.nii.gz").rename(prediction / "missing_0000.nii.gz")
    save(prediction / "shape.nii.gz", labels[:-1])
    data = (prediction / "damaged.nii.gz").read_bytes()
    (prediction / "damaged.nii.gz").write_bytes(data[: len(data) // 2])
    (prediction / "text.nii.gz").write_text("no image at all")
    save(prediction / "flat.nii.gz", np.stack([labels, labels], axis=-1))
    (prediction / "unfetched.nii.gz").unlink()
    (prediction / "unfetched.nii.gz").symlink_to("../annex/object")
    (tmp_path / "reference/reference.nii.gz").write_bytes(data[:100])
    assert score(tmp_path, "--workers", "1", plots=True) == 1
    rows, report = rows_of(tmp_path), tmp_path / "report"
    assert set(rows) == {f"{name}.nii.gz" for name in names[:-1]}
    assert set(map(float, rows.pop("good.nii.gz").values())) == {1.0}
    assert {float(value) for row in rows.values() for value in row.values()} == {0.0}

    content = read(report / "accuracy.json")
    failed = {case["name"] for case in content["cases"] if case["failure"]}
    assert failed == set(rows)
    assert list(content["references_not_scored"]) == ["reference.nii.gz"]
    unmatched = {"missing_0000.nii.gz", "reference.nii.gz", "unfetched.nii.gz"}
    assert set(content["predictions_without_reference"]) <= unmatched
    assert content["summary"]["Organ_DSC"] == round(1 / 7, 4)
    # In all 7 references; sd of 1 and six 0, n - 1.
    assert table_of(tmp_path)["Liver"] == ["7", "7", "5", "14.29 ± 37.80", "14.29 ± 37.80"]
    for metric in ("dsc", "nsd"):
        with Image.open(report / f"accuracy_{metric}.png") as image:
            assert len(np.unique(np.asanyarray(image.convert("L")))) > 50
    assert not list(report.glob(".*"))


@pytest.mark.slow
@pytest.mark.parametrize("folder", ["reference", "prediction"])
def test_what_is_no_file_is_reported_wherever_it_lies(tmp_path, folder):
    for name in ("<img src=y>", os.fsdecode(b"M\xfcller")):  # of Latin-1
        save_both(tmp_path, f"{name}.nii.gz", np.ones((4, 4, 4), np.uint8))
    (tmp_path / folder / "gone.nii.gz").symlink_to("../annex/object")
    (tmp_path / folder / "folder.nii.gz").mkdir()
    (tmp_path / folder / "LOUD.NII.GZ").write_bytes(b"")
    assert score(tmp_path, "--workers", "2") == 1
    assert len(rows_of(tmp_path)) == 2
    page = (tmp_path / "report/accuracy.md").read_text()
    assert all(name in page for name in ("gone.nii.gz", "folder.nii.gz", "LOUD.NII.GZ"))
    assert "<img" not in page


@pytest.mark.slow
def test_flare22_has_no_tumor_and_the_report_is_all_that_must_be_writable(tmp_path, monkeypatch):
    save_both(tmp_path, "a.nii", blobs(5))
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda *_, **__: 1 / 0)
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(tempfile, "_candidate_tempdir_list", list)
    assert score(tmp_path, "--protocol", "flare22", plots=True) == 0  # no plot is no failure
    assert Path(tempfile.gettempdir()) == tmp_path / "report"
    (row,) = rows_of(tmp_path).values()
    assert list(row) == [f"{c}_{m}" for m in ("DSC", "NSD") for c in COLUMNS[:13]]
    assert "Tumor" not in table_of(tmp_path)


def test_nothing_to_score_is_wrong_usage(tmp_path):
    for folder in ("reference", "prediction", "more"):
        assert score(tmp_path) == 2
        (tmp_path / folder).mkdir()
    assert not (tmp_path / "report").exists()


@pytest.mark.slow
def test_scores_stand_beside_how_many_references_have_the_structure(tmp_path):
    labels = np.zeros((8, 8, 8), np.uint8)
    labels[2:5, 2:5, 2:5] = 1
    save_both(tmp_path, "a.nii.gz", labels)
    save(tmp_path / "reference/b.nii.gz", labels * 3)  # a spleen, and no liver
    assert score(tmp_path, "--workers", "1") == 1
    report, table = tmp_path / "report", table_of(tmp_path)
    counts = [table[name][:2] for name in ("Liver", "Spleen", "Tumor")]
    assert counts == [["1", "2"], ["1", "2"], ["0", "2"]]
    content = read(report / "accuracy.json")
    assert content["references_with"]["Spleen"] == 1
    assert [case["in_reference"] for case in content["cases"]] == [["Liver"], ["Spleen"]]
    assert content["annotated_only"] is None
    assert run_benchmark("report", report, "--output", tmp_path / "page.html").code == 0
    (team,) = page_data(tmp_path / "page.html")["teams"]
    assert (team["present"], team["tumors"]) == ([1, 0, 1] + [0] * 11, 0)


@pytest.fixture
def partly_labelled(tmp_path):
    """Two whole predictions; one reference has the liver alone, the other spleen and tumor."""
    labels = blobs(7)
    for name in "ab":
        save(tmp_path / f"prediction/{name}.nii.gz", np.roll(labels, 1, axis=0))
    save(tmp_path / "reference/a.nii.gz", np.where(labels == 1, labels, 0))
    save(tmp_path / "reference/b.nii.gz", np.where(np.isin(labels, (3, 14)), labels, 0))
    return tmp_path


@pytest.mark.slow
def test_partly_labelled_references_score_what_was_annotated(partly_labelled):
    cases = {"a": {"annotated_labels": [1]}, "b": {"annotated_labels": [3, 14], "slices": "stack"}}
    (partly_labelled / "cases.json").write_text(json.dumps(cases))
    options = ("--cases", partly_labelled / "cases.json", "--workers", "1")
    assert score(partly_labelled, *options) == 0
    labels, moved = blobs(7), np.roll(blobs(7), 1, axis=0)
    dice = {n: ((labels == n) & (moved == n)).sum() / (labels == n).sum() for n in (1, 3, 14)}
    first, second = rows_of(partly_labelled).values()
    columns = ("Liver_DSC", "Spleen_DSC", "Lesion_DSC")
    liver, *others = (str(round(dice[n], 4)) for n in (1, 3, 14))
    assert [first[column] for column in columns] == [liver, "", ""]
    assert [second[column] for column in columns] == ["", *others]
    assert "RK_DSC" not in first
    content = read(partly_labelled / "report/accuracy.json")
    assert content["summary"]["Organ_DSC"] == pytest.approx((dice[1] + dice[3]) / 2, abs=1e-4)
    assert content["annotated_only"]
    assert [len(case["warnings"]) for case in content["cases"]] == [0, 1]  # b is a stack
    assert table_of(partly_labelled)["Liver"][:2] == ["1", "1"]

    assert score(partly_labelled, "--labels", "1,3") == 0
    rows = list(rows_of(partly_labelled).values())
    assert list(rows[0]) == ["Liver_DSC", "Spleen_DSC", "Liver_NSD", "Spleen_NSD"]
    assert [float(row["Liver_DSC"]) > 0 for row in rows] == [True, False]


@pytest.mark.parametrize(
    ("content", "code"),
    [
        ("{", 2),
        ("[]", 2),
        ('{"a": {"labels": [1]}}', 2),
        ('{"a": {"annotated_labels": [15]}}', 2),
        ('{"c": {"annotated_labels": [1]}}', 1),  # of which there is no reference
    ],
)
def test_a_cases_file_that_cannot_be_used_is_reported(partly_labelled, content, code):
    (partly_labelled / "cases.json").write_text(content)
    assert score(partly_labelled, "--cases", partly_labelled / "cases.json") == code


@pytest.mark.parametrize("labels", ["0", "15", "liver", "1,", ""])
def test_labels_that_are_none_are_wrong_usage(partly_labelled, labels):
    assert score(partly_labelled, "--labels", labels) == 2


def _dies_or_scores(reference, prediction, protocol):
    if reference.name == "dies.nii":
        os.kill(os.getpid(), signal.SIGKILL)
    if reference.name == "breaks.nii":
        raise RuntimeError("no luck")
    if reference.name == "waits.nii":
        time.sleep(1000)
    return score_case(reference, prediction, protocol)


@pytest.mark.slow
def test_a_worker_that_dies_costs_its_case(tmp_path, monkeypatch):
    monkeypatch.setattr(accuracy, "score_case", _dies_or_scores)
    for name in ("a", "breaks", "dies", "z"):
        save_both(tmp_path, f"{name}.nii", np.ones((4, 4, 4), np.uint8))
    assert score(tmp_path, "--workers", "2") == 1
    cases = read(tmp_path / "report/accuracy.json")["cases"]
    assert [bool(case["failure"]) for case in cases] == [False, True, True, False]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_the_workers_and_the_rows_stay(tmp_path, monkeypatch, number):
    monkeypatch.setattr(accuracy, "score_case", _dies_or_scores)
    for name in ("a", "waits", "z"):
        save_both(tmp_path, f"{name}.nii", np.ones((4, 4, 4), np.uint8))
    table = tmp_path / "report" / "accuracy_per_case.csv"

    def stop_when_all_but_one_are_there():
        while not table.exists() or len(table.read_text().splitlines()) < 3:
            time.sleep(0.02)
        os.kill(os.getpid(), number)

    threading.Thread(target=stop_when_all_but_one_are_there, daemon=True).start()
    assert score(tmp_path, "--workers", "2") == 128 + number
    assert multiprocessing.active_children() == []
    assert list(rows_of(tmp_path)) == ["a.nii", "z.nii"]
