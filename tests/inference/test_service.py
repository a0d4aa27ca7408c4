"""The command line from files to files: orientations, failures, exit codes, what is left behind."""

import csv
import errno
import json
import os
import re
import shutil
import threading
import tracemalloc
from pathlib import Path

import nibabel
import numpy as np
import pytest
from conftest import ORIENTATIONS, RAS_AFFINE, SHARED, reoriented, save_nifti, stored
from PIL import Image

from inference import files
from inference.command import main
from inference.records.preview import write_preview
from inference.service import Service
from inference.volume import read_volume

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_the_label_map_is_the_same_in_all_48_orientations(folders, run, ct):
    inputs, outputs = folders
    for index, orientation in enumerate(ORIENTATIONS):
        turned, affine = reoriented(ct[:, :, :7], RAS_AFFINE, orientation)
        save_nifti(inputs / f"o{index:02}_0000.nii.gz", turned, affine)
    assert run("--quiet") == 0
    canonical = []
    for index, orientation in enumerate(ORIENTATIONS):
        before = nibabel.load(inputs / f"o{index:02}_0000.nii.gz")
        after = nibabel.load(outputs / f"o{index:02}.nii.gz")
        assert after.shape == before.shape
        np.testing.assert_array_equal(after.affine, before.affine)
        np.testing.assert_array_equal(nibabel.io_orientation(after.affine), orientation)
        canonical.append(np.asanyarray(nibabel.as_closest_canonical(after).dataobj))
    assert len(np.unique(canonical[0])) > 5
    for label_map in canonical[1:]:
        np.testing.assert_array_equal(label_map, canonical[0])


