"""The command line on folders of series: formats, names, privacy, resuming, wrong usage."""

import csv
import gzip
import os
import shutil
import zipfile

import nibabel
import numpy as np
import pydicom
import pytest
from conftest import errors_of, save_nifti
from PIL import Image

from inference.dicom.discovery import find_series
from tests.inference.dicom.test_discovery import WORDS, mixture
from tests.inference.dicom.writing import Grid, single_slices, to_bytes, write


@pytest.fixture
def hu(ct):
    return np.ascontiguousarray(ct[:, :, :5].transpose(2, 1, 0))


@pytest.fixture
def series(folders, hu):
    """Two series that can be segmented, and one with a gap that cannot."""
    root = folders[0] / "DOE^JANE"
    write(root / "one", single_slices(hu))
    write(root / "two", single_slices(hu[::-1], seed=1, SeriesNumber=4))
    gap = single_slices(hu, seed=2, SeriesNumber=5)
    write(root / "three", gap[:2] + gap[3:])


def names_of(folder, ending):
    return sorted(path.name.removesuffix(ending) for path in folder.glob(f"*{ending}"))


def labels_of(path):
    return {one.SegmentLabel for one in pydicom.dcmread(path).SegmentSequence}


@pytest.mark.slow
def test_label_maps_segmentations_statistics_and_previews(folders, run, series, tmp_path, capsys):
    inputs, outputs = folders
    table, manifest = tmp_path / "s.csv", tmp_path / "m.jsonl"
    more = ("--statistics", str(table), "--manifest", str(manifest))
    assert run("--format", "both", "--preview", *more) == 1
    captured = capsys.readouterr()
    names = names_of(outputs, ".nii.gz")
    assert names == names_of(outputs, ".seg.dcm") == names_of(outputs, ".png")
    assert [name[:-8] for name in names] == ["3_Abdomen_5_0_", "4_Abdomen_5_0_"]
    with table.open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert {row["case"] for row in rows} == set(names)
    for name in names:
        label_map = np.asanyarray(nibabel.load(outputs / f"{name}.nii.gz").dataobj)
        for row in (row for row in rows if row["case"] == name):
            millilitres = (label_map == int(row["label"])).sum() * 1.5 * 1.25 * 4e-3
            assert float(row["volume_ml"]) == pytest.approx(millilitres, abs=1e-3)
        assert len(labels_of(outputs / f"{name}.seg.dcm")) == len(np.unique(label_map)) - 1
        assert Image.open(outputs / f"{name}.png").size[0] == 4 * 320

    records = table.read_text(encoding="utf-8") + manifest.read_text(encoding="utf-8")
    assert len(manifest.read_text(encoding="utf-8").splitlines()) == 3
    written = captured.out + captured.err + records
    for name in names:  # not the SEG, which is a document of the patient's
        written += name + str(Image.open(outputs / f"{name}.png").info)
        written += gzip.decompress((outputs / f"{name}.nii.gz").read_bytes())[:352].decode(
            "latin-1"
        )
    written = written.lower().replace(str(inputs).lower(), "")
    assert not [word for word in WORDS if word in written]


def test_a_label_map_is_written_where_no_segmentation_can_be_made(folders, run, hu, capsys):
    inputs, outputs = folders
    write(inputs / "s", single_slices(hu, FrameOfReferenceUID=None))
    assert run("--quiet") == 0
    (plain,) = outputs.iterdir()
    wanted = plain.read_bytes()
    plain.unlink()
    assert run("--quiet", "--format", "both") == 1
    (error,) = errors_of(capsys)
    assert "FrameOfReferenceUID" in error
    assert list(outputs.iterdir()) == [plain] and plain.read_bytes() == wanted


@pytest.mark.slow
def test_only_a_segmentation_of_some_organs(folders, run, series):
    _, outputs = folders
    assert run("--quiet", "--format", "seg", "--organs", "liver,spleen") == 1
    segs = list(outputs.iterdir())
    assert len(segs) == 2 and all(labels_of(path) <= {"liver", "spleen"} for path in segs)
    assert run("--quiet", "--format", "seg", "--keep-existing") == 1  # of all organs now
    assert all(len(labels_of(path)) > 2 for path in segs)


