"""Anatomies to draw slices of: from a file of many structures, or of synthetic patients."""

import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy import ndimage
from skimage.morphology import convex_hull_image

from inference.labels import ORGANS, TUMOR
from inference.volume import read_volume
from synthetic.sampling import draw_anatomy
from synthetic.structures import CORES, NUMBERS, STRUCTURES
from training.cache import save_array

VOXEL_MM = 1.5
"""Spacing of the anatomies from files: about the pixel of a slice reduced by 2."""

_PHANTOM_GRID = ((84, 256, 256), (4.0, 1.6, 1.6))

_PHANTOM_SEED = 500_000  # of the first patient: far from the seeds of tests and demonstration

_CACHE_VERSION = 2

_REPORT_EVERY_S = 5.0

# Numbers beside the phantom's: the insides of organs, and lesions of different attenuation.
RIGHT_MEDULLA, LEFT_MEDULLA, STOMACH_CONTENT = range(len(STRUCTURES), len(STRUCTURES) + 3)

LESIONS = tuple(range(STOMACH_CONTENT + 1, STOMACH_CONTENT + 4))

COUNT = LESIONS[-1] + 1

LABELS = np.zeros(COUNT, np.uint8)
LABELS[: TUMOR + 1] = np.arange(TUMOR + 1)

LABELS[[RIGHT_MEDULLA, LEFT_MEDULLA, STOMACH_CONTENT]] = 2, 13, 11

LABELS[list(LESIONS)] = TUMOR


def _totalsegmentator() -> np.ndarray:
    """TotalSegmentator's class numbers, 0 to 117, to those of `STRUCTURES`."""
    names = {
        1: "spleen", 2: "right kidney", 3: "left kidney", 4: "gallbladder", 5: "liver",
        6: "stomach", 7: "pancreas", 8: "right adrenal gland", 9: "left adrenal gland",
        15: "esophagus", 16: "bowel gas", 17: "muscle", 18: "small bowel wall", 19: "duodenum",
        20: "colon wall", 21: "urinary bladder", 22: "muscle", 23: "tumor", 24: "tumor",
        51: "heart", 52: "aorta", 63: "inferior vena cava", 64: "portal vein", 79: "spinal canal",
        90: "muscle", 91: "pelvis", 116: "rib", 117: "intervertebral disc",
    }  # fmt: skip
    runs = {
        "lung": (10, 14),
        "vertebra": (25, 50),
        "veins": (53, 53),
        "arteries": (54, 62),
        "pelvis": (69, 78),
        "muscle": (80, 89),
        "rib": (92, 115),
    }
    table = np.zeros(256, np.uint8)
    for name, (first, last) in runs.items():
        table[first : last + 1] = NUMBERS[name]
    table[65:67], table[67:69] = NUMBERS["arteries"], NUMBERS["veins"]
    for number, name in names.items():
        table[number] = NUMBERS[name]
    return table


class AnatomyError(ValueError):
    """A label map that no anatomy can be made of; the message is the reason, in one line."""


@dataclass(frozen=True)
class Anatomy:
    """A patient to draw slices of.

    Attributes:
        name: for reports.
        structures: (slices, rows, columns), uint8, numbers of structures.
        beyond: the distance from the hull of the organs in each slice, mm, uint8, of the same
            shape, where the body's wall is still to be drawn; None where it is in `structures`.
        spacing: (slice, row, column), mm.
        boxes: of each of the 13 organs present: its centre (voxels) and half its size (mm).
        slices_with: by label, 1 to 14, the slices that show it.
    """

    name: str
    structures: np.ndarray
    beyond: np.ndarray | None
    spacing: tuple[float, float, float]
    boxes: dict[int, tuple[np.ndarray, np.ndarray]]
    slices_with: dict[int, np.ndarray]


def _anatomy(
    name: str, structures: np.ndarray, beyond: np.ndarray | None, spacing: Sequence[float]
) -> Anatomy:
    """Look up what the drawing needs to know."""
    labels = LABELS[structures]
    boxes, slices_with = {}, {}
    for label, box in enumerate(ndimage.find_objects(labels, max_label=TUMOR), 1):
        if box is None:
            continue
        slices_with[label] = np.flatnonzero((labels == label).any(axis=(1, 2)))
        if label in ORGANS:
            middle = np.array([(part.start + part.stop - 1) / 2 for part in box])
            size = np.array([part.stop - part.start for part in box]) * spacing
            boxes[label] = middle, np.maximum(size / 2, 8.0)
    return Anatomy(name, structures, beyond, tuple(map(float, spacing)), boxes, slices_with)


def _hollow(structures: np.ndarray, spacing: Sequence[float]) -> None:
    """Give kidneys, stomach and bowel their insides, in place."""
    insides = {
        "right kidney": (RIGHT_MEDULLA, CORES["right kidney"][0]),
        "left kidney": (LEFT_MEDULLA, CORES["left kidney"][0]),
        "stomach": (STOMACH_CONTENT, CORES["stomach"][0]),
        "small bowel wall": (NUMBERS["small bowel content"], 2.5),
        "colon wall": (NUMBERS["colon content"], 2.5),
    }
    boxes = ndimage.find_objects(structures, max_label=len(STRUCTURES))
    for name, (inside, depth) in insides.items():
        box = boxes[NUMBERS[name] - 1]
        if box is not None:
            mask = np.pad(structures[box] == NUMBERS[name], 1)  # around its box it ends as well
            distance = ndimage.distance_transform_edt(mask, spacing)[1:-1, 1:-1, 1:-1]
            structures[box][distance > depth] = inside


