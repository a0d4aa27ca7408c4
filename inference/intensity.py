"""Intensities: clipped to the volume's own percentiles, then z-scored (paper section 2.1)."""

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

# Voxels counted at once. numpy.bincount widens its input to 8 bytes, which should stay in cache;
# but the interpreter may be waited for between chunks, so that there should not be many.
_HISTOGRAM_CHUNK = 1 << 20


def _histogram_percentiles(voxels: np.ndarray, percents: tuple[float, ...]) -> list[float]:
    """Return exact percentiles of 8- and 16-bit integers, by counting instead of sorting."""
    info = np.iinfo(voxels.dtype)
    unsigned = voxels.view(f"u{voxels.dtype.itemsize}")
    counts = np.zeros(1 << info.bits, np.int64)
    for start in range(0, unsigned.size, _HISTOGRAM_CHUNK):
        counts += np.bincount(unsigned[start : start + _HISTOGRAM_CHUNK], minlength=counts.size)
    if info.min < 0:  # two's complement: the negative values are the upper half
        counts = np.roll(counts, counts.size // 2)
    cumulative = np.cumsum(counts)

    positions = np.array(percents) / 100 * (voxels.size - 1)
    ranks = positions.astype(np.int64)
    lower, upper = (
        np.searchsorted(cumulative, np.minimum(found, voxels.size - 1), side="right") + info.min
        for found in (ranks, ranks + 1)
    )
    # As numpy interpolates: from the nearer end, so that the result is the same to the bit.
    fraction, step = positions - ranks, upper - lower
    return np.where(fraction < 0.5, lower + step * fraction, upper - step * (1 - fraction)).tolist()


def percentiles(voxels: np.ndarray, percents: tuple[float, ...] = (1.0, 99.0)) -> tuple[float, ...]:
    """Return percentiles of a whole volume, equal to `numpy.percentile` of its finite voxels.

    The voxels may be of any shape, real type and memory order; the result is in their own units.

    Raises:
        ValueError: no voxel is finite.
    """
    voxels = voxels.ravel(order="K")  # a view where memory is contiguous, however it is turned
    if voxels.dtype.kind in "iu" and voxels.dtype.itemsize <= 2:
        native = voxels.astype(voxels.dtype.newbyteorder("="), copy=False)
        return tuple(_histogram_percentiles(native, percents))
    if voxels.dtype.kind == "f":
        finite = np.isfinite(voxels)
        if not finite.all():
            voxels = voxels[finite]
        if voxels.size == 0:
            raise ValueError("no voxel has a finite value")
    return tuple(float(value) for value in np.percentile(voxels, percents))


def clipped_window(
    window: tuple[float, float],
    clip_hu: tuple[float, float] | None,
    slope: float,
    intercept: float,
) -> tuple[float, float]:
    """Return the part of a window (low, high) within a range of HU, both in the units of voxels.

    HU = slope * voxel + intercept. It is the range's nearer end twice if they do not overlap, and
    the window itself without a range, or if the slope is 0, where all voxels are alike.
    """
    if clip_hu is None or slope == 0:
        return window
    least, most = sorted((value - intercept) / slope for value in clip_hu)
    low, high = (min(max(value, least), most) for value in window)
    return low, high


def normalise(
    slices: "Tensor",
    *,
    window: tuple[float, float],
    slope: float,
    intercept: float,
    mean: float,
    std: float,
) -> "Tensor":
    """Clip slices to a window and z-score them, on whatever device they are on.

    Args:
        slices: voxels as stored in the file, any shape and type.
        window: (low, high), in the same units as `slices`.
        slope, intercept: HU = slope * voxel + intercept.
        mean, std: of the training set's clipped voxels, HU.

    Returns:
        float32 z-scores; voxels that are not numbers (NaN) become the window's lower end.
    """
    low, high = window
    clipped = slices.float()
    if clipped is slices:  # the caller's own stays as it is
        clipped = slices.clone()
    clipped.nan_to_num_(nan=low).clamp_(low, high)
    return clipped.mul_(slope / std).add_((intercept - mean) / std)
