"""Read NIfTI files without resampling: voxels, affine, spacing.

In memory every array is oriented (slices, rows, columns) toward the patient's (Superior, Posterior,
Left), "SPL": each slice is seen as on a radiologist's screen, anterior on top and the patient's
right on the image's left. Only axes are swapped and flipped to get there; oblique and sheared
affines stay as they are. A C-contiguous SPL array is byte for byte an LPS file, the commonest
orientation of CT.
"""

import contextlib
import gzip
import io
import math
import os
import stat
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import nibabel
import numpy as np
from isal import igzip, isal_zlib
from nibabel.filebasedimages import ImageFileError
from nibabel.spatialimages import HeaderDataError
from nibabel.wrapstruct import WrapStructError

ORIENTATION = "SPL"
"""Where the three array axes point."""

_GZIP_MAGIC = b"\x1f\x8b"

_NIFTI2_HEADER_SIZE = 540

_HEADER_BYTES = 544  # of a NIfTI-2 file, with the four bytes that announce extensions

_START_BYTES = 1 << 16  # of a file, in which its header lies, gzipped or not

HEADER_ERRORS = (HeaderDataError, WrapStructError, ValueError, KeyError, OverflowError)
"""What nibabel raises at wild headers."""

GZIP_ERRORS: tuple[type[Exception], ...] = (
    EOFError, gzip.BadGzipFile, zlib.error, isal_zlib.error,  # type: ignore[assignment]
)  # fmt: skip
"""What unpacking damaged gzip data raises."""

_TAIL_BYTES = 1 << 20  # unpacked after the voxels, for the check sum behind them

_LARGEST_OFFSET = 1 << 28  # of the voxels; between header and voxels there may be extensions

_MM_PER_UNIT = {0: 1.0, 1: 1000.0, 2: 1.0, 3: 0.001}  # NIfTI's codes; 0 is unknown
_POSSIBLE_MM = (0.01, 100.0)  # spacings of a CT, from specimens to the thickest slices

_SAME_SIZE = 0.01  # part of a voxel's size by which `pixdim` may differ from the affine

_LONGEST_QUATERNION = 1.0001 + 1e-6  # what rounding makes of length 1; longer is no rotation

Admit = Callable[[nibabel.Nifti1Header, int], None]
"""Called with a file's header and its size in bytes before it is unpacked; raises to refuse it."""

OnContent = Callable[[bytes], None]
"""Called with a file's bytes, before they are unpacked."""


class VolumeError(ValueError):
    """A file that cannot be used as a CT volume; the message is the reason, in one line."""


@dataclass(frozen=True)
class Grid:
    """Where a file's voxels lie.

    Attributes:
        disk_axes: for each SPL axis, the file's axis that it is.
        disk_flips: for each SPL axis, whether the file stores it in reverse.
        spacing: mm between slices, rows and columns; their product is a voxel's volume, mm³.
        notes: what the header leaves open or contradicts, one line each.
    """

    disk_axes: tuple[int, ...]
    disk_flips: tuple[bool, ...]
    spacing: tuple[float, float, float]
    notes: tuple[str, ...]

    def to_spl(self, stored: np.ndarray) -> np.ndarray:
        """Return a view of a file's array, its axes turned to SPL."""
        return self._flipped(stored.transpose(self.disk_axes))

    def as_stored(self, array: np.ndarray) -> np.ndarray:
        """Return a view of an SPL array, its axes turned back to the file's."""
        return self._flipped(array).transpose(np.argsort(self.disk_axes))

    def _flipped(self, array: np.ndarray) -> np.ndarray:
        return array[tuple(slice(None, None, -1 if flip else 1) for flip in self.disk_flips)]