def _refined(label_map: np.ndarray, spacing: Sequence[float]) -> np.ndarray:
    """A label map on a grid of `VOXEL_MM`, its surfaces smooth: linear one-hot maps compete."""
    factors = [size / VOXEL_MM for size in spacing]
    shape = [round(length * f) for length, f in zip(label_map.shape, factors, strict=True)]
    refined = np.zeros(shape, np.uint8)
    best = np.full(shape, 0.5, np.float32)  # background where no structure has the majority
    for number, box in enumerate(ndimage.find_objects(label_map), 1):
        if box is None:
            continue
        start = [max(part.start - 2, 0) for part in box]
        stop = [min(part.stop + 2, n) for part, n in zip(box, label_map.shape, strict=True)]
        inner = tuple(map(slice, start, stop))
        target = tuple(
            slice(round(a * f), min(round(b * f), n))
            for a, b, f, n in zip(start, stop, factors, shape, strict=True)
        )
        points = [
            (np.arange(part.start, part.stop) + 0.5) / f - 0.5 - a
            for part, f, a in zip(target, factors, start, strict=True)
        ]
        mask = ndimage.gaussian_filter((label_map[inner] == number).astype(np.float32), 0.5)
        share = mask
        for axis, place in enumerate(points):  # linear interpolation, one axis after another
            place = np.clip(place, 0, share.shape[axis] - 1)
            low = place.astype(int)
            high = np.minimum(low + 1, share.shape[axis] - 1)
            weight = (place - low).astype(np.float32)
            weight = weight.reshape([-1 if other == axis else 1 for other in range(3)])
            share = share.take(low, axis) * (1 - weight) + share.take(high, axis) * weight
        won = share > best[target]
        refined[target][won] = number
        best[target][won] = share[won]
    return refined


def read_anatomy(path: Path) -> Anatomy:
    """Make an anatomy of a label map in TotalSegmentator's class numbers.

    What lies around the organs in each slice, wall, fat and skin, is drawn with the slice.

    Raises:
        AnatomyError: not such a label map, or it shows none of the 13 organs.
        VolumeError: the file cannot be used.
        OSError: the file cannot be read.
    """
    volume = read_volume(path)
    numbers = np.asarray(volume.voxels)
    if numbers.dtype.kind not in "iu" or numbers.min() < 0 or numbers.max() > 117:
        raise AnatomyError("not a label map in TotalSegmentator's class numbers, 0 to 117")
    structures = _totalsegmentator()[_refined(numbers.astype(np.uint8), volume.spacing)]
    if not np.isin(structures, ORGANS).any():
        raise AnatomyError("none of the 13 organs is in it")
    spacing = (VOXEL_MM,) * 3
    beyond = np.zeros(structures.shape, np.uint8)
    for index, plane in enumerate(structures):
        hull = convex_hull_image(plane > 0) if (plane > 0).sum() > 3 else plane > 0
        distance = ndimage.distance_transform_edt(~hull, VOXEL_MM) if hull.any() else 255
        beyond[index] = np.clip(distance, 0, 255)
    inside = (structures == 0) & (beyond == 0)
    structures[inside] = NUMBERS["visceral fat"]
    _hollow(structures, spacing)
    return _anatomy(path.name, structures, beyond, spacing)


def phantom_anatomies(
    count: int, folder: Path, report: Callable[[str], None] = lambda line: None
) -> list[Anatomy]:
    """Anatomies of synthetic patients, kept in a cache.

    Args:
        count: of patients; the first ones are the same whatever their number.
        folder: of the cache.
        report: gets a line of progress every few seconds.

    Raises:
        OSError: the cache cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    shape, spacing = _PHANTOM_GRID
    key = hashlib.sha256(repr((_CACHE_VERSION, _PHANTOM_GRID)).encode()).hexdigest()[:8]
    paths = [folder / f"anatomy-{key}-{number:04}.npy" for number in range(count)]
    missing = [path for path in paths if not path.is_file()]
    started = told = time.monotonic()
    anatomies = []
    for number, path in enumerate(paths):
        if path in missing:
            drawn, now = missing.index(path), time.monotonic()
            if not drawn:
                report(
                    f"drawing {len(missing)} synthetic patients, once; they are kept in {folder}"
                )
            elif now - told > _REPORT_EVERY_S:
                left = (now - started) / drawn * (len(missing) - drawn)
                report(f"drawn {drawn} of {len(missing)} synthetic patients, {left:.0f} s left")
                told = now
            structures = draw_anatomy(shape, spacing, np.random.default_rng(_PHANTOM_SEED + number))
            _hollow(structures, spacing)
            save_array(path, structures)
        structures = np.load(path, mmap_mode="r")
        anatomies.append(_anatomy(f"phantom {number}", structures, None, spacing))
    return anatomies
