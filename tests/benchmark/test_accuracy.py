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
from harness import page_data, run_benchmark
from label_maps import blobs, save
from PIL import Image

from benchmark.scoring import accuracy
from benchmark.scoring.protocol import COLUMNS
from benchmark.scoring.scores import score_case

pytestmark = pytest.mark.filterwarnings(
    "ignore:Please import.*scipy.ndimage:DeprecationWarning"  # inside the surface-distance package
)

GOLDEN = Path(__file__).parents[3] / "shared" / "golden_scores"


def score(root, report, *more):
    """Run `benchmark accuracy` over root/reference and root/prediction."""
    folders = ("--reference", root / "reference", "--prediction", root / "prediction")
    return run_benchmark("accuracy", *folders, "--report", report, *more)


def read_rows(report):
    with (report / "accuracy_per_case.csv").open() as file:
        return {row.pop("Name"): row for row in csv.DictReader(file)}


def read_report(report):
    return json.loads((report / "accuracy.json").read_text())


def table_of(report):
    """Structure to the cells of its row in accuracy.md."""
    lines = (report / "accuracy.md").read_text().splitlines()
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if "|" in line]
    return {row[0]: row[1:] for row in cells}


@pytest.mark.slow
@pytest.mark.skipif(not GOLDEN.is_dir(), reason="needs the shared golden scores")
def test_every_golden_number_agrees_with_the_official_script(tmp_path):
    assert score(GOLDEN, tmp_path, "--workers", "2").code == 0
    with (GOLDEN / "official/per_case.csv").open() as file:
        official = {row.pop("Name"): row for row in csv.DictReader(file)}
    ours = read_rows(tmp_path)
    assert list(ours) == list(official)
    assert len(official) == 5
    for name, row in official.items():
        assert list(ours[name]) == list(row)
        assert list(map(float, ours[name].values())) == list(map(float, row.values()))
    assert (tmp_path / "accuracy_official.txt").read_text() == (
        (GOLDEN / "official/scores.txt").read_text()
    )


