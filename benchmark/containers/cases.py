"""The cases of a folder of CTs."""

from dataclasses import dataclass
from pathlib import Path

from benchmark.messages import UsageError
from inference.files import case_name, find_cases
from inference.volume import VolumeError, read_header


@dataclass(frozen=True)
class Case:
    """One input volume.

    Attributes:
        name: of the case, without `_0000`.
        image: the volume's file.
        size: its shape on disk.
    """

    name: str
    image: Path
    size: tuple[int, ...]


def list_cases(inputs: Path, unreadable: dict[str, str] | None = None) -> list[Case]:
    """The cases of a folder of CTs.

    Args:
        inputs: the folder.
        unreadable: gets the name of each file that is no NIfTI file, and why.

    Raises:
        UsageError: it is no folder, or holds no case, two of one name, or, without `unreadable`,
            what is no NIfTI file.
    """
    if not inputs.is_dir():
        raise UsageError(f"--inputs {inputs} is not a folder")
    cases: dict[str, Case] = {}
    for image in find_cases(inputs):
        name = case_name(image)
        if name in cases:
            raise UsageError(f"{cases[name].image.name} and {image.name} are both case {name}")
        try:
            cases[name] = Case(name, image, tuple(read_header(image).get_data_shape()))
        except (VolumeError, OSError) as error:
            if unreadable is None:
                raise UsageError(f"{image} is not a NIfTI file: {error}") from error
            unreadable[image.name] = f"not a NIfTI file: {error}"
    if unreadable and not cases:
        raise UsageError(f"--inputs {inputs} holds no file that can be read: {unreadable}")
    if not cases:
        raise UsageError(f"--inputs {inputs} holds no .nii.gz file")
    return list(cases.values())
