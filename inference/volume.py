"""CT volumes and label maps on disk: NIfTI files read and written without resampling.

In memory every array is oriented (slices, rows, columns) toward the patient's (Superior, Posterior,
Left), "SPL": each slice is seen as on a radiologist's screen, anterior on top and the patient's
right on the image's left. Only axes are swapped and flipped to get there, so oblique and sheared
affines are kept as they are. A C-contiguous SPL array is byte for byte an LPS file, the commonest
orientation of CT.
"""

import math
import stat
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import nibabel
import numpy as np
from isal import isal_zlib
from nibabel.filebasedimages import ImageFileError
from nibabel.spatialimages import HeaderDataError
from nibabel.wrapstruct import WrapStructError

ORIENTATION = "SPL"
"""Where the three array axes point."""

_GZIP_MAGIC = b"\x1f\x8b"

GZIP_WBITS = 31  # zlib's way of asking for gzip's header and trailer

_NIFTI2_HEADER_SIZE = 540

_HEADER_BYTES = 544  # of a NIfTI-2 file, with the four bytes that announce extensions

ODD_NUMBERS = (ValueError, KeyError, OverflowError)  # what nibabel raises at wild headers

_TAIL_BYTES = 1 << 20  # looked at after the voxels, for the check sum behind them

_LARGEST_OFFSET = 1 << 28  # of the voxels; between header and voxels there may be extensions

_MM_PER_UNIT = {"meter": 1000.0, "micron": 0.001}

Admit = Callable[[nibabel.Nifti1Header, int], None]
"""Called with a file's header and its bytes before it is unpacked; raises to refuse it."""

OnContent = Callable[[bytes], None]
"""Called with all that a file holds, as it was read and before it is unpacked."""


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
    if sorted(world[:, 0]) != [0, 1, 2]:
        raise VolumeError("its affine does not tell where the axes point")
    axes, flips = [], []
    for ras_axis, ras_direction in ((2, 1), (1, -1), (0, -1)):  # superior, posterior, left
        disk_axis = int(np.flatnonzero(world[:, 0] == ras_axis)[0])
        axes.append(disk_axis)
        flips.append(bool(world[disk_axis, 1] != ras_direction))
    return tuple(axes), tuple(flips)


def flipped(array: np.ndarray, flips: Iterable[bool]) -> np.ndarray:
    """A view of an array, some of its axes reversed."""
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


def _unpacked(content: bytes, size: int) -> bytes:
    """The first `size` bytes of what gzip data holds; all members count, as in `cat a.gz b.gz`."""
    parts, length = [], 0
    while length < size and content.startswith(_GZIP_MAGIC):
        member = isal_zlib.decompressobj(wbits=GZIP_WBITS)
        parts.append(member.decompress(content, size - length))
        length += len(parts[-1])
        if length == size and not member.eof:  # a little more than the voxels: is the rest whole?
            rest = member.decompress(member.unconsumed_tail, _TAIL_BYTES)
            if len(rest) == _TAIL_BYTES:
                break
        if not member.eof:
            raise EOFError("it ends before its end mark")
        content = member.unused_data
    return parts[0] if len(parts) == 1 else b"".join(parts)


def _header(start: bytes) -> nibabel.Nifti1Header:
    """The header at the start of a file that is not, or no longer, compressed.

    Raises:
        VolumeError: there is none.
    """
    if len(start) < nibabel.Nifti1Header.sizeof_hdr:
        raise VolumeError(f"not a NIfTI file: it holds {len(start)} bytes, less than a header")
    nifti2 = _NIFTI2_HEADER_SIZE.to_bytes(4, "little")
    nifti1 = nibabel.Nifti1Header.sizeof_hdr.to_bytes(4, "little")
    if start[:4] not in (nifti1, nifti1[::-1], nifti2, nifti2[::-1]):
        raise VolumeError("not a NIfTI file: it does not begin with a header's size")
    kind = nibabel.Nifti2Header if start[:4] in (nifti2, nifti2[::-1]) else nibabel.Nifti1Header
    try:
        header = kind(start[: kind.sizeof_hdr])
        header.get_data_shape(), header.get_data_dtype()
    except (ImageFileError, HeaderDataError, WrapStructError, *ODD_NUMBERS) as error:
        raise VolumeError(f"not a NIfTI file ({error})") from error
    if bytes(header["magic"])[:3] not in (b"n+1", b"n+2"):
        raise VolumeError("not a NIfTI file in one piece (its magic is not n+1 or n+2)")
    return header


