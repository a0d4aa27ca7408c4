"""Anatomies to draw slices of: from a file of many structures, or of synthetic patients."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy import ndimage
from skimage.morphology import convex_hull_image

from inference.labels import ORGANS, TUMOR
from inference.volume import read_volume
from synthetic.rendering import core
from synthetic.sampling import draw_anatomy
from synthetic.structures import CORES, NUMBERS, STRUCTURES
from training import TrainingError, shipped_or_own
from training.label_mapping import NUM_LABELS

ANATOMY_MAPS = Path(__file__).parent / "anatomy_maps"

VOXEL_MM = 1.5
"""Spacing of the anatomies from files: about the pixel of a slice reduced by 2."""

_PHANTOM_GRID = ((84, 256, 256), (4.0, 1.6, 1.6))

_PHANTOM_SEED = 500_000  # of the first patient: far from the seeds of tests and demonstration

# Numbers beside the phantom's: the insides of organs, and lesions of different attenuation.
RIGHT_MEDULLA, LEFT_MEDULLA, STOMACH_CONTENT = range(len(STRUCTURES), len(STRUCTURES) + 3)

LESIONS = tuple(range(STOMACH_CONTENT + 1, STOMACH_CONTENT + 4))

COUNT = LESIONS[-1] + 1

LABELS = np.zeros(COUNT, np.uint8)
LABELS[: TUMOR + 1] = np.arange(TUMOR + 1)

LABELS[[RIGHT_MEDULLA, LEFT_MEDULLA, STOMACH_CONTENT]] = 2, 13, 11

LABELS[list(LESIONS)] = TUMOR


@dataclass(frozen=True)
class AnatomyMap:
    """How the numbers of a file of structures become those of `STRUCTURES`."""

    description: str  # whose numbers they are
    scale: float  # factor of the file's spacing
    unknown_labels: tuple[int, ...]  # of ours, which the file's structures do not tell apart
    structures: dict[int, int]  # the file's numbers to ours; 0 for those that are not drawn


def load_anatomy_map(name: str) -> AnatomyMap:
    """Read a map of structures: a shipped one by name (`spl`), or a path ending in .json.

    Raises:
        TrainingError: no such file, or not of the form of the shipped ones.
    """
    path = shipped_or_own(ANATOMY_MAPS, name, ".json")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        structures = dict.fromkeys(map(int, content.get("left_out", ())), 0)
        for structure, numbers in content["structures"].items():
            structures.update(dict.fromkeys(map(int, numbers), NUMBERS[structure]))
        return AnatomyMap(
            description=str(content["description"]),
            scale=float(content.get("scale", 1)),
            unknown_labels=tuple(content.get("unknown_labels", ())),
            structures={0: 0, **structures},
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise TrainingError(f"{path}: not a map of structures ({error!r})") from error


@dataclass(frozen=True)
class Anatomy:
    """A patient to draw slices of."""

    structures: np.ndarray  # (slices, rows, columns), uint8, numbers of structures
    # Of the same shape, uint8, mm from the hull of the organs in each slice, where the body's wall
    # is still to be drawn; None where it is in `structures`.
    hull_mm: np.ndarray | None
    spacing: tuple[float, float, float]  # (slice, row, column), mm
    boxes: dict[int, tuple[np.ndarray, np.ndarray]]  # by organ: centre, voxels; half its size, mm
    slices_with: dict[int, np.ndarray]  # by label, 1 to 14, the slices that show it
    annotated: tuple[int, ...]  # the labels known wherever they are, without 0


def _anatomy(
    structures: np.ndarray,
    hull_mm: np.ndarray | None,
    spacing: tuple[float, float, float],
    unknown_labels: tuple[int, ...] = (),
) -> Anatomy:
    """Return an anatomy, its kidneys, stomach and bowel hollowed in place."""
    insides = {
        "right kidney": (RIGHT_MEDULLA, CORES["right kidney"][0]),
        "left kidney": (LEFT_MEDULLA, CORES["left kidney"][0]),
        "stomach": (STOMACH_CONTENT, CORES["stomach"][0]),
        "small bowel wall": (NUMBERS["small bowel content"], 2.5),
        "colon wall": (NUMBERS["colon content"], 2.5),
    }
    found = ndimage.find_objects(structures, max_label=len(STRUCTURES))
    for name, (inside, depth) in insides.items():
        if box := found[NUMBERS[name] - 1]:
            mask = structures[box] == NUMBERS[name]
            structures[box][core(mask, depth, spacing, "constant")] = inside
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
    annotated = tuple(label for label in range(1, NUM_LABELS) if label not in unknown_labels)
    return Anatomy(structures, hull_mm, spacing, boxes, slices_with, annotated)


def _refined(label_map: np.ndarray, spacing: Sequence[float]) -> np.ndarray:
    """Return a label map on a grid of `VOXEL_MM`: each voxel's by linear one-hot maps."""
    factors = np.array(spacing) / VOXEL_MM
    shape = np.rint(label_map.shape * factors).astype(int)
    refined = np.zeros(shape, np.uint8)
    best = np.full(shape, 0.5, np.float32)  # background where no structure has the majority
    for number, box in enumerate(ndimage.find_objects(label_map), 1):
        if box is None:
            continue
        start = np.array([max(part.start - 2, 0) for part in box])
        stop = np.array(
            [min(part.stop + 2, n) for part, n in zip(box, label_map.shape, strict=True)]
        )
        first = np.rint(start * factors).astype(int)
        last = np.minimum(np.rint(stop * factors).astype(int), shape)
        source, target = (tuple(map(slice, *ends)) for ends in ((start, stop), (first, last)))
        mask = ndimage.gaussian_filter((label_map[source] == number).astype(np.float32), 0.5)
        offset = (first + 0.5) / factors - 0.5 - start
        share = ndimage.affine_transform(
            mask, 1 / factors, offset, tuple(last - first), order=1, mode="nearest"
        )
        won = share > best[target]
        refined[target][won] = number
        best[target][won] = share[won]
    return refined


