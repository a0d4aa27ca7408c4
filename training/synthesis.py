"""Synthetic CT from anatomy: fully labelled slices to train on.

Domain randomisation as SynthSeg does it (Billot et al., Medical Image Analysis 86, 2023): a label
map of many structures is deformed at random, every structure gets a random attenuation, and the
scanner's own marks are added. Nothing is learned from real grey values, so that a network trained
on it depends on shapes and neighbourhoods and not on one contrast phase or one kernel.

Axes are (slices, rows, columns), toward (superior, posterior, left); lengths are in mm.
"""

import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from scipy import ndimage
from scipy.spatial.transform import Rotation
from torch.nn import functional
from tqdm import tqdm

from inference.files import one_line, write_atomically
from inference.memory import cpu_limit
from synthetic.grid import bspline_weights
from synthetic.structures import ALIKE, CORES, NUMBERS, PHASES, STRUCTURES
from training import TrainingError
from training.anatomies import (
    COUNT,
    LABELS,
    LEFT_MEDULLA,
    LESIONS,
    RIGHT_MEDULLA,
    STOMACH_CONTENT,
    Anatomy,
    load_anatomy_map,
    phantom_anatomy,
    read_anatomy,
)
from training.augmentation import log_uniform
from training.cache import describe, file_identity, save_array
from training.cases import CachedVolume, Case, CaseFiles, annotated_only

SLICES = 1000
"""Synthetic slices, drawn before the first step and used again and again."""

PIXEL_MM = 0.8
"""Of synthetic slices."""

_CACHE_VERSION = 1

_HOSTS = [
    NUMBERS[name] for name in ("liver", "right kidney", "left kidney", "pancreas", "spleen")
] + [NUMBERS["colon wall"], NUMBERS["stomach"], NUMBERS["visceral fat"]]
"""Where lesions grow; the insides of the kidneys count as kidney."""

_HOST_WEIGHTS = np.array([6, 2, 2, 3, 0.5, 1, 0.5, 0.5])


@lru_cache(maxsize=64)
def _splines(size: int, step: float) -> torch.Tensor:
    """Return B-spline weights (size, cells) of pixels for control points `step` apart."""
    cells = math.ceil((size - 1) / step) + 3
    return torch.from_numpy(bspline_weights(np.arange(size) - (size - 1) / 2, cells, step))


def smooth_noise(rng: np.random.Generator, size: int, step: float) -> np.ndarray:
    """Return (size, size) float32: noise of mean 0 and deviation about 1, smooth over `step`."""
    weights = _splines(size, step)
    cells = weights.shape[1]
    control = torch.from_numpy(rng.standard_normal((cells, cells), dtype=np.float32))
    # By torch, which keeps to one thread here; numpy's BLAS takes all cores in each process.
    return (weights @ control @ weights.T / 0.5).numpy()


def _blurred(image: np.ndarray, sigma: float) -> np.ndarray:
    """Blur by `sigma` pixels; not by one too small to be seen."""
    return ndimage.gaussian_filter(image, sigma, truncate=2.5) if sigma > 0.2 else image


def _scanner(image: np.ndarray, rng: np.random.Generator, pixel_mm: float) -> np.ndarray:
    """Add noise with a kernel's correlation, cupping and streaks to a slice, HU."""
    size = len(image)
    deviation = log_uniform(rng, 3, 40)
    noise = rng.standard_normal((size, size), dtype=np.float32)
    soft = _blurred(noise, rng.uniform(0.3, 1.3) / pixel_mm)
    if rng.random() < 0.3:  # a sharp kernel strengthens what is fine
        soft = noise - 0.7 * soft
    image = image + soft * np.float32(deviation / max(soft.std(), 1e-6))
    if rng.random() < 0.3:  # beam hardening: darker or brighter toward the middle, and streaks
        line = np.linspace(-1, 1, size, dtype=np.float32)
        image += rng.normal(0, 8) * (1 - np.add.outer(line**2, line**2))
        across = ndimage.gaussian_filter1d(rng.standard_normal(size).astype(np.float32), 2)
        image += rng.uniform(0, 25) * across[:, None] * (1 - line**2)
    return image


