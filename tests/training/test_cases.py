"""Data sets on disk, the cache and the drawing of slices."""

import json
import os
from pathlib import Path

import nibabel
import numpy as np
import pytest
from conftest import ORIENTATIONS, RAS_AFFINE, SHARED, reoriented, save_nifti

from training import TrainingError
from training.cache import cache_cases
from training.cases import (
    Case,
    find_training_cases,
    intensity_statistics,
    label_table,
    never_present,
    split_patients,
)
from training.label_mapping import load_label_mapping, nnunet_label_mapping
from training.loss import IGNORED
from training.slices import Slice, SliceDataset, annotated_mask, collate


def write_case(
    folder: Path, name: str, seed=0, shape=(12, 10, 6), images="images", labels="labels"
):
    """A random case in RAS; its labels are in blocks along the third axis."""
    rng = np.random.default_rng(seed)
    hu = rng.normal(0, 300, shape).astype(np.int16)
    label_map = np.zeros(shape, np.uint8)
    label_map[3:9, 2:8, 1:3] = 1
    label_map[4:6, 3:6, 4] = 7
    for kind, suffix, array in ((images, "_0000.nii.gz", hu), (labels, ".nii.gz", label_map)):
        (folder / kind).mkdir(parents=True, exist_ok=True)
        save_nifti(folder / kind / f"{name}{suffix}", array)
    return hu, label_map


def cached_cases(folder, cache, mapping=None, report=lambda line: None):
    return cache_cases(find_training_cases(folder, mapping), cache, report)


@pytest.mark.parametrize(
    ("images", "labels"),
    [("images", "labels"), ("imagesTr", "labelsTr"), ("imagesTr2200", "labelsTr2200")],
)
def test_the_layouts_are_found(tmp_path, images, labels):
    write_case(tmp_path, "a", images=images, labels=labels)
    write_case(tmp_path, "b_0000", images=images, labels=labels)
    save_nifti(tmp_path / images / "unlabelled_0000.nii.gz", np.zeros((3, 3, 3), np.int16))
    cases = find_training_cases(tmp_path)
    assert [(case.name, case.annotated) for case in cases] == [("a", None), ("b_0000", None)]


def test_a_folder_that_is_no_data_set_is_an_error(tmp_path):
    with pytest.raises(TrainingError, match="imagesTr"):
        find_training_cases(tmp_path)


def test_the_description_says_who_looked_for_what(tmp_path):
    for name in ("a", "b", "c"):
        write_case(tmp_path, name)
    about = {"a": {"annotated_labels": [1], "patient": "P"}, "b": {"annotated_labels": []}}
    (tmp_path / "cases.json").write_text(json.dumps(about))
    reports = []
    a, c = cached_cases(tmp_path, tmp_path / "cache", report=reports.append)
    assert (a.name, a.annotated, a.patient) == ("a", (1,), "P")
    assert (c.name, c.annotated, c.patient) == ("c", (1, 7), "c")  # the labels present
    assert reports == []


def test_label_7_is_unmarked_where_nobody_looked_for_it(tmp_path):
    write_case(tmp_path, "a")
    (tmp_path / "cases.json").write_text('{"a": {"annotated_labels": [1, 2]}}')
    dataset = SliceDataset(cached_cases(tmp_path, tmp_path / "cache"))
    slices = [dataset[position] for position in range(40)]
    assert {int(label) for part in slices for label in np.unique(part.labels)} == {0, 1}
    assert np.flatnonzero(slices[0].annotated).tolist() == [0, 1, 2]


