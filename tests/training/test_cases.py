"""Data sets on disk, the cache, the patients held out, and the sampling of slices."""

import json
import os
from collections import Counter
from dataclasses import replace
from pathlib import Path

import nibabel
import numpy as np
import pytest
from conftest import ORIENTATIONS, RAS_AFFINE, reoriented, save_nifti
from small_data import cached, describe, labelled, read, write_case

from training import TrainingError
from training.__main__ import main
from training.cases import (
    CachedVolume,
    Case,
    CaseFiles,
    find_training_cases,
    intensity_statistics,
)
from training.cases import split_patients as split
from training.label_mapping import CHALLENGE, load_label_mapping, nnunet_label_mapping
from training.recipe import Recipe
from training.tables import Score, read_scores, write_table


@pytest.mark.parametrize(
    "kinds", [("images", "labels"), ("imagesTr", "labelsTr"), ("imagesTr2200", "labelsTr2200")]
)
def test_the_layouts_are_found(tmp_path, kinds):
    write_case(tmp_path, "a", kinds=kinds)
    write_case(tmp_path, "b_0000", kinds=kinds)
    save_nifti(tmp_path / kinds[0] / "unlabelled_0000.nii.gz", np.zeros((3, 3, 3), np.int16))
    cases, _ = find_training_cases(tmp_path)
    assert [(case.name, case.annotated) for case in cases] == [("a", None), ("b_0000", None)]
    with pytest.raises(TrainingError):
        find_training_cases(tmp_path / kinds[0])


def test_the_description_says_who_looked_for_what(tmp_path):
    for name in "abcd":
        write_case(tmp_path, name)
    about = {"a": {"annotated_labels": [1, 7], "patient": "P"}, "b": {"annotated_labels": []}}
    describe(tmp_path, **about, d={"split": "left_out", "label_quality": "model"})
    a, c = cached(tmp_path, tmp_path / "cache")
    assert (a.name, a.annotated, a.patient) == ("a", (1, 7), "P")
    assert (c.name, c.annotated, c.patient) == ("c", (1,), "c")  # the labels present
    (d,) = read(tmp_path, left_out=True).cases
    assert (d.name, d.files.expert) == ("d", False)
    (tmp_path / "dataset.json").write_text('{"labels": {"background": 0, "spleen": 1, "eso": 2}}')
    a, c, d = find_training_cases(tmp_path, nnunet_label_mapping(tmp_path))[0]
    assert (a.annotated, c.annotated) == ((1, 7), (3, 10))  # cases.json wins
    assert (c.left_out, d.left_out) == (False, True)


@pytest.mark.parametrize(
    "about",
    [
        {"split": "leftout"},
        {"slices": "some"},
        {"window_hu": [240, -160]},
        {"window_hu": 7},
        {"annotated_labels": [99]},
        {"annotated_labels": 1},
        [],
    ],
)
def test_a_word_that_is_not_understood_is_an_error(tmp_path, about):
    write_case(tmp_path, "a")
    describe(tmp_path, a=about)
    with pytest.raises(TrainingError):
        find_training_cases(tmp_path)


@pytest.mark.parametrize("orientation", ORIENTATIONS[::7])
def test_cached_arrays_are_superior_posterior_left(tmp_path, orientation):
    hu, label_map = write_case(tmp_path, "a")
    for path, array in (("images/a_0000.nii.gz", hu), ("labels/a.nii.gz", label_map)):
        save_nifti(tmp_path / path, *reoriented(array, RAS_AFFINE, orientation))
    (case,) = cached(tmp_path, tmp_path / "cache")
    spl = (slice(None), slice(None, None, -1), slice(None, None, -1))
    assert np.array_equal(case.cached.hu, hu.transpose(2, 1, 0)[spl])
    assert np.array_equal(case.cached.label_map, label_map.transpose(2, 1, 0)[spl])
    assert case.cached.spacing == pytest.approx((4, 1.25, 1.5))
    assert case.cached.window == pytest.approx(tuple(np.percentile(hu, (1, 99))))
    assert (case.cached.present, case.cached.slice_labels) == ((1,), (1, 3, 3, 3, 1, 1))


def test_scaled_floats_are_rounded_to_hu(tmp_path):
    hu = np.random.default_rng(0).normal(0, 300, (12, 10, 6)).astype(np.float32)
    hu[0, 0, 0] = np.nan
    write_case(tmp_path, "a", hu=hu)
    (case,) = cached(tmp_path, tmp_path / "cache")
    expected = np.rint(np.nan_to_num(hu)).transpose(2, 1, 0)
    assert np.array_equal(case.cached.hu, expected[:, ::-1, ::-1])