def read_anatomy(path: Path, mapping: AnatomyMap) -> Anatomy:
    """Make an anatomy of a label map of many structures.

    What lies around the organs in each slice, wall, fat and skin, is drawn with the slice.

    Raises:
        TrainingError: not a label map in the mapping's numbers, or it shows none of the 13 organs.
        VolumeError: the file cannot be used.
        OSError: the file cannot be read.
    """
    volume = read_volume(path)
    numbers = np.union1d(0, np.unique(volume.voxels))
    unknown = [number for number in numbers.tolist() if number not in mapping.structures]
    if unknown or len(numbers) > 256:
        raise TrainingError(f"not a label map in {mapping.description}: it holds {unknown[:5]}")
    compact = np.searchsorted(numbers, volume.voxels).astype(np.uint8)
    table = np.array([mapping.structures[number] for number in numbers.tolist()], np.uint8)
    structures = table[_refined(compact, [mapping.scale * size for size in volume.spacing])]
    if not np.isin(structures, ORGANS).any():
        raise TrainingError("none of the 13 organs is in it")
    hull_mm = np.zeros(structures.shape, np.uint8)
    for index, plane in enumerate(structures):
        hull = convex_hull_image(plane > 0) if (plane > 0).sum() > 3 else plane > 0
        distance = ndimage.distance_transform_edt(~hull, VOXEL_MM) if hull.any() else 255
        hull_mm[index] = np.clip(distance, 0, 255)
    structures[(structures == 0) & (hull_mm == 0)] = NUMBERS["visceral fat"]
    return _anatomy(structures, hull_mm, (VOXEL_MM,) * 3, mapping.unknown_labels)


def phantom_anatomy(number: int) -> Anatomy:
    """Return the anatomy of a synthetic patient, of those for training."""
    shape, spacing = _PHANTOM_GRID
    structures = draw_anatomy(shape, spacing, np.random.default_rng(_PHANTOM_SEED + number))
    return _anatomy(structures, None, spacing)