@dataclass(frozen=True)
class Volume(Grid):
    """A CT volume and the on-disk grid it came from.

    Attributes:
        voxels: (slices, rows, columns), SPL, a view in the file's own data type; not HU.
        slope, intercept: HU = slope * voxels + intercept.
        header: the file's NIfTI header, from which the label map's header is made.
    """

    voxels: np.ndarray
    slope: float
    intercept: float
    header: nibabel.Nifti1Header

    @property
    def affine(self) -> np.ndarray:
        """4x4: the file's own voxel indices (i, j, k) to RAS+ coordinates, in the header's unit."""
        return header_affine(self.header)

    @property
    def voxel_ml(self) -> float:
        """Volume of a voxel, mL; finite and positive."""
        return math.prod(self.spacing) / 1000


def header_affine(header: nibabel.Nifti1Header) -> np.ndarray:
    """Return a header's `Volume.affine`: its sform, else its qform, else by `pixdim` alone.

    A quaternion that rounding has made longer than 1 is normalised, where nibabel refuses it.

    Raises:
        VolumeError: the header has no usable one.
    """
    names = ("quatern_b", "quatern_c", "quatern_d")
    length = float(np.linalg.norm([float(header[name]) for name in names]))
    if int(header["sform_code"]) <= 0 < int(header["qform_code"]) and length > 1:
        if not length <= _LONGEST_QUATERNION:
            raise VolumeError(f"its qform is no rotation: its quaternion has length {length:.6g}")
        header = header.copy()
        for name in names:
            header[name] = header[name] / length
    try:
        return header.get_best_affine()
    except (*HEADER_ERRORS, np.linalg.LinAlgError, FloatingPointError) as error:
        raise VolumeError(f"its affine cannot be used ({error})") from error


def orientation(affine: np.ndarray) -> tuple[tuple[int, ...], tuple[bool, ...]]:
    """Return `Grid.disk_axes` and `Grid.disk_flips`, to the nearest axes, of a `Volume.affine`.

    Raises:
        VolumeError: the affine has no such axes (not finite, or singular).
    """
    if not np.isfinite(affine).all() or np.linalg.det(affine[:3, :3]) == 0:
        raise VolumeError("its affine is singular or not finite")
    world = nibabel.io_orientation(affine)
    if sorted(world[:, 0]) != [0, 1, 2]:
        raise VolumeError("its affine has no nearest axes of the patient")
    to_lps = nibabel.orientations.ornt_transform(world, nibabel.orientations.axcodes2ornt("LPS"))
    axes = tuple(int(axis) for axis in np.argsort(to_lps[:, 0])[::-1])
    return axes, tuple(bool(to_lps[axis, 1] < 0) for axis in axes)


def header_grid(header: nibabel.Nifti1Header, pixdim: np.ndarray | None = None) -> Grid:
    """Return the grid of a file's voxels: the affine's, whatever `StoredImage.pixdim` is.

    Raises:
        VolumeError: the header has no usable affine.
    """
    affine, notes = header_affine(header), []
    axes, flips = orientation(affine)
    lengths = nibabel.affines.voxel_sizes(affine)
    # Orthogonal parts of the steps along columns, rows and slices: lengths where the axes are at
    # right angles, the distance of the planes where slices lean. Their product is the determinant.
    steps = np.abs(np.diag(np.linalg.qr(affine[:3, axes[::-1]], mode="r")))[::-1]

    code = int(header["xyzt_units"]) & 7
    unit = _MM_PER_UNIT.get(code, 0.0)
    if not unit:
        notes.append(f"its unit of length is unknown (code {code}): taken as mm")
    elif unit != 1 and _possible(steps) and not _possible(unit * steps):
        notes.append(f"its unit would make its voxels {_mm(unit * lengths)}: taken as mm")
        unit = 0.0
    unit = unit or 1.0
    slice_mm, row_mm, column_mm = (float(step) * unit for step in steps)
    if not 0 < slice_mm * row_mm * column_mm < math.inf:
        raise VolumeError("its affine is singular or not finite")

    sform, qform = int(header["sform_code"]) > 0, int(header["qform_code"]) > 0
    if not (sform or qform):
        codes = "".join(nibabel.aff2axcodes(affine))
        notes.append(f"its orientation is unknown (form codes 0): its axes are taken as {codes}")
    pixdim = np.array(header["pixdim"][1:4] if pixdim is None else pixdim, float)
    if not (np.abs(pixdim - lengths) <= _SAME_SIZE * lengths).all():
        notes.append(
            f"its affine has voxels of {_mm(unit * lengths)}, its pixdim of {_mm(unit * pixdim)}: "
            "the affine is used"
        )
    if sform and qform:
        other = header.copy()
        other["sform_code"] = 0
        with contextlib.suppress(VolumeError):
            if orientation(header_affine(other)) != (axes, flips):
                notes.append("its qform turns or mirrors the axes of its sform: the sform is used")
    return Grid(axes, flips, (slice_mm, row_mm, column_mm), tuple(notes))