def _deformed_slab(
    anatomy: Anatomy, rng: np.random.Generator, size: int, pixel_mm: float
) -> tuple[np.ndarray, np.ndarray | None]:
    """Cut a deformed slab of the anatomy, (k, size, size): k planes through the slice's thickness.

    Returns the nearest structures, and `hull_mm` in the same places, or None.
    """
    spacing = np.array(anatomy.spacing, np.float32)
    planes = int(rng.integers(1, 4))
    thickness = log_uniform(rng, 1.0, 8.0)
    depth = ((np.arange(planes) + 0.5) / planes - 0.5) * thickness
    across = (np.arange(size, dtype=np.float32) - (size - 1) / 2) * pixel_mm

    angles = rng.normal(0, (7, 4, 4))  # about the superior, left and posterior axis
    rotation = Rotation.from_euler("xzy", angles, degrees=True).as_matrix()
    scale = np.exp(rng.normal(0, 0.1) + rng.normal(0, 0.06, 3))
    matrix = (rotation / scale).astype(np.float32)

    # Millimetres from the middle of the slice, before and after.
    places = np.stack(np.meshgrid(depth, across, across, indexing="ij")).astype(np.float32)
    points = np.einsum("ab,bpij->apij", matrix, places)
    for distance, strength in ((90.0, rng.uniform(0, 9)), (30.0, rng.uniform(0, 3))):
        for axis in range(3):
            points[axis] += strength * smooth_noise(rng, size, distance / pixel_mm)

    shape = np.array(anatomy.structures.shape)
    centre = (shape - 1) / 2
    if rng.random() < 0.6:  # of the slices, around one that shows a label, as rare organs need
        labels = sorted(anatomy.slices_with)
        centre[0] = rng.choice(anatomy.slices_with[labels[rng.integers(len(labels))]])
    else:
        centre[0] = rng.uniform(0, shape[0] - 1)
    changed = rng.permutation(sorted(anatomy.boxes))[:4]
    for label in changed:
        middle, half = anatomy.boxes[label]
        growth = np.exp(rng.normal(0, 0.2))
        offset = ((middle - centre) * spacing).astype(np.float32)
        if abs(offset[0]) > 2 * half[0] + 20:
            continue
        away = [points[axis] - offset[axis] for axis in range(3)]
        square = sum((part / (1.2 * size)) ** 2 for part, size in zip(away, half, strict=True))
        weight = np.float32(1 / growth - 1) * np.exp(-square)
        for axis in range(3):
            points[axis] += weight * away[axis]

    places = points / spacing[:, None, None, None] + centre.astype(np.float32)[:, None, None, None]
    places[0] = places[0].clip(0, shape[0] - 1)  # the first and last slice are repeated outwards

    def nearest(volume: np.ndarray, outside: int) -> np.ndarray:
        return ndimage.map_coordinates(volume, places, order=0, mode="grid-constant", cval=outside)

    hull_mm = anatomy.hull_mm
    return nearest(anatomy.structures, 0), None if hull_mm is None else nearest(hull_mm, 255)


