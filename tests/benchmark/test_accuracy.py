"""The accuracy run over folders: rows, tables, partly labelled references, cases that fail."""

import csv
import json
import multiprocessing
import os
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from label_maps import blobs, save
from PIL import Image

from benchmark.__main__ import main
from benchmark.scoring import accuracy
from benchmark.scoring.protocol import COLUMNS
from benchmark.scoring.scores import score_case

pytestmark = pytest.mark.filterwarnings(
    "ignore:Please import.*scipy.ndimage:DeprecationWarning"  # inside the surface-distance package
)

GOLDEN = Path(__file__).parents[3] / "shared" / "golden_scores"


def score_folders(root, *more):
    """Run `benchmark accuracy` over root/reference and root/prediction; its exit code."""
    return main(
        [
            *("accuracy", "--reference", str(root / "reference")),
            *("--prediction", str(root / "prediction"), *more),
        ]
    )


@pytest.mark.slow
@pytest.mark.skipif(not GOLDEN.is_dir(), reason="needs the shared golden scores")
def test_every_golden_number_agrees_with_the_official_script(tmp_path):
    report = tmp_path / "report"
    code = score_folders(GOLDEN, "--report", str(report), "--workers", "2")
    assert code == 0
    official = list(csv.DictReader((GOLDEN / "official/per_case.csv").open()))
    ours = list(csv.DictReader((report / "accuracy_per_case.csv").open()))
    assert [list(row) for row in ours] == [list(row) for row in official]
    assert [row.pop("Name") for row in ours] == [row.pop("Name") for row in official]
    assert len(official) == 5
    for mine, theirs in zip(ours, official, strict=True):
        assert {key: float(value) for key, value in mine.items()} == {
            key: float(value) for key, value in theirs.items()
        }
    scores = (GOLDEN / "official/scores.txt").read_text()
    assert (report / "accuracy_official.txt").read_text() == scores


