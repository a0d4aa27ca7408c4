"""The command line on folders of series: formats, names, privacy, what is kept, wrong usage."""

import csv
import gzip
import os
import re
import shutil
import zipfile

import nibabel
import numpy as np
import pydicom
import pytest
from conftest import save_nifti
from PIL import Image

from tests.inference.dicom.test_discovery import IDENTITY, mixture
from tests.inference.dicom.writing import Grid, single_slices, to_bytes, write


@pytest.fixture
def series(folders, ct):
    """Two series that can be segmented, and one that cannot."""
    inputs, _ = folders
    hu = np.ascontiguousarray(ct[:, :, :5].transpose(2, 1, 0))
    write(inputs / "DOE^JANE" / "one", single_slices(hu))
    write(inputs / "DOE^JANE" / "two", single_slices(hu[::-1], seed=1, SeriesNumber=4))
    gap = single_slices(hu, seed=2, SeriesNumber=5)
    del gap[2]
    write(inputs / "DOE^JANE" / "three", gap)
    return hu


def names_of(folder, ending):
    return sorted(path.name.removesuffix(ending) for path in folder.glob(f"*{ending}"))


@pytest.mark.slow
def test_label_maps_segmentations_statistics_and_previews(folders, run, series, tmp_path, capsys):
    inputs, outputs = folders
    table, manifest = tmp_path / "s.csv", tmp_path / "m.jsonl"
    more = ("--statistics", str(table), "--manifest", str(manifest))
    assert run("--format", "both", "--preview", *more) == 1
    captured = capsys.readouterr()
    errors = [line for line in captured.err.splitlines() if line.startswith("error")]
    assert len(errors) == 1 and "1 of its slices are missing" in errors[0]
    names = names_of(outputs, ".nii.gz")
    assert names == names_of(outputs, ".seg.dcm") == names_of(outputs, ".png")
    assert [name[:-8] for name in names] == ["3_Abdomen_5_0_", "4_Abdomen_5_0_"]
    with table.open() as file:
        rows = list(csv.DictReader(file))
    assert {row["case"] for row in rows} == set(names)
    for name in names:
        label_map = np.asanyarray(nibabel.load(outputs / f"{name}.nii.gz").dataobj)
        for row in rows:
            if row["case"] == name:
                millilitres = (label_map == int(row["label"])).sum() * 1.5 * 1.25 * 4e-3
                assert float(row["volume_ml"]) == pytest.approx(millilitres, abs=1e-3)
        found = pydicom.dcmread(outputs / f"{name}.seg.dcm")
        present = {one.SegmentLabel for one in found.SegmentSequence}
        assert len(present) == len(np.unique(label_map)) - 1
        assert Image.open(outputs / f"{name}.png").size[0] == 4 * 320

    assert len(manifest.read_text().splitlines()) == 3
    said = captured.out + captured.err + table.read_text() + manifest.read_text()
    for name in names:  # not the SEG, which is a document of the patient's
        said += name + str(Image.open(outputs / f"{name}.png").info)
        said += gzip.decompress((outputs / f"{name}.nii.gz").read_bytes())[:352].decode("latin-1")
    said = said.lower().replace(str(inputs).lower(), "")
    for word in IDENTITY:
        assert word not in said, word


def test_a_label_map_is_written_where_no_segmentation_can_be_made(folders, run, series, capsys):
    inputs, outputs = folders
    for path in (inputs / "DOE^JANE" / "one").iterdir():
        dataset = pydicom.dcmread(path)
        del dataset.FrameOfReferenceUID
        dataset.save_as(path)
    shutil.rmtree(inputs / "DOE^JANE" / "two")
    shutil.rmtree(inputs / "DOE^JANE" / "three")
    assert run("--quiet") == 0
    (plain,) = outputs.iterdir()
    wanted = plain.read_bytes()
    plain.unlink()
    assert run("--quiet", "--format", "both") == 1
    assert "FrameOfReferenceUID" in capsys.readouterr().err
    assert list(outputs.iterdir()) == [plain] and plain.read_bytes() == wanted


@pytest.mark.slow
def test_only_a_segmentation(folders, run, series):
    _, outputs = folders
    assert run("--quiet", "--format", "seg") == 1
    assert names_of(outputs, ".nii.gz") == [] and len(names_of(outputs, ".seg.dcm")) == 2


@pytest.mark.slow
def test_only_the_organs_asked_for(folders, run, series):
    _, outputs = folders
    assert run("--quiet", "--format", "both", "--organs", "liver,spleen") == 1
    for name in names_of(outputs, ".nii.gz"):
        found = pydicom.dcmread(outputs / f"{name}.seg.dcm")
        assert {one.SegmentLabel for one in found.SegmentSequence} <= {"liver", "spleen"}
        assert set(np.unique(nibabel.load(outputs / f"{name}.nii.gz").dataobj)) <= {0, 1, 3}
    assert run("--quiet", "--format", "both", "--keep-existing") == 1  # made again: of all organs
    found = pydicom.dcmread(outputs / f"{name}.seg.dcm")
    assert len(found.SegmentSequence) > 2


