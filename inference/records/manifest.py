"""What a run knows of each case: one record, as a line of a manifest and as rows of a table."""

import contextlib
import fcntl
import hashlib
import json
import os
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import nibabel
import numpy as np

from ..files import flush_to_disk, one_line
from ..labels import LABEL_NAMES
from ..phases import PhaseTimer
from ..volume import Volume
from .provenance import Provenance, same_signature
from .statistics import StatisticsTable

if TYPE_CHECKING:
    from ..case import Case

_START = b'{"case": '
"""The first bytes of every line of a manifest."""

_INPUT_INFO = ("bytes", "sha256", "shape", "spacing_mm", "orientation", "device", "precision")
_STATISTICS = ("voxels", "volumes_ml", "mean_hu")


def content_info(content: bytes) -> dict:
    """Return what a record says of a file's bytes; other threads run while they are hashed."""
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def grid_info(volume: Volume) -> dict:
    """Return what a record says of a volume's grid, in the order of the file's axes (i, j, k).

    Returns:
        `shape`; `spacing_mm`; `orientation`, the directions of the axes as nibabel's `aff2axcodes`.
    """
    order = np.argsort(volume.disk_axes)
    return {
        "shape": [volume.voxels.shape[axis] for axis in order],
        "spacing_mm": [round(volume.spacing[axis], 6) for axis in order],
        "orientation": "".join(nibabel.aff2axcodes(volume.affine)),
    }


def case_record(case: "Case", provenance: Provenance, seconds: dict[str, float]) -> dict:
    """Return the record of a case that has ended, of JSON's types.

    Args:
        case: with its input and statistics, as far as it was read.
        provenance: what makes its label map.
        seconds: per stage of the case.
    """
    flags = [
        {"flag": flag.name, "label": LABEL_NAMES[flag.label] if flag.label else None}
        | ({"detail": flag.detail} if flag.detail else {})
        for flag in case.flags
    ]
    return {
        "case": case.name,
        "status": case.status,
        "reason": case.reason or None,
        "input": str(case.source),
        **{name: case.input_info.get(name) for name in _INPUT_INFO},
        "made_by": provenance.signature,
        "weights": provenance.weights_names,
        "weights_sha256": provenance.digests,
        "versions": provenance.versions,
        "seconds": {stage: round(value, 4) for stage, value in seconds.items()},
        **{name: case.statistics.get(name) for name in _STATISTICS},
        "flags": flags,
        "warnings": case.warnings,
    }