@pytest.fixture
def folders(tmp_path):
    """Seven cases: one whole, five failed each in its way, one whose reference is damaged."""
    labels = blobs(4)
    for name in ("good", "missing", "shape", "damaged", "text", "flat", "reference"):
        save(tmp_path / "reference" / f"{name}.nii.gz", labels)
        save(tmp_path / "prediction" / f"{name}.nii.gz", labels)
    prediction = tmp_path / "prediction"
    (prediction / "missing.nii.gz").rename(prediction / "missing_0000.nii.gz")
    save(prediction / "shape.nii.gz", labels[:-1])
    data = (prediction / "damaged.nii.gz").read_bytes()
    (prediction / "damaged.nii.gz").write_bytes(data[: len(data) // 2])
    (prediction / "text.nii.gz").write_text("no image at all")
    save(prediction / "flat.nii.gz", np.stack([labels, labels], axis=-1))
    (tmp_path / "reference/reference.nii.gz").write_bytes(data[:100])
    return tmp_path


@pytest.mark.slow
def test_failed_cases_cost_only_their_own_row(folders, capsys):
    report = folders / "report"
    code = score_folders(folders, "--report", str(report), "--workers", "1")
    assert code == 1
    rows = {
        row.pop("Name"): row for row in csv.DictReader((report / "accuracy_per_case.csv").open())
    }
    assert set(map(float, rows["good.nii.gz"].values())) == {1.0}
    failed = {"missing.nii.gz", "shape.nii.gz", "damaged.nii.gz", "text.nii.gz", "flat.nii.gz"}
    assert set(rows) == failed | {"good.nii.gz"}
    for name in failed:
        assert set(map(float, rows[name].values())) == {0.0}

    content = json.loads((report / "accuracy.json").read_text())
    reasons = {case["name"]: case["failure"] for case in content["cases"]}
    assert reasons["good.nii.gz"] is None
    assert "missing" in reasons["missing.nii.gz"]
    assert "39x36x24, the reference 40x36x24" in reasons["shape.nii.gz"]
    assert "cannot be read" in reasons["damaged.nii.gz"]
    assert "cannot be read" in reasons["text.nii.gz"]
    assert "not one 3D volume: its shape is 40x36x24x2" in reasons["flat.nii.gz"]
    assert list(content["references_not_scored"]) == ["reference.nii.gz"]
    assert content["predictions_without_reference"] == ["missing_0000.nii.gz"]
    assert content["summary"]["Organ_DSC"] == round(1 / 6, 4)

    table = (report / "accuracy.md").read_text()
    # In all 6 references; sd of 1 and five 0, n - 1.
    assert "| Liver | 6 | 6 | 5 | 16.67 ± 40.82 | 16.67 ± 40.82 |" in table
    assert "shape.nii.gz: **failed**" in table
    printed = capsys.readouterr().out
    assert printed.count(": failed,") == 5
    for metric in ("dsc", "nsd"):
        with Image.open(report / f"accuracy_{metric}.png") as image:
            assert image.size[0] > 1000
            assert len(np.unique(np.asarray(image.convert("L")))) > 50
    assert not list(report.glob(".*"))


@pytest.mark.slow
def test_flare22_has_no_tumor(tmp_path):
    for folder in ("reference", "prediction"):
        save(tmp_path / folder / "a.nii", blobs(5))
    code = score_folders(tmp_path, "--report", str(tmp_path / "report"), "--protocol", "flare22")
    assert code == 0
    (row,) = csv.DictReader((tmp_path / "report/accuracy_per_case.csv").open())
    assert list(row) == ["Name"] + [f"{c}_{m}" for m in ("DSC", "NSD") for c in COLUMNS[:13]]
    assert "tumor" not in (tmp_path / "report/accuracy.md").read_text().lower()


@pytest.mark.parametrize("missing", ["reference", "prediction", None])
def test_nothing_to_score_is_wrong_usage(tmp_path, missing, capsys):
    for folder in {"reference", "prediction"} - {missing}:
        (tmp_path / folder).mkdir()
    assert score_folders(tmp_path, "--report", str(tmp_path / "report")) == 2
    assert (missing or "no .nii.gz or .nii in") in capsys.readouterr().err
    assert not (tmp_path / "report").exists()


def table_of(report):
    """Structure to the cells of its row in accuracy.md."""
    lines = (report / "accuracy.md").read_text().splitlines()
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if "|" in line]
    return {row[0]: row[1:] for row in cells}


@pytest.mark.slow
def test_scores_say_how_many_references_have_the_structure(tmp_path):
    labels = np.zeros((8, 8, 8), np.uint8)
    labels[2:5, 2:5, 2:5] = 1
    save(tmp_path / "reference/a.nii.gz", labels)
    save(tmp_path / "prediction/a.nii.gz", labels)
    save(tmp_path / "reference/b.nii.gz", labels * 3)  # a spleen, and no liver
    report = tmp_path / "report"
    assert score_folders(tmp_path, "--report", str(report), "--workers", "1") == 1
    table = table_of(report)
    assert table["Liver"][:2] == ["1", "2"]
    assert table["Spleen"][:2] == ["1", "2"]
    assert table["Tumor"][:2] == ["0", "2"]
    content = json.loads((report / "accuracy.json").read_text())
    assert content["references_with"]["Spleen"] == 1
    assert [case["in_reference"] for case in content["cases"]] == [["Liver"], ["Spleen"]]
    assert content["annotated_only"] is None
    assert "it counts 1, where only one has it 0" in (report / "accuracy.md").read_text()
    page = tmp_path / "page.html"
    assert main(["report", str(report), "--output", str(page)]) == 0
    data = json.loads(page.read_text().split('id="data">')[1].split("</script>")[0])
    (team,) = data["teams"]
    assert team["present"] == [1, 0, 1] + [0] * 11
    assert team["summary"]["tumors"] == 0


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
def test_partly_labelled_references_score_what_was_annotated(partly_labelled, capsys):
    cases = {"a": {"annotated_labels": [1]}, "b": {"annotated_labels": [3, 14], "slices": "stack"}}
    (partly_labelled / "cases.json").write_text(json.dumps(cases))
    report = partly_labelled / "report"
    options = ("--cases", str(partly_labelled / "cases.json"), "--report", str(report))
    assert score_folders(partly_labelled, *options, "--workers", "1") == 0
    labels, moved = blobs(7), np.roll(blobs(7), 1, axis=0)
    dice = {
        label: 2 * ((labels == label) & (moved == label)).sum() / (2 * (labels == label).sum())
        for label in (1, 3, 14)
    }
    first, second = csv.DictReader((report / "accuracy_per_case.csv").open())
    assert [float(first["Liver_DSC"]), first["Spleen_DSC"], first["Lesion_NSD"]] == [
        *(round(dice[1], 4), "", "")
    ]
    assert [second["Liver_DSC"], float(second["Spleen_DSC"]), float(second["Lesion_DSC"])] == [
        *("", round(dice[3], 4), round(dice[14], 4))
    ]
    assert "RK_DSC" not in first
    content = json.loads((report / "accuracy.json").read_text())
    assert content["summary"]["Organ_DSC"] == pytest.approx((dice[1] + dice[3]) / 2, abs=1e-4)
    page = (report / "accuracy.md").read_text()
    assert "**Not the official rule: of each case only the labels that were annotated" in page
    assert "b.nii.gz: a stack of slices that do not touch" in page
    assert table_of(report)["Liver"][:2] == ["1", "1"]
    out = capsys.readouterr().out
    assert "a.nii.gz: 1 annotated organ DSC" in out
    assert "not the official rule" in out
    assert main(["report", str(report), "--output", str(partly_labelled / "page.html")]) == 0
    assert "annotated labels only" in (partly_labelled / "page.html").read_text()


@pytest.mark.slow
def test_labels_are_scored_alone_in_every_case(partly_labelled):
    report = partly_labelled / "report"
    assert score_folders(partly_labelled, "--labels", "1,3", "--report", str(report)) == 0
    rows = list(csv.DictReader((report / "accuracy_per_case.csv").open()))
    assert list(rows[0]) == ["Name", "Liver_DSC", "Spleen_DSC", "Liver_NSD", "Spleen_NSD"]
    assert [float(row["Liver_DSC"]) > 0 for row in rows] == [True, False]
    assert "(--labels: liver, spleen)" in (report / "accuracy.md").read_text()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "cannot be read"),
        ("[]", "no cases in it"),
        ('{"a": {"labels": [1]}}', "a has no annotated_labels"),
        ('{"a": {"annotated_labels": [15]}}', "a has no annotated_labels"),
        ('{"c": {"annotated_labels": [1]}}', None),
    ],
)
def test_a_cases_file_that_cannot_be_used_is_said(partly_labelled, capsys, content, said):
    (partly_labelled / "cases.json").write_text(content)
    options = ("--cases", str(partly_labelled / "cases.json"))
    code = score_folders(partly_labelled, *options, "--report", str(partly_labelled / "report"))
    shown = capsys.readouterr()
    if said:
        assert code == 2
        assert said in shown.err
    else:
        assert code == 1
        assert "a.nii.gz: not scored: it is not in --cases" in shown.out


