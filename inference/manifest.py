"""A run's manifest: a line of JSON for each case as it ends, which says what made its label map."""

import contextlib
import fcntl
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import nibabel
import numpy as np

from inference.files import flush_to_disk
from inference.labels import LABEL_NAMES
from inference.provenance import Provenance
from inference.volume import Volume

if TYPE_CHECKING:
    from inference.case import Case

_BEGIN = b'{"case": '
"""How every line of a manifest begins."""

_MADE = ("done", "kept")

_ABOUT = ("bytes", "sha256", "shape", "spacing_mm", "orientation", "device", "precision")


def describe_content(content: bytes) -> dict:
    """What a manifest says of a file's bytes; hashing them lets other threads run."""
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def describe_grid(volume: Volume) -> dict:
    """What a manifest says of a volume's grid, in the order of the file's own axes (i, j, k).

    Returns:
        `shape`; `spacing_mm`; `orientation`, where the axes run to, as nibabel's `aff2axcodes` says
        it; `voxel_ml`.
    """
    order = np.argsort(volume.disk_axes)
    return {
        "shape": [volume.voxels.shape[axis] for axis in order],
        "spacing_mm": [round(volume.spacing[axis], 6) for axis in order],
        "orientation": "".join(nibabel.aff2axcodes(volume.affine)),
        "voxel_ml": volume.voxel_ml,
    }


def manifest_line(case: "Case", provenance: Provenance, seconds: dict[str, float]) -> dict:
    """A case that has ended, as a manifest has it; JSON's types only.

    Args:
        case: with `Case.about` filled, as far as it was read.
        provenance: what made its label map.
        seconds: per stage of the case.
    """
    voxel_ml = case.about.get("voxel_ml")
    volumes = None
    if case.sizes is not None and voxel_ml:
        volumes = {
            name: round(int(case.sizes.kept[label]) * voxel_ml, 3)
            for label, name in enumerate(LABEL_NAMES)
            if label
        }
    flags = [
        {"flag": flag.name, "label": LABEL_NAMES[flag.label] if flag.label else None}
        | ({"detail": flag.detail} if flag.detail else {})
        for flag in case.flags
    ]
    return {
        "case": case.name,
        "status": case.status,
        "reason": case.reason or None,
        "input": str(case.path),
        **{name: case.about.get(name) for name in _ABOUT},
        "made_by": provenance.made_by,
        "weights": provenance.weights_names,
        "weights_sha256": provenance.digests,
        "versions": provenance.versions,
        "seconds": {stage: round(value, 4) for stage, value in seconds.items()},
        "volumes_ml": volumes,
        "flags": flags,
        "warnings": case.warnings,
    }


class Manifest:
    """A manifest that a run appends to, after the lines of runs before it.

    Each line is appended whole, by one write to a file opened with O_APPEND and locked meanwhile,
    so that several processes may share it on a file system that knows locks. A line that a machine
    left torn when it died is taken away before the next is written. Of several lines of a case the
    last one counts.

    Args:
        path: of the file, `.jsonl`.

    Raises:
        ValueError: the file holds something else.
        OSError: it cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._append(b"")

    def add(self, line: dict) -> None:
        """Append a line.

        Raises:
            OSError: the file cannot be written.
        """
        text = json.dumps(line, allow_nan=False)  # ASCII: a name of any bytes is kept
        self._append(text.encode() + b"\n")

    def made(self, maker: str) -> dict[str, dict]:
        """Return size and SHA-256 of the inputs whose last line says a label map by this maker.

        Raises:
            OSError: the file cannot be read.
        """
        found: dict[str, dict] = {}
        with self.path.open("rb") as file:
            for line in file:
                with contextlib.suppress(ValueError, KeyError, TypeError):
                    record = json.loads(line)
                    found.pop(record["case"], None)
                    if record["status"] in _MADE and record["made_by"] == maker:
                        input_info = {name: record.get(name) for name in ("bytes", "sha256")}
                        found[record["case"]] = input_info
        return found

    @contextlib.contextmanager
    def _locked(self) -> Iterator[int]:
        flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC
        descriptor = os.open(self.path, flags, 0o666)
        try:
            with contextlib.suppress(OSError):  # not every file system has locks
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield descriptor
        finally:
            os.close(descriptor)

    def _append(self, data: bytes) -> None:
        with self._locked() as descriptor:
            self._mend(descriptor)
            view = memoryview(data)
            while view:  # one write, unless the disk is full
                view = view[os.write(descriptor, view) :]
            if data:
                flush_to_disk(descriptor)

    def _mend(self, descriptor: int) -> None:
        """Take a torn last line away; a whole one that lacks its line end gets it.

        Raises:
            ValueError: the file is no manifest.
        """
        size = os.fstat(descriptor).st_size
        begin = os.pread(descriptor, len(_BEGIN), 0)
        if not _BEGIN.startswith(begin):
            raise ValueError("not a manifest: name another file")
        if size == 0 or os.pread(descriptor, 1, size - 1) == b"\n":
            return
        start, tail = size, b""
        while start and b"\n" not in tail:
            step = min(start, 1 << 16)
            start -= step
            tail = os.pread(descriptor, step, start) + tail
        whole = tail.rfind(b"\n") + 1
        try:
            json.loads(tail[whole:])
        except ValueError:
            os.ftruncate(descriptor, start + whole)
        else:
            os.write(descriptor, b"\n")
