"""The cache: volumes and label maps read once, as arrays to map into memory."""

import hashlib
import json
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from inference.files import one_line, whole_file, write_atomically
from inference.intensity import percentiles
from inference.volume import Volume, VolumeError, read_volume
from training.cases import CachedVolume, Case
from training.label_mapping import LARGEST_NUMBER, NUM_LABELS, LabelMapping
from training.packing import read_packed

_CACHE_VERSION = 2


def _corners(volume: Volume) -> np.ndarray:
    """Return the corners of a volume in RAS+ coordinates, mm, in the order of its SPL array."""
    indices = np.ones((4, 8))
    at_end = np.indices((2, 2, 2), bool).reshape(3, 8)
    for axis, (disk_axis, flip) in enumerate(zip(volume.disk_axes, volume.disk_flips, strict=True)):
        indices[disk_axis] = (at_end[axis] ^ flip) * (volume.voxels.shape[axis] - 1)
    unit = np.cbrt(np.prod(volume.spacing) / abs(np.linalg.det(volume.affine[:3, :3])))
    return unit * (volume.affine @ indices)[:3]


def _disagreement(image: Volume, label: Volume) -> str:
    """Return where the headers of an image and its label map disagree, or "".

    Both are compared as SPL arrays. Where only positions differ, the arrays belong together as
    stored (the challenge itself compares raw arrays).

    Raises:
        VolumeError: they cannot be paired: where an axis runs the other way, nobody can tell which
            header is right.
    """
    if image.voxels.shape != label.voxels.shape:
        raise VolumeError(f"shapes {image.voxels.shape} and {label.voxels.shape} differ")
    distance = float(np.linalg.norm(_corners(image) - _corners(label), axis=0).max())
    if distance <= 0.1 * min(image.spacing):
        return ""
    if (image.disk_axes, image.disk_flips) != (label.disk_axes, label.disk_flips):
        raise VolumeError(f"orientations differ and corners lie {distance:.1f} mm apart")
    return f"corners lie {distance:.1f} mm apart; paired as stored"


def _values(volume: Volume, index: int) -> np.ndarray:
    """Return a slice's values, float64: slice by slice, no float copy of the volume is made."""
    return volume.slope * volume.voxels[index].astype(np.float64) + volume.intercept


def _hu(volume: Volume) -> np.ndarray:
    """Return the volume in HU as int16, rounded where the file has fractions or scales."""
    if volume.voxels.dtype == np.int16 and (volume.slope, volume.intercept) == (1, 0):
        return np.ascontiguousarray(volume.voxels)
    limits = np.iinfo(np.int16)
    hu = np.empty(volume.voxels.shape, np.int16)
    for index in range(len(hu)):
        values = np.nan_to_num(_values(volume, index))
        hu[index] = np.clip(np.rint(values), limits.min, limits.max)
    return hu


def _our_labels(volume: Volume, mapping: LabelMapping | None) -> np.ndarray:
    """Return a label map in our numbers, uint8; floats are taken where they are whole numbers.

    Raises:
        VolumeError: it holds a number that the mapping does not know: as background it would be
            taught that nothing is there.
    """
    known = mapping.labels if mapping else {label: label for label in range(NUM_LABELS)}
    table = np.zeros(LARGEST_NUMBER + 1, np.uint8)
    table[list(known)] = list(known.values())
    found: set[int] = set()
    ours = np.empty(volume.voxels.shape, np.uint8)
    for index in range(len(ours)):
        values = _values(volume, index)
        numbers = np.rint(values)
        if not np.isfinite(values).all() or np.abs(values - numbers).max() > 1e-3:
            raise VolumeError("the label map holds values that are not whole numbers")
        if numbers.min() < 0 or numbers.max() > LARGEST_NUMBER:
            found.update(np.unique(numbers).astype(int).tolist())
            continue
        numbers = numbers.astype(np.uint16)
        found.update(np.flatnonzero(np.bincount(numbers.ravel())).tolist())
        ours[index] = table[numbers]
    if unknown := sorted(found - set(known)):
        shown = ", ".join(map(str, unknown[:5])) + (", …" if len(unknown) > 5 else "")
        raise VolumeError(
            f"the label map holds {shown}, not in {mapping.name}: add what is no label of ours to "
            "its background"
            if mapping
            else f"the label map holds {shown}, our labels are 0 to {NUM_LABELS - 1}: name the "
            "data set's own numbers with DIR=MAP"
        )
    return ours


