"""CT volumes and label maps on disk: NIfTI files read and written without resampling.

In memory every array is oriented (slices, rows, columns) toward the patient's (Superior, Posterior,
Left), "SPL": each slice is seen as on a radiologist's screen, anterior on top and the patient's
right on the image's left. Only axes are swapped and flipped to get there, so oblique and sheared
affines are kept as they are. A C-contiguous SPL array is byte for byte an LPS file, the commonest
orientation of CT.
"""

import math
import os
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import nibabel
import numpy as np
from isal import igzip, isal_zlib
from nibabel.filebasedimages import ImageFileError
from nibabel.spatialimages import HeaderDataError
from nibabel.wrapstruct import WrapStructError

ORIENTATION = "SPL"
"""Where the three array axes point."""

SUFFIXES = (".nii.gz", ".nii")

_GZIP_MAGIC = b"\x1f\x8b"
_GZIP_WBITS = 31  # zlib's way of asking for gzip's header and trailer
_NIFTI2_HEADER_SIZE = 540
_MM_PER_UNIT = {"meter": 1000.0, "micron": 0.001}


class VolumeError(ValueError):
    """A file that cannot be used as a CT volume; the message is the reason, in one line."""


@dataclass(frozen=True)
class Volume:
    """A CT volume and the on-disk grid it came from.

    Attributes:
        voxels: (slices, rows, columns), SPL, a view in the file's own data type; not HU.
        slope, intercept: HU = slope * voxels + intercept.
        spacing: millimetres between slices, rows and columns.
        header: the file's NIfTI header, from which the label map's header is made.
        disk_axes: for each axis of `voxels`, the file's axis that it is.
        disk_flips: for each axis of `voxels`, whether the file stores it in reverse.
    """

    voxels: np.ndarray
    slope: float
    intercept: float
    spacing: tuple[float, float, float]
    header: nibabel.Nifti1Header
    disk_axes: tuple[int, int, int]
    disk_flips: tuple[bool, bool, bool]

    @property
    def affine(self) -> np.ndarray:
        """4x4: the file's own voxel indices (i, j, k) to RAS+ coordinates."""
        return self.header.get_best_affine()


def case_name(path: Path) -> str:
    """NAME of `NAME_0000.nii.gz`, `NAME.nii.gz` and the same with `.nii` (challenge rule)."""
    for suffix in SUFFIXES:
        if path.name.endswith(suffix):
            return path.name.removesuffix(suffix).removesuffix("_0000")
    raise VolumeError("not a .nii.gz or .nii file")


def find_cases(source: Path) -> list[Path]:
    """The volumes of a folder, sorted by name, hidden files left out; or the one file named."""
    if source.is_file():
        return [source]
    return sorted(
        path
        for path in source.iterdir()
        if path.name.endswith(SUFFIXES) and not path.name.startswith(".") and path.is_file()
    )


def orientation(affine: np.ndarray) -> tuple[tuple[int, int, int], tuple[bool, bool, bool]]:
    """How the axes of a file's array are swapped and flipped to become SPL.

    Args:
        affine: 4x4, voxel indices to RAS+; oblique ones go to the nearest axes.

    Returns:
        For each SPL axis the file's axis, and whether it runs the other way.

    Raises:
        VolumeError: the affine has no such axes (not finite, or singular).
    """
    if not np.isfinite(affine).all() or np.linalg.det(affine[:3, :3]) == 0:
        raise VolumeError("its affine is singular or not finite")
    world = nibabel.io_orientation(affine)  # row: file axis; columns: RAS axis, direction
    axes, flips = [], []
    for ras_axis, ras_direction in ((2, 1), (1, -1), (0, -1)):  # superior, posterior, left
        disk_axis = int(np.flatnonzero(world[:, 0] == ras_axis)[0])
        axes.append(disk_axis)
        flips.append(bool(world[disk_axis, 1] != ras_direction))
    return tuple(axes), tuple(flips)


def _flipped(array: np.ndarray, flips: Iterable[bool]) -> np.ndarray:
    return array[tuple(slice(None, None, -1 if flip else 1) for flip in flips)]


@dataclass(frozen=True)
class StoredImage:
    """A NIfTI file as it is stored.

    Attributes:
        voxels: 3D, the file's axes in its order, its own data type.
        slope, intercept: value = slope * voxels + intercept.
        header: the file's own.
    """

    voxels: np.ndarray
    slope: float
    intercept: float
    header: nibabel.Nifti1Header


