"""Flags on label maps that were drawn to have one fault each, and on a phantom without."""

from dataclasses import replace

import numpy as np
import pytest
from conftest import save_nifti

from inference.components import keep_largest_components
from inference.intensity import percentiles
from inference.labels import LABEL_NAMES
from inference.records.flags import PLAUSIBLE_ML, Flag, count_in_words, find_flags, in_words
from inference.volume import read_volume
from synthetic.phantom import draw_phantom, write_nifti

NUMBER = {name: number for number, name in enumerate(LABEL_NAMES)}
LIVER, RIGHT, LEFT = NUMBER["liver"], NUMBER["right kidney"], NUMBER["left kidney"]
MM = 5.0


def volume_of(tmp_path, hu=None, shape=(40, 60, 60)):
    """A volume in LPS with isotropic voxels of 0.125 mL: air, and soft tissue in the middle."""
    if hu is None:
        hu = np.full(shape, -1000, np.int16)
        hu[5:-5, 10:-10, 10:-10] = 60
    affine = np.diag([-MM, -MM, MM, 1.0])
    return read_volume(save_nifti(tmp_path / "a_0000.nii", hu.transpose(2, 1, 0), affine))


def good_label_map(shape=(40, 60, 60)):
    """Liver 1715 mL, kidneys 187.5 mL, the right one on the patient's right: the lower columns."""
    label_map = np.zeros(shape, np.uint8)
    label_map[10:34, 10:34, 5:29] = LIVER
    label_map[5:15, 40:50, 10:25] = RIGHT
    label_map[5:15, 40:50, 35:50] = LEFT
    return label_map


def flags_of(label_map, volume, clip_hu=None):
    sizes = keep_largest_components(label_map)
    return find_flags(label_map, sizes, volume, percentiles(volume.voxels), clip_hu)


def names(flags):
    return {(flag.name, flag.label) for flag in flags}


def faulty(label_map, fault):
    if fault == "none":
        return set()
    if fault == "no liver":
        label_map[label_map == LIVER] = 0
        return {("no liver", LIVER)}
    if fault == "empty":
        label_map[:] = 0
        return {("empty", 0)}
    if fault == "sides":
        label_map[:] = label_map[:, :, ::-1].copy()
        return {("sides", RIGHT), ("sides", LEFT)}
    if fault == "feet up":
        label_map[:] = label_map[::-1].copy()
        return {("orientation", 0)}
    if fault == "upside down":  # as a network labels it
        label_map[(label_map == RIGHT) | (label_map == LEFT)] = 0
        return {("orientation", 0)}
    if fault == "mirrored":  # the same: the true liver is labelled spleen
        label_map[label_map == LIVER] = 0
        label_map[10:30, 10:20, 5:20] = LIVER  # 375 mL
        label_map[10:30, 10:30, 30:40] = NUMBER["spleen"]  # 500 mL
        return {("orientation", 0), ("small", LIVER)}
    if fault == "border":
        label_map[-1, 20, 20] = label_map[-2, 20, 20] = NUMBER["stomach"]
        label_map[30:, 40, 40] = NUMBER["aorta"]
        label_map[15:25, 0, 40:50] = NUMBER["inferior vena cava"]
        return {
            ("border", NUMBER["stomach"]), ("fragment", NUMBER["stomach"]),
            ("border", NUMBER["inferior vena cava"]),
        }  # fmt: skip
    if fault == "pieces":
        label_map[26:34, 10:34, 5:29] = 0
        label_map[30:34, 10:34, 5:29] = LIVER
        return {("pieces", LIVER)}
    if fault == "specks":
        label_map[36, 30, 30] = label_map[38, 30, 30] = LIVER
        return set()
    if fault == "fragment":
        label_map[36, 30, 30:33] = NUMBER["spleen"]  # 0.375 mL, as in the first user's story
        return {("fragment", NUMBER["spleen"])}
    if fault == "small":
        label_map[36, 30:40, 30:40] = NUMBER["spleen"]  # 12.5 mL
        return {("small", NUMBER["spleen"])}
    if fault == "large":
        label_map[34:37, 10:55, 5:55] = NUMBER["spleen"]  # 844 mL
        return {("large", NUMBER["spleen"])}
    raise AssertionError(fault)