def test_names_that_the_locale_cannot_decode_are_read(tmp_path):
    folder = tmp_path / "M\udcc3\udcbcller"  # as Python reads UTF-8 names in an ASCII locale
    write_case(folder, "a\udcfc")
    (case,) = cached(folder, tmp_path / "cache")
    score = Score(0, case.files.data_set, "a", 1, 0.5, 0.5)
    write_table(tmp_path / "scores.csv", Score, [score])
    assert read_scores(tmp_path / "scores.csv")[0].data_set == "Müller"
    assert split([case, replace(case, files=replace(case.files, patient="b"))], Recipe())


@pytest.mark.parametrize("kind", ["labels", "images"])
@pytest.mark.parametrize("mtime", [0, 1, 10**9, None])
def test_the_cache_does_not_believe_times_alone(tmp_path, kind, mtime):
    """A file of the same size and time: label maps at any time, images where it cannot be one."""
    write_case(tmp_path, "a")
    path = tmp_path / kind / ("a.nii" if kind == "labels" else "a_0000.nii")
    (tmp_path / kind / f"{path.name}.gz").unlink()
    found = []
    for value in (1, 2):
        save_nifti(path, np.full((12, 10, 6), value, np.uint8))
        if mtime is not None:  # else: just written
            os.utime(path, (mtime, mtime))
        (case,) = cached(tmp_path, tmp_path / "cache")
        found.append(case.cached.label_map.max() if kind == "labels" else case.cached.hu.max())
    assert found == ([1, 1] if kind == "images" and mtime == 10**9 else [1, 2])


@pytest.mark.parametrize("name", ["*.hu.npy", "*.labels.npy", "*.json"])
@pytest.mark.parametrize("damage", [lambda content: content[:-9], lambda content: b"x" * 300])
def test_damaged_files_of_the_cache_are_read_again(tmp_path, capsys, name, damage):
    write_case(tmp_path, "a")
    (case,) = cached(tmp_path, tmp_path / "cache")
    before = case.cached.hu.copy(), case.cached.label_map.copy()
    (path,) = (tmp_path / "cache").glob(name)
    path.write_bytes(damage(path.read_bytes()))
    for lines in (1, 0):
        (case,) = cached(tmp_path, tmp_path / "cache")
        assert len(capsys.readouterr().out.splitlines()) == lines
        assert np.array_equal(case.cached.hu, before[0])
        assert np.array_equal(case.cached.label_map, before[1])


@pytest.mark.parametrize(
    ("mapping", "numbers", "slope", "used"),
    [
        ("totalsegmentator", (0, 255), 1, False),
        ("dataset.json", (1, 4), 1, False),
        ("dataset.json", (1, -1), 1, False),
        ("dataset.json", (1, 70_000), 1, False),
        (None, (0, 255), 1, False),
        (None, (1, -1), 1, False),
        ("mine.json", (10, 70), 1, False),
        ("mine.json", (10, 80), 1, True),
        ("btcv", (6, 10), 1, True),  # the portal vein is none of ours
        ("dataset.json", (1, 2), 1, True),
        ("dataset.json", (2, 4), 0.5, True),  # stored twice as large
    ],
)
def test_numbers_that_a_map_does_not_know_are_named(tmp_path, mapping, numbers, slope, used):
    label_map = np.full((12, 10, 6), numbers[0], np.int32)
    label_map[3:5, 4, 2] = numbers[1]
    write_case(tmp_path, "a", label_map)
    image = nibabel.Nifti1Image(label_map, RAS_AFFINE)
    image.header.set_slope_inter(slope, 0)
    nibabel.save(image, tmp_path / "labels" / "a.nii.gz")
    names = {"background": 0, "liver": 1, "vessels": 2}
    (tmp_path / "dataset.json").write_text(json.dumps({"labels": names}))
    mine = {"labels": {"10": 1}, "background": [80], "annotated_labels": [1, 9]}
    (tmp_path / "mine.json").write_text(json.dumps(mine))
    if mapping == "mine.json":
        mapping = str(tmp_path / mapping)
    if mapping == "dataset.json":
        chosen = nnunet_label_mapping(tmp_path)
    else:
        chosen = load_label_mapping(mapping) if mapping else CHALLENGE
    data_set = read(tmp_path, tmp_path / "cache", chosen)
    if used:
        assert [case.cached.present for case in data_set.cases] == [(1,)]
    else:
        ((reason, cases),) = data_set.unused.items()
        assert cases == ["a"] and str(numbers[1]) in reason


FAULTY = {
    "unseen": {"split": "left_out"},
    "empty": {"annotated_labels": []},
    "gone": {"annotated_labels": [1]},
    "unlisted": {"annotated_labels": [1]},
}


