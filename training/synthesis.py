"""Synthetic CT from anatomy: endless fully labelled slices to train on.

Domain randomisation as SynthSeg does it (Billot et al., Medical Image Analysis 86, 2023): a label
map of many structures is deformed at random, every structure gets a random attenuation, and the
scanner's own marks are added. Nothing is learned from real grey values, so that a network trained
on it depends on shapes and neighbourhoods and not on one contrast phase or one kernel.

An anatomy is a label map in the numbers of `synthetic.structures.STRUCTURES`, widened by those of
`anatomies.py`.
It comes from the phantom (many patients, each a cartoon) or from a file in TotalSegmentator's class
numbers (one patient, in detail).

Axes are (slices, rows, columns), toward (superior, posterior, left); lengths are in mm.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy import ndimage

from inference.files import one_line
from inference.labels import LABEL_NAMES
from synthetic.structures import CORES, NUMBERS, PHASES, STRUCTURES
from training import TrainingError
from training.anatomies import (
    COUNT,
    LABELS,
    LEFT_MEDULLA,
    LESIONS,
    RIGHT_MEDULLA,
    STOMACH_CONTENT,
    Anatomy,
    in_parallel,
    load_anatomy_map,
    phantom_anatomies,
    read_anatomy,
)
from training.deformation import deformed_slab
from training.slices import Slice, annotated_only
from training.textures import blurred, doubled, scanner, smooth_noise

_HOSTS = [
    NUMBERS[name] for name in ("liver", "right kidney", "left kidney", "pancreas", "spleen")
] + [NUMBERS["colon wall"], NUMBERS["stomach"], NUMBERS["visceral fat"]]
"""Where lesions grow; the insides of the kidneys count as kidney."""

_HOST_WEIGHTS = np.array([6, 2, 2, 3, 0.5, 1, 0.5, 0.5])


@dataclass(frozen=True)
class Synthesis:
    """Draws slices: call it with a generator.

    Attributes:
        anatomies: to draw from, each as often as any other within its group.
        groups: sizes of the groups, in order: the anatomies of a group share its part equally, and
            every group has the same part (one detailed patient beside a hundred cartoons).
        matrix: rows and columns of the slices; even.
        pixel_mm: of the slices.
    """

    anatomies: list[Anatomy]
    groups: tuple[int, ...]
    matrix: int = 512
    pixel_mm: float = 0.8

    def __call__(self, rng: np.random.Generator) -> Slice:
        """One slice; all labels are looked for that its anatomy tells apart."""
        group = rng.integers(len(self.groups))
        number = sum(self.groups[:group]) + rng.integers(self.groups[group])
        return draw_slice(self.anatomies[number], rng, self.matrix, self.pixel_mm)


def _read_file(file: str) -> Anatomy:
    path, _, name = file.partition("=")
    try:
        return read_anatomy(Path(path), load_anatomy_map(name or "totalsegmentator"))
    except (OSError, ValueError) as error:
        raise TrainingError(f"{path}: {one_line(error)}") from error


def load(files: Sequence[str], phantoms: int, cache: Path) -> Synthesis:
    """Make ready to draw slices: from files, if there are any, as often as from phantoms.

    Args:
        files: FILE or FILE=MAP, a path and which map its numbers are of (`load_anatomy_map`).
        phantoms: number of synthetic patients.
        cache: folder for these.

    Raises:
        TrainingError: a file is not an anatomy; its name is in the message.
        OSError: the cache cannot be written.
    """
    anatomies = in_parallel(_read_file, [(file,) for file in files], "anatomies")
    anatomies += phantom_anatomies(phantoms, cache)
    return Synthesis(anatomies, tuple(size for size in (len(files), phantoms) if size))


def intensity_statistics(synthesise: Synthesis, slices: int = 100) -> tuple[float, float]:
    """Mean and standard deviation, HU, of slices drawn, each clipped to its own window."""
    rng = np.random.default_rng(0)
    drawn = [synthesise(rng) for _ in range(slices)]
    values = np.concatenate([np.clip(part.hu, *part.window).ravel() for part in drawn])
    return float(values.mean()), float(values.std())


def _add_wall(
    structures: np.ndarray, beyond: np.ndarray, rng: np.random.Generator, pixel_mm: float
) -> None:
    """Draw muscle, fat and skin around the hull of the organs, and a table, in place."""
    size = structures.shape[-1]
    uneven = smooth_noise(rng, size, 60 / pixel_mm)
    distance = beyond + 2.0 * uneven
    muscle = rng.uniform(2, 14)
    fat = muscle + np.exp(rng.uniform(np.log(3), np.log(45)))
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
        radius = np.exp(rng.uniform(np.log(3), np.log(35))) / pixel_mm
        reach = int(radius * 1.6) + 2
        row, column = int(rows[chosen]), int(columns[chosen])
        window = (
            slice(max(row - reach, 0), min(row + reach, size)),
            slice(max(column - reach, 0), min(column + reach, size)),
        )
        stretch = np.exp(rng.normal(0, 0.2))
        ragged = smooth_noise(rng, size, max(radius * 0.8, 2))[window]
        y = np.arange(window[0].start, window[0].stop)[:, None]
        x = np.arange(window[1].start, window[1].stop)
        away = np.hypot((y - row) * stretch, (x - column) / stretch) / radius
        grown = away + 0.15 * ragged < 1
        part = structures[:, window[0], window[1]]
        part[grown & ((part == host) | (part == kidneys.get(host, host)))] = number
        hosts[number] = host
    return hosts


def _levels(rng: np.random.Generator, hosts: dict[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Mean attenuation and texture of every structure, HU, of one patient in one phase."""
    phase = rng.integers(len(PHASES))
    doubt = rng.uniform(0, 18)  # no table of attenuations is the truth of a clinic
    levels, textures = np.zeros((2, COUNT), np.float32)
    for number, structure in enumerate(STRUCTURES):
        levels[number] = rng.uniform(*structure.hu[phase])
        textures[number] = structure.texture
        if -200 < levels[number] < 150:
            levels[number] += rng.normal(0, doubt)
    for one, other in (
        ("right kidney", "left kidney"),
        ("right adrenal gland", "left adrenal gland"),
        ("aorta", "arteries"),
        ("inferior vena cava", "veins"),
    ):
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
    """Gas above the contents of stomach and bowel, in place: it rises to the front."""
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
    anatomy: Anatomy, rng: np.random.Generator, matrix: int = 512, pixel_mm: float = 0.8
) -> Slice:
    """Draw a slice of a patient nobody has seen.

    The anatomy is sampled at twice the pixel, which is about its own resolution, and noise is added
    at the pixel itself.

    Args:
        anatomy: to draw from.
        rng: source of everything random.
        matrix: rows and columns; even.
        pixel_mm: size of a pixel.

    Returns:
        A slice of (matrix, matrix), all labels looked for but the anatomy's unknown ones. Its
        window is what the 1st and 99th percentile of a whole CT may be: air or the padding's value,
        and bone or soft tissue.
    """
    coarse_mm, size = 2 * pixel_mm, matrix // 2
    structures, beyond = deformed_slab(anatomy, rng, size, coarse_mm)
    if beyond is not None:
        _add_wall(structures, beyond, rng, coarse_mm)
    hosts = _add_lesions(structures, rng, coarse_mm)
    levels, textures = _levels(rng, hosts)
    annotated = np.ones(len(LABEL_NAMES), bool)
    annotated[list(anatomy.unknown_labels)] = False
    labels = annotated_only(LABELS[structures[structures.shape[0] // 2]], annotated)

    smooth = smooth_noise(rng, size, rng.uniform(6, 25) / coarse_mm)
    # Vessels: thin ridges of a smooth field, where organs have them.
    ridges = np.abs(smooth_noise(rng, size, rng.uniform(10, 22) / coarse_mm)) < 0.07
    vessel = rng.uniform(-15, 70)
    hu = levels[structures] + textures[structures] * smooth
    hu += vessel * (ridges & np.isin(structures, (NUMBERS["liver"], NUMBERS["visceral fat"])))
    grain = rng.standard_normal((size, size), dtype=np.float32)
    hu += textures[structures] * blurred(grain, rng.uniform(0.3, 1.2))
    _add_gas(structures, hu, rng)
    plane = hu.mean(axis=0)
    plane = blurred(plane, rng.uniform(0.3, 1.0))

    image = scanner(doubled(doubled(plane).T).T, rng, pixel_mm)
    low, high = rng.normal(-1010, 15), np.exp(rng.uniform(np.log(160), np.log(900)))
    if rng.random() < 0.4:  # what lies outside the circle that was measured
        padding = float(rng.choice((-1024, -2048, -3024), p=(0.6, 0.25, 0.15)))
        y = np.arange(matrix) - (matrix - 1) / 2
        radius = rng.uniform(0.47, 0.52) * matrix
        image[np.add.outer(y**2, y**2) > radius**2] = padding
        low = min(low, padding) if rng.random() < 0.8 else low
    return Slice(
        hu=np.clip(np.rint(image), -3024, 3071).astype(np.int16),
        labels=labels.repeat(2, axis=0).repeat(2, axis=1),
        annotated=annotated,
        window=(float(low), float(high)),
        pixel_mm=pixel_mm,
    )
