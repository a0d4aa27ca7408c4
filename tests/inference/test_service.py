"""The command line from files to files: orientations, failures, exit codes, what is left behind."""

import csv
import errno
import json
import os
import shutil
import threading
import tracemalloc

import nibabel
import numpy as np
import pytest
from conftest import (
    ORIENTATIONS,
    RAS_AFFINE,
    SHARED,
    assert_same_grid,
    errors_of,
    names_in,
    reoriented,
    save_nifti,
    stored,
)
from PIL import Image

from inference import files
from inference.records.preview import write_preview
from inference.service import STAGES, Service
from inference.volume import read_volume


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


def test_bad_cases_fail_alone_each_with_one_line(folders, run, cts, ct, capsys):
    inputs, outputs = folders
    (good,) = cts("good")
    whole = good.read_bytes()
    bad = [inputs / name for name in ("cut_0000.nii.gz", "text_0000.nii.gz", "empty_0000.nii")]
    for path, content in zip(bad, (whole[: len(whole) // 2], b"not a volume\n", b""), strict=True):
        path.write_bytes(content)
    bad.append(save_nifti(inputs / "series_0000.nii", np.stack([ct, ct], axis=3)))
    bad.append(save_nifti(inputs / "nan.nii", np.full((5, 5, 5), np.nan, np.float32)))
    shutil.copy(good, inputs / "good.nii.gz")  # the first in order of two with one output name
    assert run("--quiet") == 1
    captured = capsys.readouterr()
    lines = captured.err.splitlines()
    assert captured.out == "" and len(lines) == len(bad) + 1
    assert all(sum(str(path) in line for line in lines) == 1 for path in (*bad, good))
    assert names_in(outputs) == ["good.nii.gz"]
    assert run() == 1
    captured = capsys.readouterr()
    table = [line.split() for line in captured.out.splitlines()]
    assert table[0] == ["case", "shape", *STAGES, "status"]
    assert sorted(row[-1] for row in table[1:8]) == ["done"] + ["failed"] * 6
    assert "40×33×21" in captured.out  # as the user's header says it
    assert "good: done" in captured.err


@pytest.mark.slow
def test_bad_cases_do_not_use_up_the_read_ahead(folders, run, cts, monkeypatch):
    """What follows bad cases is being read before the case ahead of them is predicted."""
    inputs, outputs = folders
    cts("a", "d", "e")
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
    assert names_in(outputs) == [f"{name}.nii.gz" for name in "ade"]


def test_nothing_half_written_stays(folders, run, cts, monkeypatch, capsys):
    cts("a")

    def full_disk(descriptor):  # but for a few bytes
        if os.fstat(descriptor).st_size > 100:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files.os, "fsync", full_disk)
    assert run("--quiet") == 1
    assert len(errors_of(capsys)) == 1
    assert names_in(folders[1]) == []


@pytest.mark.slow
def test_statistics(folders, run, ct, tmp_path):
    inputs, outputs = folders
    image = nibabel.Nifti1Image(ct, RAS_AFFINE)
    image.header.set_slope_inter(0.5, -100)
    nibabel.save(image, inputs / "a_0000.nii.gz")
    for ending in ("csv", "json"):
        assert run("--quiet", "--statistics", tmp_path / f"s.{ending}") == 0
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
@pytest.mark.parametrize(
    ("shape", "pixel_mm"),
    [((40, 33, 21), 1.25), ((3, 3000, 2), 1.0), ((3000, 3, 2), 1.0), ((20, 20, 3), 1e30)],
)
def test_a_preview_has_true_proportions_within_bounds(folders, run, shape, pixel_mm):
    voxels = np.random.default_rng(0).integers(-100, 200, shape, np.int16)
    save_nifti(folders[0] / "a_0000.nii", voxels, np.diag([-1.5, -pixel_mm, 2.0, 1.0]))
    assert run("--preview", "--quiet") == 0
    with Image.open(folders[1] / "a.png") as sheet:
        tile_height = round(320 * min(max(shape[1] * pixel_mm / shape[0] / 1.5, 1 / 16), 2))
        rows = -(-shape[2] // 4) if shape[2] < 12 else 3
        assert sheet.size == (4 * 320, 26 + rows * tile_height + 52)
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


@pytest.mark.slow
def test_a_preview_that_fails_costs_no_case(folders, run, cts, capsys):
    cts("a")
    (folders[1] / "a.png").mkdir(parents=True)
    assert run("--preview") == 0
    assert capsys.readouterr().err.count("\nwarning: ") == 1
    assert (folders[1] / "a.nii.gz").is_file()


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--input", "nowhere"], "nowhere"),
        (["--input", "{tmp}/empty"], "/empty"),
        (["--input", "{tmp}/text.txt"], "text.txt"),
        (["--input", "{tmp}/pipe.nii.gz"], "pipe.nii.gz"),
        (["--input", "/dev/null"], "/dev/null"),
        (["--input", "/" + "n" * 300 + ".nii.gz"], "--input"),
        (["--input", "/" + "n/" * 4000], "--input"),
        (["--device", "tpu"], "--device tpu"),
        (["--device", "cuda:77"], "cuda:77"),
        (["--batch-size", "0"], "--batch-size"),
        (["--gpu-memory", "-5"], "--gpu-memory"),
        (["--statistics", "s.xlsx"], "s.xlsx"),
        (["--statistics", "{tmp}/nowhere/s.csv"], "--statistics"),
        (["--manifest", "{tmp}/nowhere/m.jsonl"], "--manifest"),
        (["--weights", "none.safetensors"], "none.safetensors"),
        (["--weights", "{tmp}/text.txt"], "text.txt"),
        (["--output", "{tmp}/text.txt/x"], "text.txt/x"),
        (["--organs", "liver,heart"], "heart"),
        (["--shard", "3/3"], "3/3"),
        (["--what"], "--what"),
    ],
)
def test_wrong_usage_is_one_line(
    folders, run, cts, tmp_path, capsys, monkeypatch, arguments, named
):
    cts("a")
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.txt").write_text("text")
    os.mkfifo(tmp_path / "pipe.nii.gz")
    monkeypatch.setattr(Service, "run", lambda *_: pytest.fail("a case was started"))
    if "cuda:77" in arguments:
        monkeypatch.undo()  # what there is, is known when the network is loaded
    assert run("--quiet", *(argument.format(tmp=tmp_path) for argument in arguments)) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert named in last and "error: " in last


def test_phase_log(run, cts, tmp_path, monkeypatch, capsys):
    cts("a")
    monkeypatch.setenv("ABDOSEG_PHASE_LOG", str(tmp_path / "phases.jsonl"))
    assert run("--quiet") == 0
    phases = [json.loads(line) for line in (tmp_path / "phases.jsonl").read_text().splitlines()]
    by_name = {phase["phase"]: phase for phase in phases}
    assert list(by_name)[-3:] == ["predict", "components", "write"]
    assert {"imports", "context", "read", "percentiles"} < set(by_name)
    assert (by_name["read"]["case"], by_name["imports"]["case"]) == ("a", None)
    assert by_name["context"]["end"] <= by_name["predict"]["start"]
    assert by_name["predict"]["end"] <= by_name["write"]["start"]
    monkeypatch.setenv("ABDOSEG_PHASE_LOG", "/dev/full")
    assert run() == 0
    assert capsys.readouterr().err.count("warning: ABDOSEG_PHASE_LOG") == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", ["totalseg_3mm", "amos_0013", "totalseg_slab"])
def test_real_ct_keeps_its_geometry(folders, run, name):
    """Where real CT is at hand, the quickest three: 3 mm isotropic, LAS and LPS slabs."""
    if not (path := SHARED / "ct" / "images" / f"{name}_0000.nii.gz").is_file():
        pytest.skip("real CT beside the project")
    assert run("--input", path, "--quiet") == 0
    assert_same_grid(path, folders[1] / f"{name}.nii.gz")