def _possible(sizes_mm: np.ndarray) -> bool:
    """Return whether a CT may have voxels of such sizes."""
    return bool(_POSSIBLE_MM[0] <= sizes_mm.min() and sizes_mm.max() <= _POSSIBLE_MM[1])


def _mm(sizes: np.ndarray) -> str:
    return "x".join(f"{size:.4g}" for size in sizes) + " mm"


class StoredImage(NamedTuple):
    """The voxels of a NIfTI file as they are stored.

    Attributes:
        voxels: 3D, the file's axes in its order, its own data type.
        slope, intercept: value = slope * voxels + intercept.
        header: the file's own.
        pixdim: voxel sizes as the file has them; in `header` a 0 is 1, as nibabel reads it.
    """

    voxels: np.ndarray
    slope: float
    intercept: float
    header: nibabel.Nifti1Header
    pixdim: np.ndarray


def _unpacked(content: bytes, size: int, tail: int = _TAIL_BYTES) -> bytearray:
    """Return the first `size` bytes of gzip data of one or more members, fewer if it has no more.

    So many bytes as `tail` are unpacked behind them, so that a check sum which is near is reached.

    Raises:
        VolumeError: the data are damaged or cut short.
    """
    unpacked, length = bytearray(size), 0
    try:
        with igzip.GzipFile(fileobj=io.BytesIO(content)) as file, memoryview(unpacked) as view:
            while length < size and (count := file.readinto(view[length:])):
                length += count
            file.read(tail)
    except GZIP_ERRORS as error:
        raise VolumeError(f"damaged gzip data ({error})") from error
    del unpacked[length:]
    return unpacked


def _header(start: bytes) -> tuple[nibabel.Nifti1Header, np.ndarray]:
    """Return the header at the start of a file, gzipped or not, and its `StoredImage.pixdim`."""
    if start.startswith(_GZIP_MAGIC):
        start = bytes(_unpacked(start, _HEADER_BYTES, 0))
    if not start:
        raise VolumeError("the file is empty")
    if len(start) < nibabel.Nifti1Header.sizeof_hdr:
        raise VolumeError(f"not a NIfTI file: it holds {len(start)} bytes, less than a header")
    nifti2 = _NIFTI2_HEADER_SIZE.to_bytes(4, "little")
    nifti1 = nibabel.Nifti1Header.sizeof_hdr.to_bytes(4, "little")
    if start[:4] not in (nifti1, nifti1[::-1], nifti2, nifti2[::-1]):
        raise VolumeError("not a NIfTI file: it does not start with a header's size")
    kind = nibabel.Nifti2Header if start[:4] in (nifti2, nifti2[::-1]) else nibabel.Nifti1Header
    try:
        header = kind(start[: kind.sizeof_hdr])
        more = header["dim"][4 : int(header["dim"][0]) + 1]
        more[more == 0] = 1  # as the NIfTI library reads it
        header.get_data_shape(), header.get_data_dtype()
        pixdim = kind(start[: kind.sizeof_hdr], check=False)["pixdim"][1:4]
    except (ImageFileError, *HEADER_ERRORS) as error:
        raise VolumeError(f"not a NIfTI file ({error})") from error
    if bytes(header["magic"])[:3] not in (b"n+1", b"n+2"):
        raise VolumeError("not a NIfTI file in one piece (its magic is not n+1 or n+2)")
    return header, pixdim


