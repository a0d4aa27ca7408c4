"""DSC and NSD of a case: the rules on whole volumes, edges of the rules, odd values."""

from dataclasses import replace

import numpy as np
import pytest
import surface_distance
from harness import AFFINE, blobs, save

from benchmark.scoring.label_map import as_labels
from benchmark.scoring.protocol import PROTOCOLS
from benchmark.scoring.scores import score_case, score_label_maps, surface_area, surface_dice

pytestmark = pytest.mark.filterwarnings(
    "ignore:Please import.*scipy.ndimage:DeprecationWarning"  # inside the surface-distance package
)

SPACING = (0.8, 1.1, 2.5)


def whole_volume_nsd(reference, prediction, spacing, tolerance):
    found = surface_distance.compute_surface_distances(reference, prediction, spacing)
    return surface_distance.compute_surface_dice_at_tolerance(found, tolerance)


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
    seen = set()
    for seed in range(6):
        reference = blobs(seed)
        prediction = np.roll(blobs(seed, noise), (seed % 3, -1, seed % 2), axis=(0, 1, 2))
        prediction[prediction == seed] = 0
        reference[reference == seed + 3] = 0
        spacing = (SPACING, (1.0, 0.5, 2.0))[seed % 2]  # of the second, distances equal tolerances
        scores = score_label_maps(reference, prediction.astype(np.int16), spacing, protocol)
        expected = by_the_rules(reference, prediction, spacing, protocol)
        assert {label: (scores.dsc[label], scores.nsd[label]) for label in scores.dsc} == expected
        seen |= {nsd for _, nsd in expected.values()}
    assert len(seen) > 20  # the cases are not all 0 or 1


def test_nsd_is_zero_below_the_floor_only():
    reference, prediction = np.zeros((2, 40, 12, 12), np.uint8)
    reference[2:22, 3:9, 3:9] = 1
    prediction[19:39, 3:9, 3:9] = 1  # overlap 3 of 20: DSC 0.15
    low = PROTOCOLS["flare23"]
    found = score_label_maps(reference, prediction, (1, 1, 1), low)
    assert (found.dsc[1], found.nsd[1]) == (0.15, 0)
    published = replace(low, nsd_floor=0.1)
    assert score_label_maps(reference, prediction, (1, 1, 1), published).nsd[1] > 0.3
    # Disjoint, but one voxel apart: FLARE 2022 has no floor.
    prediction[:22] = 0
    old = score_label_maps(reference, prediction, (1, 1, 1), PROTOCOLS["flare22"])
    assert (old.dsc[1], old.nsd[1] > 0.1) == (0, True)


@pytest.mark.parametrize("label", [5, 6, 10])
def test_a_one_slice_reference_is_scored_on_that_slice(label):
    reference, prediction = np.zeros((2, 16, 16, 20), np.uint8)
    reference[4:10, 4:10, 7] = label
    prediction[4:10, 4:8, 3:9] = label
    scores = score_label_maps(reference, prediction, SPACING)
    assert scores.dsc[label] == round(2 * 24 / (36 + 24), 4)
    assert 0 < scores.nsd[label] <= 1
    assert len(scores.warnings) == 1


def test_shapes_must_agree():
    with pytest.raises(ValueError, match="shapes"):
        score_label_maps(np.zeros((2, 3, 4), np.uint8), np.zeros((2, 3, 5), np.uint8), SPACING)


@pytest.mark.parametrize(
    ("values", "expected", "warning"),
    [
        (np.array([0.0, 3.0, 14.0]), [0, 3, 14], None),
        (np.array([0.2, 3.7, 14.0]), [0, 3, 14], "2 voxels"),
        (np.array([np.nan, np.inf, 5.0]), [0, 0, 5], "2 voxels"),
        (np.array([15, 14, 255], np.uint8), [0, 14, 0], "2 voxels"),
        (np.array([257, -1, 2], np.int16), [0, 0, 2], "(-1, 257)"),
    ],
)
def test_odd_values_are_taken_and_warned_of(values, expected, warning):
    labels, warnings = as_labels(values)
    assert (labels.tolist(), labels.dtype) == (expected, np.uint8)
    assert [warning in line for line in warnings] == ([True] if warning else [])


def test_float_file_scores_as_its_integers_do(tmp_path):
    labels = blobs(1)
    reference = save(tmp_path / "r/a.nii.gz", labels)
    moved = np.roll(labels, 1, axis=0)
    plain = score_case(reference, save(tmp_path / "p/a.nii.gz", moved))
    floats = score_case(reference, save(tmp_path / "p/b.nii.gz", moved.astype(np.float32)))
    assert (floats.dsc, floats.nsd, floats.warnings) == (plain.dsc, plain.nsd, [])
    assert plain.failure is None
    assert 0.5 < np.mean(list(plain.dsc.values())) < 1


@pytest.mark.parametrize(("shift_mm", "warnings"), [(3, 1), (0.01, 0)])
def test_another_affine_is_warned_of_and_scored(tmp_path, shift_mm, warnings):
    labels, affine = blobs(2), AFFINE.copy()
    affine[0, 3] = shift_mm
    reference = save(tmp_path / "r/a.nii.gz", labels)
    scores = score_case(reference, save(tmp_path / "p/a.nii.gz", labels, affine))
    assert set(scores.dsc.values()) == {1.0}
    assert len(scores.warnings) == warnings


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
