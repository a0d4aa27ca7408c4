"""Largest components against scikit-image's labelling of one organ at a time."""

import numpy as np
import pytest
from skimage.measure import label

from inference.components import keep_largest_components


def plain_largest_components(label_map):
    kept = np.where(label_map == 14, label_map, 0)
    for organ in range(1, 14):
        components = label(label_map == organ, connectivity=1)
        sizes = np.bincount(components.ravel())[1:]
        if sizes.size:
            kept[components == np.argmax(sizes) + 1] = organ
    return kept


@pytest.mark.parametrize("seed", range(6))
def test_equal_to_scikit_image(seed):
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 15, (6, 7, 8)) * (rng.random((6, 7, 8)) < 0.6)
    label_map = np.kron(coarse, np.ones((3, 3, 3))).astype(np.uint8)
    noise = rng.random(label_map.shape) < 0.05
    label_map[noise] = rng.integers(0, 15, noise.sum())
    before, expected = label_map.copy(), plain_largest_components(label_map)
    sizes = keep_largest_components(label_map)
    np.testing.assert_array_equal(label_map, expected)
    for organ in range(1, 14):
        voxels = np.bincount(label(before == organ, connectivity=1).ravel())[1:]
        largest = [*sorted(voxels.tolist(), reverse=True), 0, 0]
        assert [sizes.kept[organ], sizes.next_largest[organ]] == largest[:2]
    assert (sizes.kept[14], sizes.next_largest[14]) == ((before == 14).sum(), 0)


def many_slices():
    """Arms that meet only in the last slice, one that ends, and a helix through all slices."""
    label_map = np.zeros((75, 24, 24), np.uint8)
    label_map[:, 2:4, 2:4] = 1
    label_map[:, 2:4, 8:10] = 1
    label_map[74, 2:4, 2:10] = 1
    label_map[:60, 2:4, 14:20] = 1
    for index in range(75):
        turn = index / 3
        row, column = round(14 + 6 * np.sin(turn)), round(12 + 6 * np.cos(turn))
        label_map[index, row - 1 : row + 2, column - 1 : column + 2] = 7
    label_map[20:30, 13:15, 11:13] = 7
    label_map[::3, 22, 22] = 11  # 25 alike: the first stays
    return label_map


def small_ones():
    """Two alike, of which the lower row stays; corners, which do not connect; tumors; a divider."""
    label_map = np.zeros((5, 6, 12), np.uint8)
    label_map[1, 4:6, 0:2] = label_map[1, 1:3, 4:6] = label_map[3, 0:2, 0:2] = 3
    label_map[0, 0, :2] = label_map[0, 1, 2:5] = 1
    label_map[0, 3, :6] = [2, 2, 5, 2, 2, 2]
    label_map[4, 1, ::2] = 14
    return label_map


@pytest.mark.parametrize("make", [many_slices, small_ones, lambda: np.zeros((2, 3, 4), np.uint8)])
def test_of_chosen_shapes(make):
    label_map = make()
    expected = plain_largest_components(label_map)
    keep_largest_components(label_map)
    np.testing.assert_array_equal(label_map, expected)
