"""The volumes of a check: phantoms as unlike each other as the challenge's CTs, or a team's own."""

from pathlib import Path
from typing import NamedTuple

import nibabel
import numpy as np
from nibabel.orientations import axcodes2ornt, io_orientation, ornt_transform

from benchmark.containers.measurement import Case, list_cases
from benchmark.options import HarnessError
from benchmark.text import by, log
from synthetic.phantom import draw_phantom, write_nifti

LARGE_SLICES = 852
"""Slices of the very large phantom: 95 % of the challenge's CTs have fewer, the largest 2,651."""

_SEED = 2023
_COARSER = 2  # generated with so many fewer rows and columns, and repeated: a quarter of the time
_TURNED = ("S", "L", "A")  # where the turned file's axes point; most files have L, P, S or R, A, S


class Subject(NamedTuple):
    """One volume: what the check calls it, and a case with a name that the challenge could give."""

    label: str
    case: Case


_PHANTOMS = {
    "typical": ((172, 512, 512), (2.5, 0.82, 0.82)),  # medians of the challenge's 3,918 CTs
    "thin": ((24, 512, 512), (5.0, 0.82, 0.82)),  # its fewest slices
    "anisotropic": ((40, 512, 512), (8.0, 0.44, 0.44)),  # its thickest and its finest
    "turned": ((96, 320, 400), (3.0, 1.1, 1.0)),  # no two axes alike, which would hide a mistake
}
"""Shape and spacing (slices, rows, columns; mm) of the phantoms but the very large one."""


def make_subjects(folder: Path, large_slices: int) -> list[Subject]:
    """Generate the phantoms.

    Returns:
        The typical one first; the very large one last, unless `large_slices` is 0.
    """
    wanted = dict(_PHANTOMS)
    if large_slices:
        (_, rows, columns), spacing = wanted["typical"]
        wanted["very large"] = ((large_slices, rows, columns), spacing)
    subjects: list[Subject] = []
    typical = np.empty((0, 0, 0), np.int16)
    for number, (label, (shape, spacing)) in enumerate(wanted.items(), start=1):
        log(f"generating the {label} phantom, {by(shape[::-1])}")
        name = f"FLARE23Ts_{number:04d}"
        path = folder / f"{name}_0000.nii.gz"
        # The very large one, the last, is the typical one many times over, which saves a minute.
        volume = _draw(shape, spacing) if label in _PHANTOMS else lengthened(typical, shape[0])
        typical = volume if label == "typical" else typical
        write_nifti(path, volume, spacing)
        if label == "turned":
            _turn(path)
        subjects.append(
            Subject(label, Case(name, path, nibabel.Nifti1Image.from_filename(path).shape))
        )
    return subjects


def own_subjects(inputs: Path) -> list[Subject]:
    """Return a team's own CTs, smallest file first.

    Raises:
        HarnessError: as `list_cases`, and where something is no volume.
    """
    cases, refused = list_cases(inputs)
    for name, reason in refused.items():
        raise HarnessError(f"{inputs / name}: {reason}")
    cases = sorted(cases, key=lambda case: case.image.stat().st_size)
    return [Subject(case.name, case) for case in cases]


def damaged_subject(folder: Path, source: Subject) -> Subject:
    """Return a volume whose file ends in its middle, as one of a broken download does."""
    name = f"{source.case.name}_damaged"
    path = folder / f"{name}_0000.nii.gz"
    content = source.case.image.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    return Subject("damaged", Case(name, path, source.case.size))


def _draw(shape: tuple[int, int, int], spacing: tuple[float, float, float]) -> np.ndarray:
    coarse = draw_phantom(
        (shape[0], shape[1] // _COARSER, shape[2] // _COARSER),
        (spacing[0], spacing[1] * _COARSER, spacing[2] * _COARSER),
        _SEED,
    )
    return coarse.volume.repeat(_COARSER, axis=1).repeat(_COARSER, axis=2)


def lengthened(volume: np.ndarray, slices: int) -> np.ndarray:
    """Return so many slices of a volume that goes up and down again, so that no step shows."""
    there_and_back = [*range(len(volume)), *reversed(range(len(volume)))]
    return volume[np.resize(there_and_back, slices)]


def _turn(path: Path) -> None:
    """Store a file's volume with other axes; every voxel stays where it is in the patient."""
    image = nibabel.Nifti1Image.from_filename(path)
    turn = ornt_transform(io_orientation(image.affine), axcodes2ornt(_TURNED))
    turned = image.as_reoriented(turn)
    turned.set_sform(turned.affine, code=1)
    turned.set_qform(turned.affine, code=1)
    nibabel.save(turned, path)