def read_stored(path: Path) -> StoredImage:
    """Read a NIfTI-1 or NIfTI-2 file, gzipped or not, as its first bytes tell; turn no axis.

    Trailing axes of length 1 are allowed; a 2D image is a volume of one slice.

    Raises:
        VolumeError: not such a file, damaged, cut short, not 3D, or of a type that is not a number.
        OSError: the file cannot be read.
    """
    content = path.read_bytes()
    if content.startswith(_GZIP_MAGIC):
        try:
            content = igzip.decompress(content)
        except (EOFError, OSError, zlib.error, isal_zlib.IsalError) as error:
            raise VolumeError(f"damaged gzip data ({error})") from error
    nifti2 = _NIFTI2_HEADER_SIZE.to_bytes(4, "little")
    image_class = (
        nibabel.Nifti2Image if content[:4] in (nifti2, nifti2[::-1]) else nibabel.Nifti1Image
    )
    try:
        image = image_class.from_bytes(content)
    except (ImageFileError, HeaderDataError, WrapStructError, ValueError) as error:
        raise VolumeError(f"not a NIfTI file ({error})") from error

    shape = image.header.get_data_shape()
    if len(shape) > 3 and set(shape[3:]) != {1}:
        raise VolumeError(f"not one 3D volume: its shape is {'x'.join(map(str, shape))}")
    shape = (*shape, 1, 1)[:3]
    if 0 in shape:
        raise VolumeError(f"it has no voxels: its shape is {'x'.join(map(str, shape))}")
    dtype = image.header.get_data_dtype()
    if dtype.kind not in "iuf":
        raise VolumeError(f"its voxels are not real numbers but {dtype}")
    count, offset = math.prod(shape), int(image.dataobj.offset)
    if len(content) - offset < count * dtype.itemsize:
        raise VolumeError(f"cut short: {len(content) - offset} of {count * dtype.itemsize} bytes")
    return StoredImage(
        voxels=np.frombuffer(content, dtype, count, offset).reshape(shape, order="F"),
        slope=float(image.dataobj.slope),
        intercept=float(image.dataobj.inter),
        header=image.header,
    )


def read_volume(path: Path) -> Volume:
    """Read a CT volume and turn its axes to SPL.

    Raises:
        VolumeError: as `read_stored`, or the affine has no such axes.
        OSError: the file cannot be read.
    """
    stored = read_stored(path)
    header = stored.header
    axes, flips = orientation(header.get_best_affine())
    zooms = (*header.get_zooms(), 1.0, 1.0)
    unit = _MM_PER_UNIT.get(header.get_xyzt_units()[0], 1.0)
    return Volume(
        voxels=_flipped(stored.voxels.transpose(axes), flips),
        slope=stored.slope,
        intercept=stored.intercept,
        spacing=tuple(float(zooms[axis]) * unit for axis in axes),
        header=header,
        disk_axes=axes,
        disk_flips=flips,
    )


def write_label_map(path: Path, label_map: np.ndarray, volume: Volume) -> None:
    """Write a label map on the grid of the volume it was made from.

    The file has the volume's axis order, shape, affine, sform and qform codes, spacing and units;
    its type is uint8 with `scl_slope` 1. It appears under its name only when it is whole.

    Args:
        path: `NAME.nii.gz`, or `NAME.nii` for a file that is not compressed.
        label_map: (slices, rows, columns), SPL, uint8.
        volume: where the label map belongs.

    Raises:
        ValueError: the label map is not of the volume's shape or not uint8.
        OSError: the file cannot be written.
    """
    if label_map.shape != volume.voxels.shape or label_map.dtype != np.uint8:
        raise ValueError(
            f"a label map of {volume.voxels.shape} uint8 is needed, "
            f"not {label_map.shape} {label_map.dtype}"
        )
    header = volume.header.copy()
    header.set_data_dtype(np.uint8)
    header.set_slope_inter(1, 0)
    header["cal_min"] = header["cal_max"] = 0
    header["intent_code"] = 0
    header["descrip"] = b"abdoseg label map"
    header["magic"] = header.single_magic
    header["vox_offset"] = header.single_vox_offset
    no_extensions = b"\0\0\0\0"

    stored = _flipped(label_map, volume.disk_flips).transpose(np.argsort(volume.disk_axes))
    parts = [header.binaryblock + no_extensions]
    parts.append(stored.ravel(order="F").data)  # copies only where the file is not LPS
    if path.name.endswith(".gz"):
        gzip = isal_zlib.compressobj(level=1, wbits=_GZIP_WBITS)
        parts = [*map(gzip.compress, parts), gzip.flush()]
    write_atomically(path, b"".join(parts))


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file under a hidden temporary name beside it, then rename it.

    Raises:
        OSError: the file cannot be written; nothing is left under either name.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        temporary.write_bytes(data)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
