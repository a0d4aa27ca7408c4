"""What a run knows of each case: one record, as a line of a manifest and as rows of a table."""

import argparse
import contextlib
import fcntl
import hashlib
import json
import os
from collections.abc import Iterator
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
    """Return a record's fields of a file's bytes; other threads run while they are hashed."""
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def grid_info(volume: Volume) -> dict:
    """Return `shape`, `spacing_mm` and `orientation` (as RAS) of the file's axes (i, j, k)."""
    order = np.argsort(volume.disk_axes)
    return {
        "shape": [volume.voxels.shape[axis] for axis in order],
        "spacing_mm": [round(volume.spacing[axis], 6) for axis in order],
        "orientation": "".join(nibabel.aff2axcodes(volume.affine)),
    }


def case_record(case: "Case", provenance: Provenance, seconds: dict[str, float]) -> dict:
    """Return the record of a case that has ended, of JSON's types, with the seconds per stage."""
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

    Raises:
        ValueError: the file is something else.
        OSError: it cannot be written; as of all methods.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        path.touch()  # so that what appends below finds a file: some mounts refuse that
        self._append(b"")

    def add(self, record: dict) -> None:
        """Append a record."""
        text = json.dumps(record, allow_nan=False)  # ASCII: a name of any bytes fits
        self._append(text.encode() + b"\n")

    def lines(self, signature: str) -> dict[str, bytes]:
        """Return, by case, its last label map's line if that is by a signature.

        Lines of failures are skipped: they leave the label map, which may be of another input of
        the same name, as it is.
        """
        found: dict[str, bytes] = {}
        with self.path.open("rb") as file:
            for line in file:
                with contextlib.suppress(ValueError, KeyError, TypeError):
                    record = json.loads(line)
                    if record["status"] in ("done", "kept"):  # "kept" by earlier versions
                        found.pop(record["case"], None)
                        if same_signature(record["made_by"], signature):
                            found[record["case"]] = line
        return found

    def _append(self, data: bytes) -> None:
        with self.path.open("a+b") as file:
            with contextlib.suppress(OSError):  # not every file system has locks
                fcntl.flock(file, fcntl.LOCK_EX)
            file.seek(0)
            if not _START.startswith(file.read(len(_START))):
                raise ValueError("not a manifest: name another file")
            size = file.seek(0, os.SEEK_END)
            if size and os.pread(file.fileno(), 1, size - 1) != b"\n":  # a torn line
                content = os.pread(file.fileno(), size, 0)  # of all lines, once after a crash
                file.truncate(content.rfind(b"\n") + 1)
            file.write(data)
            file.flush()
            if data:
                flush_to_disk(file.fileno())


class Records:
    """The records of a run, in a manifest and a table of statistics, each if asked for.

    Attributes:
        incomplete: a line of the manifest could not be written.

    Args:
        options: of `parse_arguments`: their files, and whether a table that is there keeps its
            rows; a manifest always does.
        timer: with each case's seconds.
        provenance: what makes the label maps.

    Raises:
        ValueError: one of the files cannot be written or is something else; the message names its
            option.
    """

    def __init__(
        self, options: argparse.Namespace, timer: PhaseTimer, provenance: Provenance
    ) -> None:
        self.timer, self.provenance = timer, provenance
        self.table: StatisticsTable | None = None
        self.manifest: Manifest | None = None
        self.incomplete = False
        if options.statistics:
            with _naming(f"--statistics {options.statistics}"):
                self.table = StatisticsTable(options.statistics, keep=options.keep_existing)
        if options.manifest:
            with _naming(f"--manifest {options.manifest}"):
                self.manifest = Manifest(options.manifest)

    @cached_property
    def _lines(self) -> dict[str, bytes]:
        return self.manifest.lines(self.provenance.signature) if self.manifest else {}

    def recorded(self, name: str) -> dict | None:
        """Return the record of a case whose label map by the run's signature is there.

        It is {} without a manifest, and None if a record that was asked for is missing.
        """
        in_table = self.table is None or name in self.table
        if self.manifest is None:
            return {} if in_table else None
        record = json.loads(self._lines.get(name, b"null"))
        return record if record and (in_table or record.get("voxels")) else None

    def add(self, case: "Case") -> None:
        """Add a case that has ended; what cannot be written becomes one of its warnings.

        Of a case that is skipped the table's rows are written anew from the manifest.
        """
        is_skipped = case.status == "kept"
        if is_skipped:
            record = self.recorded(case.name) or {}
        else:
            record = case_record(case, self.provenance, self.timer.seconds(case.name))
        files: list[StatisticsTable | Manifest] = []
        if self.table and record.get("voxels"):
            files.append(self.table)
        if self.manifest and not is_skipped:
            files.append(self.manifest)
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
            with _naming(f"--statistics {self.table.path}"):
                self.table.write()


@contextlib.contextmanager
def _naming(option: str) -> Iterator[None]:
    """Name the option whose file cannot be written or is something else."""
    try:
        yield
    except (OSError, ValueError) as error:
        raise ValueError(f"{option}: {one_line(error)}") from error