@pytest.mark.parametrize("orientation", ORIENTATIONS[::7])
def test_cached_arrays_are_superior_posterior_left(tmp_path, orientation):
    hu, label_map = write_case(tmp_path, "a")
    for path, array in (("images/a_0000.nii.gz", hu), ("labels/a.nii.gz", label_map)):
        save_nifti(tmp_path / path, *reoriented(array, RAS_AFFINE, orientation))
    (case,) = cached_cases(tmp_path, tmp_path / "cache")
    spl = (slice(None), slice(None, None, -1), slice(None, None, -1))
    assert np.array_equal(np.load(case.cached.image), hu.transpose(2, 1, 0)[spl])
    assert np.array_equal(np.load(case.cached.labels), label_map.transpose(2, 1, 0)[spl])
    assert case.cached.spacing == pytest.approx((4, 1.25, 1.5))
    assert case.cached.window == pytest.approx(tuple(np.percentile(hu, (1, 99))))
    assert case.cached.present == (1, 7)
    assert case.cached.slice_labels == (1, 3, 3, 1, 129, 1)


def test_scaled_floats_are_rounded_to_hu(tmp_path):
    hu, _ = write_case(tmp_path, "a")
    values = hu.astype(np.float32) + 0.3
    values[0, 0, 0] = np.nan
    image = save_nifti(tmp_path / "images" / "a_0000.nii.gz", values)
    (case,) = cached_cases(tmp_path, tmp_path / "cache")
    expected = np.rint(np.nan_to_num(nibabel.load(image).get_fdata())).transpose(2, 1, 0)
    assert np.array_equal(np.load(case.cached.image), expected[:, ::-1, ::-1])


def test_the_cache_follows_the_files(tmp_path):
    write_case(tmp_path, "a")
    (first,) = cached_cases(tmp_path, tmp_path / "cache")
    written = first.cached.image.stat().st_mtime_ns
    (again,) = cached_cases(tmp_path, tmp_path / "cache")
    assert again.cached == first.cached
    assert again.cached.image.stat().st_mtime_ns == written

    hu, _ = write_case(tmp_path, "a", seed=1)
    path = tmp_path / "images" / "a_0000.nii.gz"
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 10**9))
    (changed,) = cached_cases(tmp_path, tmp_path / "cache")
    assert np.array_equal(np.load(changed.cached.image), hu.transpose(2, 1, 0)[:, ::-1, ::-1])


@pytest.mark.parametrize("kind", ["labels", "images"])
@pytest.mark.parametrize("mtime", [0, 1, 10**9, None])
def test_the_cache_does_not_believe_times_alone(tmp_path, kind, mtime):
    """A file of the same size and time: label maps at any time, images where it cannot be one."""
    write_case(tmp_path, "a")
    path = tmp_path / kind / ("a.nii" if kind == "labels" else "a_0000.nii")
    (tmp_path / kind / f"{path.name}.gz").unlink()
    arrays = [np.full((12, 10, 6), value, np.uint8) for value in (1, 2)]
    found = []
    for array in arrays:
        save_nifti(path, array)
        if mtime is not None:  # else: just written
            os.utime(path, (mtime, mtime))
        (case,) = cached_cases(tmp_path, tmp_path / "cache")
        found.append(np.load(case.cached.labels if kind == "labels" else case.cached.image).max())
    assert found == ([1, 1] if kind == "images" and mtime == 10**9 else [1, 2])


@pytest.mark.parametrize("name", ["*.hu.npy", "*.labels.npy", "*.json"])
@pytest.mark.parametrize("damage", [lambda content: content[:-9], lambda content: b"x" * 300])
def test_damaged_files_of_the_cache_are_read_again(tmp_path, name, damage):
    write_case(tmp_path, "a")
    (case,) = cached_cases(tmp_path, tmp_path / "cache")
    before = [np.load(path) for path in (case.cached.image, case.cached.labels)]
    (path,) = (tmp_path / "cache").glob(name)
    path.write_bytes(damage(path.read_bytes()))
    reports = []
    (case,) = cached_cases(tmp_path, tmp_path / "cache", report=reports.append)
    assert len(reports) == 1
    for path, array in zip((case.cached.image, case.cached.labels), before, strict=True):
        assert np.array_equal(np.load(path), array)
    assert cached_cases(tmp_path, tmp_path / "cache", report=pytest.fail)


