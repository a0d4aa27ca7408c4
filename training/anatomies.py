"""Anatomies to draw slices of: from a file of many structures, or of synthetic patients."""

import hashlib
import json
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from scipy import ndimage
from skimage.morphology import convex_hull_image
from tqdm import tqdm

from inference.labels import ORGANS, TUMOR
from inference.memory import cpu_limit
from inference.volume import read_volume
from synthetic.sampling import draw_anatomy
from synthetic.structures import CORES, NUMBERS, STRUCTURES
from training import TrainingError
from training.cache import save_array

Result = TypeVar("Result")

ANATOMY_MAPS = Path(__file__).parent / "anatomy_maps"
"""Where the shipped maps of structures lie."""

VOXEL_MM = 1.5
"""Spacing of the anatomies from files: about the pixel of a slice reduced by 2."""

_PHANTOM_GRID = ((84, 256, 256), (4.0, 1.6, 1.6))

_PHANTOM_SEED = 500_000  # of the first patient: far from the seeds of tests and demonstration

_CACHE_VERSION = 2

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
    """How the numbers of a file of structures become those of `STRUCTURES`.

    Attributes:
        name: of the file in `ANATOMY_MAPS`, or its path.
        description: whose numbers they are.
        scale: factor of the file's spacing.
        unknown_labels: of ours, which the file's structures do not tell apart.
        structures: the file's numbers to ours; 0 for those left out.
    """

    name: str
    description: str
    scale: float
    unknown_labels: tuple[int, ...]
    structures: dict[int, int]


def load_anatomy_map(name: str) -> AnatomyMap:
    """Read a map of structures: a shipped one by name (`spl`), or a path ending in .json.

    Raises:
        TrainingError: no such file, or not of the form of the shipped ones.
    """
    path = Path(name) if name.endswith(".json") else ANATOMY_MAPS / f"{name}.json"
    if not path.is_file():
        shipped = ", ".join(sorted(file.stem for file in ANATOMY_MAPS.glob("*.json")))
        raise TrainingError(f"no map of structures {name}: name one of {shipped} or a .json file")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        structures = dict.fromkeys(map(int, content.get("left_out", ())), 0)
        for structure, numbers in content["structures"].items():
            structures.update(dict.fromkeys(map(int, numbers), NUMBERS[structure]))
        return AnatomyMap(
            name=name,
            description=str(content["description"]),
            scale=float(content.get("scale", 1)),
            unknown_labels=tuple(content.get("unknown_labels", ())),
            structures={0: 0, **structures},
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise TrainingError(f"{path}: not a map of structures ({error!r})") from error


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
        unknown_labels: that its structures do not tell apart, so that nobody knows where they are.
    """

    name: str
    structures: np.ndarray
    beyond: np.ndarray | None
    spacing: tuple[float, float, float]
    boxes: dict[int, tuple[np.ndarray, np.ndarray]]
    slices_with: dict[int, np.ndarray]
    unknown_labels: tuple[int, ...] = ()


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


def read_anatomy(path: Path, mapping: AnatomyMap | None = None) -> Anatomy:
    """Make an anatomy of a label map of many structures.

    What lies around the organs in each slice, wall, fat and skin, is drawn with the slice.

    Args:
        path: of the file.
        mapping: of its numbers; TotalSegmentator's by default.

    Raises:
        TrainingError: not such a label map, or it shows none of the 13 organs.
        VolumeError: the file cannot be used.
        OSError: the file cannot be read.
    """
    mapping = mapping or load_anatomy_map("totalsegmentator")
    volume = read_volume(path)
    if volume.voxels.dtype.kind not in "iu":
        raise TrainingError(f"not a label map in {mapping.description}")
    numbers = np.union1d(0, np.unique(volume.voxels))
    unknown = [number for number in numbers.tolist() if number not in mapping.structures]
    if unknown or len(numbers) > 256:
        raise TrainingError(f"not a label map in {mapping.description}: it holds {unknown[:5]}")
    compact = np.searchsorted(numbers, volume.voxels).astype(np.uint8)
    table = np.array([mapping.structures[number] for number in numbers.tolist()], np.uint8)
    refined = _refined(compact, [mapping.scale * size for size in volume.spacing])
    structures = table[refined]
    if not np.isin(structures, ORGANS).any():
        raise TrainingError("none of the 13 organs is in it")
    spacing = (VOXEL_MM,) * 3
    beyond = np.zeros(structures.shape, np.uint8)
    for index, plane in enumerate(structures):
        hull = convex_hull_image(plane > 0) if (plane > 0).sum() > 3 else plane > 0
        distance = ndimage.distance_transform_edt(~hull, VOXEL_MM) if hull.any() else 255
        beyond[index] = np.clip(distance, 0, 255)
    inside = (structures == 0) & (beyond == 0)
    structures[inside] = NUMBERS["visceral fat"]
    _hollow(structures, spacing)
    anatomy = _anatomy(path.name, structures, beyond, spacing)
    return replace(anatomy, unknown_labels=mapping.unknown_labels)


def in_parallel(function: Callable[..., Result], tasks: Sequence[tuple], text: str) -> list[Result]:
    """Return what a function returns for each task, by all cores; Ctrl-C cancels those waiting."""
    if not tasks:
        return []
    workers = min(cpu_limit(), len(tasks))
    # Threads of torch do not survive the fork.
    pool = ProcessPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,))
    try:
        outcomes = pool.map(function, *zip(*tasks, strict=True))
        return list(tqdm(outcomes, text, len(tasks), leave=False, disable=None))
    finally:
        pool.shutdown(cancel_futures=True)


def _draw_phantom(number: int, path: Path) -> None:
    shape, spacing = _PHANTOM_GRID
    structures = draw_anatomy(shape, spacing, np.random.default_rng(_PHANTOM_SEED + number))
    _hollow(structures, spacing)
    save_array(path, structures)


def _is_whole(path: Path) -> bool:
    try:
        return np.load(path, mmap_mode="r").shape == _PHANTOM_GRID[0]
    except (OSError, ValueError, EOFError):
        return False


def phantom_anatomies(count: int, folder: Path) -> list[Anatomy]:
    """Return anatomies of synthetic patients, kept in a cache.

    Args:
        count: of patients; the first ones are the same whatever their number.
        folder: of the cache.

    Raises:
        OSError: the cache cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    key = hashlib.sha256(repr((_CACHE_VERSION, _PHANTOM_GRID)).encode()).hexdigest()[:8]
    paths = [folder / f"anatomy-{key}-{number:04}.npy" for number in range(count)]
    missing = [(number, path) for number, path in enumerate(paths) if not _is_whole(path)]
    in_parallel(_draw_phantom, missing, "synthetic patients")
    return [
        _anatomy(f"phantom {number}", np.load(path, mmap_mode="r"), None, _PHANTOM_GRID[1])
        for number, path in enumerate(paths)
    ]