def bad_inputs(inputs, ct):
    """Files that cannot be segmented, and the word that says why."""
    whole = save_nifti(inputs / "good_0000.nii.gz", ct).read_bytes()
    (inputs / "cut_0000.nii.gz").write_bytes(whole[: len(whole) // 2])
    (inputs / "text_0000.nii.gz").write_text("not a volume\n")
    (inputs / "empty_0000.nii").touch()
    save_nifti(inputs / "series_0000.nii", np.stack([ct, ct], axis=3))
    save_nifti(inputs / "nan.nii", np.full((5, 5, 5), np.nan, np.float32))
    shutil.copy(inputs / "good_0000.nii.gz", inputs / "good.nii.gz")
    return {
        "cut_0000.nii.gz": "gzip",
        "text_0000.nii.gz": "NIfTI",
        "empty_0000.nii": "empty",
        "series_0000.nii": "3D",
        "nan.nii": "finite",
        "good_0000.nii.gz": "good.nii.gz",
    }


def test_bad_cases_fail_alone_each_with_one_line(folders, run, ct, capsys):
    inputs, outputs = folders
    reasons = bad_inputs(inputs, ct)
    assert run("--quiet") == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    errors = captured.err.splitlines()
    assert len(errors) == len(reasons)
    for name, reason in reasons.items():
        assert any(str(inputs / name) in line and reason in line for line in errors), name
    assert [path.name for path in outputs.iterdir()] == ["good.nii.gz"]


@pytest.mark.slow
def test_bad_cases_do_not_use_up_the_read_ahead(folders, run, ct, tmp_path, monkeypatch):
    """What follows bad cases is being read before the case ahead of them is predicted."""
    inputs, outputs = folders
    for name in ("a", "d", "e"):
        save_nifti(inputs / f"{name}_0000.nii.gz", ct)
    for name in ("b", "c", "f"):
        (inputs / f"{name}_0000.nii.gz").write_bytes(b"not NIfTI")
    reads = {name: threading.Event() for name in "abcdef"}
    read, predict, order = Service._read, Service._predict, []

    def seen_read(self, case):
        try:
            return read(self, case)
        finally:
            reads[case.name].set()

    def waits_for_d(self, read, predictor):
        if read.case.name == "a":
            assert reads["d"].wait(60)
            assert not reads["e"].is_set()  # one is enough: volumes are large
        order.append(read.case.name)
        return predict(self, read, predictor)

    monkeypatch.setattr(Service, "_read", seen_read)
    monkeypatch.setattr(Service, "_predict", waits_for_d)
    assert run() == 1
    assert order == ["a", "d", "e"]
    assert sorted(path.name for path in outputs.iterdir()) == [f"{n}.nii.gz" for n in "ade"]


@pytest.mark.slow
def test_a_stream_may_wait_for_what_becomes_of_a_case(folders, run, ct, monkeypatch):
    """Every case ends before the next is known, also one that cannot be read."""
    inputs, outputs = folders
    save_nifti(inputs / "a_0000.nii.gz", ct)
    (inputs / "b_0000.nii.gz").write_bytes(b"not NIfTI")
    save_nifti(inputs / "c_0000.nii.gz", ct)
    segment = Service.segment

    def one_by_one(self, cases):
        ended = {case.name: threading.Event() for case in cases}
        on_case = self.observer.on_case

        def on_case_and_tell(case):
            on_case(case)
            ended[case.name].set()

        def stream():
            for case in cases:
                yield case
                assert ended[case.name].wait(60)

        self.observer.on_case = on_case_and_tell
        segment(self, stream())

    monkeypatch.setattr(Service, "segment", one_by_one)
    assert run() == 1
    assert sorted(path.name for path in outputs.iterdir()) == ["a.nii.gz", "c.nii.gz"]


@pytest.mark.slow
def test_table_and_progress(folders, run, ct, capsys):
    inputs, _ = folders
    bad_inputs(inputs, ct)
    assert run() == 1
    captured = capsys.readouterr()
    lines = captured.out.splitlines()
    assert lines[0].split() == [
        "case", "shape", "read", "percentiles", "predict", "components", "write", "status"
    ]  # fmt: skip
    assert [line.split()[-1] for line in lines[1:8]].count("done") == 1
    assert "40×33×21" in captured.out  # as the user's header says it
    assert lines[-1].startswith("1 of 7 cases")
    assert re.search(r"^\[\d/7\] good: done$", captured.err, re.MULTILINE)


def test_nothing_half_written_stays(folders, run, ct, monkeypatch, capsys):
    inputs, outputs = folders
    save_nifti(inputs / "a_0000.nii.gz", ct)

    def full_disk(descriptor):  # but for a few bytes
        if os.fstat(descriptor).st_size > 100:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files.os, "fsync", full_disk)
    assert run("--quiet") == 1
    assert "No space left on device" in capsys.readouterr().err
    assert list(outputs.iterdir()) == []


@pytest.mark.slow
def test_existing_label_maps_are_kept_when_asked(folders, run, ct):
    inputs, outputs = folders
    save_nifti(inputs / "a_0000.nii.gz", ct)
    save_nifti(inputs / "b_0000.nii.gz", ct)
    assert run("--quiet") == 0
    before = nibabel.load(outputs / "a.nii.gz")
    mine = nibabel.Nifti1Image(np.full(ct.shape, 3, np.uint8), before.affine, before.header)
    nibabel.save(mine, outputs / "a.nii.gz")
    (outputs / "b.nii.gz").unlink()
    assert run("--keep-existing", "--quiet", "--preview") == 0
    assert (stored(outputs / "a.nii.gz") == 3).all()
    assert {path.name for path in outputs.iterdir()} == {
        "a.nii.gz", "a.png", "b.nii.gz", "b.png"
    }  # fmt: skip
    assert stored(outputs / "b.nii.gz").shape == ct.shape
    assert run("--quiet") == 0
    assert not (stored(outputs / "a.nii.gz") == 3).all()


@pytest.mark.slow
def test_statistics(folders, run, ct, tmp_path):
    inputs, outputs = folders
    image = nibabel.Nifti1Image(ct, RAS_AFFINE)
    image.header.set_slope_inter(0.5, -100)
    nibabel.save(image, inputs / "a_0000.nii.gz")
    assert run("--quiet", "--statistics", str(tmp_path / "s.csv")) == 0
    assert run("--quiet", "--statistics", str(tmp_path / "s.json")) == 0
    with (tmp_path / "s.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [int(row["label"]) for row in rows] == list(range(1, 15))
    label_map = stored(outputs / "a.nii.gz")
    hu = nibabel.load(inputs / "a_0000.nii.gz").get_fdata()
    for row, record in zip(rows, json.loads((tmp_path / "s.json").read_text()), strict=True):
        mask = label_map == int(row["label"])
        assert float(row["volume_ml"]) == pytest.approx(mask.sum() * 1.5 * 1.25 * 4e-3, abs=1e-3)
        if mask.any():
            assert float(row["mean_hu"]) == pytest.approx(hu[mask].mean(), abs=0.01)
        else:
            assert row["mean_hu"] == ""
        assert record["volume_ml"] == float(row["volume_ml"])


@pytest.mark.slow
def test_preview_shows_slices_in_true_proportion(folders, run, ct):
    inputs, outputs = folders
    save_nifti(inputs / "a_0000.nii.gz", ct)
    assert run("--quiet", "--preview") == 0
    sheet = Image.open(outputs / "a.png")
    tile_height = round(320 * 33 * 1.25 / (40 * 1.5))
    assert sheet.size == (4 * 320, 26 + 3 * tile_height + 52)
    assert len(np.unique(np.asarray(sheet).reshape(-1, 3), axis=0)) > 100


@pytest.mark.slow
def test_a_preview_of_a_huge_slice_takes_little_memory(tmp_path):
    voxels = np.full((4000, 4000, 1), -1000, np.int16)
    voxels[1000:3000, 1500:2500] = 40
    volume = read_volume(save_nifti(tmp_path / "a.nii", voxels, np.diag([-1.0, -1.0, 1.0, 1.0])))
    label_map = np.zeros(volume.voxels.shape, np.uint8)
    tracemalloc.start()
    write_preview(tmp_path / "a.png", label_map, volume, "a")
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 40 << 20  # the slice has 32 MB in the file, and 128 MB as HU
    with Image.open(tmp_path / "a.png") as sheet:  # cropped to the body: twice as wide as high
        assert sheet.height - 26 - 52 == pytest.approx(160, abs=2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--input", "nowhere"], "no such file or folder"),
        (["--input", "{empty}"], "no .nii.gz or .nii file there"),
        (["--input", "{text}"], "not a .nii.gz or .nii file"),
        (["--device", "tpu"], "choose auto, cpu, cuda"),
        (["--batch-size", "0"], "at least 1"),
        (["--gpu-memory", "-5"], "more than 0"),
        (["--statistics", "s.xlsx"], ".csv or .json"),
        (["--weights", "none.safetensors"], "no such file"),
        (["--weights", "{text}"], "not a safetensors file"),
        (["--output", "{text}/x"], "Not a directory"),
        (["--what"], "unrecognized"),
    ],
)
def test_wrong_usage(folders, run, ct, tmp_path, capsys, arguments, message):
    save_nifti(folders[0] / "a_0000.nii.gz", ct)
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.txt").write_text("text")
    places = {"empty": tmp_path / "empty", "text": tmp_path / "text.txt"}
    with pytest.raises(SystemExit) as caught:
        run(*(argument.format(**places) for argument in arguments))
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def test_device_that_is_not_there(folders, run, ct, capsys):
    save_nifti(folders[0] / "a_0000.nii.gz", ct)
    assert run("--device", "cuda:77") == 2
    assert "no CUDA device cuda:77" in capsys.readouterr().err


def test_phase_log(folders, run, ct, tmp_path, monkeypatch):
    save_nifti(folders[0] / "a_0000.nii.gz", ct)
    monkeypatch.setenv("ABDOSEG_PHASE_LOG", str(tmp_path / "phases.jsonl"))
    assert run("--quiet") == 0
    phases = [json.loads(line) for line in (tmp_path / "phases.jsonl").read_text().splitlines()]
    by_name = {phase["phase"]: phase for phase in phases}
    assert list(by_name)[-3:] == ["predict", "components", "write"]
    assert {"imports", "context", "read", "percentiles"} < set(by_name)
    assert by_name["read"]["case"] == "a"
    assert by_name["imports"]["case"] is None
    assert by_name["context"]["end"] <= by_name["predict"]["start"]
    assert by_name["predict"]["end"] <= by_name["write"]["start"]


@pytest.mark.slow
def test_real_ct_keeps_its_geometry(tmp_path, weights_file):
    """Where real CT is at hand, the quickest three: 3 mm isotropic, LAS and LPS slabs."""
    images = SHARED / "ct" / "images"
    names = ("totalseg_3mm", "amos_0013", "totalseg_slab")
    if not images.is_dir():
        names = ()
    for name in names:
        path = images / f"{name}_0000.nii.gz"
        output = ("--output", str(tmp_path), "--weights", str(weights_file), "--quiet")
        assert main(["--input", str(path), "--device", "cpu", *output]) == 0
        before, after = nibabel.load(path), nibabel.load(tmp_path / f"{name}.nii.gz")
        assert after.shape == before.shape
        assert after.get_data_dtype() == np.uint8
        np.testing.assert_array_equal(after.affine, before.affine)
        for code in ("sform_code", "qform_code", "xyzt_units"):
            assert after.header[code] == before.header[code]
        assert set(np.unique(np.asanyarray(after.dataobj))) <= set(range(15))