@pytest.mark.slow
def test_shards_share_the_series(folders, run, series):
    codes = [run("--quiet", "--shard", f"{shard}/3") for shard in range(3)]
    assert sorted(codes) == [0, 0, 1] and len(names_of(folders[1], ".nii.gz")) == 2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("damage", "made"), [("none", 0), ("label map gone", 2), ("SEG cut", 2), ("nothing there", 4)]
)
def test_a_whole_case_is_skipped(folders, run, series, damage, made):
    _, outputs = folders
    assert run("--quiet", "--format", "both") == 1
    name = names_of(outputs, ".nii.gz")[0]
    if damage == "label map gone":
        (outputs / f"{name}.nii.gz").unlink()
    elif damage == "SEG cut":
        path = outputs / f"{name}.seg.dcm"
        path.write_bytes(path.read_bytes()[:-100])
    elif damage == "nothing there":
        shutil.rmtree(outputs)
        outputs.mkdir()
    stamp = 2 * 10**18  # later than any input's
    for path in outputs.iterdir():
        os.utime(path, ns=(stamp, stamp))
    assert run("--keep-existing", "--format", "both") == 1
    stamps = [path.stat().st_mtime_ns for path in outputs.iterdir()]
    assert len(stamps) == 4 and sum(found != stamp for found in stamps) == made


@pytest.mark.slow
def test_a_zip_or_a_file_may_be_named(folders, run, series, hu, tmp_path):
    inputs, outputs = folders
    packed = tmp_path / "series.zip"
    with zipfile.ZipFile(packed, "w") as archive:
        for index, dataset in enumerate(single_slices(hu)):
            archive.writestr(f"{index}.dcm", to_bytes(dataset))
    assert run("--quiet", "--input", str(packed)) == 0
    assert run("--quiet", "--names", "uid", "--input", str(next(inputs.rglob("IM0000")))) == 0
    assert [path.name[:3] for path in sorted(outputs.iterdir())] == ["3_A", "ct_"]


def test_notes_on_a_series_are_warnings(folders, run, hu, capsys):
    write(folders[0] / "s", single_slices(hu, Grid(orientation=(1, 0, 0, 0, 0.96, -0.28))))
    assert run() == 0
    assert "16.3°" in capsys.readouterr().err


def test_what_is_skipped_is_reported(tmp_path, run, capsys):
    folder = mixture(tmp_path / "mixed")
    assert run("--input", str(folder)) == 0
    printed = capsys.readouterr().err
    assert all(line in printed for line in find_series(folder)[1])


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--input", "{nifti}", "--format", "seg"], "--format seg"),
        (["--input", "{mixed}/others"], "{mixed}/others"),
        (["--input", "{mixed}/zip.zip"], "{mixed}/zip.zip"),
        (["--output", "{inputs}"], "--output"),
    ],
)
def test_wrong_usage(folders, run, ct, series, tmp_path, capsys, arguments, named):
    mixture(tmp_path)
    shutil.move(tmp_path / "DOE^JANE", tmp_path / "mixed")
    (tmp_path / "mixed" / "zip.zip").write_bytes(b"PK")
    (tmp_path / "nifti").mkdir()
    save_nifti(tmp_path / "nifti" / "a_0000.nii.gz", ct)
    places = {name: tmp_path / name for name in ("mixed", "nifti", "inputs")}
    assert run(*(argument.format(**places) for argument in arguments)) == 2
    assert named.format(**places) in capsys.readouterr().err.splitlines()[-1]


def test_nifti_files_go_first(folders, run, series, ct):
    inputs, outputs = folders
    save_nifti(inputs / "a_0000.nii.gz", ct[:, :, :5])
    assert run("--quiet") == 0
    assert [path.name for path in outputs.iterdir()] == ["a.nii.gz"]


def test_a_series_that_memory_cannot_hold_is_refused_by_its_headers(
    folders, run, series, monkeypatch, capsys
):
    monkeypatch.setattr("inference.service.memory_limit", lambda: (600 << 20) + 30_000)
    monkeypatch.setattr("inference.dicom.series.read_pixels", None)
    assert run("--quiet") == 1
    assert sum("GB" in error for error in errors_of(capsys)) == 2
