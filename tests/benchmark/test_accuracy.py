import csv
import json
import multiprocessing
import os
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path

import nibabel
import numpy as np
import pytest
import surface_distance
from PIL import Image

from benchmark.__main__ import main
from benchmark.scoring import accuracy
from benchmark.scoring.label_map import as_labels
from benchmark.scoring.protocol import COLUMNS, PROTOCOLS
from benchmark.scoring.scores import score_case, score_label_maps, surface_area, surface_dice

pytestmark = pytest.mark.filterwarnings(
    "ignore:Please import.*scipy.ndimage:DeprecationWarning"  # inside the surface-distance package
)

GOLDEN = Path(__file__).parents[3] / "shared" / "golden_scores"
SPACING = (0.8, 1.1, 2.5)


def save(path, labels, affine=None, dtype=np.uint8):
    path.parent.mkdir(parents=True, exist_ok=True)
    affine = np.diag([-0.8, -1.1, 2.5, 1]) if affine is None else affine
    nibabel.save(nibabel.Nifti1Image(labels.astype(dtype), affine), path)
    return path


def score_folders(root, *more):
    """Run `benchmark accuracy` over root/reference and root/prediction; its exit code."""
    return main(
        [
            *("accuracy", "--reference", str(root / "reference")),
            *("--prediction", str(root / "prediction"), *more),
        ]
    )


def blobs(seed, shape=(40, 36, 24), noise=0.0):
    """A label map of 14 overlapping boxes, some at the array's borders, and stray voxels."""
    rng = np.random.default_rng(seed)
    labels = np.zeros(shape, np.uint8)
    for label in rng.permutation(np.arange(1, 15)):
        start = [rng.integers(-3, size - 3) for size in shape]
        stop = [first + rng.integers(4, 15) for first in start]
        box = tuple(slice(max(a, 0), b) for a, b in zip(start, stop, strict=True))
        labels[box] = label
    stray = rng.random(shape) < noise
    labels[stray] = rng.integers(0, 15, stray.sum())
    return labels


def whole_volume_nsd(reference, prediction, spacing, tolerance):
    found = surface_distance.compute_surface_distances(reference, prediction, spacing)
    return surface_distance.compute_surface_dice_at_tolerance(found, tolerance)


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


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(12))
def test_cropping_changes_nothing(seed):
    rng = np.random.default_rng(seed)
    shape = tuple(rng.integers(12, 40, 3))
    spacing = tuple(rng.choice([0.5, 0.7, 1.0, 2.0, 2.5], 3))
    reference = np.zeros(shape, bool)
    corner = [rng.integers(0, size - 4) for size in shape]
    reference[tuple(slice(a, a + rng.integers(1, 9)) for a in corner)] = True
    prediction = np.roll(reference, rng.integers(-2, 3, 3), axis=(0, 1, 2))
    prediction |= rng.random(shape) < 0.01
    reference[0, rng.integers(shape[1]), -1] = seed % 2
    for tolerance in (1, 2, 3, 5, 7):  # often a whole number of voxels: distances equal to it
        expected = whole_volume_nsd(reference, prediction, spacing, tolerance)
        assert surface_dice(reference, prediction, spacing, tolerance) == pytest.approx(
            expected, abs=1e-12
        )
        expected = whole_volume_nsd(prediction, reference, spacing, tolerance)
        assert surface_dice(prediction, reference, spacing, tolerance) == pytest.approx(
            expected, abs=1e-12
        )


def test_surface_dice_beyond_the_tolerance_is_zero():
    reference, prediction = np.zeros((2, 60, 8, 8), bool)
    reference[2:5, 2:5, 2:5] = prediction[50:53, 2:5, 2:5] = True
    assert surface_dice(reference, prediction, (1, 1, 1), 5) == 0


def test_surface_area_tends_to_that_of_a_box():
    # 30 x 20 x 10 mm; the package's cells cut the edges, which are a small part of so large a box.
    box = np.ones((60, 20, 5), bool)
    area = surface_area(box, (0.5, 1.0, 2.0))
    assert area == pytest.approx(2 * (30 * 20 + 30 * 10 + 20 * 10), rel=0.06)
    found = surface_distance.compute_surface_distances(box, box, (0.5, 1.0, 2.0))
    assert area == pytest.approx(found["surfel_areas_gt"].sum(), rel=1e-12)