@pytest.mark.slow
def test_shards_share_the_series(folders, run, series):
    _, outputs = folders
    for shard, made in (("0/3", None), ("1/3", None), ("2/3", 2)):
        run("--quiet", "--shard", shard)
        assert made is None or len(names_of(outputs, ".nii.gz")) == made


def stamps(outputs):
    return {path.name: path.stat().st_mtime_ns for path in outputs.iterdir()}


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["none", "label map gone", "segmentation cut", "nothing there"])
def test_what_is_whole_is_kept(folders, run, series, damage, capsys):
    _, outputs = folders
    assert run("--quiet", "--format", "both") == 1
    name = names_of(outputs, ".nii.gz")[0]
    if damage == "label map gone":
        (outputs / f"{name}.nii.gz").unlink()
    elif damage == "segmentation cut":
        path = outputs / f"{name}.seg.dcm"
        path.write_bytes(path.read_bytes()[:-100])
    elif damage == "nothing there":
        shutil.rmtree(outputs)
        outputs.mkdir()
    stamp = 2 * 10**18  # later than any input's
    for path in outputs.iterdir():
        os.utime(path, ns=(stamp, stamp))
    assert run("--keep-existing", "--format", "both") == 1
    assert ("recomputing" in capsys.readouterr().err) == (damage == "segmentation cut")
    made = {"none": 0, "nothing there": 4}.get(damage, 2)
    assert sum(found != stamp for found in stamps(outputs).values()) == made
    assert len(stamps(outputs)) == 4


@pytest.mark.slow
def test_a_zip_or_a_file_may_be_named(folders, run, series, tmp_path):
    inputs, outputs = folders
    packed = tmp_path / "series.zip"
    with zipfile.ZipFile(packed, "w") as archive:
        for index, dataset in enumerate(single_slices(series)):
            archive.writestr(f"{index}.dcm", to_bytes(dataset))
    assert run("--quiet", "--input", str(packed)) == 0
    assert run("--quiet", "--names", "uid", "--input", str(next(inputs.rglob("IM0000")))) == 0
    first, second = sorted(path.name for path in outputs.iterdir())
    assert re.fullmatch(r"3_Abdomen_5_0_[0-9a-f]{8}\.nii\.gz", first)
    assert re.fullmatch(r"ct_[0-9a-f]{16}\.nii\.gz", second)


def test_a_tilted_series_is_segmented_with_a_word_about_it(folders, run, series, capsys):
    inputs, outputs = folders
    shutil.rmtree(inputs)
    grid = Grid(orientation=(1, 0, 0, 0, 0.96, -0.28))
    write(inputs / "s", single_slices(series, grid))
    assert run("--quiet") == 0
    assert "warning: series 3_Abdomen" in (said := capsys.readouterr().err) and "sheared" in said
    (path,) = outputs.iterdir()
    affine = nibabel.load(path).affine
    assert abs(np.linalg.det(affine[:3, :3])) == pytest.approx(1.5 * 1.25 * 4 * 0.96, rel=1e-5)


def test_what_is_left_out_is_said(tmp_path, run, capsys):
    mixture(tmp_path / "mixed")
    assert run("--input", str(tmp_path / "mixed")) == 0
    assert capsys.readouterr().err.count("left out: ") == 6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--input", "{nifti}", "--format", "seg"], "a DICOM SEG belongs to a DICOM series"),
        (["--input", "{mixed}/others"], "no CT series in DICOM; left out: series"),
        (["--input", "{mixed}/zip.zip"], "a zip that cannot be opened"),
        (["--names", "patient"], "invalid choice"),
        (["--format", "jpeg"], "invalid choice"),
        (["--output", "{inputs}"], "name another folder"),
    ],
)
def test_wrong_usage(folders, run, ct, series, tmp_path, capsys, arguments, message):
    mixture(tmp_path)
    shutil.move(tmp_path / "DOE^JANE", tmp_path / "mixed")
    (tmp_path / "mixed" / "zip.zip").write_bytes(b"PK")
    (tmp_path / "nifti").mkdir()
    save_nifti(tmp_path / "nifti" / "a_0000.nii.gz", ct)
    places = {name: tmp_path / name for name in ("mixed", "nifti", "inputs")}
    with pytest.raises(SystemExit) as caught:
        run(*(argument.format(**places) for argument in arguments))
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def test_nifti_files_go_first(folders, run, series, ct):
    inputs, outputs = folders
    save_nifti(inputs / "a_0000.nii.gz", ct[:, :, :5])
    assert run("--quiet") == 0
    assert [path.name for path in outputs.iterdir()] == ["a.nii.gz"]


def test_a_series_that_memory_cannot_hold_is_refused_by_its_headers(
    folders, run, series, monkeypatch, capsys
):
    monkeypatch.setattr("inference.command.memory_limit", lambda: (600 << 20) + 30_000)
    monkeypatch.setattr("inference.dicom.series.read_pixels", None)
    assert run("--quiet") == 1
    assert capsys.readouterr().err.count("GB of memory") == 2
