"""Label maps on disk: written on the grid of the volume they were made from, and known again."""

from pathlib import Path

import nibabel
import numpy as np
from isal import isal_zlib
from nibabel.spatialimages import HeaderDataError
from nibabel.wrapstruct import WrapStructError

from inference.files import write_atomically
from inference.volume import (
    GZIP_WBITS,
    ODD_NUMBERS,
    Volume,
    VolumeError,
    flipped,
    read_header,
    read_stored,
)


def label_map_header(header: nibabel.Nifti1Header) -> nibabel.Nifti1Header:
    """The header of the label map that belongs to a volume, read back by its own rules.

    Raises:
        VolumeError: whoever reads it would not find the volume's grid.
    """
    made = header.copy()
    try:
        made.set_data_dtype(np.uint8)
        made.set_slope_inter(1, 0)
        made["cal_min"] = made["cal_max"] = 0
        made["intent_code"] = 0
        made["descrip"] = b"abdoseg label map"
        made["magic"] = made.single_magic
        made["vox_offset"] = made.single_vox_offset
        read = type(made)(made.binaryblock)
        same = (
            read.get_data_shape() == header.get_data_shape()
            and read.get_data_dtype() == np.uint8
            and np.array_equal(read.get_best_affine(), header.get_best_affine())
        )
    except (HeaderDataError, WrapStructError, *ODD_NUMBERS) as error:
        raise VolumeError(f"no label map can be written with its header ({error})") from error
    if not same:
        raise VolumeError("no label map can be written with its header")
    return made


def is_label_map_of(path: Path, source: Path) -> str:
    """Why a file is not the whole label map of a volume, or "" if it is.

    The gzip check sum, the size, the type, and shape, affine and codes against the volume's header;
    not what the voxels say.

    Args:
        path: of the label map.
        source: of the volume.
    """
    try:
        if not path.is_file():
            return "it is no file"
        label_map, grid = read_stored(path), read_header(source)
        found, wanted = label_map.header, label_map_header(grid)
    except (VolumeError, OSError, EOFError) as error:
        return str(error)
    if found.get_data_dtype() != np.uint8:
        return f"its type is {found.get_data_dtype()}"
    for name, value, right in (
        ("shape", found.get_data_shape(), wanted.get_data_shape()),
        ("affine", found.get_best_affine(), wanted.get_best_affine()),
        ("sform code", int(found["sform_code"]), int(wanted["sform_code"])),
        ("qform code", int(found["qform_code"]), int(wanted["qform_code"])),
    ):
        if not np.array_equal(value, right):
            return f"its {name} is not the volume's"
    return ""


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
    header = label_map_header(volume.header)
    no_extensions = b"\0\0\0\0"

    stored = flipped(label_map, volume.disk_flips).transpose(np.argsort(volume.disk_axes))
    parts = [header.binaryblock + no_extensions]
    parts.append(stored.ravel(order="F").data)  # copies only where the file is not LPS
    if path.name.endswith(".gz"):
        gzip = isal_zlib.compressobj(level=1, wbits=GZIP_WBITS)
        parts = [*map(gzip.compress, parts), gzip.flush()]
    write_atomically(path, b"".join(parts))