def by_the_rules(reference, prediction, spacing, protocol):
    """The challenge's rules over whole volumes, label by label, with nothing cropped."""
    expected = {}
    for label, tolerance in protocol.tolerances_mm.items():
        ours, theirs = reference == label, prediction == label
        if not ours.any() or not theirs.any():
            expected[label] = (float(ours.any() == theirs.any()),) * 2
            continue
        if label in (5, 6, 10):
            slices = np.flatnonzero(ours.any(axis=(0, 1)))
            ours, theirs = (mask[:, :, slices[0] : slices[-1]] for mask in (ours, theirs))
        dsc = 2 * (ours & theirs).sum() / (ours.sum() + theirs.sum())
        nsd = 0.0
        if dsc >= protocol.nsd_floor and theirs.any():
            nsd = whole_volume_nsd(ours, theirs, spacing, tolerance)
        expected[label] = (round(float(dsc), 4), round(float(nsd), 4))
    return expected


@pytest.mark.slow
@pytest.mark.parametrize("protocol", PROTOCOLS.values(), ids=PROTOCOLS)
@pytest.mark.parametrize("noise", [0.0, 0.002])
def test_label_maps_score_as_the_rules_say(protocol, noise):
    shift_seen = set()
    for seed in range(6):
        reference = blobs(seed)
        prediction = np.roll(reference, (seed % 3, -1, seed % 2), axis=(0, 1, 2))
        prediction[np.random.default_rng(seed).random(prediction.shape) < noise] = 0
        prediction[prediction == seed] = 0
        reference[reference == seed + 3] = 0
        scores = score_label_maps(reference, prediction.astype(np.int16), SPACING, protocol)
        expected = by_the_rules(reference, prediction, SPACING, protocol)
        assert {label: (scores.dsc[label], scores.nsd[label]) for label in scores.dsc} == expected
        shift_seen |= {nsd for _, nsd in expected.values()}
    assert len(shift_seen) > 20  # the cases are not all 0 or 1


def test_nsd_is_zero_below_the_floor_only():
    reference, prediction = np.zeros((2, 40, 12, 12), np.uint8)
    reference[2:22, 3:9, 3:9] = 1
    prediction[19:39, 3:9, 3:9] = 1  # overlap 3 of 20: DSC 0.15
    low = PROTOCOLS["flare23"]
    assert score_label_maps(reference, prediction, (1, 1, 1), low).dsc[1] == 0.15
    assert score_label_maps(reference, prediction, (1, 1, 1), low).nsd[1] == 0
    published = replace(low, nsd_floor=0.1)
    assert score_label_maps(reference, prediction, (1, 1, 1), published).nsd[1] > 0.3
    # Disjoint, but one voxel apart: FLARE 2022 has no floor.
    prediction[:22] = 0
    old = score_label_maps(reference, prediction, (1, 1, 1), PROTOCOLS["flare22"])
    assert (old.dsc[1], old.nsd[1] > 0.1) == (0, True)


def test_aorta_counts_on_the_references_slices_but_the_last():
    reference, prediction = np.zeros((2, 16, 16, 20), np.uint8)
    reference[4:10, 4:10, 5:12] = 5
    prediction[4:10, 4:10, 5:11] = 5  # all slices but the last
    prediction[4:10, 4:10, 14:20] = 5  # and false ones beyond
    assert score_label_maps(reference, prediction, SPACING).dsc[5] == 1
    reference[reference > 0] = prediction[prediction > 0] = 1  # the liver counts on all slices
    scores = score_label_maps(reference, prediction, SPACING)
    assert scores.dsc[1] == round(2 * 6 / (7 + 12), 4)


@pytest.mark.parametrize("label", [5, 6, 10])
def test_one_slice_reference_is_scored_on_that_slice(label):
    reference, prediction = np.zeros((2, 16, 16, 20), np.uint8)
    reference[4:10, 4:10, 7] = label
    prediction[4:10, 4:8, 3:9] = label
    scores = score_label_maps(reference, prediction, SPACING)
    assert scores.dsc[label] == round(2 * 24 / (36 + 24), 4)
    assert 0 < scores.nsd[label] <= 1
    assert len(scores.warnings) == 1
    assert "one labelled slice" in scores.warnings[0]


