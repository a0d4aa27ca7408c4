"""What a container leaves: its label map, its log. Nothing of it is trusted.

A container owns its outputs folder while it runs: a link there may lead to any file of the host, a
pipe makes whoever opens it wait, a file may be of any size. So no link is followed, nothing but
regular files is read, and no more than a limit of each; and what a label map does to the libraries
that read it, to memory or to time, it does to a process of its own.
"""

import contextlib
import math
import multiprocessing
import os
import stat
import threading
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import BinaryIO

import nibabel
import numpy as np

from benchmark.processes import WorkerDiedError, in_processes
from benchmark.text import by
from inference.files import printable
from inference.labels import LABEL_NAMES
from inference.volume import VolumeError, read_header, read_volume

LOG_BYTES = 16 << 20
"""The most of what a container prints that is stored."""

_LOG_TAIL_BYTES = 16384
_HEADER_BYTES = 16 << 20  # of a label map beside its voxels
_MOST_ENTRIES = 1000  # of a folder, to report what is there instead
_AFFINE_TOLERANCE = 1e-3  # mm; what float32 headers and quaternions lose in copying is below

# Limits of the process that reads a label map: for the libraries and small volumes, and for each
# voxel as complex128 and half as much again; 20 times as many voxels a second are usual.
_BASE_BYTES, _BYTES_PER_VOXEL = 1 << 30, 24
_BASE_SECONDS, _VOXELS_PER_SECOND = 60.0, 2e6
_START = "forkserver"  # a fork of this process would take its threads' locks with it


class RefusedError(ValueError):
    """A file that is not taken; the message is the reason, in one line."""


@dataclass
class OutputCheck:
    """What is wrong with a case's output, one line for each problem."""

    found: bool  # the file is there under its name
    scorable: bool  # the official script can score it: readable and of the input's shape
    problems: list[str] = field(default_factory=list)
    aspects: list[str] = field(default_factory=list)  # "name", "file", "shape", "affine", "type" …
    valid: bool = field(init=False)  # found, and nothing is wrong with it

    def __post_init__(self) -> None:
        self.valid = self.found and not self.problems


def _unusable(problem: str, aspect: str = "file", *, found: bool = True) -> OutputCheck:
    return OutputCheck(found, False, [printable(problem)], [aspect])


def open_left_file(folder: Path, name: str, most_bytes: int) -> BinaryIO:
    """Open a regular file of a folder itself that a container wrote into.

    Raises:
        RefusedError: it is a link, not a regular file, or too large.
        OSError: there is none, or it cannot be opened.
    """
    parent = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        # Before it is opened, which would wake a device, and again after, for it may be replaced.
        _insist_on_a_file(os.stat(name, dir_fd=parent, follow_symlinks=False), name, most_bytes)
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        file = os.fdopen(os.open(name, flags, dir_fd=parent), "rb")
    finally:
        os.close(parent)
    try:
        _insist_on_a_file(os.fstat(file.fileno()), name, most_bytes)
    except RefusedError:
        file.close()
        raise
    return file


def _insist_on_a_file(found: os.stat_result, name: str, most_bytes: int) -> None:
    if stat.S_ISLNK(found.st_mode):
        raise RefusedError(f"{name} is a link, which is not followed")
    if not stat.S_ISREG(found.st_mode):
        raise RefusedError(f"{name} is not a regular file")
    if found.st_size > most_bytes:
        raise RefusedError(f"{name} has {found.st_size / 1e6:,.0f} MB, more than it may")


