"""Whether what a container wrote can be scored, and whether it is what the challenge asks for."""

from dataclasses import dataclass, field
from pathlib import Path

import nibabel
import numpy as np

from inference.labels import LABEL_NAMES
from inference.volume import Volume, VolumeError, read_volume

_AFFINE_TOLERANCE = 1e-3
"""mm; what float32 headers and quaternions lose in copying is below."""


@dataclass
class OutputCheck:
    """What is to be said of a case's output.

    Attributes:
        found: the file is there under its name.
        scorable: the official script can score it: readable and of the input's shape.
        problems: what differs from what the challenge asks for, one line each.
    """

    found: bool
    scorable: bool
    problems: list[str] = field(default_factory=list)

    @property
    def valid(self) -> bool:
        """Found, and nothing is wrong with it."""
        return self.found and not self.problems


def check_output(outputs: Path, case: str, image: Path) -> OutputCheck:
    """Hold a case's output against its input: name, shape, affine, type and labels.

    Args:
        outputs: the folder that the container wrote into.
        case: NAME; the label map must be `NAME.nii.gz` (challenge rule).
        image: the input volume.
    """
    path = outputs / f"{case}.nii.gz"
    if not path.is_file():
        others = sorted(
            str(other.relative_to(outputs))
            for other in outputs.rglob("*")
            if other.is_file() and not other.name.startswith(".")
        )
        found = f"found {', '.join(others[:5])} instead" if others else "the folder is empty"
        return OutputCheck(found=False, scorable=False, problems=[f"no {path.name}: {found}"])
    try:
        output = read_volume(path)
    except (VolumeError, OSError) as error:
        return OutputCheck(found=True, scorable=False, problems=[f"cannot be read: {error}"])
    problems = _problems(output, nibabel.load(image).header)
    return OutputCheck(
        found=True, scorable=not problems.get("shape"), problems=[*problems.values()]
    )


def _problems(output: Volume, image: nibabel.Nifti1Header) -> dict[str, str]:
    problems = {}
    shape, expected = output.header.get_data_shape(), image.get_data_shape()
    if shape != expected:
        problems["shape"] = f"shape {_by(shape)}, the input has {_by(expected)}"
    if not np.allclose(output.affine, image.get_best_affine(), rtol=0, atol=_AFFINE_TOLERANCE):
        problems["affine"] = "affine differs from the input's"
    if output.voxels.dtype.kind not in "iu":
        problems["dtype"] = f"stored as {output.voxels.dtype}, not as integers"
    if (output.slope, output.intercept) != (1.0, 0.0):
        problems["scale"] = f"scaled by {output.slope:g} and {output.intercept:g}"
    values = np.unique(np.concatenate([np.unique(part) for part in output.voxels]))
    values = values * output.slope + output.intercept
    strange = np.setdiff1d(values, np.arange(len(LABEL_NAMES)))
    if strange.size:
        shown = ", ".join(f"{value:g}" for value in strange[:5])
        problems["labels"] = f"values that are no label: {shown}" + " …" * (strange.size > 5)
    return problems


def _by(shape: tuple[int, ...]) -> str:
    return "×".join(map(str, shape))