def test_empty_masks():
    empty, one = np.zeros((2, 8, 8, 8), np.uint8)
    one[2:5, 2:5, 2:5] = 3
    assert set(score_label_maps(empty, empty, SPACING).nsd.values()) == {1.0}
    for pair in ((empty, one), (one, empty)):
        scores = score_label_maps(*pair, SPACING)
        assert (scores.dsc[3], scores.nsd[3], scores.dsc[4]) == (0, 0, 1)


def test_shapes_must_agree():
    with pytest.raises(ValueError, match="shapes differ"):
        score_label_maps(np.zeros((2, 3, 4), np.uint8), np.zeros((2, 3, 5), np.uint8), SPACING)


@pytest.mark.parametrize(
    ("values", "expected", "said"),
    [
        (np.array([0.0, 3.0, 14.0]), [0, 3, 14], None),
        (np.array([0.2, 3.7, 14.0]), [0, 3, 14], "2 voxels hold fractions"),
        (np.array([np.nan, np.inf, 5.0]), [0, 0, 5], "2 voxels are NaN or infinite"),
        (np.array([15, 14, 255], np.uint8), [0, 14, 0], "2 voxels hold labels outside 0 to 14"),
        (np.array([257, -1, 2], np.int16), [0, 0, 2], "(-1, 257)"),
    ],
)
def test_odd_values_are_taken_and_said(values, expected, said):
    labels, warnings = as_labels(values)
    assert labels.tolist() == expected
    assert labels.dtype == np.uint8
    assert [said in warning for warning in warnings] == ([True] if said else [])


def test_float_file_scores_as_its_integers_do(tmp_path):
    labels = blobs(1)
    reference = save(tmp_path / "r/a.nii.gz", labels)
    moved = np.roll(labels, 1, axis=0)
    plain = score_case(reference, save(tmp_path / "p/a.nii.gz", moved))
    floats = score_case(reference, save(tmp_path / "p/b.nii.gz", moved, dtype=np.float32))
    assert (floats.dsc, floats.nsd, floats.warnings) == (plain.dsc, plain.nsd, [])
    assert plain.failure is None
    assert 0.5 < np.mean(list(plain.dsc.values())) < 1


def test_another_affine_is_warned_of_and_scored(tmp_path):
    labels = blobs(2)
    reference = save(tmp_path / "r/a.nii.gz", labels)
    affine = np.diag([-0.8, -1.1, 2.5, 1])
    affine[0, 3] = 3
    scores = score_case(reference, save(tmp_path / "p/a.nii.gz", labels, affine))
    assert set(scores.dsc.values()) == {1.0}
    assert scores.warnings == ["prediction: its affine is up to 3 mm away from the reference's"]
    affine[0, 3] = 0.01
    near = score_case(reference, save(tmp_path / "p/b.nii.gz", labels, affine))
    assert near.warnings == []


def test_spacing_is_the_references(tmp_path):
    labels = blobs(3)
    moved = np.roll(labels, 1, axis=2)
    fine, coarse = np.diag([-1, -1, 1, 1]), np.diag([-1, -1, 20, 1])
    same = save(tmp_path / "p/a.nii.gz", moved, fine)
    near = score_case(save(tmp_path / "r/a.nii.gz", labels, fine), same)
    far = score_case(save(tmp_path / "r/b.nii.gz", labels, coarse), same)
    assert near.dsc == far.dsc
    assert near.nsd[12] == 1  # one slice of 1 mm is within the duodenum's 7 mm; of 20 mm not
    assert far.nsd[12] < 1


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
        assert "a.nii.gz: not scored: --cases says nothing of it" in shown.out


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
    with pytest.raises(SystemExit) as stopped:
        score_folders(some_die, "--report", str(some_die / "report"), "--workers", "2")
    assert stopped.value.code == 143
    assert multiprocessing.active_children() == []
    names = [row["Name"] for row in csv.DictReader(table.open())]
    assert names == ["a.nii", "breaks.nii", "z.nii"]
