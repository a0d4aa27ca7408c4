"""Mutated NIfTI files: one seed and number, one file."""

import gzip
import struct
import zlib

import nibabel
import numpy as np

_TYPES = ("u1", "i1", "i2", "u2", "i4", "u4", "i8", "u8", "f4", "f8")
_TYPE_CODES = (0, 1, 2, 4, 8, 16, 32, 64, 128, 511, 512, 768, 1024, 1536, 2304, 9999)
_OFFSETS = (0, 1, 347, 348, 353, 400, -8, 1e9)
_WILD_NUMBERS = (0, -1, 1, 2, 7, 255, 32767, -32768, 2**31 - 1, 1e30, 1e-30)
_WILD_NUMBERS += (np.nan, np.inf, -np.inf)


def whole_file(rng: np.random.Generator) -> tuple[bytes, nibabel.Nifti1Header]:
    """Return a good NIfTI-1 or NIfTI-2 file, uncompressed, of any byte order, type and geometry."""
    kind = (nibabel.Nifti1Header, nibabel.Nifti2Header)[rng.integers(2)]
    order = "<>"[rng.integers(2)]
    header = kind(endianness=order)
    shape = tuple(int(n) for n in rng.integers(1, 9, 3))
    header.set_data_dtype(np.dtype(_TYPES[rng.integers(len(_TYPES))]).newbyteorder(order))
    header.set_data_shape(shape)
    affine = np.eye(4)
    affine[:3, :3] = np.diag(rng.uniform(0.5, 5, 3) * rng.choice([-1, 1], 3))[rng.permutation(3)]
    affine[:3, 3] = rng.uniform(-200, 200, 3)
    header.set_sform(affine, int(rng.integers(1, 5)))
    header.set_qform(affine, int(rng.integers(0, 5)))
    header.set_xyzt_units("mm", "sec")
    if rng.random() < 0.3:
        header.set_slope_inter(float(rng.uniform(0.1, 3)), float(rng.uniform(-1024, 10)))
    header["magic"] = header.single_magic
    header["vox_offset"] = header.single_vox_offset
    dtype = header.get_data_dtype()
    if dtype.kind == "f":
        voxels = rng.normal(0, 300, shape).astype(dtype)
    else:
        limits = np.iinfo(dtype)
        voxels = rng.integers(max(limits.min, -1000), min(limits.max, 1000), shape).astype(dtype)
    return header.binaryblock + bytes(4) + voxels.tobytes(order="F"), header


def _set(
    content: bytearray, header: nibabel.Nifti1Header, name: str, place: int, value: float
) -> None:
    """Write a number into a header's field as it is stored, whatever the field is for."""
    dtype, offset = header.template_dtype.fields[name][:2]
    item = (dtype.subdtype[0] if dtype.subdtype else dtype).newbyteorder(header.endianness)
    with np.errstate(all="ignore"):
        stored = np.zeros(1, item)
        try:
            stored[0] = value
        except (ValueError, OverflowError):
            stored[0] = np.iinfo(item).max if item.kind in "iu" else 0
    start = offset + place * item.itemsize
    content[start : start + item.itemsize] = stored.tobytes()


def mutated_file(seed: int, number: int) -> tuple[str, bytes]:
    """Return the file of this number: its name's ending, and its content."""
    rng = np.random.default_rng((seed, number))
    content, header = whole_file(rng)
    content = bytearray(content)
    fields = [
        name
        for name, (dtype, _) in header.template_dtype.fields.items()
        if (dtype.subdtype[0] if dtype.subdtype else dtype).kind in "iuf"
    ]
    kinds = ["bytes", "field", "field", "dims", "type", "offset", "scale", "affine", "units"]
    kinds += ["cut", "longer", "bomb", "nothing"]
    for _ in range(int(rng.integers(1, 3))):
        kind = kinds[rng.integers(len(kinds))]
        wild = _WILD_NUMBERS[rng.integers(len(_WILD_NUMBERS))]
        if kind == "bytes":
            for place in rng.integers(0, min(len(content), 540), int(rng.integers(1, 9))):
                content[place] = int(rng.integers(256))
        elif kind == "field":
            name = fields[rng.integers(len(fields))]
            dtype = header.template_dtype.fields[name][0]
            count = int(np.prod(dtype.subdtype[1])) if dtype.subdtype else 1
            _set(content, header, name, int(rng.integers(count)), wild)
        elif kind == "dims":
            _set(content, header, "dim", int(rng.integers(8)), int(rng.integers(-5, 300)))
        elif kind == "type":
            _set(content, header, "datatype", 0, int(rng.choice(_TYPE_CODES)))
        elif kind == "offset":
            _set(content, header, "vox_offset", 0, float(rng.choice(_OFFSETS)))
        elif kind == "scale":
            _set(content, header, ("scl_slope", "scl_inter")[rng.integers(2)], 0, wild)
        elif kind == "affine":
            row = ("srow_x", "srow_y", "srow_z")[rng.integers(3)]
            _set(content, header, row, int(rng.integers(4)), wild)
        elif kind == "units":
            _set(content, header, "xyzt_units", 0, int(rng.integers(256)))
        elif kind == "cut" and len(content) > 1:
            content = content[: int(rng.integers(len(content)))]
        elif kind == "longer":
            content += bytes(int(rng.integers(1, 5000)))
        elif kind == "bomb":
            for place in (1, 2, 3):
                _set(content, header, "dim", place, 32767)
    if rng.random() < 0.5:
        return ".nii", bytes(content)
    return ".nii.gz", _packed(bytes(content), rng)


def _packed(content: bytes, rng: np.random.Generator) -> bytes:
    """Return gzip data, damaged in a third of the files."""
    packed = bytearray(gzip.compress(content, int(rng.integers(1, 10)), mtime=0))
    damage = rng.random()
    if damage < 0.1:
        return bytes(packed[: int(rng.integers(len(packed)))])
    if damage < 0.2:
        packed[int(rng.integers(len(packed)))] ^= 1 << int(rng.integers(8))
    elif damage < 0.25:  # the check sum or the size
        packed[-int(rng.integers(1, 9))] ^= 0xFF
    elif damage < 0.28:  # two members
        half = len(content) // 2
        return gzip.compress(content[:half], mtime=0) + gzip.compress(content[half:], mtime=0)
    elif damage < 0.3:  # a deflate stream without gzip's frame
        return b"\x1f\x8b" + struct.pack("<B", 8) + zlib.compress(content)
    return bytes(packed)