@pytest.fixture
def faulty(tmp_path):
    folder = describe(tmp_path / "set", **FAULTY)
    moved = RAS_AFFINE.copy()
    moved[0, 3] += 50
    for name in ("good", "unseen", "empty", "unlabelled", "damaged"):
        write_case(folder, name)
    write_case(folder, "moved", affine=moved)
    write_case(folder, "turned", affine=RAS_AFFINE * [[-1], [-1], [1], [1]])
    write_case(folder, "blank", labelled(0))
    write_case(folder, "strange", labelled(40))
    write_case(folder, "unlisted", labelled(7))
    write_case(folder, "picture", hu=np.full((12, 10, 6), 90, np.int16))
    save_nifti(folder / "labels" / "lonely.nii.gz", labelled())
    save_nifti(folder / "labels" / "damaged.nii.gz", labelled()[:-1])
    (folder / "labels" / "unlabelled.nii.gz").unlink()
    return folder


def test_every_fault_is_named_with_its_case(faulty, tmp_path, capsys):
    before = sorted(faulty.rglob("*"))
    assert main(["check", "--data", str(faulty)]) == 1
    assert sorted(faulty.rglob("*")) == before  # it writes nothing
    data_set = read(faulty)
    unused = ["blank", "damaged", "empty", "gone", "lonely", "strange", "turned", "unlabelled"]
    assert sorted(data_set.unused.values()) == [[name] for name in unused]
    assert sorted(data_set.doubts.values()) == [["moved"], ["picture"], ["unlisted"]]
    assert [case.name for case in data_set.cases] == ["good", "moved", "picture", "unlisted"]
    lines = capsys.readouterr().out.splitlines()
    # Annotated in all four, present in three, in three slices of each.
    assert [line.split() for line in lines if line.startswith(" 1 liver")] == [
        ["1", "liver", "4", "3", "9", "0"]
    ]
    with pytest.raises(SystemExit, match="2"):
        main(["check", "--data", str(faulty.parent / "nothing")])


def test_a_label_annotated_everywhere_and_present_nowhere_is_named(tmp_path):
    for name in "ab":
        write_case(tmp_path, name)
    describe(tmp_path, a={"annotated_labels": [1, 2, 3]}, b={"annotated_labels": [1, 2]})
    ((reason, names),) = read(tmp_path).doubts.items()
    assert reason.endswith(": right kidney") and names == ["a", "b"]


def test_a_label_map_in_another_orientation_is_paired_where_it_is(tmp_path):
    _, label_map = write_case(tmp_path, "a")
    (usual,) = cached(tmp_path, tmp_path / "cache")
    expected = usual.cached.label_map.copy()
    save_nifti(
        tmp_path / "labels" / "a.nii.gz", *reoriented(label_map, RAS_AFFINE, ORIENTATIONS[9])
    )
    (turned,) = cached(tmp_path, tmp_path / "other")
    assert turned.cached.remark == ""
    assert np.array_equal(turned.cached.label_map, expected)


def volume() -> CachedVolume:
    empty = np.zeros((1, 1, 1), np.int16)
    return CachedVolume(empty, empty, (1, 1, 1), (1, 1, 1), (0, 1), 1, 0, 0, (1,))


def test_cases_of_a_patient_are_never_on_both_sides():
    cases = [
        Case(CaseFiles("d", f"c{n}", Path(), Path(), patient=f"p{n // 3}"), (1,), volume())
        for n in range(60)
    ]
    tenth = Recipe(held_out_fraction=0.1)
    training, held_out = split(cases, tenth)
    assert len(held_out) == 6
    assert not {case.patient for case in training} & {case.patient for case in held_out}
    assert split(cases[::-1], tenth)[1] == held_out[::-1]
    assert split(cases, replace(tenth, seed=1))[1] != held_out
    # More patients leave those held out where they are, or move them out of the tenth.
    assert len(split(cases[:30], tenth)[1]) == 3
    _, named = split(cases, tenth, ["c4", "p7"])
    assert {case.name for case in named} == {"c3", "c4", "c5", "c21", "c22", "c23"}
    folds = [split(cases, Recipe(seed=7, folds=6, fold=number))[1] for number in range(6)]
    names = Counter(case.name for part in folds for case in part)
    assert names == Counter(case.name for case in cases)
    assert sorted(len(part) for part in folds) == [9, 9, 9, 9, 12, 12]  # 3 or 4 patients
    every = [case.name for case in cases]
    for recipe, named in ((tenth, ["nobody"]), (Recipe(folds=30), None), (tenth, every)):
        with pytest.raises(TrainingError):
            split(cases, recipe, named)


def test_intensity_statistics_are_those_of_all_clipped_voxels(tmp_path):
    volumes = [
        write_case(tmp_path, name, labelled(shape=shape), seed=seed)[0]
        for seed, (name, shape) in enumerate([("a", (12, 10, 6)), ("b", (20, 9, 5))])
    ]
    voxels = np.concatenate([np.clip(hu.ravel(), *np.percentile(hu, (1, 99))) for hu in volumes])
    cases = cached(tmp_path, tmp_path / "cache")
    assert intensity_statistics([case.cached for case in cases]) == pytest.approx(
        (voxels.mean(), voxels.std())
    )
