"""The cache: volumes and label maps read once, as arrays to map into memory."""

import hashlib
import json
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from inference.files import one_line, whole_file, write_atomically
from inference.intensity import percentiles
from inference.volume import Volume, VolumeError, read_volume
from training.cases import CachedVolume, CaseFiles
from training.label_mapping import LARGEST_NUMBER, NUM_LABELS, LabelMapping
from training.packing import read_packed

_CACHE_VERSION = 3


def _corners(volume: Volume) -> np.ndarray:
    """Return the corners of a volume in RAS+ coordinates, mm, in the order of its SPL array."""
    indices = np.ones((4, 8))
    at_end = np.indices((2, 2, 2), bool).reshape(3, 8)
    for axis, (disk_axis, flip) in enumerate(zip(volume.disk_axes, volume.disk_flips, strict=True)):
        indices[disk_axis] = (at_end[axis] ^ flip) * (volume.voxels.shape[axis] - 1)
    unit = np.cbrt(np.prod(volume.spacing) / abs(np.linalg.det(volume.affine[:3, :3])))
    return unit * (volume.affine @ indices)[:3]


def _check_geometry(image: Volume, label: Volume) -> str:
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
    hu = np.empty(volume.voxels.shape, np.int16)
    for index in range(len(hu)):
        hu[index] = np.rint(np.nan_to_num(_values(volume, index))).clip(-32768, 32767)
    return hu


def _our_labels(volume: Volume, mapping: LabelMapping) -> np.ndarray:
    """Return a label map in our numbers, uint8; floats are taken where they are whole numbers.

    Raises:
        VolumeError: it holds a number that the mapping does not list: as background it would be
            taught that nothing is there.
    """
    table = np.full(LARGEST_NUMBER + 1, 255, np.uint8)
    table[list(mapping.labels)] = list(mapping.labels.values())
    found: set[int] = set()
    ours = np.empty(volume.voxels.shape, np.uint8)
    for index in range(len(ours)):
        values = _values(volume, index)
        numbers = np.rint(values)
        if not np.isfinite(values).all() or np.abs(values - numbers).max() > 1e-3:
            raise VolumeError("the label map holds values that are not whole numbers")
        ours[index] = table[numbers.clip(0, LARGEST_NUMBER).astype(np.uint16)]
        wrong = (ours[index] == 255) | (numbers < 0) | (numbers > LARGEST_NUMBER)
        found.update(np.unique(numbers[wrong]).astype(int).tolist())
    if unknown := sorted(found):
        shown = ", ".join(map(str, unknown[:5])) + (", …" if len(unknown) > 5 else "")
        raise VolumeError(
            f"the label map holds {shown}, not in {mapping.name}: add numbers of other structures "
            "to its background"
            if mapping.name
            else f"the label map holds {shown}, our labels are 0 to {NUM_LABELS - 1}: name the "
            "data set's own numbers with DIR=MAP"
        )
    return ours


def file_identity(path: Path, *, by_content: bool) -> list[str]:
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


def save_array(path: Path, array: np.ndarray) -> None:
    """Write a .npy file, whole and flushed to the disk or not at all."""
    header = np.lib.format.header_data_from_array_1_0(array := np.ascontiguousarray(array))
    with whole_file(path) as file:
        np.lib.format.write_array_header_1_0(file, header)
        file.write(array.data)  # np.save would lose the reason of an error


def read_case(case: CaseFiles) -> tuple[np.ndarray, np.ndarray, dict[str, Any]]:
    """Read a case.

    Returns:
        HU, int16, and labels in our numbers, uint8, both (slices, rows, columns), SPL; and by name
        the other attributes of `CachedVolume`.

    Raises:
        VolumeError: a file cannot be read or used, or image and label map do not belong together.
    """
    if case.packed:
        return read_packed(case.packed)
    try:
        image, label = read_volume(case.image), read_volume(case.label)
        low, high = percentiles(image.voxels)
    except (OSError, ValueError) as error:
        raise VolumeError(one_line(error)) from error
    notes = (*image.notes, _check_geometry(image, label))
    low, high = sorted(image.slope * value + image.intercept for value in (low, high))
    hu, labels = _hu(image), _our_labels(label, case.mapping)
    about = describe(hu, labels, image.spacing, (low, high))
    return hu, labels, {**about, "remark": "; ".join(filter(None, notes))}


def describe(
    hu: np.ndarray,
    labels: np.ndarray,
    spacing: tuple[float, float, float],
    window: tuple[float, float],
) -> dict[str, Any]:
    """Return the attributes of `CachedVolume` for a volume's arrays."""
    total = total_of_squares = 0.0
    for values in hu:
        clipped = values.astype(np.float64).clip(*window)
        total += float(clipped.sum())
        total_of_squares += float(np.square(clipped).sum())
    present = [np.flatnonzero(np.bincount(part.ravel())) for part in labels]
    return {
        "shape": hu.shape,
        "spacing": spacing,
        "window": window,
        "count": hu.size,
        "total": total,
        "total_of_squares": total_of_squares,
        "slice_labels": [int(np.bitwise_or.reduce(1 << numbers)) for numbers in present],
    }


def cache_case(case: CaseFiles, folder: Path, report: Callable[[str], None]) -> CachedVolume:
    """Read a case into a folder's cache, or find it there; a packed one stays in memory instead.

    `report` gets a line where the cached files are damaged.

    Raises:
        VolumeError: as `read_case`.
        OSError: the cache cannot be written.
    """
    if case.packed:
        return CachedVolume.of(*read_case(case))
    parts = [str(_CACHE_VERSION), json.dumps(sorted(case.mapping.labels.items()))]
    try:  # label maps are small and get corrected by hand
        parts += file_identity(case.image, by_content=False)
        parts += file_identity(case.label, by_content=True)
    except OSError as error:
        raise VolumeError(one_line(error)) from error
    key = hashlib.sha256("\n".join(parts).encode(errors="surrogateescape")).hexdigest()[:16]
    hu_path, labels_path, about_path = (
        folder / f"{case.name}-{key}.{ending}" for ending in ("hu.npy", "labels.npy", "json")
    )
    if about_path.is_file():
        with suppress(OSError, ValueError, KeyError, TypeError, EOFError):
            cached = CachedVolume.of(
                hu_path, labels_path, json.loads(about_path.read_text("utf-8"))
            )
            if cached.hu.shape == cached.label_map.shape == cached.shape:
                return cached
        report(f"{case.name}: its files in the cache are damaged: read again")
    hu, labels, about = read_case(case)
    save_array(hu_path, hu)
    save_array(labels_path, labels)
    write_atomically(about_path, json.dumps(about))  # last: it makes the others valid
    return CachedVolume.of(hu_path, labels_path, about)