def _open(path: Path) -> io.FileIO:
    """Open a regular file to read; a pipe would block, and other things are no file."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise VolumeError("not a regular file")
    return path.open("rb", buffering=0)


def read_header(path: Path) -> nibabel.Nifti1Header:
    """Read the header of a NIfTI file, and no more of the file than that takes.

    Raises:
        VolumeError: not such a file.
        OSError: the file cannot be read.
    """
    with _open(path) as file:
        return _header(file.read(_START_BYTES))[0]


def read_stored(
    path: Path, admit: Admit | None = None, on_content: OnContent | None = None
) -> StoredImage:
    """Read a NIfTI-1 or NIfTI-2 file, gzipped or not, by its first bytes; turn no axis.

    Trailing axes of length 1 are allowed; a 2D image is a volume of one slice. Gzip data after the
    voxels of the header's shape are not unpacked. The file stays open from header to voxels: if
    another is renamed to its name meanwhile, what is read is still all of one file.

    Raises:
        VolumeError: not such a file, damaged, cut short, not 3D, of a type that is not a number, or
            written to while it was read.
        OSError: the file cannot be read.
    """
    with _open(path) as file:
        before = os.fstat(file.fileno())
        start = file.read(_START_BYTES)
        header, pixdim = _header(start)
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
        except HEADER_ERRORS as error:
            raise VolumeError(f"its header is damaged ({error})") from error
        if not header.sizeof_hdr <= offset <= _LARGEST_OFFSET:
            raise VolumeError(f"its header is damaged (voxels from byte {offset} on)")
        count = math.prod(shape)
        size = count * dtype.itemsize
        if admit:
            admit(header, before.st_size)

        file.seek(0)
        content = file.readall()
        after = os.fstat(file.fileno())
    unchanged = (before.st_size, before.st_mtime_ns) == (after.st_size, after.st_mtime_ns)
    if not unchanged or not content.startswith(start):
        raise VolumeError("it changed while it was read")
    if on_content:
        on_content(content)
    image: bytes | bytearray = content
    if content.startswith(_GZIP_MAGIC):
        image = _unpacked(content, offset + size)
    if len(image) - offset < size:
        raise VolumeError(f"cut short: {max(0, len(image) - offset)} of {size} bytes of voxels")
    return StoredImage(
        voxels=np.frombuffer(image, dtype, count, offset).reshape(shape, order="F"),
        slope=1.0 if slope is None else float(slope),
        intercept=0.0 if intercept is None else float(intercept),
        header=header,
        pixdim=pixdim,
    )


def read_volume(
    path: Path, admit: Admit | None = None, on_content: OnContent | None = None
) -> Volume:
    """Read a CT volume as `read_stored`, and turn its axes to SPL.

    Raises:
        VolumeError: as `read_stored`, or the affine cannot be used.
        OSError: the file cannot be read.
    """
    stored = read_stored(path, admit, on_content)
    return volume_on(header_grid(stored.header, stored.pixdim), *stored[:4])


def image_volume(image: nibabel.spatialimages.SpatialImage) -> Volume:
    """Return a nibabel image as a volume, with its voxels as HU.

    Raises:
        VolumeError: not one 3D volume of real numbers, or the affine cannot be used.
    """
    image = nibabel.Nifti1Image.from_image(image)
    voxels = np.asanyarray(image.dataobj)
    shape = (*voxels.shape, 1, 1)[:3]
    if voxels.size != math.prod(shape) or not voxels.size or voxels.dtype.kind not in "iuf":
        text = "x".join(map(str, voxels.shape))
        raise VolumeError(f"not one 3D volume of real numbers but {text} {voxels.dtype}")
    return volume_on(header_grid(image.header), voxels.reshape(shape), 1.0, 0.0, image.header)


def volume_on(
    grid: Grid, stored: np.ndarray, slope: float, intercept: float, header: nibabel.Nifti1Header
) -> Volume:
    """Return the volume of voxels that are stored on a grid; arguments as the attributes'."""
    return Volume(
        **vars(grid), voxels=grid.to_spl(stored), slope=slope, intercept=intercept, header=header
    )
