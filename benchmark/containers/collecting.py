"""What a container left in its outputs folder, taken without trusting it.

A container owns its folder while it runs: a link there may lead to any file of the host, a pipe
makes whoever opens it wait, a file may be of any size. So nothing is opened through a link, nothing
but regular files is read, and no more than a limit of each.
"""

import contextlib
import os
import stat
import threading
from pathlib import Path
from typing import BinaryIO

LOG_BYTES = 16 << 20
"""Kept of what a container prints."""


class RefusedError(ValueError):
    """A file that is not taken; the message is the reason, in one line."""


def open_left_file(folder: Path, name: str, most_bytes: int) -> BinaryIO:
    """Open a regular file that lies in a folder itself.

    Args:
        folder: that the container wrote into.
        name: of the file, without any folder.
        most_bytes: that it may have.

    Raises:
        RefusedError: it is a link, not a regular file, or too large.
        FileNotFoundError: there is none.
        OSError: it cannot be opened.
    """
    parent = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        kind = os.stat(name, dir_fd=parent, follow_symlinks=False).st_mode
        if stat.S_ISLNK(kind):
            raise RefusedError(f"{name} is a link, which is not followed")
        if not stat.S_ISREG(kind):
            raise RefusedError(f"{name} is not a regular file")
        # Not to wait for a pipe, nor to follow a link, put there since.
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        descriptor = os.open(name, flags, dir_fd=parent)
    finally:
        os.close(parent)
    file = os.fdopen(descriptor, "rb")
    found = os.fstat(descriptor)
    if not stat.S_ISREG(found.st_mode):
        file.close()
        raise RefusedError(f"{name} is not a regular file")
    if found.st_size > most_bytes:
        file.close()
        raise RefusedError(f"{name} has {found.st_size / 1e6:,.0f} MB, more than it may")
    return file


def collect(folder: Path, name: str, target: Path, most_bytes: int) -> None:
    """Copy a file that a container left to a place of ours.

    Args:
        folder, name, most_bytes: as in `open_left_file`.
        target: path of the copy.

    Raises:
        RefusedError, FileNotFoundError, OSError: as `open_left_file`.
    """
    with open_left_file(folder, name, most_bytes) as file, target.open("xb") as copy:
        left = most_bytes  # it may grow while it is copied
        while left > 0 and (part := file.read(min(left, 1 << 20))):
            copy.write(part)
            left -= len(part)


class LogWriter(threading.Thread):
    """Writes what a process prints to a file, up to a size, and reads the rest away.

    Args:
        source: file descriptor of the pipe's end to read; closed at the end.
        path: of the log.
        most_bytes: kept; a last line then says that the rest was cut.
    """

    def __init__(self, source: int, path: Path, most_bytes: int = LOG_BYTES) -> None:
        super().__init__(daemon=True)
        self._source, self._path, self._most_bytes = source, path, most_bytes

    def run(self) -> None:
        """Read until nobody holds the pipe's other end any longer."""
        with os.fdopen(self._source, "rb", buffering=0) as source:
            with contextlib.suppress(OSError):  # a full disk must not make the container wait
                self._write(source)
            while source.read(1 << 16):
                pass

    def _write(self, source: BinaryIO) -> None:
        with self._path.open("wb", buffering=0) as log:
            left = self._most_bytes
            while part := source.read(1 << 16):
                if left < 0:
                    continue
                log.write(part[:left])
                left -= len(part)
                if left < 0:
                    log.write(b"\n[cut here: it printed more than is kept]\n")