@pytest.mark.parametrize(
    ("mapping", "numbers", "slope", "used"),
    [
        ("totalsegmentator", (0, 255), 1, False),
        ("dataset.json", (1, 4), 1, False),
        ("dataset.json", (1, -1), 1, False),
        ("dataset.json", (1, 70_000), 1, False),
        (None, (0, 255), 1, False),
        (None, (1, -1), 1, False),
        ("btcv", (6, 10), 1, True),  # the portal vein is none of ours
        ("dataset.json", (1, 2), 1, True),
        ("dataset.json", (2, 4), 0.5, True),  # stored twice as large
    ],
)
def test_numbers_that_a_map_does_not_know_are_named(tmp_path, mapping, numbers, slope, used):
    for name in ("a", "b"):
        write_case(tmp_path, name)
    known = 5 if mapping == "totalsegmentator" else 6 if mapping == "btcv" else 1
    for name, (one, other), factor in (("a", (known, 0), 1), ("b", numbers, slope)):
        label_map = np.full((12, 10, 6), one, np.int32)
        label_map[3:5, 4, 2] = other
        image = nibabel.Nifti1Image(label_map, RAS_AFFINE)
        image.header.set_slope_inter(factor, 0)
        nibabel.save(image, tmp_path / "labels" / f"{name}.nii.gz")
    names = {"background": 0, "liver": 1, "vessels": 2}
    (tmp_path / "dataset.json").write_text(json.dumps({"labels": names}))
    chosen = nnunet_label_mapping(tmp_path) if mapping == "dataset.json" else mapping
    chosen = load_label_mapping(mapping) if chosen == mapping and mapping else chosen
    reports = []
    cases = cached_cases(tmp_path, tmp_path / "cache", chosen, reports.append)
    assert [case.name for case in cases] == (["a", "b"] if used else ["a"])
    lines = [line for line in reports if line.startswith("b:")]
    assert len(lines) == (0 if used else 1)
    if used:
        assert cases[1].cached.present == (1,)
    else:
        (stray,) = set(numbers) - {0, 1}
        assert str(stray) in lines[0]


def test_a_label_annotated_everywhere_and_present_nowhere_is_named(tmp_path):
    for name in ("a", "b"):
        write_case(tmp_path, name)
    about = {"a": {"annotated_labels": [1, 2, 3]}, "b": {"annotated_labels": [1, 2]}}
    (tmp_path / "cases.json").write_text(json.dumps(about))
    reports = []
    cases = cached_cases(tmp_path, tmp_path / "cache", report=reports.append)
    assert never_present(cases).endswith(": right kidney")
    assert len(reports) == 1 and str(tmp_path) in reports[0]
    assert never_present([]) == ""


def test_headers_that_disagree_are_reported_by_case(tmp_path):
    for name in ("a", "b", "c", "d", "e"):
        _, label_map = write_case(tmp_path, name)
    moved = RAS_AFFINE.copy()
    moved[0, 3] += 50
    save_nifti(tmp_path / "labels" / "b.nii.gz", label_map, moved)
    save_nifti(tmp_path / "labels" / "c.nii.gz", label_map, RAS_AFFINE * [[-1], [-1], [1], [1]])
    save_nifti(tmp_path / "labels" / "d.nii.gz", label_map[:-1])
    (tmp_path / "labels" / "e.nii.gz").write_bytes(b"nothing")
    reports = []
    cases = cached_cases(tmp_path, tmp_path / "cache", report=reports.append)
    assert [case.name for case in cases] == ["a", "b"]
    assert [line[:2] for line in reports] == ["b:", "c:", "d:", "e:"]
    assert "50.0 mm apart" in reports[0]
    assert "orientations differ" in reports[1]
    assert "shapes" in reports[2]