@pytest.mark.parametrize(
    "fault",
    ["none", "no liver", "empty", "sides", "feet up", "upside down", "mirrored", "border", "pieces",
     "specks", "fragment", "small", "large"],
)  # fmt: skip
def test_each_fault_has_its_flag_and_no_other(tmp_path, fault):
    label_map = good_label_map()
    expected = faulty(label_map, fault)
    found = flags_of(label_map, volume_of(tmp_path))
    assert names(found) == expected
    assert bool(in_words(found)) == bool(expected)


def test_the_sides_of_a_large_volume_are_told_from_a_sample(tmp_path):
    shape = (100, 210, 210)
    hu = np.full(shape, -1000, np.int16)
    hu[20:-20, 40:-40, 40:-40] = 60
    label_map = np.zeros(shape, np.uint8)
    label_map[20:60, 60:100, 20:100] = LIVER
    label_map[20:31, 130:141, 60:80], label_map[20:31, 130:141, 120:140] = LEFT, RIGHT
    assert {("sides", RIGHT), ("sides", LEFT)} <= names(
        flags_of(label_map, volume_of(tmp_path, hu))
    )


@pytest.mark.parametrize(
    ("change", "is_hu"),
    [
        (lambda hu: hu, True),
        (lambda hu: hu + 1024, False),
        (lambda hu: hu - 1024, False),
        (lambda hu: np.clip(hu, 0, 255), False),
        (lambda hu: (hu - 60) / 400, False),
        (lambda hu: np.where(hu == -1000, -2048, hu), True),  # padding
        (lambda hu: hu * 100.0, False),
    ],
)
def test_intensities_that_are_not_hu(tmp_path, change, is_hu):
    hu = change(volume_of(tmp_path).voxels.astype(np.float32)).astype(np.float32)
    found = names(flags_of(good_label_map(), volume_of(tmp_path, hu)))
    assert (("not HU", 0) in found) != is_hu


@pytest.mark.parametrize(
    ("padding", "clip_hu", "flagged"),
    [(-1024, None, 0), (-2048, None, 0), (-3024, None, 1), (-3024, (-160.0, 240.0), 0)],
)
def test_padding_that_moves_the_percentile(tmp_path, padding, clip_hu, flagged):
    hu = volume_of(tmp_path).voxels.astype(np.int16)
    volume = volume_of(tmp_path, np.where(hu == -1000, padding, hu))
    found = flags_of(good_label_map(), volume, clip_hu)
    assert names(found) == ({("padding", 0)} if flagged else set())


def test_hu_plus_1024_with_its_intercept_is_hu(tmp_path):
    volume = volume_of(tmp_path)
    plus = replace(volume, voxels=volume.voxels + np.int16(1024), intercept=-1024.0)
    assert flags_of(good_label_map(), plus) == []


def test_bounds_hold_the_published_means():
    """Geraghty 2004 and Wang 2012; see the module."""
    for name, means in {
        "liver": (1411, 1710), "spleen": (179.8, 238.4), "pancreas": (64.4, 87.4),
        "left kidney": (156.5, 193.1), "right adrenal gland": (2.59, 6.56),
    }.items():  # fmt: skip
        least, most = PLAUSIBLE_ML[NUMBER[name]]
        assert least < means[0] and means[1] < most


@pytest.mark.slow
def test_the_truth_of_a_phantom_is_plausible(tmp_path):
    phantom = draw_phantom((60, 256, 256), (6.0, 1.6, 1.6), 11)
    write_nifti(tmp_path / "p.nii", phantom.volume, (6.0, 1.6, 1.6))
    volume = read_volume(tmp_path / "p.nii")
    found = flags_of(phantom.label_map.copy(), volume)
    assert not {flag.name for flag in found} & {"not HU", "no liver", "sides", "small", "fragment"}


def test_the_closing_line_counts():
    assert count_in_words([[], []]) == ""
    border, empty = Flag("border", LIVER), Flag("empty")
    line = count_in_words([[border, border], [empty], [border], []])
    assert line == "3 of 4 label maps have flags to check: empty 1, border 2"


@pytest.mark.slow
def test_flags_are_printed_and_counted_unless_quiet(run, cts, ct, capsys):
    cts("shifted", array=np.clip(ct, -1000, None) + 1024)
    for quiet, count in (((), 1), (("--quiet",), 0)):
        assert run(*quiet) == 0
        captured = capsys.readouterr()
        assert captured.err.count("check shifted: ") == count
        assert captured.out.count("not HU 1") == count