def _identity(path: Path, *, by_content: bool) -> list[str]:
    """Return what tells a file from an earlier one of the same name.

    A time of change is trusted only where it can be one: archives and squashfs set 0 or 1, and a
    file younger than two seconds may change again within the clock's tick.
    """
    status = path.stat()
    parts = [str(path.resolve()), str(status.st_size)]
    if by_content or status.st_mtime < 2 or time.time() - status.st_mtime < 2:
        with path.open("rb") as file:
            return [*parts, hashlib.file_digest(file, "sha256").hexdigest()]
    return [*parts, str(status.st_mtime_ns)]


def _cache_key(case: Case) -> str:
    """Return what the cached files depend on; label maps are small and get corrected by hand."""
    labels = sorted(case.mapping.labels.items()) if case.mapping else None
    parts = [str(_CACHE_VERSION), json.dumps(labels)]
    parts += _identity(case.image, by_content=False) + _identity(case.label, by_content=True)
    return hashlib.sha256("\n".join(parts).encode(errors="surrogateescape")).hexdigest()[:16]


def save_array(path: Path, array: np.ndarray) -> None:
    """Write a .npy file, whole and flushed to the disk or not at all."""
    header = np.lib.format.header_data_from_array_1_0(array := np.ascontiguousarray(array))
    with whole_file(path) as file:
        np.lib.format.write_array_header_1_0(file, header)
        file.write(array.data)  # np.save would lose the reason of an error


def read_case(case: Case) -> tuple[np.ndarray, np.ndarray, dict]:
    """Read a case.

    Returns:
        HU, int16, and labels in our numbers, uint8, both (slices, rows, columns), SPL; and by name
        what `CachedVolume` says of them.

    Raises:
        VolumeError: a file cannot be read or used, or image and label map do not belong together.
    """
    if case.packed:
        return read_packed(case)
    try:
        image, label = read_volume(case.image), read_volume(case.label)
        low, high = percentiles(image.voxels)
    except (OSError, ValueError) as error:
        raise VolumeError(one_line(error)) from error
    notes = (*image.notes, _disagreement(image, label))
    window = sorted(image.slope * value + image.intercept for value in (low, high))
    hu, labels = _hu(image), _our_labels(label, case.mapping)
    total = total_of_squares = 0.0
    for values in hu:
        clipped = np.clip(values.astype(np.float64), *window)
        total += float(clipped.sum())
        total_of_squares += float(np.square(clipped).sum())
    return hu, labels, {
        "shape": hu.shape,
        "spacing": image.spacing,
        "window": window,
        "count": hu.size,
        "total": total,
        "total_of_squares": total_of_squares,
        "slice_labels": [
            int(np.bitwise_or.reduce(1 << np.flatnonzero(np.bincount(part.ravel()))))
            for part in labels
        ],
        "remark": "; ".join(filter(None, notes)),
    }  # fmt: skip


def cache_case(case: Case, folder: Path, report: Callable[[str], None]) -> CachedVolume:
    """Read a case into the cache, or find it there; a packed one is kept in memory instead.

    Args:
        case: to read; its files are known by `_identity`.
        folder: of the cache.
        report: gets a line where the cached files are damaged.

    Raises:
        VolumeError: as `read_case`.
        OSError: the cache cannot be written.
    """
    if case.packed:
        return CachedVolume.of(*read_case(case))
    try:
        stem = f"{case.name}-{_cache_key(case)}"
    except OSError as error:
        raise VolumeError(one_line(error)) from error
    paths = folder / f"{stem}.hu.npy", folder / f"{stem}.labels.npy"
    about_path = folder / f"{stem}.json"
    if about_path.is_file():
        try:
            cached = CachedVolume.of(*paths, json.loads(about_path.read_text(encoding="utf-8")))
            if cached.hu.shape == cached.label_map.shape == cached.shape:
                return cached
        except (OSError, ValueError, KeyError, TypeError, EOFError):
            pass
        report(f"{case.name}: its files in the cache are damaged: read again")
    *arrays, about = read_case(case)
    for path, array in zip(paths, arrays, strict=True):
        save_array(path, array)
    write_atomically(about_path, json.dumps(about).encode())  # last: it makes the others valid
    return CachedVolume.of(*paths, about)