@pytest.mark.parametrize("labels", ["0", "15", "liver", "1,", ""])
def test_labels_that_are_none_are_wrong_usage(partly_labelled, labels, capsys):
    with pytest.raises(SystemExit) as stopped:
        score_folders(partly_labelled, "--labels", labels, "--report", str(partly_labelled / "r"))
    assert stopped.value.code == 2
    assert "1,4" in capsys.readouterr().err


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
    assert score_folders(some_die, "--report", str(report), "--workers", "2") == 1
    cases = json.loads((report / "accuracy.json").read_text())["cases"]
    assert {case["name"]: case["failure"] is None for case in cases} == {
        "a.nii": True, "breaks.nii": False, "dies.nii": False, "z.nii": True
    }  # fmt: skip
    failures = {case["name"]: case["failure"] for case in cases}
    assert "its process ended with -9; with little memory" in failures["dies.nii"]
    assert failures["breaks.nii"] == "RuntimeError: no luck"


@pytest.mark.slow
def test_sigterm_ends_the_workers_and_keeps_the_rows(some_die):
    for folder in ("reference", "prediction"):
        (some_die / folder / "dies.nii").rename(some_die / folder / "waits.nii")
    table = some_die / "report" / "accuracy_per_case.csv"

    def stop_when_all_but_one_are_there():
        while not table.exists() or len(table.read_text().splitlines()) < 4:
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop_when_all_but_one_are_there, daemon=True).start()
    assert score_folders(some_die, "--report", str(some_die / "report"), "--workers", "2") == 143
    assert multiprocessing.active_children() == []
    names = [row["Name"] for row in csv.DictReader(table.open())]
    assert names == ["a.nii", "breaks.nii", "z.nii"]