def _insist_on_a_file(path: Path) -> None:
    """Refuse a pipe, which would be waited for without end, and whatever else is no file."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise VolumeError("not a regular file")


def read_header(path: Path) -> nibabel.Nifti1Header:
    """The header of a NIfTI file; no more of the file is read than it takes.

    Raises:
        VolumeError: not such a file.
        OSError: the file cannot be read.
    """
    _insist_on_a_file(path)
    with path.open("rb") as file:
        start = file.read(1 << 16)
    if start.startswith(_GZIP_MAGIC):
        try:
            start = isal_zlib.decompressobj(wbits=GZIP_WBITS).decompress(start, _HEADER_BYTES)
        except (zlib.error, isal_zlib.IsalError) as error:
            raise VolumeError(f"damaged gzip data ({error})") from error
    return _header(start)


def read_stored(
    path: Path, admit: Admit | None = None, on_content: OnContent | None = None
) -> StoredImage:
    """Read a NIfTI-1 or NIfTI-2 file, gzipped or not, as its first bytes tell; turn no axis.

    Trailing axes of length 1 are allowed; a 2D image is a volume of one slice. What a gzip file
    holds beyond the voxels that its header speaks of is not unpacked.

    Args:
        path: of the file.
        admit: called before anything is unpacked, with the header and the bytes of the file; raises
            where that is too much.
        on_content: called with the file's bytes, for those who keep a check sum of them.

    Raises:
        VolumeError: not such a file, damaged, cut short, not 3D, or of a type that is not a number.
        OSError: the file cannot be read.
    """
    _insist_on_a_file(path)
    file_size = path.stat().st_size
    if file_size == 0:
        raise VolumeError("the file is empty")
    header = read_header(path)
    shape = header.get_data_shape()
    text = "x".join(map(str, shape))
    if len(shape) > 3 and set(shape[3:]) != {1}:
        raise VolumeError(f"not one 3D volume: its shape is {text}")
    shape = (*shape, 1, 1)[:3]
    if min(shape) < 1:
        raise VolumeError(f"it has no voxels: its shape is {text}")
    dtype = header.get_data_dtype()
    if dtype.kind not in "iuf":
        raise VolumeError(f"its voxels are not real numbers but {dtype}")
    try:
        offset = int(header.get_data_offset())
        slope, intercept = header.get_slope_inter()
    except (HeaderDataError, *ODD_NUMBERS) as error:
        raise VolumeError(f"its header is damaged ({error})") from error
    if not header.sizeof_hdr <= offset <= _LARGEST_OFFSET:
        raise VolumeError(f"its header is damaged (voxels that begin at byte {offset})")
    count = math.prod(shape)
    size = count * dtype.itemsize
    if admit:
        admit(header, file_size)

    content = path.read_bytes()
    if on_content:
        on_content(content)
    if content.startswith(_GZIP_MAGIC):
        try:
            content = _unpacked(content, offset + size)
        except (EOFError, OSError, zlib.error, isal_zlib.IsalError) as error:
            raise VolumeError(f"damaged gzip data ({error})") from error
    if len(content) - offset < size:
        raise VolumeError(f"cut short: {max(0, len(content) - offset)} of {size} bytes of voxels")
    return StoredImage(
        voxels=np.frombuffer(content, dtype, count, offset).reshape(shape, order="F"),
        slope=1.0 if slope is None else float(slope),
        intercept=0.0 if intercept is None else float(intercept),
        header=header,
    )


def read_volume(
    path: Path, admit: Admit | None = None, on_content: OnContent | None = None
) -> Volume:
    """Read a CT volume and turn its axes to SPL.

    Args:
        path: of the file.
        admit, on_content: as in `read_stored`.

    Raises:
        VolumeError: as `read_stored`, or the affine has no such axes.
        OSError: the file cannot be read.
    """
    stored = read_stored(path, admit, on_content)
    header = stored.header
    try:
        axes, flips = orientation(header.get_best_affine())
        unit = _MM_PER_UNIT.get(header.get_xyzt_units()[0], 1.0)
    except KeyError:
        units = int(header["xyzt_units"])
        raise VolumeError(f"its header has unknown units (xyzt_units {units})") from None
    except (HeaderDataError, np.linalg.LinAlgError, FloatingPointError) as error:
        raise VolumeError(f"its affine cannot be used ({error})") from error
    zooms = (*header.get_zooms(), 1.0, 1.0)
    return Volume(
        voxels=flipped(stored.voxels.transpose(axes), flips),
        slope=stored.slope,
        intercept=stored.intercept,
        spacing=tuple(float(zooms[axis]) * unit for axis in axes),
        header=header,
        disk_axes=axes,
        disk_flips=flips,
    )
