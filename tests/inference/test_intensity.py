"""Percentiles against numpy, z-scores against their definition."""

import numpy as np
import pytest
import torch

from inference.intensity import clipped_window, normalise, percentiles

PERCENTS = (0.0, 0.37, 1.0, 50.0, 63.1, 99.0, 100.0)


@pytest.mark.parametrize(
    "dtype",
    ["int8", "uint8", "int16", "uint16", ">i2", ">u2", "int32", "uint32", "int64", "<f4", "f8"],
)
@pytest.mark.parametrize("size", [1, 2, 99, 4001])
def test_equal_to_numpy(dtype, size):
    rng = np.random.default_rng(size)
    info = np.iinfo(dtype) if np.dtype(dtype).kind in "iu" else np.iinfo("int16")
    low, high = max(info.min, -40_000), min(info.max, 60_000)
    voxels = rng.integers(low, high, size, endpoint=True).astype(dtype)
    # In float, because numpy interpolates integers in their own type, where differences overflow.
    reference = voxels.astype(float) if voxels.dtype.kind in "iu" else voxels
    assert percentiles(voxels, PERCENTS) == tuple(np.percentile(reference, PERCENTS))


def test_any_memory_order():
    voxels = np.random.default_rng(0).normal(0, 900, (11, 13, 17)).astype(np.int16)
    expected = tuple(np.percentile(voxels, PERCENTS))
    for view in (voxels.T, voxels[::-1], voxels[:, ::-1].transpose(1, 2, 0)):
        assert percentiles(view, PERCENTS) == expected


def test_voxels_that_are_not_finite_do_not_count():
    voxels = np.array([np.nan, 1, 2, 3, np.inf, -np.inf, 4], np.float32)
    assert percentiles(voxels, (0.0, 50.0, 100.0)) == (1, 2.5, 4)
    with pytest.raises(ValueError, match="finite"):
        percentiles(np.full(3, np.nan))


def test_z_scores_of_the_clipped_hu():
    voxels = np.array([-2048, 0, 100, 500, 3000], np.int16)
    slope, intercept = 2.0, -1024.0
    window = (50.0, 600.0)
    hu = slope * np.clip(voxels.astype(float), *window) + intercept
    of_file = {"window": window, "slope": slope, "intercept": intercept}
    z = normalise(torch.from_numpy(voxels), **of_file, mean=70, std=141)
    np.testing.assert_allclose(z.numpy(), (hu - 70) / 141, rtol=1e-5)


@pytest.mark.parametrize(("slope", "intercept"), [(1.0, 0.0), (2.0, -1024.0), (-0.5, 300.0)])
@pytest.mark.parametrize(
    "window", [(-900.0, 500.0), (-50.0, 90.0), (-900.0, -300.0), (400.0, 500.0)]
)
def test_a_clipped_window_is_clipping_twice(slope, intercept, window):
    hu = np.linspace(-2000, 2000, 401)
    voxels = (hu - intercept) / slope
    of_voxels = tuple(sorted((value - intercept) / slope for value in window))
    low, high = clipped_window(of_voxels, (-160, 240), slope, intercept)
    expected = np.clip(np.clip(hu, *window), -160, 240)
    np.testing.assert_allclose(slope * np.clip(voxels, low, high) + intercept, expected)


def test_without_a_range_the_window_is_the_percentiles():
    assert clipped_window((-900.0, 500.0), None, 1, 0) == (-900, 500)
    assert clipped_window((0.0, 0.0), (-160, 240), 0, 7) == (0, 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.int16, torch.float64])
def test_the_voxels_themselves_stay_as_they_are_and_nan_becomes_the_lower_end(dtype):
    voxels = torch.tensor([-5000, 3, 5000], dtype=dtype)
    as_they_are = {"slope": 1, "intercept": 0, "mean": 0, "std": 1}
    normalise(voxels, window=(-1.0, 5.0), **as_they_are)
    assert voxels.tolist() == [-5000, 3, 5000]
    z = normalise(torch.tensor([torch.nan, torch.inf]), window=(-1.0, 3.0), **as_they_are)
    assert z.tolist() == [-1, 3]