def _add_wall(
    structures: np.ndarray, hull_mm: np.ndarray, rng: np.random.Generator, pixel_mm: float
) -> None:
    """Draw muscle, fat and skin around the hull of the organs, and a table, in place."""
    size = structures.shape[-1]
    uneven = smooth_noise(rng, size, 60 / pixel_mm)
    distance = hull_mm + 2.0 * uneven
    muscle = rng.uniform(2, 14)
    fat = muscle + log_uniform(rng, 3, 45)
    empty = structures == 0
    for name, upto in (
        ("skin", fat + 2.5),
        ("subcutaneous fat", fat),
        ("muscle", muscle),
        ("visceral fat", rng.uniform(0, 3)),
    ):
        structures[empty & (distance < upto)] = NUMBERS[name]
    rows = np.flatnonzero((structures[0] > 0).any(axis=1))
    if len(rows) and rng.random() < 0.8:
        across = np.arange(size) - size / 2 + rng.normal(0, 10)
        curve = (across * pixel_mm / rng.uniform(150, 600)) ** 2 * 60
        below = np.arange(size)[:, None] - rows[-1] - rng.uniform(0, 8) + curve / pixel_mm
        table = (below > 0) & (below * pixel_mm < 40) & (np.abs(across) * pixel_mm < 210)
        foam = table & (below * pixel_mm > 4) & (below * pixel_mm < 36)
        for mask, name in ((table, "table"), (foam, "table foam")):
            structures[(structures == 0) & mask] = NUMBERS[name]


