"""Write label maps on the grid of the volume they are of, and check them."""

import math
from pathlib import Path

import nibabel
import numpy as np
from isal import isal_zlib

from .files import write_atomically
from .records.provenance import format_signature, same_signature
from .volume import GZIP_ERRORS, HEADER_ERRORS, Volume, VolumeError, header_affine, read_header

_GZIP_WBITS = 31  # zlib's way of asking for gzip's header and trailer


def label_map_header(
    header: nibabel.Nifti1Header, signature: str | None = None
) -> nibabel.Nifti1Header:
    """Return the header of the label map of a volume.

    It is the volume's own but for type, scaling and texts: those of the input may name a patient.
    The signature becomes its `descrip`, at most 79 bytes of ASCII; by default the program's alone.

    Raises:
        VolumeError: whoever reads it would not find the volume's grid.
    """
    made = header.copy()
    try:
        made.set_data_dtype(np.uint8)
        made.set_slope_inter(1, 0)
        made["cal_min"] = made["cal_max"] = 0
        made["intent_code"] = 0
        for name in made.template_dtype.names:
            if made.template_dtype[name].kind == "S" and name != "regular":
                made[name] = b""
        made["descrip"] = (signature or format_signature()).encode("ascii", "replace")
        made["magic"] = made.single_magic
        made["vox_offset"] = made.single_vox_offset
        read = type(made)(made.binaryblock)
        same = (
            read.get_data_shape() == header.get_data_shape()
            and read.get_data_dtype() == np.uint8
            and np.array_equal(header_affine(read), header_affine(header))
        )
    except HEADER_ERRORS as error:
        raise VolumeError(f"no label map can be written with its header ({error})") from error
    if not same:
        raise VolumeError("no label map can be written with its header")
    return made


def why_not_label_map_of(
    path: Path, header: nibabel.Nifti1Header, signature: str | None = None
) -> str:
    """Return why a file is not the whole label map of a volume, or "" if it is.

    Checked are its header (type; shape, affine and codes against the volume's; signature), then
    size and gzip check sum; not the voxels.

    Args:
        path: of the label map, gzipped.
        header: of the volume.
        signature: that it must have, but for the names of weights; None: any.
    """
    try:
        if not path.is_file():
            return "it is no file"
        found, wanted = read_header(path), label_map_header(header)
        if found.get_data_dtype() != np.uint8:
            return f"its type is {found.get_data_dtype()}"
        for name, value, right in (
            ("shape", found.get_data_shape(), wanted.get_data_shape()),
            ("affine", header_affine(found), header_affine(wanted)),
            ("sform code", int(found["sform_code"]), int(wanted["sform_code"])),
            ("qform code", int(found["qform_code"]), int(wanted["qform_code"])),
        ):
            if not np.array_equal(value, right):
                return f"its {name} is not the volume's"
        made_by = bytes(found["descrip"].item()).decode("ascii", "replace")
        if signature is not None and not same_signature(made_by, signature):
            return f"it was made by {made_by or 'an unknown program'}, not by {signature}"
        size = int(found["vox_offset"]) + math.prod(map(int, found.get_data_shape()))
        unpacker = isal_zlib.decompressobj(wbits=_GZIP_WBITS)
        length = len(unpacker.decompress(path.read_bytes(), size + 1))
        whole = length == size and unpacker.eof and not unpacker.unused_data
        return "" if whole else "it is cut short, or goes on behind its voxels"
    except (OSError, *GZIP_ERRORS, *HEADER_ERRORS) as error:  # type: ignore[misc]
        return str(error)


def select_labels(label_map: np.ndarray, labels: tuple[int, ...]) -> np.ndarray:
    """Return a copy of a label map, uint8, in which all labels but some are 0."""
    table = np.zeros(256, np.uint8)
    table[list(labels)] = labels
    return table[label_map]


def label_map_image(label_map: np.ndarray, volume: Volume) -> nibabel.Nifti1Image:
    """Return a label map (slices, rows, columns), SPL, uint8, as an image on its volume's grid.

    Raises:
        VolumeError: as `label_map_header`.
    """
    header = label_map_header(volume.header)
    kind = nibabel.Nifti2Image if header.sizeof_hdr == 540 else nibabel.Nifti1Image
    shape = volume.header.get_data_shape()
    voxels = np.ascontiguousarray(volume.as_stored(label_map)).reshape(shape)
    return kind(voxels, header_affine(header), header)


def write_label_map(
    path: Path, label_map: np.ndarray, volume: Volume, signature: str | None = None
) -> None:
    """Write a label map on the grid of its volume.

    The file has the volume's axis order, shape, affine, sform and qform codes, spacing and units;
    its type is uint8 with `scl_slope` 1. It appears under its name only when it is whole.

    Args:
        path: `NAME.nii.gz`, or `NAME.nii` for a file that is not compressed.
        label_map: (slices, rows, columns), SPL, uint8.
        volume: that it is of.
        signature: as in `label_map_header`.

    Raises:
        ValueError: the label map is not of the volume's shape or not uint8.
        OSError: the file cannot be written.
    """
    if label_map.shape != volume.voxels.shape or label_map.dtype != np.uint8:
        raise ValueError(
            f"a label map of {volume.voxels.shape} uint8 is needed, "
            f"not {label_map.shape} {label_map.dtype}"
        )
    no_extensions = b"\0\0\0\0"
    parts = [label_map_header(volume.header, signature).binaryblock + no_extensions]
    stored = volume.as_stored(label_map)
    parts.append(stored.ravel(order="F").data)  # copies only where the file is not LPS
    if path.name.endswith(".gz"):
        gzip = isal_zlib.compressobj(level=1, wbits=_GZIP_WBITS)
        parts = [*map(gzip.compress, parts), gzip.flush()]
    write_atomically(path, b"".join(parts))
