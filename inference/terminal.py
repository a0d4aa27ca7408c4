"""What a person reads on a terminal: lines, warnings among them, and one line for wrong usage."""

import argparse
import os
import sys
from pathlib import Path
from typing import NoReturn, TextIO

from .files import printable

_YELLOW, _PLAIN = "\033[33m", "\033[0m"


def log(*lines: object, to: TextIO | None = None) -> None:
    """Print lines, made `printable`, unless the terminal is gone, which must not cost a run.

    Lines that begin with "warning:" are yellow on a terminal, unless NO_COLOR is set
    (no-color.org).
    """
    stream = to or sys.stderr
    try:
        wanted = not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
        colours = stream.isatty() and wanted
        for line in map(printable, lines):
            yellow = colours and line.startswith("warning:")
            print(f"{_YELLOW}{line}{_PLAIN}" if yellow else line, file=stream)
        stream.flush()
    except (OSError, ValueError):
        # The lines stay in the stream's buffer, and would fail whoever flushes it next.
        for name in ("stdout", "stderr"):
            if getattr(sys, name) is stream:
                setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: PTH123, SIM115


class Parser(argparse.ArgumentParser):
    """A command line that reports in one line what is wrong; `--help` has the usage."""

    def error(self, message: str) -> NoReturn:
        """Report wrong usage, or a file or folder that cannot be used, and exit with 2."""
        log(f"{self.prog}: error: {message}")
        raise SystemExit(2)


def existing(text: str) -> Path:
    """Read an option that names a file or folder which must be there."""
    path = Path(text)
    try:
        path.stat()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise argparse.ArgumentTypeError(f"{printable(text)}: {reason}") from error
    return path
