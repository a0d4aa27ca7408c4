"""A synthetic abdominal CT with all 14 structures of the challenge and its exact label map.

The patient is a list of ellipsoids and tapered capsules in millimetres, bent by a smooth random
deformation and sampled on any grid: shape and spacing choose what is seen of a patient, the seed
chooses the patient. It stands in for real CT where truth must be known and no data may be shipped
(demonstration, tests, timings); it is a cartoon of an abdomen, and no accuracy measured on it tells
anything about patients.

Axes are (slices, rows, columns), toward (superior, posterior, left), as everywhere in memory.
Points are (superior, posterior, left) in mm from the first lumbar vertebra (superior) and the
middle of the body (posterior, left).

    python -m benchmark phantom --output DIR
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
from isal import igzip

from inference.files import write_atomically
from inference.labels import TUMOR
from synthetic.rendering import render
from synthetic.sampling import draw_anatomy
from synthetic.structures import PHASES


@dataclass(frozen=True)
class Phantom:
    """A synthetic CT and its truth."""

    volume: np.ndarray  # int16 (slices, rows, columns), HU
    label_map: np.ndarray  # uint8, of the same shape, the challenge's labels; all else is 0
    spacing: tuple[float, float, float]  # of slices, rows and columns, mm
    phase: str  # one of `PHASES`


def draw_phantom(
    shape: tuple[int, int, int] = (100, 512, 512),
    spacing: tuple[float, float, float] = (2.5, 0.8, 0.8),
    seed: int = 0,
    phase: str | None = None,
) -> Phantom:
    """Draw a synthetic abdominal CT; the same arguments give the same phantom.

    Args:
        shape: slices, rows and columns.
        spacing: of slices, rows and columns, mm.
        seed: of the patient and of the noise, 0 or more.
        phase: one of `PHASES`; None draws one from the seed.
    """
    anatomy_rng, look_rng, phase_rng = np.random.default_rng(seed).spawn(3)
    drawn = PHASES[phase_rng.integers(len(PHASES))] if phase is None else phase
    anatomy = draw_anatomy(shape, spacing, anatomy_rng)
    volume = render(anatomy, spacing, look_rng, drawn)
    label_map = np.where(anatomy <= TUMOR, anatomy, 0).astype(np.uint8)
    return Phantom(volume, label_map, spacing, drawn)


def write_nifti(path: Path, array: np.ndarray, spacing: Sequence[float]) -> None:
    """Write an array (slices, rows, columns) as an LPS NIfTI file, its middle at the origin.

    Args:
        path: ends in `.nii.gz`; it appears complete or not at all.
        array: int16 or uint8, toward (superior, posterior, left).
        spacing: of slices, rows and columns, mm.

    Raises:
        OSError: the file cannot be written.
    """
    steps = np.array([-spacing[2], -spacing[1], spacing[0]])  # NIfTI counts toward right, anterior
    affine = np.diag([*steps, 1.0])
    affine[:3, 3] = -steps * (np.array(array.shape[::-1]) - 1) / 2
    image = nib.Nifti1Image(array.transpose(2, 1, 0), affine)
    image.set_sform(affine, code=1)
    image.set_qform(affine, code=1)
    image.header.set_xyzt_units("mm")
    write_atomically(path, igzip.compress(image.to_bytes(), 2))
