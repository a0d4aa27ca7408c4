"""What --keep-existing skips and what it recomputes, and the files of some organs only."""

import gzip
import os
import shutil

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
)
from test_records import lines_of

from inference.label_map import why_not_label_map_of, write_label_map
from inference.labels import LABEL_NAMES
from inference.network.weights import save_weights
from inference.records import provenance
from inference.records.colours import ITK_SNAP_TABLE, SLICER_TABLE
from inference.volume import read_header, read_volume

pytestmark = [pytest.mark.usefixtures("every_label"), pytest.mark.slow]


def test_label_maps_of_other_weights_or_versions_are_recomputed(
    run, cts, weights_file, tmp_path, predicted, monkeypatch
):
    cts("a")
    network = trained_looking_network(seed=1)
    other = tmp_path / "other.safetensors"
    save_weights(other, network.state_dict(), metadata_of(network))
    renamed = shutil.copy(weights_file, tmp_path / "sha256:a b.safetensors")
    for weights, count in ((other, 1), (weights_file, 2), (renamed, 2), (weights_file, 2)):
        assert run("--quiet", "--keep-existing", "--weights", weights) == 0
        assert len(predicted) == count
    monkeypatch.setattr(provenance, "__version__", "9.0.0")
    assert run("--quiet", "--keep-existing") == 0
    assert len(predicted) == 3


@pytest.mark.parametrize(
    ("first", "then", "recomputed"),
    [
        ([], [], False),
        ([], ["--organs", "liver"], True),
        (["--organs", "liver"], [], True),
        (["--organs", "liver,spleen"], ["--organs", "spleen,Liver"], False),
        (["--organs", "liver"], ["--organs", "liver", "--per-organ"], True),
        (["--organs", "liver", "--per-organ"], ["--organs", "liver", "--per-organ"], False),
        ([], ["--preview"], True),
        (["--preview"], ["--preview"], False),
        ([], ["--statistics", "{tmp}/t.csv"], True),
        (["--statistics", "{tmp}/t.csv"], ["--statistics", "{tmp}/t.csv"], False),
        (["--statistics", "{tmp}/t.csv"], ["--manifest", "{tmp}/m.jsonl"], True),
        (["--manifest", "{tmp}/m.jsonl"], ["--statistics", "{tmp}/t.csv"], True),
        (["--manifest", "{tmp}/m.jsonl"], ["--manifest", "{tmp}/m.jsonl"], False),
    ],
)
def test_all_that_is_asked_for_must_be_there(
    folders, run, cts, tmp_path, predicted, first, then, recomputed
):
    cts("a")
    for arguments in (first, then):
        arguments = [argument.format(tmp=tmp_path) for argument in arguments]
        assert run("--quiet", "--keep-existing", *arguments) == 0
    assert predicted == ["a"] * (1 + recomputed)
    assert (folders[1] / "a.png").is_file() == ("--preview" in then)
    assert (folders[1] / "a" / "liver.nii.gz").is_file() == ("--per-organ" in then)


def test_only_a_whole_label_map_of_the_volume_is_skipped(folders, run, cts, ct, tmp_path, capsys):
    (source,), path, other = cts("a"), folders[1] / "a.nii.gz", tmp_path / "other.nii.gz"
    assert run("--quiet") == 0
    good = path.read_bytes()
    volume = read_volume(save_nifti(tmp_path / "b.nii.gz", ct[:, :, :5]))
    write_label_map(other, np.zeros(volume.voxels.shape, np.uint8), volume)
    damaged = [b"", good[:-20], good[:-1], good[:-6] + bytes([good[-6] ^ 255]) + good[-5:]]
    damaged += [good + b"\0", good + good, gzip.compress(gzip.decompress(good) + b"\0")]
    damaged += [gzip.compress(gzip.decompress(good)[:-1]), other.read_bytes(), b"mine"]
    for content in damaged:
        path.write_bytes(content)
        assert run("--keep-existing") == 0
        assert capsys.readouterr().err.count("warning: ") == 1
        assert path.read_bytes() == good
    mine = nibabel.load(path)
    nibabel.save(nibabel.Nifti1Image(np.full(ct.shape, 3, np.uint8), None, mine.header), path)
    assert run("--keep-existing", "--quiet") == 0
    assert (stored(path) == 3).all()  # its voxels are not checked
    assert why_not_label_map_of(path, read_header(source)) == ""
    save_nifti(source, ct, RAS_AFFINE + np.diag([0, 0, 0.5, 0]))
    assert "affine" in why_not_label_map_of(path, read_header(source))
    path.unlink()
    path.mkdir()
    assert run("--keep-existing", "--quiet") == 1
    assert len(errors_of(capsys)) == 1