def test_a_label_map_in_another_orientation_is_paired_where_it_is(tmp_path):
    _, label_map = write_case(tmp_path, "a")
    (usual,) = cached_cases(tmp_path, tmp_path / "cache")
    expected = np.load(usual.cached.labels)
    save_nifti(
        tmp_path / "labels" / "a.nii.gz", *reoriented(label_map, RAS_AFFINE, ORIENTATIONS[9])
    )
    (turned,) = cached_cases(tmp_path, tmp_path / "other")
    assert turned.cached.remark == ""
    assert np.array_equal(np.load(turned.cached.labels), expected)


def test_a_mapping_turns_numbers_into_ours_and_says_what_was_looked_for(tmp_path):
    _, label_map = write_case(tmp_path, "a")
    path = tmp_path / "labels" / "a.nii.gz"
    save_nifti(path, (label_map * 10).astype(np.float32))  # 10 and 70, as floats
    mapping = tmp_path / "mine.json"
    mapping.write_text('{"labels": {"10": 3}, "background": [70], "annotated_labels": [3, 9]}')
    (case,) = cached_cases(tmp_path, tmp_path / "cache", load_label_mapping(str(mapping)))
    assert case.annotated == (3, 9)
    assert case.cached.present == (3,)
    reports = []
    assert cached_cases(tmp_path, tmp_path / "cache", report=reports.append) == []
    assert "DIR=MAP" in reports[0]


def test_cases_of_a_patient_are_never_on_both_sides(tmp_path):
    cases = [Case(f"c{number}", Path(), Path(), patient=f"p{number // 3}") for number in range(60)]
    training, held_out = split_patients(cases, 0.1, seed=0)
    assert len(held_out) == 6
    assert not {case.patient for case in training} & {case.patient for case in held_out}
    assert split_patients(cases[::-1], 0.1, seed=0)[1] == held_out[::-1]
    assert split_patients(cases, 0.1, seed=1)[1] != held_out
    # More patients leave those held out where they are, or move them out of the tenth.
    fewer = split_patients(cases[:30], 0.1, seed=0)[1]
    assert len(fewer) == 3
    _, named = split_patients(cases, 0.1, seed=0, held_out=["c4", "p7"])
    assert {case.name for case in named} == {"c3", "c4", "c5", "c21", "c22", "c23"}
    with pytest.raises(TrainingError, match="nobody"):
        split_patients(cases, 0.1, seed=0, held_out=["nobody"])
    with pytest.raises(TrainingError, match="nothing is left"):
        split_patients(cases[:3], 0.1, seed=0)


def test_intensity_statistics_are_those_of_all_clipped_voxels(tmp_path):
    volumes = [
        write_case(tmp_path, name, seed, shape)[0]
        for seed, (name, shape) in enumerate([("a", (12, 10, 6)), ("b", (20, 9, 5))])
    ]
    cases = cached_cases(tmp_path, tmp_path / "cache")
    voxels = np.concatenate([np.clip(hu.ravel(), *np.percentile(hu, (1, 99))) for hu in volumes])
    assert intensity_statistics(cases) == pytest.approx((voxels.mean(), voxels.std()))


def test_slices_depend_on_seed_and_position_alone(tmp_path):
    for seed, name in enumerate("abc"):
        write_case(tmp_path, name, seed)
    cases = cached_cases(tmp_path, tmp_path / "cache")
    dataset = SliceDataset(cases, seed=3, label_balanced_fraction=0.5)
    forwards = [dataset[position] for position in range(20)]
    backwards = [dataset[position] for position in range(19, -1, -1)][::-1]
    assert all(np.array_equal(a.hu, b.hu) for a, b in zip(forwards, backwards, strict=True))
    other = SliceDataset(cases, seed=4, label_balanced_fraction=0.5)
    assert any(not np.array_equal(other[p].hu, forwards[p].hu) for p in range(20))


