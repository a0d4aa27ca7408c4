"""Some organs only, a file for each, and tables for viewers."""

import nibabel
import numpy as np
import pytest
from conftest import save_nifti

from inference.labels import LABEL_NAMES
from inference.records.colours import ITK_SNAP_TABLE, SLICER_TABLE


def labels_of(path):
    return np.asanyarray(nibabel.load(path).dataobj)


pytestmark = pytest.mark.usefixtures("every_label")


@pytest.mark.slow
def test_only_the_organs_asked_for(folders, run, ct):
    save_nifti(folders[0] / "a_0000.nii.gz", ct)
    assert run("--quiet") == 0
    everything = labels_of(folders[1] / "a.nii.gz")
    assert run("--quiet", "--organs", "Left_Kidney, liver") == 0
    chosen = labels_of(folders[1] / "a.nii.gz")
    assert np.array_equal(chosen, np.where(np.isin(everything, (1, 13)), everything, 0))
    assert np.unique(chosen).tolist() == [0, 1, 13]
    assert np.unique(everything).tolist() == list(range(15))


@pytest.mark.slow
def test_label_maps_of_other_organs_are_made_again(folders, run, ct, predicted):
    save_nifti(folders[0] / "a_0000.nii.gz", ct)
    assert run("--quiet", "--organs", "liver") == 0
    assert run("--quiet", "--keep-existing", "--organs", "liver") == 0
    assert predicted == ["a"]
    assert run("--quiet", "--keep-existing") == 0
    assert predicted == ["a", "a"]
    assert len(np.unique(labels_of(folders[1] / "a.nii.gz"))) == 15


@pytest.mark.slow
def test_a_mask_for_each_organ(folders, run, ct):
    save_nifti(folders[0] / "a_0000.nii.gz", ct)
    assert run("--quiet", "--per-organ") == 0
    label_map = nibabel.load(folders[1] / "a.nii.gz")
    files = sorted(path.name for path in (folders[1] / "a").iterdir())
    assert files == sorted(f"{name.replace(' ', '_')}.nii.gz" for name in LABEL_NAMES[1:])
    for label, name in enumerate(LABEL_NAMES[1:], start=1):
        mask = nibabel.load(folders[1] / "a" / f"{name.replace(' ', '_')}.nii.gz")
        assert np.array_equal(mask.affine, label_map.affine)
        assert np.array_equal(
            np.asanyarray(mask.dataobj), labels_of(folders[1] / "a.nii.gz") == label
        )
    assert (
        run("--quiet", "--per-organ", "--organs", "spleen", "--output", str(folders[0] / "o")) == 0
    )
    assert [path.name for path in (folders[0] / "o" / "a").iterdir()] == ["spleen.nii.gz"]


@pytest.mark.slow
def test_a_kept_label_map_does_not_stand_for_masks_that_are_missing(folders, run, ct):
    save_nifti(folders[0] / "a_0000.nii.gz", ct)
    assert run("--quiet", "--organs", "spleen,liver") == 0
    assert run("--quiet", "--organs", "spleen,liver", "--per-organ", "--keep-existing") == 0
    masks = [folders[1] / "a" / name for name in ("liver.nii.gz", "spleen.nii.gz")]
    assert sorted((folders[1] / "a").iterdir()) == masks
    made = [path.stat().st_mtime_ns for path in masks]
    assert run("--quiet", "--organs", "spleen,liver", "--per-organ", "--keep-existing") == 0
    assert [path.stat().st_mtime_ns for path in masks] == made


@pytest.mark.slow
def test_viewers_tables_only_where_asked_for(folders, run, ct):
    save_nifti(folders[0] / "a_0000.nii.gz", ct)
    assert run("--quiet") == 0
    assert [path.name for path in folders[1].iterdir()] == ["a.nii.gz"]
    assert run("--quiet", "--colours") == 0
    assert {path.name for path in folders[1].iterdir()} == {
        "a.nii.gz", SLICER_TABLE, ITK_SNAP_TABLE
    }  # fmt: skip


def test_an_unknown_organ_is_wrong_usage(folders, run, ct, capsys):
    save_nifti(folders[0] / "a_0000.nii.gz", ct)
    with pytest.raises(SystemExit) as stopped:
        run("--organs", "liver,heart")
    assert stopped.value.code == 2
    assert "heart: choose of liver, right-kidney" in capsys.readouterr().err
