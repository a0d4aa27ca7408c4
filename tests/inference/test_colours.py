"""The labels' colours: for every reader, and as viewers read them."""

import numpy as np
import pytest
from skimage.color import deltaE_ciede2000, rgb2lab

from inference.colours import ITK_SNAP_TABLE, LABEL_COLOURS, SLICER_TABLE, write_colour_tables
from inference.labels import LABEL_NAMES

SIMULATIONS = {
    # Machado, Oliveira and Fernandes 2009, severity 1, for linear RGB.
    "all cones": np.eye(3),
    "no red cones": [
        [0.152286, 1.052583, -0.204868],
        [0.114503, 0.786281, 0.099216],
        [-0.003882, -0.048116, 1.051998],
    ],
    "no green cones": [
        [0.367322, 0.860646, -0.227968],
        [0.280085, 0.672501, 0.047413],
        [-0.011820, 0.042940, 0.968881],
    ],
    "no blue cones": [
        [1.255528, -0.076749, -0.178779],
        [-0.078411, 0.930809, 0.147602],
        [0.004733, 0.691367, 0.303900],
    ],
}


def as_seen(matrix):
    encoded = LABEL_COLOURS[1:] / 255
    linear = np.where(encoded <= 0.04045, encoded / 12.92, ((encoded + 0.055) / 1.055) ** 2.4)
    seen = np.clip(linear @ np.array(matrix).T, 0, 1)
    encoded = np.where(seen <= 0.0031308, 12.92 * seen, 1.055 * seen ** (1 / 2.4) - 0.055)
    return rgb2lab(encoded[None])[0]


@pytest.mark.parametrize("eyes", SIMULATIONS)
def test_any_two_labels_can_be_told_apart(eyes):
    lab = as_seen(SIMULATIONS[eyes])
    difference = deltaE_ciede2000(lab[:, None], lab[None])
    first, second = np.triu_indices(len(lab), 1)
    assert difference[first, second].min() > 8  # 2.3 is just noticeable side by side


def test_none_is_grey_as_the_ct_is():
    lab = rgb2lab(LABEL_COLOURS[None, 1:] / 255)[0]
    assert np.hypot(lab[:, 1], lab[:, 2]).min() > 25


def test_viewers_get_every_label(tmp_path):
    write_colour_tables(tmp_path)
    slicer = [
        line.split()
        for line in (tmp_path / SLICER_TABLE).read_text().splitlines()
        if not line.startswith("#")
    ]
    assert [int(fields[0]) for fields in slicer] == list(range(15))
    assert [fields[1].replace("_", " ") for fields in slicer] == list(LABEL_NAMES)
    assert [[int(value) for value in fields[2:5]] for fields in slicer] == LABEL_COLOURS.tolist()
    assert [int(fields[5]) for fields in slicer] == [0] + [255] * 14
    itk_snap = [
        line
        for line in (tmp_path / ITK_SNAP_TABLE).read_text().splitlines()
        if not line.startswith("#")
    ]
    assert [line.split('"')[1] for line in itk_snap] == list(LABEL_NAMES)
    numbers = [[int(value) for value in line.split('"')[0].split()] for line in itk_snap]
    assert [fields[0] for fields in numbers] == list(range(15))
    assert [fields[1:4] for fields in numbers] == LABEL_COLOURS.tolist()
