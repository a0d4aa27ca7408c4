"""What the service segments: NIfTI files, and DICOM series, whose room only they import."""

import contextlib
import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from inference.files import case_name, why_not_a_volume

if TYPE_CHECKING:
    import nibabel

    from inference.dicom.series import Series
    from inference.volume import Admit, OnContent, Volume

Source: TypeAlias = "Path | Series"
"""A NIfTI file by its path, or a series as `inference.dicom.discovery` finds it."""


def source_name(source: Source) -> str:
    """The name of a source's case; a file's own where it is not called as a volume is."""
    if not isinstance(source, Path):
        return source.name
    try:
        return case_name(source)
    except ValueError:
        return source.name


def source_files(source: Source) -> set[Path]:
    """The files that must not be written over."""
    return {source} if isinstance(source, Path) else {one.file.path for one in source.slices}


def why_not_a_source(source: Source) -> str:
    """What can be said against a source before it is read, or ""."""
    return why_not_a_volume(source) if isinstance(source, Path) else source.refusal


def read_source(
    source: Source, admit: "Admit | None" = None, on_content: "OnContent | None" = None
) -> "Volume":
    """Read a source, as `read_volume` does; a series has no content in one piece to be told of."""
    if not isinstance(source, Path):
        return source.read(admit)
    from inference.volume import read_volume

    return read_volume(source, admit, on_content)


def source_notes(source: Source) -> list[str]:
    """What is odd about a source that was read, and costs nothing."""
    return [] if isinstance(source, Path) else source.notes


def source_state(source: Source) -> tuple[int, int] | None:
    """Return size and time of change (ns) of a file; None for a series and where there is none."""
    with contextlib.suppress(OSError):
        if isinstance(source, Path):
            found = source.stat()
            return found.st_size, found.st_mtime_ns
    return None


def why_changed(source: Source, record: dict | None, made_ns: int) -> str:
    """Return why a source is not, or may not be, what its label map was made from, or "".

    Size and SHA-256 decide if there is a record of them, else the time of change.

    Args:
        source: as it is now.
        record: a manifest line, with `bytes` and `sha256`; None or empty if there is none.
        made_ns: time of change of the label map, ns.

    Raises:
        OSError: it cannot be read.
    """
    if not (record and record.get("sha256") and isinstance(source, Path)):
        newest = max(file.stat().st_mtime_ns for file in source_files(source))
        return "its input is newer" if newest > made_ns else ""
    if source.stat().st_size != record["bytes"]:
        return "its input has another size than in the manifest"
    with source.open("rb") as file:
        same = hashlib.file_digest(file, "sha256").hexdigest() == record["sha256"]
    return "" if same else "its input has another SHA-256 than in the manifest"


def source_header(source: Source) -> "nibabel.Nifti1Header":
    """The NIfTI header of a source's grid; its voxels are not read.

    Raises:
        VolumeError: it has none.
        OSError: the file cannot be read.
    """
    if not isinstance(source, Path):
        return source.header
    from inference.volume import read_header

    return read_header(source)
