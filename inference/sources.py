"""What the service segments: NIfTI files, and DICOM series, whose package only they import."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from .files import case_name, why_not_a_volume

if TYPE_CHECKING:
    import nibabel

    from .dicom.series import Series
    from .volume import Admit, OnContent, Volume


@dataclass(frozen=True)
class NiftiFile:
    """A NIfTI file, to be segmented as a `Series` is."""

    path: Path

    def __str__(self) -> str:
        return str(self.path)

    @property
    def name(self) -> str:
        """Return the name of its case; the file's own where that is no volume's."""
        try:
            return case_name(self.path)
        except ValueError:
            return self.path.name

    @property
    def refusal(self) -> str:
        """Return why it cannot be read, as far as its name and kind show, or ""."""
        return why_not_a_volume(self.path)

    @property
    def files(self) -> set[Path]:
        """Return the files that it is read from."""
        return {self.path}

    @property
    def byte_count(self) -> int:
        """Return its size, bytes; 0 where there is no file."""
        try:
            return self.path.stat().st_size
        except OSError:
            return 0

    @property
    def header(self) -> "nibabel.Nifti1Header":
        """Read its header alone; raises as `read_header`."""
        from .volume import read_header

        return read_header(self.path)

    def read(self, admit: "Admit | None" = None, on_content: "OnContent | None" = None) -> "Volume":
        """Read it as `read_volume`."""
        from .volume import read_volume

        return read_volume(self.path, admit, on_content)


Source: TypeAlias = "NiftiFile | Series"


def files_state(source: Source) -> set[tuple[Path, int, int]] | None:
    """Return path, size and time of change (ns) of a source's files; None if one is not there."""
    try:
        found = [(path, path.stat()) for path in source.files]
    except OSError:
        return None
    return {(path, status.st_size, status.st_mtime_ns) for path, status in found}


def why_changed(source: Source, record: dict | None, made_ns: int) -> str:
    """Return why a source is not, or may not be, what its label map was made from, or "".

    Size and SHA-256 of its one file decide if they are recorded, else its time of change against
    that of the label map (ns).
    """
    if not (record and record.get("sha256")):
        newest = max(path.stat().st_mtime_ns for path in source.files)
        return "its input is newer" if newest > made_ns else ""
    (path,) = source.files
    if path.stat().st_size != record["bytes"]:
        return "its input has another size than in the manifest"
    with path.open("rb") as file:
        same = hashlib.file_digest(file, "sha256").hexdigest() == record["sha256"]
    return "" if same else "its input has another SHA-256 than in the manifest"