@pytest.mark.slow
def test_failed_cases_cost_only_their_own_row(tmp_path):
    labels, prediction = blobs(4), tmp_path / "prediction"
    names = ("good", "missing", "shape", "damaged", "text", "flat", "unfetched", "reference")
    for name in names:
        save(tmp_path / "reference" / f"{name}.nii.gz", labels)
        save(prediction / f"{name}.nii.gz", labels)
    (prediction / "missing.nii.gz").rename(prediction / "missing_0000.nii.gz")
    save(prediction / "shape.nii.gz", labels[:-1])
    data = (prediction / "damaged.nii.gz").read_bytes()
    (prediction / "damaged.nii.gz").write_bytes(data[: len(data) // 2])
    (prediction / "text.nii.gz").write_text("no image at all")
    save(prediction / "flat.nii.gz", np.stack([labels, labels], axis=-1))
    (prediction / "unfetched.nii.gz").unlink()
    (prediction / "unfetched.nii.gz").symlink_to("../annex/object")
    (tmp_path / "reference/reference.nii.gz").write_bytes(data[:100])
    report = tmp_path / "report"
    done = score(tmp_path, report, "--workers", "1")
    assert done.code == 1
    rows = read_rows(report)
    assert set(rows) == {f"{name}.nii.gz" for name in names[:-1]}
    assert set(map(float, rows.pop("good.nii.gz").values())) == {1.0}
    assert {float(value) for row in rows.values() for value in row.values()} == {0.0}

    content = read_report(report)
    reasons = {case["name"]: case["failure"] for case in content["cases"]}
    assert reasons.pop("good.nii.gz") is None
    for name, words in {
        "missing": "missing",
        "shape": "39x36x24, the reference 40x36x24",
        "damaged": "cannot be read",
        "text": "cannot be read",
        "flat": "40x36x24x2",
        "unfetched": "leads nowhere",
    }.items():
        assert words in reasons[f"{name}.nii.gz"]
    assert list(content["references_not_scored"]) == ["reference.nii.gz"]
    unmatched = ["missing_0000.nii.gz", "reference.nii.gz", "unfetched.nii.gz"]
    assert set(content["predictions_without_reference"]) <= set(unmatched)
    assert content["summary"]["Organ_DSC"] == round(1 / 7, 4)
    # In all 7 references; sd of 1 and six 0, n - 1.
    assert table_of(report)["Liver"] == ["7", "7", "5", "14.29 ± 37.80", "14.29 ± 37.80"]
    assert done.out.count(": failed,") == 6
    for metric in ("dsc", "nsd"):
        with Image.open(report / f"accuracy_{metric}.png") as image:
            assert image.size[0] > 1000
            assert len(np.unique(np.asarray(image.convert("L")))) > 50
    assert not list(report.glob(".*"))


@pytest.mark.slow
@pytest.mark.parametrize("folder", ["reference", "prediction"])
def test_what_is_no_file_is_reported_wherever_it_lies(tmp_path, folder):
    for name in ("<img src=y>", "b"):
        for side in ("reference", "prediction"):
            save(tmp_path / side / f"{name}.nii.gz", np.ones((4, 4, 4), np.uint8))
    (tmp_path / folder / "gone.nii.gz").symlink_to("../annex/object")
    (tmp_path / folder / "folder.nii.gz").mkdir()
    (tmp_path / folder / "LOUD.NII.GZ").write_bytes(b"")
    done = score(tmp_path, tmp_path / "report", "--workers", "2")
    assert done.code == 1
    assert len(read_rows(tmp_path / "report")) == 2
    page = (tmp_path / "report/accuracy.md").read_text()
    for name in ("gone.nii.gz", "folder.nii.gz", "LOUD.NII.GZ"):
        assert name in page
        assert name in done.out
    assert "<img" not in page


@pytest.mark.slow
def test_flare22_has_no_tumor_and_no_plot_is_no_failure(tmp_path, monkeypatch):
    for folder in ("reference", "prediction"):
        save(tmp_path / folder / "a.nii", blobs(5))
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda *_, **__: 1 / 0)
    assert score(tmp_path, tmp_path / "report", "--protocol", "flare22").code == 0
    (row,) = read_rows(tmp_path / "report").values()
    assert list(row) == [f"{c}_{m}" for m in ("DSC", "NSD") for c in COLUMNS[:13]]
    assert "tumor" not in (tmp_path / "report/accuracy.md").read_text().lower()


@pytest.mark.slow
def test_the_report_is_all_that_needs_to_be_written(tmp_path, monkeypatch):
    for folder in ("reference", "prediction"):
        save(tmp_path / folder / "a.nii", blobs(5))
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(tempfile, "_candidate_tempdir_list", list)
    assert score(tmp_path, tmp_path / "report").code == 0
    assert Path(tempfile.gettempdir()) == tmp_path / "report"


def test_nothing_to_score_is_wrong_usage(tmp_path):
    report = tmp_path / "report"
    assert score(tmp_path, report).code == 2
    (tmp_path / "reference").mkdir()
    assert score(tmp_path, report).code == 2
    (tmp_path / "prediction").mkdir()
    assert score(tmp_path, report).code == 2
    assert not report.exists()


@pytest.mark.slow
def test_scores_tell_how_many_references_have_the_structure(tmp_path):
    labels = np.zeros((8, 8, 8), np.uint8)
    labels[2:5, 2:5, 2:5] = 1
    save(tmp_path / "reference/a.nii.gz", labels)
    save(tmp_path / "prediction/a.nii.gz", labels)
    save(tmp_path / "reference/b.nii.gz", labels * 3)  # a spleen, and no liver
    report = tmp_path / "report"
    assert score(tmp_path, report, "--workers", "1").code == 1
    table, content = table_of(report), read_report(report)
    counts = [table[name][:2] for name in ("Liver", "Spleen", "Tumor")]
    assert counts == [["1", "2"], ["1", "2"], ["0", "2"]]
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
    report = partly_labelled / "report"
    options = ("--cases", partly_labelled / "cases.json", "--workers", "1")
    assert score(partly_labelled, report, *options).code == 0
    labels, moved = blobs(7), np.roll(blobs(7), 1, axis=0)
    dice = {n: ((labels == n) & (moved == n)).sum() / (labels == n).sum() for n in (1, 3, 14)}
    first, second = read_rows(report).values()
    columns = ("Liver_DSC", "Spleen_DSC", "Lesion_DSC")
    assert [first[column] for column in columns] == [str(round(dice[1], 4)), "", ""]
    others = [str(round(dice[n], 4)) for n in (3, 14)]
    assert [second[column] for column in columns] == ["", *others]
    assert "RK_DSC" not in first
    content = read_report(report)
    assert content["summary"]["Organ_DSC"] == pytest.approx((dice[1] + dice[3]) / 2, abs=1e-4)
    assert content["annotated_only"]
    assert [len(case["warnings"]) for case in content["cases"]] == [0, 1]  # b is a stack
    assert table_of(report)["Liver"][:2] == ["1", "1"]
    assert run_benchmark("report", report, "--output", partly_labelled / "page.html").code == 0
    assert "annotated labels only" in page_data(partly_labelled / "page.html")["notes"][0]

    assert score(partly_labelled, report, "--labels", "1,3").code == 0
    rows = list(read_rows(report).values())
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
    done = score(partly_labelled, partly_labelled / "r", "--cases", partly_labelled / "cases.json")
    assert done.code == code
    assert len(done.err.splitlines()) == (code == 2)


@pytest.mark.parametrize("labels", ["0", "15", "liver", "1,", ""])
def test_labels_that_are_none_are_wrong_usage(partly_labelled, labels):
    assert score(partly_labelled, partly_labelled / "r", "--labels", labels).code == 2


def _dies_or_scores(reference, prediction, protocol):
    if reference.name == "dies.nii":
        os.kill(os.getpid(), signal.SIGKILL)
    if reference.name == "breaks.nii":
        raise RuntimeError("no luck")
    if reference.name == "waits.nii":
        time.sleep(1000)
    return score_case(reference, prediction, protocol)


@pytest.fixture
def some_die(tmp_path, monkeypatch):
    for folder in ("reference", "prediction"):
        for name in ("a", "breaks", "dies", "z"):
            save(tmp_path / folder / f"{name}.nii", np.ones((4, 4, 4), np.uint8))
    monkeypatch.setattr(accuracy, "score_case", _dies_or_scores)
    return tmp_path


@pytest.mark.slow
def test_a_worker_that_dies_costs_its_case(some_die):
    report = some_die / "report"
    assert score(some_die, report, "--workers", "2").code == 1
    failures = {case["name"]: case["failure"] for case in read_report(report)["cases"]}
    assert failures["a.nii"] is failures["z.nii"] is None
    assert "its process ended with -9; with little memory" in failures["dies.nii"]
    assert failures["breaks.nii"] == "RuntimeError: no luck"


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_the_workers_and_the_rows_stay(some_die, number):
    for folder in ("reference", "prediction"):
        (some_die / folder / "dies.nii").rename(some_die / folder / "waits.nii")
    table = some_die / "report" / "accuracy_per_case.csv"

    def stop_when_all_but_one_are_there():
        while not table.exists() or len(table.read_text().splitlines()) < 4:
            time.sleep(0.02)
        os.kill(os.getpid(), number)

    threading.Thread(target=stop_when_all_but_one_are_there, daemon=True).start()
    assert score(some_die, some_die / "report", "--workers", "2").code == 128 + number
    assert multiprocessing.active_children() == []
    assert list(read_rows(some_die / "report")) == ["a.nii", "breaks.nii", "z.nii"]
