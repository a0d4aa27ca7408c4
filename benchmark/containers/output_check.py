"""Whether what a container wrote can be scored, and whether it is what the challenge asks for."""

from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import nibabel
import numpy as np

from inference.files import printable
from inference.labels import LABEL_NAMES
from inference.volume import Volume, VolumeError, read_header, read_volume

_MOST_ENTRIES = 1000  # of a folder, looked at to say what is there instead
_AFFINE_TOLERANCE = 1e-3
"""mm; what float32 headers and quaternions lose in copying is below."""


@dataclass
class OutputCheck:
    """What is to be said of a case's output.

    Attributes:
        found: the file is there under its name.
        scorable: the official script can score it: readable and of the input's shape.
        problems: what differs from what the challenge asks for, one line each.
        aspects: what each problem is about: "name", "file", "shape", "affine", "type" or "labels".
    """

    found: bool
    scorable: bool
    problems: list[str] = field(default_factory=list)
    aspects: list[str] = field(default_factory=list)

    @property
    def valid(self) -> bool:
        """Found, and nothing is wrong with it."""
        return self.found and not self.problems


def missing_output(outputs: Path, name: str) -> OutputCheck:
    """What is to be said where the label map is not there.

    Args:
        outputs: the folder that the container wrote into.
        name: that the label map must have.
    """
    entries = islice(outputs.rglob("*"), _MOST_ENTRIES)
    others = sorted(
        str(other.relative_to(outputs))
        for other in entries
        if not other.is_symlink() and other.is_file() and not other.name.startswith(".")
    )
    shown = ", ".join(printable(other) for other in others[:5])
    found = f"found {shown} instead" if others else "the folder is empty"
    return OutputCheck(
        found=False, scorable=False, problems=[f"no {name}: {found}"], aspects=["name"]
    )


def check_output(path: Path, image: Path) -> OutputCheck:
    """Hold a case's label map against its input: shape, affine, type and labels.

    A label map of another shape is not unpacked: what it takes depends on the input alone.

    Args:
        path: of the label map.
        image: the input volume.
    """
    expected = nibabel.load(image).header
    try:
        shape = read_header(path).get_data_shape()
        if shape != expected.get_data_shape():
            wanted = _by(expected.get_data_shape())
            problem = f"shape {_by(shape)}, the input has {wanted}"
            return OutputCheck(found=True, scorable=False, problems=[problem], aspects=["shape"])
        output = read_volume(path)
    except (VolumeError, OSError) as error:
        problem = printable(f"cannot be read: {error}")
        return OutputCheck(found=True, scorable=False, problems=[problem], aspects=["file"])
    check = OutputCheck(found=True, scorable=True)
    for aspect, problem in _problems(output, expected):
        check.aspects.append(aspect)
        check.problems.append(problem)
    return check


def _problems(output: Volume, image: nibabel.Nifti1Header) -> list[tuple[str, str]]:
    problems = []
    if not np.allclose(output.affine, image.get_best_affine(), rtol=0, atol=_AFFINE_TOLERANCE):
        problems.append(("affine", "affine differs from the input's"))
    if output.voxels.dtype.kind not in "iu":
        problems.append(("type", f"stored as {output.voxels.dtype}, not as integers"))
    if (output.slope, output.intercept) != (1.0, 0.0):
        problems.append(("type", f"scaled by {output.slope:g} and {output.intercept:g}"))
    values = np.unique(np.concatenate([np.unique(part) for part in output.voxels]))
    values = values * output.slope + output.intercept
    strange = np.setdiff1d(values, np.arange(len(LABEL_NAMES)))
    if strange.size:
        shown = ", ".join(f"{value:g}" for value in strange[:5])
        more = " …" * (strange.size > 5)
        problems.append(("labels", f"values that are no label: {shown}{more}"))
    return problems


def _by(shape: tuple[int, ...]) -> str:
    return "×".join(map(str, shape))
