"""The labels' colours: told apart over CT and in legends, and as viewers read them."""

import shlex

import numpy as np
import pytest
from skimage.color import deltaE_ciede2000, rgb2lab

from inference.labels import LABEL_NAMES
from inference.records.colours import (
    ITK_SNAP_TABLE,
    LABEL_COLOURS,
    LEGEND_COLOURS,
    SLICER_TABLE,
    overlay,
    write_colour_tables,
)

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


# Labels that touch or lie within some 10 mm of each other, and those that were confused.
NEAR = {
    "liver": "right kidney/pancreas/aorta/inferior vena cava/right adrenal gland/gallbladder/"
    "esophagus/stomach/duodenum/tumor",
    "right kidney": "left kidney/duodenum/right adrenal gland/aorta/inferior vena cava/"
    "gallbladder/tumor",
    "spleen": "pancreas/stomach/left kidney/inferior vena cava/tumor",
    "pancreas": "inferior vena cava/left adrenal gland/stomach/duodenum/left kidney/tumor",
    "aorta": "inferior vena cava/left adrenal gland/esophagus/duodenum/left kidney",
    "inferior vena cava": "right adrenal gland/esophagus/duodenum",
    "left adrenal gland": "esophagus/stomach/left kidney",
    "gallbladder": "duodenum/stomach/pancreas",
    "esophagus": "stomach",
    "stomach": "duodenum/left kidney",
    "left kidney": "tumor",
    "tumor": "duodenum/right adrenal gland",
}
NEAR_PAIRS = [
    (LABEL_NAMES.index(a), LABEL_NAMES.index(b)) for a, of in NEAR.items() for b in of.split("/")
]
LABELS = np.arange(len(LABEL_NAMES))


def as_seen(rgb, matrix):
    encoded = rgb / 255
    linear = np.where(encoded <= 0.04045, encoded / 12.92, ((encoded + 0.055) / 1.055) ** 2.4)
    seen = np.clip(linear @ np.array(matrix).T, 0, 1)
    encoded = np.where(seen <= 0.0031308, 12.92 * seen, 1.055 * seen ** (1 / 2.4) - 0.055)
    return rgb2lab(encoded)


@pytest.mark.parametrize("eyes", SIMULATIONS)
@pytest.mark.parametrize("hu", [20, 60, 150])  # fat-free tissue without and with contrast
def test_labels_over_ct_can_be_told_apart(eyes, hu):
    lab = as_seen(overlay(np.full(15, float(hu)), LABELS), SIMULATIONS[eyes])
    difference = deltaE_ciede2000(lab[:, None], lab[None])
    near, any_two = (18, 12) if eyes == "all cones" else (10, 6)  # 2.3 is just noticeable
    assert min(difference[pair] for pair in NEAR_PAIRS) > near
    assert difference[np.triu_indices(15, 1)].min() > any_two  # 0 is the tissue's own grey


@pytest.mark.parametrize("page", [0, 255])
def test_a_legend_is_seen_on_black_and_on_white(page):
    lab = rgb2lab(LEGEND_COLOURS[1:] / 255)
    assert deltaE_ciede2000(lab, rgb2lab(np.full((14, 3), page / 255))).min() > 15


def test_an_overlay_shows_tissue_and_the_legend_its_colours():
    hu, label_map = np.array([[-500.0, 40.0, np.nan, 60.0]]), np.array([[0, 0, 0, 5]], np.uint8)
    picture = overlay(hu, label_map)
    assert picture[0, :3].tolist() == [[0] * 3, [127] * 3, [0] * 3]
    assert picture[0, 3].tolist() == LEGEND_COLOURS[5].tolist() != LABEL_COLOURS[5].tolist()


def test_viewers_get_every_label(tmp_path):
    write_colour_tables(tmp_path)
    slicer, itk_snap = (
        [shlex.split(line, comments=True) for line in (tmp_path / table).read_text().splitlines()]
        for table in (SLICER_TABLE, ITK_SNAP_TABLE)
    )
    for label, (row, other) in enumerate(zip(slicer[1:], itk_snap[1:], strict=True)):
        colour, shown = map(str, LABEL_COLOURS[label]), label > 0
        assert row == [str(label), LABEL_NAMES[label].replace(" ", "_"), *colour, str(255 * shown)]
        colour, shown = map(str, LABEL_COLOURS[label]), str(int(shown))
        assert other == [str(label), *colour, shown, shown, shown, LABEL_NAMES[label]]
    assert len(slicer) == 16
