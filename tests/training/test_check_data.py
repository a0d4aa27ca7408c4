"""The dry check of data sets, against sets whose faults are known."""

import json

import nibabel
import numpy as np
import pytest
from conftest import RAS_AFFINE, save_nifti

from training.__main__ import main


def write(folder, name, labels=None, *, hu=None, affine=RAS_AFFINE):
    for kind in ("images", "labels"):
        (folder / kind).mkdir(parents=True, exist_ok=True)
    if hu is None:
        hu = np.random.default_rng(0).normal(-200, 500, (16, 12, 6)).astype(np.int16)
    save_nifti(folder / "images" / f"{name}_0000.nii.gz", hu)
    if labels is not None:
        save_nifti(folder / "labels" / f"{name}.nii.gz", labels, affine)


def liver(value=1, shape=(16, 12, 6)):
    labels = np.zeros(shape, np.uint8)
    labels[2:9, 3:8, 1:4] = value
    return labels


@pytest.fixture
def faulty(tmp_path):
    folder = tmp_path / "set"
    for name in ("good", "unseen", "empty", "moved"):
        write(folder, name, liver())
    write(folder, "unlabelled")
    write(folder, "short", liver(shape=(16, 12, 5)))
    write(folder, "blank", liver(0))
    write(folder, "strange", liver(40))
    write(folder, "unlisted", liver(7))
    write(folder, "picture", liver(), hu=np.full((16, 12, 6), 90, np.int16))
    save_nifti(folder / "labels" / "lonely.nii.gz", liver())
    moved = RAS_AFFINE.copy()
    moved[0, 3] += 50
    save_nifti(folder / "labels" / "moved.nii.gz", liver(), moved)
    about = {
        "unseen": {"split": "left_out"},
        "empty": {"annotated_labels": []},
        "gone": {"annotated_labels": [1]},
        "unlisted": {"annotated_labels": [1]},
    }
    (folder / "cases.json").write_text(json.dumps(about))
    return folder


def test_every_fault_is_told_with_its_case(faulty, capsys):
    before = sorted(faulty.rglob("*"))
    assert main(["check", "--data", str(faulty)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith(
        "4 cases of 4 patients to train on; 1 left out for a last score (split)"
    )
    for kind, reason, name in (
        ("not used", "no label map", "unlabelled"),
        ("not used", "a label map without an image", "lonely"),
        ("not used", "in cases.json without an image", "gone"),
        ("not used", "described as unlabelled", "empty"),
        ("not used", "shapes (6, 12, 16) and (5, 12, 16) differ", "short"),
        ("not used", "nothing is labelled", "blank"),
        ("not used", "the label map holds 40", "strange"),
        ("caution", "headers disagree: corners lie 50.0 mm apart", "moved"),
        ("caution", "marked but not in annotated_labels, so not taught: right adrenal", "unlisted"),
        ("caution", "no air below -300 HU", "picture"),
    ):
        (line,) = [line for line in lines if line.startswith(f"  {kind}: {reason}")]
        assert line.endswith(f": 1 ({name})")
    (row,) = [line.split() for line in lines if line.startswith(" 1 liver")]
    # Annotated in good, moved, picture (their label) and unlisted (cases.json); in 3 slices of 3.
    assert row == ["1", "liver", "4", "3", "9", "0"]
    assert lines[-1] == "4 cases to train on, 7 not used, 3 with a caution"
    assert sorted(faulty.rglob("*")) == before  # it is dry


def test_a_label_map_with_a_slope_is_judged_by_what_training_reads(tmp_path, capsys):
    folder = tmp_path / "set"
    write(folder, "a", liver(12))
    image = nibabel.Nifti1Image(liver(12), RAS_AFFINE)
    image.header.set_slope_inter(0.5, 0)
    nibabel.save(image, folder / "labels" / "a.nii.gz")
    assert main(["check", "--data", f"{folder}=btcv"]) == 0
    lines = capsys.readouterr().out.splitlines()
    (row,) = [line.split() for line in lines if line.startswith(" 1 liver")]
    assert row == ["1", "liver", "1", "1", "3", "0"]


def test_names_that_two_data_sets_share_are_told(tmp_path, capsys):
    for folder in ("one", "two"):
        write(tmp_path / folder, "a", liver())
    sets = ["--data", str(tmp_path / "one"), "--data", str(tmp_path / "two")]
    assert main(["check", *sets]) == 1
    assert "case names occur twice: a" in capsys.readouterr().out


def test_no_data_set_is_wrong_usage(tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["check", "--data", str(tmp_path)])
    assert "imagesTr" in capsys.readouterr().err.splitlines()[-1]
