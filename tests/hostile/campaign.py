"""Damaged files through reading and writing, each outcome put into a class."""

import math
import warnings
from collections.abc import Callable
from pathlib import Path

import nibabel
import numpy as np

from inference.files import one_line
from inference.intensity import percentiles
from inference.label_map import write_label_map
from inference.memory import MemoryBudget, case_bytes
from inference.volume import Volume, read_volume
from tests.hostile.generator import mutated_file

OK, REFUSED = "ok", "refused in one line"
MEMORY_BYTES = 256 << 20
"""What a volume may take: bombs are refused by their headers."""


def outcome(seed: int, number: int, folder: Path) -> tuple[str, str]:
    """Read and write one file.

    Args:
        seed, number: of the file.
        folder: for it and its label map; nothing stays there.

    Returns:
        A class, `OK` and `REFUSED` being the good ones, and its reason.
    """
    ending, content = mutated_file(seed, number)
    source, target = folder / f"a_0000{ending}", folder / "a.nii.gz"
    source.write_bytes(content)
    budget = MemoryBudget(MEMORY_BYTES)

    def admit(header: nibabel.Nifti1Header, size: int) -> None:
        voxels = math.prod(int(length) for length in header.get_data_shape())
        budget.take(case_bytes(size, voxels, header.get_data_dtype().itemsize))

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                volume = read_volume(source, admit)
                window = percentiles(volume.voxels)
                label_map = _stand_in_labels(volume, window)
                write_label_map(target, label_map, volume)
            except (ValueError, OSError) as error:
                line = one_line(error)
                good = "\n" not in line and line.isprintable() and len(line) < 300
                return (REFUSED, line) if good else ("refused in more than a line", line)
            except Exception as error:
                return f"escaped: {type(error).__name__}", str(error)
            return _compare(source, target, volume, label_map)
    finally:
        source.unlink()
        target.unlink(missing_ok=True)


def _stand_in_labels(volume: Volume, window: tuple[float, ...]) -> np.ndarray:
    """Return a label map that depends on every voxel's place and value."""
    labels = np.arange(volume.voxels.size).reshape(volume.voxels.shape) % 15
    return np.where(volume.voxels > window[0], labels, 0).astype(np.uint8)


def _compare(source: Path, target: Path, volume: Volume, label_map: np.ndarray) -> tuple[str, str]:
    """Compare the label map and the voxels read with nibabel's own reading."""
    to_disk = np.argsort(volume.disk_axes)

    def as_stored(array: np.ndarray) -> np.ndarray:
        flips = tuple(slice(None, None, -1 if flip else 1) for flip in volume.disk_flips)
        return array[flips].transpose(to_disk)

    try:
        before = nibabel.load(source)
        voxels = np.asanyarray(before.dataobj.get_unscaled())
    except Exception as error:
        return "nibabel cannot read what was read", str(error)
    try:
        written = nibabel.load(target)
        labels = np.asanyarray(written.dataobj)
    except Exception as error:
        return "nibabel cannot read the label map", str(error)
    wanted, read = as_stored(label_map), as_stored(volume.voxels)
    if written.shape != before.shape:
        return "another shape", f"{written.shape}, not {before.shape}"
    is_right = {
        "another affine": np.array_equal(written.affine, before.affine),
        "another type": labels.dtype == written.get_data_dtype() == np.uint8,
        "other labels": np.array_equal(labels.reshape(wanted.shape), wanted),
        "other voxels": np.array_equal(voxels.reshape(read.shape), read, read.dtype.kind == "f"),
    }
    return next((name for name, right in is_right.items() if not right), OK), ""


def campaign(
    seed: int,
    count: int,
    folder: Path,
    report: Callable[[int], None] = lambda done: None,
    outcome: Callable[[int, int, Path], tuple[str, str]] = outcome,
) -> dict[str, list[tuple[int, str]]]:
    """Run files 0 to count − 1 of a seed.

    Args:
        seed, count, folder: as `outcome` takes them.
        report: called with the number of files done.
        outcome: of one file, or of one series.

    Returns:
        For each class the numbers of its files, and their reasons.
    """
    classes: dict[str, list[tuple[int, str]]] = {}
    for number in range(count):
        name, line = outcome(seed, number, folder)
        classes.setdefault(name, []).append((number, line))
        report(number + 1)
    return classes