@pytest.mark.slow
def test_rare_organs_are_favoured_as_asked(tmp_path):
    write_case(tmp_path, "a")  # 6 slices: label 1 in two, label 7 in one
    cases = cached_cases(tmp_path, tmp_path / "cache")

    def share_of_7(fraction):
        dataset = SliceDataset(cases, label_balanced_fraction=fraction)
        return np.mean([(dataset[position].labels == 7).any() for position in range(600)])

    assert share_of_7(0) == pytest.approx(1 / 6, abs=0.05)
    assert share_of_7(1) == pytest.approx(1 / 2, abs=0.07)


def test_drawn_slices_are_mixed_in_as_asked(tmp_path):
    write_case(tmp_path, "a")
    cases = cached_cases(tmp_path, tmp_path / "cache")
    drawn = Slice(
        hu=np.full((5, 4), 999, np.int16),
        labels=np.zeros((5, 4), np.uint8),
        annotated=annotated_mask((1,)),
        window=(-100.0, 1000.0),
        pixel_mm=1.0,
    )
    dataset = SliceDataset(cases, synthesise=lambda rng: drawn, synthetic_fraction=0.3)
    assert np.mean([dataset[p].hu[0, 0] == 999 for p in range(600)]) == pytest.approx(0.3, abs=0.06)


def test_slices_of_a_batch_share_their_middle():
    sizes = [(20, 40), (33, 17)]
    rng = np.random.default_rng(0)
    slices = [
        Slice(
            hu=rng.integers(-999, 999, size).astype(np.int16),
            labels=np.ones(size, np.uint8),
            annotated=annotated_mask((1,)),
            window=(-1.0, 1.0),
            pixel_mm=0.8,
        )
        for size in sizes
    ]
    batch = collate(slices, multiple=16)
    assert batch.hu.shape == (2, 1, 48, 48)
    around = [((14, 14), (4, 4)), ((7, 8), (15, 16))]
    for index, (rows, columns) in enumerate(sizes):
        padded = np.pad(slices[index].hu, around[index], mode="edge")
        assert np.array_equal(batch.hu[index, 0], padded)
        assert (batch.labels[index] == 1).sum() == rows * columns
        assert (batch.labels[index] == IGNORED).sum() == 48 * 48 - rows * columns


def test_the_table_counts_cases_and_slices(tmp_path):
    for name in "ab":
        write_case(tmp_path, name)
    (tmp_path / "cases.json").write_text('{"a": {"annotated_labels": [1]}}')
    a, b = cached_cases(tmp_path, tmp_path / "cache")
    rows = [line.split() for line in label_table([a, b], []).splitlines()]
    assert rows[1] == ["1", "liver", "2", "2", "4", "0"]
    assert rows[7] == ["7", "right", "adrenal", "gland", "1", "1", "1", "0"]
    assert rows[2][-4:] == ["0", "0", "0", "0"]


def test_the_shared_data_set_is_understood():
    if not SHARED.is_dir():
        return
    cases = {case.name: case for case in find_training_cases(SHARED / "ct")}
    assert cases["amos_0018"].annotated == tuple(range(1, 14))
    assert cases["amos_0018"].window_hu == (-160, 240)
    left_out = {case.name: case for case in find_training_cases(SHARED / "ct", left_out=True)}
    assert not cases.keys() & left_out.keys()
    assert left_out["chaos"].annotated == (1,)
    assert left_out["amos_0013"].annotated == tuple(range(1, 14))


def test_an_nnunet_folder_is_trained_on_and_cases_json_wins(tmp_path):
    for name in "ab":
        write_case(tmp_path, name)
    (tmp_path / "dataset.json").write_text('{"labels": {"background": 0, "spleen": 1, "eso": 2}}')
    (tmp_path / "cases.json").write_text('{"a": {"annotated_labels": [3]}}')
    mapping = nnunet_label_mapping(tmp_path)
    a, b = find_training_cases(tmp_path, mapping)
    assert (a.annotated, b.annotated) == ((3,), (3, 10))
