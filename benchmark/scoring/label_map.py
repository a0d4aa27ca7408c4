"""Label maps as stored in files, for scoring: stored axes, values made labels, affines compared."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from nibabel.spatialimages import HeaderDataError

from inference.labels import LABEL_NAMES
from inference.volume import VolumeError, read_stored


class LabelMapError(ValueError):
    """A file without a usable label map; the message is the reason, in one line."""


@dataclass(frozen=True)
class LabelMap:
    """A label map as stored on disk."""

    labels: np.ndarray  # 3D uint8 in the file's own axis order, 0 to 14
    affine: np.ndarray  # 4x4, voxel indices to mm
    spacing: tuple[float, float, float]  # mm along each array axis
    warnings: list[str]  # what had to be done to the file's values


def read_label_map(path: Path) -> LabelMap:
    """Read a NIfTI label map without turning its axes.

    Raises:
        LabelMapError: missing, damaged, not NIfTI, not 3D.
    """
    try:
        stored = read_stored(path)
        affine = stored.header.get_best_affine()
    except FileNotFoundError as error:
        reason = "it is a link that leads nowhere" if path.is_symlink() else "the file is missing"
        raise LabelMapError(reason) from error
    except (OSError, VolumeError, HeaderDataError) as error:
        raise LabelMapError(f"cannot be read ({' '.join(str(error).split())})") from error
    values = stored.voxels
    if (stored.slope, stored.intercept) != (1.0, 0.0):
        values = values * stored.slope + stored.intercept
    labels, warnings = as_labels(values)
    x, y, z = (float(zoom) for zoom in (*stored.header.get_zooms(), 1.0, 1.0)[:3])
    return LabelMap(labels, affine, (x, y, z), warnings)


def as_labels(values: np.ndarray) -> tuple[np.ndarray, list[str]]:
    """Turn the values of a label map into uint8 from 0 to 14, and return what to warn of.

    Fractions are cut off, as the official script's conversion does. Values outside 0 to 14 and NaN
    become background: the official conversion to 8 bits would turn 257 into liver.
    """
    warnings = []
    if values.dtype.kind == "f":
        finite = np.isfinite(values)
        if not finite.all():
            warnings.append(f"{np.count_nonzero(~finite)} voxels are NaN or infinite: background")
            values = np.where(finite, values, 0)
        whole = np.trunc(values)
        if fractional := np.count_nonzero(whole != values):
            warnings.append(f"{fractional} voxels are fractions, not labels: cut off to integers")
        values = whole
    outside = (values < 0) | (values >= len(LABEL_NAMES))
    if outside.any():
        found = np.unique(values[outside])
        shown = ", ".join(f"{value:g}" for value in found[:5]) + ", …" * (len(found) > 5)
        warnings.append(
            f"{np.count_nonzero(outside)} voxels have labels outside 0 to {len(LABEL_NAMES) - 1} "
            f"({shown}): background"
        )
        values = np.where(outside, 0, values)
    return values.astype(np.uint8, copy=False), warnings


def affine_difference(reference: LabelMap, prediction: LabelMap) -> str | None:
    """Return how far apart two affines put the volume's corners; None within a tenth of a voxel."""
    corners = np.array([[*corner, 1] for corner in np.ndindex(2, 2, 2)], float)
    corners[:, :3] *= np.array(reference.labels.shape) - 1
    shift = np.linalg.norm(corners @ (prediction.affine - reference.affine).T, axis=1).max()
    return None if shift <= 0.1 * min(reference.spacing) else f"up to {shift:.3g} mm"


def joined(numbers: Iterable[float]) -> str:
    """Return numbers as 512x512x60."""
    return "x".join(f"{number:g}" for number in numbers)