class Manifest:
    """A file of records, one line of JSON each, to which runs append.

    Each line is appended whole, by one write to a file opened with O_APPEND and locked meanwhile,
    so that several processes may share it on a file system that has locks. A line that a machine
    left torn when it died is removed before the next is written. Of several lines of a case the
    last one counts.

    Args:
        path: of the file, `.jsonl`.

    Raises:
        ValueError: the file is something else.
        OSError: it cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        path.touch()  # so that what appends below finds a file: some mounts refuse that
        self._append(b"")

    def add(self, record: dict) -> None:
        """Append a record.

        Raises:
            OSError: the file cannot be written.
        """
        text = json.dumps(record, allow_nan=False)  # ASCII: a name of any bytes fits
        self._append(text.encode() + b"\n")

    def find(self, signature: str) -> dict[str, int]:
        """Return, by case, the offset of its last label map's line if that is by a signature.

        Lines of failures are skipped: they leave the label map, which may be of another input of
        the same name, as it is.

        Raises:
            OSError: the file cannot be read.
        """
        found: dict[str, int] = {}
        offset = 0
        with self.path.open("rb") as file:
            for line in file:
                with contextlib.suppress(ValueError, KeyError, TypeError):
                    record = json.loads(line)
                    if record["status"] in ("done", "kept"):
                        found.pop(record["case"], None)
                        if same_signature(record["made_by"], signature):
                            found[record["case"]] = offset
                offset += len(line)
        return found

    def read(self, offset: int) -> dict:
        """Return the record at an offset.

        Raises:
            OSError: the file cannot be read.
        """
        with self.path.open("rb") as file:
            file.seek(offset)
            return json.loads(file.readline())

    def _append(self, data: bytes) -> None:
        flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC
        descriptor = os.open(self.path, flags, 0o666)
        try:
            with contextlib.suppress(OSError):  # not every file system has locks
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            self._mend(descriptor)
            view = memoryview(data)
            while view:  # one write, unless the disk is full
                view = view[os.write(descriptor, view) :]
            if data:
                flush_to_disk(descriptor)
        finally:
            os.close(descriptor)

    def _mend(self, descriptor: int) -> None:
        """Remove a torn last line; a whole one without line end gets it.

        Raises:
            ValueError: the file is no manifest.
        """
        size = os.fstat(descriptor).st_size
        if not _START.startswith(os.pread(descriptor, len(_START), 0)):
            raise ValueError("not a manifest: name another file")
        if size == 0 or os.pread(descriptor, 1, size - 1) == b"\n":
            return
        content = os.pread(descriptor, size, 0)  # of all lines, once after a crash
        whole = content.rfind(b"\n") + 1
        try:
            json.loads(content[whole:])
        except ValueError:
            os.ftruncate(descriptor, whole)
        else:
            os.write(descriptor, b"\n")


class Records:
    """The records of a run, in a manifest and a table of statistics, each if asked for.

    Attributes:
        incomplete: a line of the manifest could not be written.

    Args:
        statistics: file of the table.
        manifest: file of the manifest.
        keep: whether a table that is there keeps its rows; a manifest always does.
        timer: with each case's seconds.
        provenance: what makes the label maps.

    Raises:
        ValueError: one of the files cannot be written or is something else; the message names its
            option.
    """

    def __init__(
        self,
        statistics: Path | None,
        manifest: Path | None,
        *,
        keep: bool,
        timer: PhaseTimer,
        provenance: Provenance,
    ) -> None:
        self.timer = timer
        self.provenance = provenance
        self.table = self.manifest = None
        self.incomplete = False
        try:
            option = f"--statistics {statistics}"
            if statistics:
                self.table = StatisticsTable(statistics, keep=keep)
            option = f"--manifest {manifest}"
            if manifest:
                self.manifest = Manifest(manifest)
        except (OSError, ValueError) as error:
            raise ValueError(f"{option}: {one_line(error)}") from error

    @cached_property
    def _offsets(self) -> dict[str, int]:
        return self.manifest.find(self.provenance.signature)

    def recorded(self, name: str) -> dict | None:
        """Return the record of a case whose label map by the run's signature is there.

        Returns:
            As the manifest has it; {} without a manifest; None if a record that was asked for is
            missing.
        """
        in_table = self.table is None or name in self.table
        if self.manifest is None:
            return {} if in_table else None
        offset = self._offsets.get(name)
        record = None if offset is None else self.manifest.read(offset)
        return record if record and (in_table or record.get("voxels")) else None

    def add(self, case: "Case") -> None:
        """Add a case that has ended; what cannot be written becomes one of its warnings."""
        known = self.recorded(case.name) if case.status == "kept" else None
        record = known
        if record is None:
            record = case_record(case, self.provenance, self.timer.seconds(case.name))
        # Of a label map that was only read, a row that is there has more flags than a new one.
        reread = case.status == "kept" and known is None
        has_row = reread and self.table and case.name in self.table
        files = [self.table] if self.table and record.get("voxels") and not has_row else []
        files += [self.manifest] if self.manifest and known is None else []
        for file in files:
            try:
                file.add(record)
            except (OSError, ValueError) as error:
                case.warnings.append(f"{file.path}: {one_line(error)}")
                self.incomplete = self.incomplete or file is self.manifest
        case.statistics, case.input_info = {}, {}  # of thousands, it adds up

    def close(self) -> None:
        """Write the rows that are not on disk yet.

        Raises:
            ValueError: the table cannot be written; the message names its option.
        """
        if self.table:
            try:
                self.table.write()
            except (OSError, ValueError) as error:
                raise ValueError(f"--statistics {self.table.path}: {one_line(error)}") from error
