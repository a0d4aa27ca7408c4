"""Label maps on disk: written on the grid of the volume they were made from, and known again."""

from pathlib import Path

import nibabel
import numpy as np
from isal import isal_zlib

from inference.files import write_atomically
from inference.labels import LABEL_NAMES
from inference.provenance import MADE_BY_BYTES, made_by
from inference.volume import (
    GZIP_ERRORS,
    GZIP_WBITS,
    HEADER_ERRORS,
    Volume,
    VolumeError,
    flipped,
    header_affine,
    read_header,
    read_stored,
)

_CHUNK = 1 << 20  # bytes unpacked at once where they are only looked at


def label_map_header(
    header: nibabel.Nifti1Header, maker: str | None = None
) -> nibabel.Nifti1Header:
    """Return the header of the label map that belongs to a volume.

    It is the volume's own but for type, scaling and texts: those of the input may name a patient.

    Args:
        header: of the volume.
        maker: what `descrip` says of who made it, at most 79 bytes of ASCII; by default the program
            alone, as `inference.provenance.made_by` has it.

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
        made["descrip"] = (maker or made_by()).encode("ascii", "replace")[:MADE_BY_BYTES]
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


def is_label_map_of(
    path: Path, source: Path | nibabel.Nifti1Header, maker: str | None = None
) -> str:
    """Why a file is not the whole label map of a volume, or "" if it is.

    Its header first: type, then shape, affine and codes against the volume's, and who made it; then
    size and gzip check sum. What the voxels say is not looked at.

    Args:
        path: of the label map, gzipped.
        source: the volume's file, or its header.
        maker: by whom it must be made, as its header says; None: whoever it was.
    """
    try:
        if not path.is_file():
            return "it is no file"
        grid = read_header(source) if isinstance(source, Path) else source
        found, wanted = read_header(path), label_map_header(grid, maker)
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
        was, is_now = (bytes(header["descrip"].item()) for header in (found, wanted))
        if maker is not None and was != is_now:
            other = was.decode("ascii", "replace") or "who knows what"
            return f"it was made by {other}, not by {is_now.decode()}"
        voxels = int(np.prod(found.get_data_shape(), dtype=np.int64))
        return _why_not_whole(path, int(found["vox_offset"]) + voxels)
    except (OSError, *HEADER_ERRORS) as error:
        return str(error)


def _why_not_whole(path: Path, size: int) -> str:
    """Why a file is not one gzip member of `size` bytes with the right check sum, or ""."""
    unpacker, length = isal_zlib.decompressobj(wbits=GZIP_WBITS), 0
    try:
        with path.open("rb") as file:
            while not unpacker.eof:
                packed = unpacker.unconsumed_tail or file.read(_CHUNK)
                part = unpacker.decompress(packed, _CHUNK)
                length += len(part)
                if length > size:
                    return "it holds more than its voxels"
                if not packed and not part:
                    return "it ends before its end mark"
            if unpacker.unused_data or file.read(1):
                return "it goes on behind its end"
    except GZIP_ERRORS as error:
        return f"damaged gzip data ({error})"
    return "" if length == size else f"cut short: it holds {length} of {size} bytes"


def read_label_map(path: Path, volume: Volume) -> np.ndarray:
    """Read the label map that was written for a volume.

    Returns:
        (slices, rows, columns), SPL, uint8, as `volume.voxels`.

    Raises:
        VolumeError: it is damaged, or not of the volume's shape or not uint8.
        OSError: the file cannot be read.
    """
    stored = read_stored(path).voxels
    label_map = flipped(stored.transpose(volume.disk_axes), volume.disk_flips)
    if label_map.shape != volume.voxels.shape or label_map.dtype != np.uint8:
        raise VolumeError(f"its label map has {label_map.shape} {label_map.dtype}")
    return label_map


def only(labels: tuple[int, ...], label_map: np.ndarray) -> np.ndarray:
    """A label map, uint8, in which all other labels are 0; a new array of the same shape."""
    kept = np.zeros(256, np.uint8)
    kept[list(labels)] = labels
    return kept[label_map]


def organ_mask_path(folder: Path, label: int) -> Path:
    """Where the mask of a label is, such as `right_kidney.nii.gz`."""
    return folder / f"{LABEL_NAMES[label].replace(' ', '_')}.nii.gz"


def write_organ_masks(
    folder: Path,
    label_map: np.ndarray,
    volume: Volume,
    labels: tuple[int, ...],
    maker: str | None = None,
) -> None:
    """Write a mask of 0 and 1 for each label, whether it is there or not.

    Args:
        folder: for the masks; made if need be.
        label_map, volume, maker: as in `write_label_map`.
        labels: of which masks are written.

    Raises:
        OSError: one cannot be written.
    """
    folder.mkdir(exist_ok=True)
    for label in labels:
        mask = (label_map == label).view(np.uint8)
        write_label_map(organ_mask_path(folder, label), mask, volume, maker)


def write_label_map(
    path: Path, label_map: np.ndarray, volume: Volume, maker: str | None = None
) -> None:
    """Write a label map on the grid of the volume it was made from.

    The file has the volume's axis order, shape, affine, sform and qform codes, spacing and units;
    its type is uint8 with `scl_slope` 1. It appears under its name only when it is whole.

    Args:
        path: `NAME.nii.gz`, or `NAME.nii` for a file that is not compressed.
        label_map: (slices, rows, columns), SPL, uint8.
        volume: where the label map belongs.
        maker: as in `label_map_header`.

    Raises:
        ValueError: the label map is not of the volume's shape or not uint8.
        OSError: the file cannot be written.
    """
    if label_map.shape != volume.voxels.shape or label_map.dtype != np.uint8:
        raise ValueError(
            f"a label map of {volume.voxels.shape} uint8 is needed, "
            f"not {label_map.shape} {label_map.dtype}"
        )
    header = label_map_header(volume.header, maker)
    no_extensions = b"\0\0\0\0"

    stored = flipped(label_map, volume.disk_flips).transpose(np.argsort(volume.disk_axes))
    parts = [header.binaryblock + no_extensions]
    parts.append(stored.ravel(order="F").data)  # copies only where the file is not LPS
    if path.name.endswith(".gz"):
        gzip = isal_zlib.compressobj(level=1, wbits=GZIP_WBITS)
        parts = [*map(gzip.compress, parts), gzip.flush()]
    write_atomically(path, b"".join(parts))