@pytest.mark.parametrize(
    ("ending", "same_content", "same_time", "logged", "recomputed"),
    [
        (".nii", False, False, False, True),
        (".nii", False, True, False, False),  # nothing shows it
        (".nii", False, True, True, True),  # the SHA-256 does
        (".nii.gz", False, True, True, True),  # the size does
        (".nii", True, False, False, True),
        (".nii", True, False, True, False),  # touched alone: the SHA-256 is the same
    ],
)
def test_a_replaced_input_is_segmented_again(
    folders, run, ct, tmp_path, predicted, ending, same_content, same_time, logged, recomputed
):
    """Its label map and its rows are those of the new file, and a line reports why."""
    source, output = folders[0] / f"a_0000{ending}", folders[1] / "a.nii.gz"
    log, table, fresh = tmp_path / "m.jsonl", tmp_path / "t.csv", tmp_path / "fresh.csv"
    records = ["--quiet", "--statistics", table]
    records += ["--manifest", log] if logged else []
    save_nifti(source, ct)
    os.utime(source, ns=(10**18, 10**18))
    assert run(*records) == 0
    save_nifti(source, ct if same_content else ct[::-1] // 2)
    later = output.stat().st_mtime_ns + 1
    os.utime(source, ns=(10**18, 10**18) if same_time else (later, later))
    predicted.clear()
    assert run("--keep-existing", *records) == 0
    assert predicted == ["a"] * recomputed
    if logged:
        assert len(lines_of(log)[-1]["warnings"]) == recomputed
    if recomputed:
        again = output.read_bytes()
        assert run("--quiet", "--statistics", fresh) == 0
        assert (output.read_bytes(), table.read_text()) == (again, fresh.read_text())


def test_an_interrupted_manifest_is_continued(run, cts, tmp_path, predicted, capsys):
    cts(*"abc")
    log, table = tmp_path / "m.jsonl", tmp_path / "t.csv"
    records = ("--quiet", "--keep-existing", "--manifest", log, "--statistics", table)
    assert run(*records) == 0
    whole, rows = log.read_bytes().splitlines(keepends=True), table.read_text()
    # Killed after c's label map was written and in the middle of its line; rows of b are missing.
    log.write_bytes(b"".join(whole[:2]) + whole[2][:50])
    table.write_text("".join(row for row in rows.splitlines(keepends=True) if row[0] != "b"))
    predicted.clear()
    for _ in range(2):
        assert run(*records) == 0
        assert predicted == ["c"]
        assert [(line["case"], line["status"]) for line in lines_of(log)] == [
            ("a", "done"), ("b", "done"), ("c", "done")
        ]  # fmt: skip
        assert table.read_text() == rows
    assert capsys.readouterr().err == ""


def test_some_organs_masks_and_tables_for_viewers(folders, run, cts):
    cts("a")
    assert run("--quiet", "--per-organ") == 0
    whole, files = nibabel.load(folders[1] / "a.nii.gz"), names_in(folders[1] / "a")
    everything = np.asanyarray(whole.dataobj)
    assert np.unique(everything).tolist() == list(range(15))
    assert names_in(folders[1]) == ["a", "a.nii.gz"]
    assert files == sorted(f"{name.replace(' ', '_')}.nii.gz" for name in LABEL_NAMES[1:])
    for label, name in enumerate(LABEL_NAMES[1:], start=1):
        mask = nibabel.load(folders[1] / "a" / f"{name.replace(' ', '_')}.nii.gz")
        assert np.array_equal(mask.affine, whole.affine)
        assert np.array_equal(np.asanyarray(mask.dataobj), everything == label)
    other = folders[0] / "o"
    some = ("--organs", "Left_Kidney, liver", "--per-organ", "--colours")
    assert run("--quiet", *some, "--output", other) == 0
    chosen = np.where(np.isin(everything, (1, 13)), everything, 0)
    assert np.array_equal(stored(other / "a.nii.gz"), chosen)
    assert names_in(other) == sorted(["a", "a.nii.gz", SLICER_TABLE, ITK_SNAP_TABLE])
    assert names_in(other / "a") == ["left_kidney.nii.gz", "liver.nii.gz"]


def test_an_input_of_the_same_name_does_not_hide_the_record_of_the_first(
    folders, run, ct, tmp_path, capsys
):
    log = tmp_path / "m.jsonl"
    for ending in (".nii", ".nii.gz"):
        save_nifti(folders[0] / f"a{ending}", ct)
    for _ in range(3):
        assert run("--keep-existing", "--manifest", log) == 1
        assert "warning" not in (captured := capsys.readouterr()).err
        # A case that failed has no seconds of the other's.
        assert captured.out.splitlines()[2].split()[1:] == ["-"] * 6 + ["failed"]
    assert [line["status"] for line in lines_of(log)] == ["failed", "done", "failed", "failed"]