def take_output(outputs: Path, collected: Path, image: Path, size: tuple[int, ...]) -> OutputCheck:
    """Copy a case's label map out of the container's reach, and check the copy.

    `check_output` runs in a process of its own, with limits of memory and time by the voxels.

    Args:
        outputs: the folder that the container wrote into.
        collected: path of the copy, under the name that the label map must have.
        image, size: the input volume and its shape.
    """
    voxels = math.prod(max(1, length) for length in size)
    left = 9 * voxels + _HEADER_BYTES  # as float64 and hardly compressed it would be smaller
    try:
        with open_left_file(outputs, collected.name, left) as file, collected.open("xb") as copy:
            while left > 0 and (part := file.read(min(left, 1 << 20))):
                copy.write(part)
                left -= len(part)  # it may grow while it is copied
    except FileNotFoundError:
        others = sorted(
            str(other.relative_to(outputs))
            for other in islice(outputs.rglob("*"), _MOST_ENTRIES)
            if not other.is_symlink() and other.is_file() and not other.name.startswith(".")
        )
        found = f"found {', '.join(others[:5])} instead" if others else "the folder is empty"
        return _unusable(f"no {collected.name}: {found}", "name", found=False)
    except (RefusedError, OSError) as error:
        return _unusable(f"not taken: {error}", found=False)
    limit = _BASE_BYTES + _BYTES_PER_VOXEL * voxels
    seconds = _BASE_SECONDS + voxels / _VOXELS_PER_SECOND
    multiprocessing.set_forkserver_preload(["__main__", __name__])
    jobs = {collected: (collected, image)}
    [(_, result)] = in_processes(check_output, jobs, 1, start=_START, memory=limit, seconds=seconds)
    match result:
        case OutputCheck():
            return result
        case TimeoutError():
            return _unusable(f"reading it took {result}")
        case MemoryError():
            return _unusable(f"reading it takes more than {limit >> 20:,} MB")
        case WorkerDiedError():
            return _unusable(f"reading it ended the reader, which may take {limit >> 20:,} MB")
        case _:  # whatever a stranger's file does to the libraries
            return _unusable(f"reading it failed: {type(result).__name__}")


def check_output(path: Path, image: Path) -> OutputCheck:
    """Compare a label map with its input volume: shape, affine, type and labels.

    A label map of another shape is not unpacked: what it takes depends on the input alone.
    """
    expected = nibabel.Nifti1Image.from_filename(image).header
    try:
        shape = read_header(path).get_data_shape()
        if shape != expected.get_data_shape():
            wanted = by(expected.get_data_shape())
            return _unusable(f"shape {by(shape)}, the input has {wanted}", "shape")
        output = read_volume(path)
    except (VolumeError, OSError) as error:
        return _unusable(f"cannot be read: {error}")
    problems = []
    if not np.allclose(output.affine, expected.get_best_affine(), rtol=0, atol=_AFFINE_TOLERANCE):
        problems.append(("affine", "affine differs from the input's"))
    if output.voxels.dtype.kind not in "iu":
        problems.append(("type", f"stored as {output.voxels.dtype}, not as integers"))
    if (output.slope, output.intercept) != (1.0, 0.0):
        problems.append(("type", f"scaled by {output.slope:g} and {output.intercept:g}"))
    values = np.unique(np.concatenate([np.unique(part) for part in output.voxels]))
    unknown = np.setdiff1d(values * output.slope + output.intercept, range(len(LABEL_NAMES)))
    if unknown.size:
        shown = ", ".join(f"{value:g}" for value in unknown[:5]) + " …" * (unknown.size > 5)
        problems.append(("labels", f"values that are no label: {shown}"))
    return OutputCheck(True, True, [text for _, text in problems], [what for what, _ in problems])


class LogWriter(threading.Thread):
    """Writes what a process prints into `sink` to a file, up to a size, and reads the rest away."""

    def __init__(self, path: Path, most_bytes: int = LOG_BYTES) -> None:
        super().__init__(daemon=True)
        self._source, self.sink = os.pipe()
        self._path, self._most_bytes = path, most_bytes

    def start(self) -> None:
        """Close `sink` and read until it is closed everywhere."""
        os.close(self.sink)
        super().start()

    def run(self) -> None:
        """Read until the pipe's other end is closed."""
        with os.fdopen(self._source, "rb", buffering=0) as source:
            with contextlib.suppress(OSError):  # a full disk must not make the container wait
                left = self._most_bytes
                with self._path.open("wb", buffering=0) as log:
                    while left >= 0 and (part := source.read(1 << 16)):
                        log.write(part[:left])
                        left -= len(part)
                    if left < 0:
                        log.write(b"\n[cut here: it printed more than is stored]\n")
            while source.read(1 << 16):
                pass


def log_tail(path: Path) -> str:
    """Return the last of what a run printed; "" where the disk was too full for a log."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - _LOG_TAIL_BYTES))
            return file.read().decode(errors="replace")
    except OSError:
        return ""