def _add_lesions(
    structures: np.ndarray, rng: np.random.Generator, pixel_mm: float
) -> dict[int, int]:
    """Grow lesions in the slice, in place; returns the host of each lesion's number."""
    if rng.random() < 0.5:
        return {}
    size = structures.shape[-1]
    plane = structures[structures.shape[0] // 2]
    kidneys = {NUMBERS["right kidney"]: RIGHT_MEDULLA, NUMBERS["left kidney"]: LEFT_MEDULLA}
    hosts = {}
    for number in LESIONS[: rng.integers(1, len(LESIONS) + 1)]:
        counts = np.bincount(plane.ravel(), minlength=COUNT)
        weights = _HOST_WEIGHTS * (counts[_HOSTS] > 30)
        if not weights.sum():
            break
        host = int(rng.choice(_HOSTS, p=weights / weights.sum()))
        rows, columns = np.nonzero(plane == host)
        chosen = rng.integers(len(rows))
        radius = log_uniform(rng, 3, 35) / pixel_mm
        row, column = int(rows[chosen]), int(columns[chosen])
        stretch = np.exp(rng.normal(0, 0.2))
        ragged = smooth_noise(rng, size, max(radius * 0.8, 2))
        y, x = np.ogrid[:size, :size]
        away = np.hypot((y - row) * stretch, (x - column) / stretch) / radius
        grown = away + 0.15 * ragged < 1
        within = (structures == host) | (structures == kidneys.get(host, host))
        structures[grown & within] = number
        hosts[number] = host
    return hosts


def _levels(rng: np.random.Generator, hosts: dict[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Return mean attenuation and texture of every structure, HU, of a patient in one phase."""
    phase = rng.integers(len(PHASES))
    doubt = rng.uniform(0, 18)  # no table of attenuations is the truth of a clinic
    levels, textures = np.zeros((2, COUNT), np.float32)
    for number, structure in enumerate(STRUCTURES):
        levels[number] = rng.uniform(*structure.hu[phase])
        textures[number] = structure.texture
        if -200 < levels[number] < 150:
            levels[number] += rng.normal(0, doubt)
    for one, other in ALIKE:
        levels[NUMBERS[other]] = levels[NUMBERS[one]] + rng.normal(0, 4)
    if rng.random() < 0.15:  # fatty liver
        levels[NUMBERS["liver"]] -= rng.uniform(10, 60)
    levels[[RIGHT_MEDULLA, LEFT_MEDULLA]] = rng.uniform(*CORES["left kidney"][1][phase])
    levels[STOMACH_CONTENT] = rng.uniform(*CORES["stomach"][1][phase])
    for content in (STOMACH_CONTENT, NUMBERS["small bowel content"], NUMBERS["duodenum"]):
        if rng.random() < 0.2:  # oral contrast agent
            levels[content] = rng.uniform(100, 350)
    textures[[RIGHT_MEDULLA, LEFT_MEDULLA]] = 6
    textures[STOMACH_CONTENT] = rng.uniform(3, 40)
    textures *= rng.uniform(0.5, 2)
    for number, host in hosts.items():
        sign = -1 if rng.random() < 0.8 or host == NUMBERS["visceral fat"] else 1
        base = 60 if host == NUMBERS["visceral fat"] else levels[host]
        levels[number] = np.clip(base + sign * rng.uniform(20, 75), -10, 250)
        textures[number] = rng.uniform(3, 15)
    return levels, textures


def _add_gas(structures: np.ndarray, hu: np.ndarray, rng: np.random.Generator) -> None:
    """Add gas above the contents of stomach and bowel, in place: it rises to the front."""
    size = structures.shape[-1]
    for content, often in (
        (STOMACH_CONTENT, 0.5),
        (NUMBERS["small bowel content"], 0.25),
        (NUMBERS["colon content"], 0.6),
    ):
        mask = structures == content
        if rng.random() >= often or not mask.any():
            continue
        parts, count = ndimage.label(mask[mask.shape[0] // 2])
        if not count:
            continue
        fill = np.zeros((size, size), bool)
        for index, box in enumerate(ndimage.find_objects(parts), 1):
            rows = box[0].stop - box[0].start
            surface = int(rows * rng.uniform(-0.4, 1.2))
            if surface > 0:
                fill[box][:surface] |= parts[box][:surface] == index
        hu[mask & fill] = rng.uniform(-1000, -850)


def draw_slice(
    anatomy: Anatomy, rng: np.random.Generator, matrix: int = 512, pixel_mm: float = PIXEL_MM
) -> tuple[np.ndarray, np.ndarray, tuple[float, float]]:
    """Draw a slice of a new patient.

    The anatomy is sampled at twice the pixel, which is about its own resolution, and noise is added
    at the pixel itself.

    Returns:
        HU, int16, and the anatomy's annotated labels, uint8, both (matrix, matrix), which is even;
        and a window, HU, such as the 1st and 99th percentile of a whole CT may be: air or the
        padding's value, and bone or soft tissue.
    """
    coarse_mm, size = 2 * pixel_mm, matrix // 2
    structures, hull_mm = _deformed_slab(anatomy, rng, size, coarse_mm)
    if hull_mm is not None:
        _add_wall(structures, hull_mm, rng, coarse_mm)
    hosts = _add_lesions(structures, rng, coarse_mm)
    levels, textures = _levels(rng, hosts)
    labels = annotated_only(LABELS[structures[structures.shape[0] // 2]], anatomy.annotated)

    smooth = smooth_noise(rng, size, rng.uniform(6, 25) / coarse_mm)
    # Vessels: thin ridges of a smooth field, where organs have them.
    ridges = np.abs(smooth_noise(rng, size, rng.uniform(10, 22) / coarse_mm)) < 0.07
    vessel = rng.uniform(-15, 70)
    hu = levels[structures] + textures[structures] * smooth
    hu += vessel * (ridges & np.isin(structures, (NUMBERS["liver"], NUMBERS["visceral fat"])))
    grain = rng.standard_normal((size, size), dtype=np.float32)
    hu += textures[structures] * _blurred(grain, rng.uniform(0.3, 1.2))
    _add_gas(structures, hu, rng)
    plane = hu.mean(axis=0)
    plane = _blurred(plane, rng.uniform(0.3, 1.0))

    coarse = torch.from_numpy(plane)[None, None]
    finer = functional.interpolate(coarse, scale_factor=2, mode="bilinear")[0, 0].numpy()
    image = _scanner(finer, rng, pixel_mm)
    low, high = rng.normal(-1010, 15), log_uniform(rng, 160, 900)
    if rng.random() < 0.4:  # what lies outside the circle that was measured
        padding = float(rng.choice((-1024, -2048, -3024), p=(0.6, 0.25, 0.15)))
        y = np.arange(matrix) - (matrix - 1) / 2
        radius = rng.uniform(0.47, 0.52) * matrix
        image[np.add.outer(y**2, y**2) > radius**2] = padding
        low = min(low, padding) if rng.random() < 0.8 else low
    hu = np.clip(np.rint(image), -3024, 3071).astype(np.int16)
    return hu, labels.repeat(2, axis=0).repeat(2, axis=1), (float(low), float(high))


def _draw_source(source: str, count: int, folder: Path) -> None:
    """Draw slices of one source (FILE[=MAP], or the number of a synthetic patient) into a folder.

    Its files are `hu.npy`, `labels.npy` and, last, `slices.json`.
    """
    path, _, name = source.partition("=")
    try:
        if source.isdigit():
            anatomy = phantom_anatomy(int(source))
        else:
            anatomy = read_anatomy(Path(path), load_anatomy_map(name or "totalsegmentator"))
    except (OSError, ValueError) as error:
        raise TrainingError(f"{path}: {one_line(error)}") from error
    folder.mkdir(parents=True, exist_ok=True)
    seed = int(source) + 1 if source.isdigit() else 0
    drawn = [draw_slice(anatomy, np.random.default_rng((seed, n))) for n in range(count)]
    hu, labels, windows = zip(*drawn, strict=True)
    about = [
        describe(values[None], part[None], (PIXEL_MM,) * 3, window)
        for values, part, window in zip(hu, labels, windows, strict=True)
    ]
    save_array(folder / "hu.npy", np.stack(hu))
    save_array(folder / "labels.npy", np.stack(labels))
    content = {"annotated": anatomy.annotated, "slices": about}
    write_atomically(folder / "slices.json", json.dumps(content))


def _read_source(folder: Path) -> Iterator[Case]:
    """Return each slice that `_draw_source` drew as a case of its own, with its own window."""
    content = json.loads((folder / "slices.json").read_text(encoding="utf-8"))
    hu, labels = (np.load(folder / f"{name}.npy", "r") for name in ("hu", "labels"))
    for index, about in enumerate(content["slices"]):
        name = f"{folder.name}-{index}"
        files = CaseFiles("synthetic", name, folder, folder, name, stack=True)
        here = slice(index, index + 1)
        yield Case(
            files, tuple(content["annotated"]), CachedVolume.of(hu[here], labels[here], about)
        )


def synthetic_cases(files: Sequence[str], phantoms: int, cache: Path, count: int) -> list[Case]:
    """Return about `count` synthetic slices, drawn by all cores or found in the cache.

    There are as many of files (FILE or FILE=MAP, as `load_anatomy_map` takes it) as of phantoms.

    Raises:
        TrainingError: a file is not an anatomy; its name is in the message.
        OSError: the cache cannot be written.
    """
    groups = [list(files), [str(number) for number in range(phantoms)]]
    parts = sum(map(bool, groups))
    tasks = []
    for group in groups:
        for source in group:
            share = math.ceil(count / parts / len(group))
            key = [_CACHE_VERSION, source, share]
            if not source.isdigit():
                try:
                    key += file_identity(Path(source.partition("=")[0]), by_content=False)
                except OSError as error:
                    raise TrainingError(f"{source}: {one_line(error)}") from error
            digest = hashlib.sha256(repr(key).encode(errors="surrogateescape")).hexdigest()[:16]
            tasks.append((source, share, cache / f"synthetic-{digest}"))
    missing = [task for task in tasks if not (task[2] / "slices.json").is_file()]
    if missing:
        # Threads of torch do not survive the fork.
        workers = min(cpu_limit(), len(missing))
        pool = ProcessPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,))
        try:
            outcomes = pool.map(_draw_source, *zip(*missing, strict=True))
            list(tqdm(outcomes, "synthetic slices", len(missing), leave=False, disable=None))
        finally:
            pool.shutdown(cancel_futures=True)
    return [case for _, _, folder in tasks for case in _read_source(folder)]
